"""Each command: what it prints, and what it refuses."""

import json
import re
import shutil

import numpy as np
import pytest
from helpers import TINY
from helpers import command as _run

from flashlm_numba.heads import DenseHead
from flashlm_numba.kernels.ternary_gemm import gemm_variant
from flashlm_numba.kernels.ternary_gemv import best_variant
from flashlm_numba.model import checkpoint
from flashlm_numba.system.errors import UserError


def _settings(*settings):
    return [part for setting in (*TINY, *settings) for part in ("--set", setting)]


def test_eval_prints_one_json_object_and_agrees_with_itself(run, corpus, corpus_files):
    done = _run("eval", run, "--json", "--smoothed")
    assert done.exit_code == 0, done.output
    own = json.loads(done.stdout)
    lines = (corpus_files / "validation.jsonl").read_text()
    validation = [json.loads(line)["text"] for line in lines.splitlines()]
    assert own["bytes"] == sum(len(text.encode()) for text in validation)
    assert own["documents"] == len(validation)
    for data in (corpus, corpus_files, corpus_files / "validation.jsonl"):
        other = json.loads(_run("eval", run, data, "--json").stdout)
        assert other["nll"] == pytest.approx(own["nll"], abs=1e-6)
        assert (other["tokens"], other["bytes"]) == (own["tokens"], own["bytes"])
        assert other["smoothed_loss"] is None
    assert own["perplexity"] == pytest.approx(2.718281828 ** own["nll"])
    assert own["bits_per_byte"] == pytest.approx(own["nll"] * own["tokens"] / 0.6931471806 / own["bytes"])
    assert abs(own["smoothed_loss"] - own["nll"]) < 1
    averaged = json.loads(_run("eval", run, "--json", "--ema").stdout)
    assert averaged["ema"] is True
    assert averaged["nll"] != own["nll"]
    first = json.loads(_run("eval", run, "--json", "--checkpoint", "step-1").stdout)
    assert first["checkpoint_step"] == 1
    assert first["nll"] != own["nll"]


def test_eval_takes_a_source_as_prepare_does(run, tmp_path):
    (tmp_path / "some.txt").write_text("one two three\nfour five\n")
    (tmp_path / "some.jsonl").write_text('{"body": "one two three"}\n{"body": "four five"}\n')
    by_line, by_row = (
        json.loads(_run("eval", run, "--json", tmp_path / name, *words).stdout)
        for name, words in (("some.txt", ["--lines"]), ("some.jsonl", ["--column", "body"]))
    )
    assert by_line["documents"] == by_row["documents"] == 2
    assert by_line["nll"] == by_row["nll"]
    assert json.loads(_run("eval", run, "--json", tmp_path / "some.txt").stdout)["documents"] == 1
    assert "has no column text" in _run("eval", run, tmp_path / "some.jsonl").stderr


def test_eval_of_an_unfinished_folder_says_what_to_do(run, corpus, tmp_path):
    unfinished = tmp_path / "tokens"
    shutil.copytree(corpus, unfinished)
    (unfinished / "manifest.json").rename(unfinished / "progress.json")
    done = _run("eval", run, unfinished)
    assert done.exit_code == 1
    assert "is not finished: run the same `flashlm-numba prepare` command again" in done.stderr


def test_eval_in_words(run):
    done = _run("eval", run)
    assert done.exit_code == 0
    assert "nats per token" in done.stdout
    assert "bits per byte" in done.stdout


def test_info_counts_the_parameters(run):
    info = json.loads(_run("info", run, "--json").stdout)
    assert info["head"] == "tree"
    assert info["parameters"] == sum(info["parameters_by_group"].values())
    assert info["parameters_by_group"]["embedding"] == 50_257 * 16
    assert info["parameters_by_group"]["head"] == (info["tree"]["nodes"] - 1) * 16
    assert info["tree"]["tokens"] == 50_257
    assert info["trained"]["steps"] == 3
    words = _run("info", run)
    assert words.exit_code == 0
    assert re.search(r"running_average +no\n", words.stdout)
    assert f"{info['parameters']:,}" in words.stdout


def test_generate_repeats_itself_with_a_seed(run):
    texts = [
        _run(
            "generate",
            run,
            "--prompt",
            "Ünïcode 🙂",
            "--max-tokens",
            5,
            "--seed",
            1,
            "--top-k",
            9,
            "--top-p",
            0.9,
        )
        for _ in range(2)
    ]
    assert texts[0].exit_code == 0, texts[0].output
    assert texts[0].stdout == texts[1].stdout
    assert texts[0].stdout.startswith("Ünïcode 🙂")
    assert _run("generate", run, "--max-tokens", 3, "--temperature", 0).exit_code == 0


