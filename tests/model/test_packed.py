"""A model in one file: packing without loss, the same NLL and text as the run, and files that are refused."""

import base64
import json
import os
import shutil
import stat
import zlib

import numpy as np
import pytest
from helpers import command as _run
from hypothesis import given
from hypothesis import strategies as st

from flashlm_numba.inference.evaluate import token_nll
from flashlm_numba.model import packed
from flashlm_numba.model.build import load_model
from flashlm_numba.model.parameters import EMBEDDING, ternary_names
from flashlm_numba.model.rounded_rows import round_rows, rows_bytes, widen_rows
from flashlm_numba.model.settings import run_from_json
from flashlm_numba.system.errors import UserError


@given(st.integers(0, 2**32 - 1), st.integers(0, 5), st.sampled_from([0, 1, 4, 5, 6, 683]))
def test_base_3_loses_nothing(seed, rows, columns):
    weight = np.random.default_rng(seed).integers(-1, 2, (rows, columns)).astype(np.float32)
    stored = packed.pack_base3(weight)
    assert stored.shape == (rows, -(-columns // 5))
    np.testing.assert_array_equal(packed.unpack_base3(stored, columns), weight)


def test_base_3_refuses_what_it_cannot_have_written():
    with pytest.raises(ValueError, match="-1, 0 and \\+1;"):
        packed.pack_base3(np.array([[0.5]]))
    with pytest.raises(ValueError, match="no byte can be above 242, got 243"):
        packed.unpack_base3(np.array([[243]], np.uint8), 5)
    with pytest.raises(ValueError, match="6 columns take 2 bytes per row"):
        packed.unpack_base3(np.zeros((1, 1), np.uint8), 6)


@pytest.fixture(scope="module")
def exported(run, tmp_path_factory):
    path = tmp_path_factory.mktemp("exported") / "model.safetensors"
    done = _run("export", run, path, "--rows", "float")
    assert done.exit_code == 0, done.output
    assert f"{path.stat().st_size / 1e6:,.1f} MB with float rows" in done.output
    return path


@pytest.mark.parametrize("rows", ["int8", "int4"])
def test_a_file_names_its_arithmetic_and_computes_with_it(run, exported, corpus, tmp_path, rows):
    """Rounded rows change the scores, exactly as they do in a model whose rows are rounded in memory."""
    path = tmp_path / "model.safetensors"
    arguments = [] if rows == "int8" else ["--rows", rows]  # int8 is the default
    assert _run("export", run, path, *arguments).exit_code == 0
    loaded, own = load_model(path), load_model(run)
    assert loaded.state["rows"] == json.loads(_run("info", path, "--json").stdout)["rows"] == rows
    weight = own.model.parameters[EMBEDDING]
    rounded = widen_rows(*round_rows(weight, rows), weight.shape[1], rows)
    assert not np.array_equal(rounded, weight)
    np.testing.assert_array_equal(loaded.model.parameters[EMBEDDING], rounded)
    weight[...] = rounded
    own.model.sync_weights()
    ids = np.arange(40, dtype=np.int32)
    np.testing.assert_array_equal(token_nll(loaded.model, ids, eot=50256), token_nll(own.model, ids, eot=50256))
    scores = [json.loads(_run("eval", model, corpus, "--json").stdout) for model in (path, exported)]
    assert [score["rows"] for score in scores] == [rows, "float"]
    nll = [score["nll"] for score in scores]
    assert nll[0] == pytest.approx(nll[1], abs=0.05 if rows == "int8" else 0.5)
    assert nll[0] != nll[1]
    saved = weight.nbytes - rows_bytes(*weight.shape, rows)
    assert exported.stat().st_size - path.stat().st_size == pytest.approx(saved, rel=0.01)


def test_without_another_arithmetic_a_model_computes_as_in_training(run, exported):
    own, other = load_model(run), load_model(exported)
    assert other.state["rows"] == "float"
    assert other.run.model == own.run.model
    ids = np.arange(40, dtype=np.int32)[None]
    np.testing.assert_array_equal(other.model.forward(ids), own.model.forward(ids))


def test_an_unknown_arithmetic_is_refused(exported, tmp_path):
    config, tensors, state, tokenizer = packed.read(exported)
    ternary = ternary_names(run_from_json(config).model)
    path = tmp_path / "model.safetensors"
    packed.write(path, tensors, ternary, config, state, tokenizer, "float")
    text = path.read_bytes()
    at = text.index(b'rows\\": \\"float')
    path.write_bytes(text[:at] + text[at:].replace(b"float", b"int99", 1))
    with pytest.raises(UserError, match="do not match its SHA-256"):
        packed.read(path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packed, "_digest", lambda *texts: json.loads(_header(path))["__metadata__"]["sha256"])
        with pytest.raises(UserError, match="the arithmetic of its rows is 'int99'"):
            packed.read(path)


def _header(path):
    data = path.read_bytes()
    return data[8 : 8 + int.from_bytes(data[:8], "little")]


def test_weights_that_cannot_be_rounded_are_refused(exported, tmp_path):
    config, tensors, state, tokenizer = packed.read(exported)
    tensors[EMBEDDING][0, 0] = 1e9
    with pytest.raises(UserError, match=r"cannot be rounded to int8 .*; export it with --rows float"):
        packed.write(
            tmp_path / "x", tensors, ternary_names(run_from_json(config).model), config, state, tokenizer, "int8"
        )
    assert not list(tmp_path.iterdir())


def test_an_exported_model_scores_and_writes_as_the_run_does(run, exported, corpus):
    own, other = (json.loads(_run("eval", model, corpus, "--json").stdout) for model in (run, exported))
    assert own == other
    texts = [
        _run("generate", model, "--prompt", "The people", "--max-tokens", 30, "--seed", 3).stdout
        for model in (run, exported)
    ]
    assert texts[0] == texts[1]
    infos = [json.loads(_run("info", model, "--json").stdout) for model in (run, exported)]
    for key in ("parameters", "parameters_by_group", "recipe", "receptive_field", "trained"):
        assert infos[0][key] == infos[1][key]
    assert infos[1]["bytes"]["exported"] == exported.stat().st_size < infos[0]["bytes"]["checkpoint"]
    assert infos[1]["peak_memory_mb"] > 0


def test_an_exported_model_tells_nothing_of_where_it_was_made(run, corpus, exported, tmp_path):
    assert str(corpus).encode() not in exported.read_bytes()
    copy, config = tmp_path / "run", json.loads((run / "config.json").read_text())
    shutil.copytree(run, copy)
    config["training"]["embedding_init"] = "/home/somebody/secret/gpt2.safetensors"
    (copy / "config.json").write_text(json.dumps(config))
    path = tmp_path / "model.safetensors"
    assert _run("export", copy, path).exit_code == 0
    assert path.read_bytes().count(b"somebody/secret") == 0
    done = _run("eval", exported)
    assert done.exit_code == 1
    assert "does not say where its text is; name the text to score" in done.stderr


def test_two_exports_of_a_run_are_the_same_bytes(run, exported, tmp_path):
    again = tmp_path / "again.safetensors"
    assert _run("export", run, again, "--rows", "float").exit_code == 0
    assert again.read_bytes() == exported.read_bytes()


def test_the_running_average_can_be_exported(run, corpus, tmp_path):
    path = tmp_path / "ema.safetensors"
    assert _run("export", run, path, "--ema", "--rows", "float").exit_code == 0
    own, other, plain = (
        json.loads(_run("eval", *arguments, "--json").stdout)
        for arguments in ((run, corpus, "--ema"), (path, corpus), (run, corpus))
    )
    assert own == other
    assert own["ema"]
    assert own["nll"] != plain["nll"]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["export", "RUN", "FILE"], "already exists; choose another file"),
        (["export", "FILE", "NEW"], "is already exported; give the folder of a run"),
        (["export", "RUN", "NEW", "--checkpoint", "step-9"], "it has step-1, step-2, step-3."),
        (["export", "RUN", f"{__file__}/x"], "could not be written"),
        (["eval", "FILE", "--checkpoint", "step-1"], "holds one model; leave out --checkpoint and --ema"),
        (["generate", "FILE", "--ema"], "holds one model"),
        (["train", "--resume", "FILE"], "is a file, not a run"),
    ],
)
def test_mistakes_are_one_sentence(run, exported, tmp_path, arguments, sentence):
    names = {"RUN": run, "FILE": exported, "NEW": tmp_path / "new.safetensors"}
    done = _run(*(names.get(argument, argument) for argument in arguments))
    assert done.exit_code == 1
    assert sentence in done.stderr
    assert "Traceback" not in done.output
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("damage", ["cut", "flip", "header", "empty", "text", "other"])
def test_a_damaged_file_is_refused(exported, tmp_path, damage):
    path, data = tmp_path / "model.safetensors", bytearray(exported.read_bytes())
    if damage == "cut":
        data = data[: len(data) // 2]
    elif damage == "flip":
        data[-1000] ^= 1
    elif damage == "header":
        data[:8] = (2**60).to_bytes(8, "little")
    elif damage == "empty":
        data = b""
    elif damage == "text":
        data = b"once upon a time"
    path.write_bytes(data)
    if damage == "other":
        from safetensors.numpy import save_file

        save_file({"x": np.zeros(3)}, path)
    for command in ("info", "generate", "eval"):
        done = _run(command, path)
        assert done.exit_code == 1
        assert str(path) in done.stderr
        assert len(done.stderr.splitlines()) == 1
        assert "Traceback" not in done.output


def test_settings_that_do_not_fit_the_tensors_are_refused(exported, tmp_path):
    config, tensors, state, tokenizer = packed.read(exported)
    ternary = ternary_names(run_from_json(config).model)
    wrong = json.loads(config)
    wrong["model"]["dim"] *= 2
    path = tmp_path / "wrong.safetensors"
    packed.write(path, tensors, ternary, json.dumps(wrong), state, tokenizer, "float")
    with pytest.raises(UserError, match="do not fit the stored settings"):
        load_model(path)


def test_a_full_disk_leaves_no_half_file(exported, tmp_path, monkeypatch):
    config, tensors, state, tokenizer = packed.read(exported)
    ternary = ternary_names(run_from_json(config).model)

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(packed.os, "fsync", full)
    with pytest.raises(UserError, match=r"could not be written.*No space left on device; choose another file"):
        packed.write(tmp_path / "model.safetensors", tensors, ternary, config, state, tokenizer, "int8")
    assert not list(tmp_path.iterdir())


def test_the_tokenizer_in_the_metadata_is_what_the_page_says(run, exported):
    """docs/vocabulary.md shows how to read it."""
    text = json.loads(_header(exported))["__metadata__"]["tokenizer"]
    assert zlib.decompress(base64.b64decode(text)) == (run / "tokenizer.json").read_bytes()


def test_a_tokenizer_that_is_cut_or_endless_is_refused(monkeypatch):
    whole = packed._compressed("x" * 5_000)
    assert packed.decompressed(whole) == "x" * 5_000
    cut = base64.b64encode(base64.b64decode(whole)[:-4]).decode()
    monkeypatch.setattr(packed, "MOST_TEXT", 4_999)
    for text, why in (
        (cut, "is cut"),
        (whole, "has over 4,999 bytes"),
        ("AAAA", "cannot be decompressed"),
        ("é", "ASCII"),
    ):
        with pytest.raises(ValueError, match=why):
            packed.decompressed(text)


@pytest.mark.skipif(os.name != "posix", reason="needs POSIX permissions")
def test_a_file_may_be_read_by_those_who_may_read_any_new_file(run, tmp_path):
    before = os.umask(0o022)
    try:
        assert _run("export", run, tmp_path / "one.safetensors").exit_code == 0
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "one.safetensors").stat().st_mode) == 0o644