def test_generate_says_how_fast_it_was(run):
    done = _run("generate", run, "--max-tokens", 3, "--seed", 1, "--stats")
    assert done.exit_code == 0, done.output
    assert re.search(r"^3 tokens, [\d,]+ tokens/s after the first; peak memory [\d,]+ MB$", done.stderr, re.M)
    assert "tokens/s" not in done.stdout


def test_every_command_refuses_a_damaged_newest_checkpoint(run, tmp_path):
    damaged = tmp_path / "damaged"
    shutil.copytree(run, damaged)
    path = damaged / "checkpoints" / "step-3" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-4] + b"\0\1\2\3")
    for command in (
        ["eval", damaged],
        ["generate", damaged],
        ["info", damaged],
        ["train", "--resume", damaged],
    ):
        done = _run(*command)
        assert done.exit_code == 1
        assert "step-3 is damaged" in done.stderr
        assert "--checkpoint step-2" in done.stderr
    assert _run("info", damaged, "--checkpoint", "step-2").exit_code == 0


def test_every_command_refuses_weights_that_are_not_finite(run, tmp_path):
    damaged = tmp_path / "damaged"
    shutil.copytree(run, damaged)
    path = damaged / "checkpoints" / "step-3"
    state = checkpoint.load_state(path)
    rest = {key: value for key, value in state.items() if key not in ("files", "sha256")}
    files = {name: checkpoint.load(path, name) for name in ("model", "optimizer", "ema")}

    def spoil(file, tensor):
        arrays = {name: {key: value.copy() for key, value in values.items()} for name, values in files.items()}
        arrays[file][tensor].flat[7] = np.nan
        checkpoint.save(damaged, 3, arrays, rest)

    for file, tensor in (("optimizer", "exp_avg_sq.embedding.weight"), ("ema", "blocks.0.glu.up.weight")):
        spoil(file, tensor)
        done = _run("train", "--resume", damaged, "--steps", 4)
        assert done.exit_code == 1
        assert f"{tensor} in {path / file}.safetensors contains values that are not finite" in done.stderr
    spoil("model", "blocks.0.glu.up.weight")
    for command in (
        ["eval", damaged, "--json"],
        ["generate", damaged],
        ["info", damaged],
        ["train", "--resume", damaged],
    ):
        done = _run(*command, *(["--steps", 4] if "--resume" in command else []))
        assert done.exit_code == 1
        assert done.stdout == ""
        assert f"glu.up.weight in {path / 'model'}.safetensors contains values that are not finite" in done.stderr
        assert "use the last intact one with --checkpoint step-2" in done.stderr


def test_tokens_with_other_bytes_in_a_shard_are_refused(run, corpus, tmp_path):
    data, trained = tmp_path / "data", tmp_path / "trained"
    shutil.copytree(corpus, data)
    arguments = [data, "--steps", 1, "--threads", 1, *_settings()]
    assert _run("train", *arguments, "--out", trained).exit_code == 0
    for split in ("train", "validation"):
        path = data / f"{split}-00000.bin"
        whole = path.read_bytes()
        path.write_bytes(whole[:-4] + whole[-2:] + whole[-2:])
        commands = [["train", *arguments, "--out", tmp_path / "new"], ["train", "--resume", trained, "--steps", 2]]
        for command in [*commands, *([["eval", trained]] if split == "validation" else [])]:
            done = _run(*command)
            assert done.exit_code == 1, command
            assert f"{split}-00000.bin is damaged" in done.stderr
        path.write_bytes(whole)
    assert not (tmp_path / "new").exists()
    assert _run("train", "--resume", trained, "--steps", 2).exit_code == 0


def test_a_damaged_vocabulary_is_told_of_before_the_prompt(run, monkeypatch):
    monkeypatch.setattr("flashlm_numba.data.gpt2._encoding", lambda: (_ for _ in ()).throw(UserError("It is damaged.")))
    done = _run("generate", run, "--prompt", "The people")
    assert done.exit_code == 1
    assert done.stdout == ""
    assert "It is damaged." in done.stderr


def test_a_folder_with_something_in_it_is_no_place_for_a_run(corpus, tmp_path):
    (tmp_path / "runs" / "first").mkdir(parents=True)
    done = _run("train", corpus, "--steps", 1, "--out", tmp_path / "runs")
    assert done.exit_code == 1
    assert "runs is not empty (it holds first); choose another --out" in done.stderr.replace("\n", "")
    assert list((tmp_path / "runs").iterdir()) == [tmp_path / "runs" / "first"]


def test_what_a_token_costs_is_said_only_where_its_counts_are_known(run, tmp_path):
    assert json.loads(_run("info", run, "--json").stdout)["tree"]["expected_path_cost"] > 1
    assert _run("export", run, tmp_path / "file.safetensors").exit_code == 0
    found = json.loads(_run("info", tmp_path / "file.safetensors", "--json").stdout)["tree"]
    assert found["nodes"] >= 1
    assert not any(name.startswith("expected") for name in found)


def test_resume_from_the_command_line(run, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    done = _run("train", "--resume", copy, "--steps", 5)
    assert done.exit_code == 0, done.output
    assert "Resuming from step 3 of 5" in done.stderr
    assert json.loads((copy / "metrics.jsonl").read_text().splitlines()[-1])["step"] == 5


def test_prepare_from_the_command_line(corpus_files, tmp_path):
    done = _run("prepare", corpus_files, "--out", tmp_path, "--max-docs", 4)
    assert done.exit_code == 0, done.output
    assert "4 documents" in done.stdout


def test_int8_activations_score_and_write_nearly_as_float_ones(run):
    scores = {}
    for kind in ("float", "int8"):
        done = _run("eval", run, "--json", "--activations", kind)
        assert done.exit_code == 0, done.output
        scores[kind] = json.loads(done.stdout)
        assert scores[kind]["activations"] == kind
        assert _run("generate", run, "--max-tokens", 5, "--seed", 1, "--activations", kind).exit_code == 0
    assert scores["int8"]["nll"] != scores["float"]["nll"]
    assert scores["int8"]["nll"] == pytest.approx(scores["float"]["nll"], abs=0.02)


def test_int8_rows_are_for_the_dense_head(run, corpus, tmp_path, monkeypatch):
    done = _run("generate", run, "--int8-head")
    assert done.exit_code == 2
    assert "--int8-head is for the dense head, but" in done.stderr
    dense = tmp_path / "dense"
    assert _run("train", corpus, "--head", "dense", "--out", dense, "--steps", 1, *_settings()).exit_code == 0
    used = []
    right = DenseHead.use_int8
    monkeypatch.setattr(DenseHead, "use_int8", lambda self: (used.append(1), right(self)))
    greedy = [
        _run("generate", dense, "--max-tokens", 12, "--temperature", 0, *options).stdout
        for options in ((), ("--int8-head",))
    ]
    assert greedy[0] == greedy[1]
    assert greedy[0].strip()
    assert used == [1]
    done = _run("generate", dense, "--int8-head", "--top-p", 0.9)
    assert done.exit_code == 2
    assert "give --top-k too" in done.stderr


def test_a_forced_variant_that_this_machine_lacks_is_one_sentence(run, monkeypatch):
    best_variant.cache_clear()
    gemm_variant.cache_clear()
    monkeypatch.setenv("FLASHLM_NUMBA_TERNARY", "sse9")
    done = _run("eval", run, "--activations", "int8")
    best_variant.cache_clear()
    gemm_variant.cache_clear()
    assert done.exit_code == 1
    assert "FLASHLM_NUMBA_TERNARY must be one of plain" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_folders_of_another_kind_are_refused(run, corpus, corpus_files, tmp_path):
    done = _run("prepare", corpus_files, "--out", run)
    assert done.exit_code == 1
    assert "holds a run; choose another folder for the tokens" in done.stderr
    done = _run("train", corpus, "--out", corpus, "--steps", 1, *_settings())
    assert done.exit_code == 1
    assert "holds prepared tokens; choose another --out" in done.stderr
    (tmp_path / "a.txt").write_text("some text " * 50)
    done = _run("prepare", tmp_path, "--out", tmp_path)
    assert done.exit_code == 1
    assert "contains the documents (a.txt)" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]
    assert "is a run, not a text" in _run("eval", run, run).stderr
    assert "is a file, not a run" in _run("train", "--resume", tmp_path / "a.txt").stderr
    done = _run("prepare", corpus_files, "--out", tmp_path / "t", "--split", "train", "--validation", corpus_files)
    assert done.exit_code == 1
    assert "leave out one of the two" in done.stderr


def test_settings_that_the_weights_were_not_trained_with_are_refused(run, tmp_path):
    """A tree's rows read as a dense head's would score, and mean nothing."""
    changed = tmp_path / "changed"
    shutil.copytree(run, changed)
    text = (changed / "config.json").read_text()
    for old, new in (('"name": "tree"', '"name": "dense"'), ('"n_passes": 2', '"n_passes": 3')):
        assert old in text
        (changed / "config.json").write_text(text.replace(old, new))
        for command in (
            ["eval", changed],
            ["generate", changed],
            ["info", changed],
            ["train", "--resume", changed, "--steps", 9],
        ):
            done = _run(*command)
            assert done.exit_code == 1
            assert "The model settings in config.json are not the ones that" in done.stderr
    (changed / "config.json").write_text(text)
    assert _run("info", changed).exit_code == 0
