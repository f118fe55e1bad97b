"""A model as a folder for the Hugging Face hub: what it holds, that every command reads it, and what is refused."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tokenizers
from helpers import TINY, command
from huggingface_hub import ModelCard
from hypothesis import given
from hypothesis import strategies as st

import flashlm_numba as fl
from flashlm_numba.cli.main import main
from flashlm_numba.data.documents import without_surrogates
from flashlm_numba.data.vocabularies import vocabulary_named
from flashlm_numba.model.hub_folder import FILES
from flashlm_numba.model.model_card import licence_of
from flashlm_numba.model.packed_model import PackedModel
from flashlm_numba.model.packed_reading import load_for_generation
from flashlm_numba.serving.served import load_served, name_of


def export(run, out, *more):
    done = command("export", run, "--hub", out, *more)
    assert done.exit_code == 0, done.output
    return out


@pytest.fixture(scope="module")
def folder(run, tmp_path_factory):
    """The run's model with the numbers of the run."""
    return export(run, tmp_path_factory.mktemp("hub") / "tiny", "--rows", "float")


@pytest.fixture
def copy(folder, tmp_path):
    """A folder to damage."""
    return Path(shutil.copytree(folder, tmp_path / "copy"))


def refused(path, sentence):
    """Every command refuses the model with one sentence."""
    for words in (["eval", path], ["generate", path], ["info", path]):
        done = command(*words)
        assert done.exit_code == 1, done.output
        assert done.stdout == ""
        assert sentence in done.stderr
        assert len(done.stderr.splitlines()) == 1


# --- what is in it ---


def test_the_folder_holds_the_file_of_export_and_what_describes_it(run, folder, tmp_path):
    assert {path.name for path in folder.iterdir()} == set(FILES)
    assert command("export", run, tmp_path / "one.safetensors", "--rows", "float").exit_code == 0
    assert (folder / "model.safetensors").read_bytes() == (tmp_path / "one.safetensors").read_bytes()
    config = json.loads((folder / "config.json").read_text())
    assert (config["model_type"], config["rows"]) == ("flashlm-numba", "float")
    assert (config["vocab_size"], config["eos_token_id"], config["hidden_size"]) == (50_257, 50_256, 16)
    assert config["settings"]["model"]["dilations"] == [1, 2]
    assert (folder / "tokenizer.json").read_bytes() == (run / "tokenizer.json").read_bytes()


@pytest.mark.skipif(shutil.which("sha256sum") is None, reason="needs sha256sum")
def test_sha256sum_accepts_the_checksums_of_all_other_files(folder):
    words = ["sha256sum", "--strict", "-c", "SHA256SUMS"]
    done = subprocess.run(
        words, cwd=folder, capture_output=True, text=True, check=True, env=os.environ | {"LC_ALL": "C"}
    )
    assert done.stdout.splitlines() == [f"{name}: OK" for name in sorted(set(FILES) - {"SHA256SUMS"})]


def test_generation_config_says_what_generate_does_by_default(folder):
    config = json.loads((folder / "generation_config.json").read_text())
    defaults = {option.name: option.default for option in main.commands["generate"].params}
    assert config["temperature"] == defaults["temperature"]
    assert config["max_new_tokens"] == defaults["max_tokens"]
    assert (config["top_k"], config["top_p"]) == (0, 1.0)  # off, in the terms of other programs
    assert not isinstance(defaults["top_k"], int)
    assert not isinstance(defaults["top_p"], float)


GPT2 = vocabulary_named("gpt2")


@pytest.fixture(scope="module")
def library(folder):
    return tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))


@given(st.text(max_size=200))
def test_tokenizers_reads_the_vocabulary_and_gives_the_same_ids(library, text):
    assert library.encode(without_surrogates(text)).ids == GPT2.encode(text)


def test_the_end_of_text_has_its_id_in_tokenizers_too(library):
    assert library.token_to_id("<|endoftext|>") == GPT2.eot
    assert library.get_vocab_size() == GPT2.size


def test_nothing_in_the_folder_names_a_folder_of_this_machine(run, corpus, corpus_files, folder):
    for path in folder.iterdir():
        data = path.read_bytes()
        for secret in (run, corpus, corpus_files, Path.home(), Path.cwd()):
            assert str(secret).encode() not in data, (path.name, secret)
    assert corpus_files.name.encode() in (folder / "README.md").read_bytes()  # the text's last name alone


def test_the_card_has_the_facts_of_the_run(run, corpus, folder):
    card = ModelCard.load(folder / "README.md")
    data = card.data.to_dict()
    assert (data["license"], data["library_name"]) == ("unknown", "flashlm-numba")
    assert data["pipeline_tag"] == "text-generation"
    assert "language" not in data
    scores = json.loads(command("eval", folder, corpus, "--json").stdout)
    found = {result.metric_type: result.metric_value for result in card.data.eval_results}
    assert found == {key: round(scores[key], 4) for key in ("bits_per_byte", "nll")}
    info = json.loads(command("info", folder, "--json").stdout)
    for fact in (
        f"{info['parameters']:,} parameters",
        f"| NLL | {scores['nll']:.4f} nats per token |",
        f"| bits per byte | {scores['bits_per_byte']:.4f} |",
        "| output head | tree |",
        "| steps | 3 |",
        f"| tokens read | {info['trained']['tokens']:,} |",
        "flashlm-numba generate hf:USER/tiny",
        *(f"| parameters: {part} | {size:,} |" for part, size in info["parameters_by_group"].items()),
    ):
        assert fact in card.text, fact


def test_a_card_without_the_training_text_leaves_out_what_is_unknown(run, corpus, tmp_path):
    moved = Path(shutil.copytree(run, tmp_path / "moved"))
    config = json.loads((moved / "config.json").read_text())
    config |= {"data": "/nowhere/secret", "data_absolute": "/nowhere/secret"}
    (moved / "config.json").write_text(json.dumps(config))
    out = export(moved, tmp_path / "out", "--license", "Apache-2.0")
    card = ModelCard.load(out / "README.md")
    assert card.data.license == "apache-2.0"
    assert not card.data.eval_results
    assert "## Evaluation" not in card.text
    assert "| text |" not in card.text
    assert "| steps | 3 |" in card.text
    assert all(b"/nowhere/secret" not in path.read_bytes() for path in out.iterdir())


def test_tokens_that_have_moved_can_be_named(run, corpus, tmp_path):
    moved, tokens = Path(shutil.copytree(run, tmp_path / "moved")), Path(shutil.copytree(corpus, tmp_path / "tokens"))
    config = json.loads((moved / "config.json").read_text()) | {"data": "", "data_absolute": ""}
    (moved / "config.json").write_text(json.dumps(config))
    out = export(moved, tmp_path / "out", "--data", tokens)
    assert "## Evaluation" in (out / "README.md").read_text()
    done = command("export", moved, "--hub", tmp_path / "other", "--data", tmp_path)
    assert done.exit_code == 1
    assert f"{tmp_path} does not hold the tokens that {moved} was trained on" in done.stderr
    path = tokens / "validation-00000.bin"
    path.write_bytes(path.read_bytes()[:-4] + b"\0" * 4)
    done = command("export", moved, "--hub", tmp_path / "third", "--data", tokens)
    assert done.exit_code == 0, done.output
    assert f"The model card has no scores: {path} is damaged" in done.stderr
    assert "## Evaluation" not in (tmp_path / "third" / "README.md").read_text()


class Text:
    def __init__(self, licence):
        self.licence = licence


class WithLicence:
    def __init__(self, chosen, of_text):
        self.licence, self.text = chosen, Text(of_text)


@pytest.mark.parametrize(
    ("chosen", "of_text", "expected"),
    [
        (None, None, {"license": "unknown"}),
        (None, "odc-by", {"license": "odc-by"}),
        ("mit", "odc-by", {"license": "mit"}),
        (None, "public domain (works)", {"license": "other", "license_name": "public-domain-works"}),
    ],
)
def test_the_licence_is_the_chosen_one_or_that_of_the_text(chosen, of_text, expected):
    assert licence_of(WithLicence(chosen, of_text)) == expected


# --- reading it ---


def test_every_command_takes_the_folder_as_it_takes_the_run(run, corpus, folder, tmp_path):
    scores = [json.loads(command("eval", model, corpus, "--json").stdout) for model in (run, folder)]
    assert scores[0] == scores[1]
    words = ["--prompt", "The people", "--max-tokens", 30, "--seed", 3]
    assert command("generate", run, *words).stdout == command("generate", folder, *words).stdout
    assert fl.load(run).generate(max_tokens=9, seed=1) == fl.load(folder).generate(max_tokens=9, seed=1)
    assert load_served(folder, progress=fl.Progress()).name == "tiny"
    settings = ["--set", "phases=2x16", "--set", "validate_every=0", "--set", "sample_tokens=0"]
    done = command("train", corpus, "--init", folder, "--steps", 1, "--out", tmp_path / "more", *settings)
    assert done.exit_code == 0, done.output
    assert json.loads((tmp_path / "more" / "config.json").read_text())["init"] == str(folder / "model.safetensors")


def test_rounded_rows_are_those_of_the_exported_file(run, corpus, tmp_path):
    out = export(run, tmp_path / "int8")
    assert command("export", run, tmp_path / "one.safetensors").exit_code == 0
    scores = [
        json.loads(command("eval", model, corpus, "--json").stdout) for model in (out, tmp_path / "one.safetensors")
    ]
    assert scores[0] == scores[1]
    assert scores[0]["rows"] == "int8"
    assert "| embedding's rows | int8" in (out / "README.md").read_text()


def test_a_run_that_holds_its_export_stays_a_run(run, tmp_path):
    copied = Path(shutil.copytree(run, tmp_path / "run"))
    assert command("export", copied, copied / "model.safetensors").exit_code == 0
    assert json.loads(command("info", copied, "--json").stdout)["checkpoint"] == "step-3"
    assert command("train", "--resume", copied, "--steps", 4).exit_code == 0


def test_a_matmul_free_lm_is_read_packed(corpus, tmp_path):
    small = ["--set", "dim=16", "--set", "ffn_dim=24", "--set", "n_blocks=1", "--set", "phases=2x16"]
    small += ["--set", "sample_tokens=0", "--set", "validate_every=0"]
    done = command("train", corpus, "--recipe", "mmf", "--steps", 1, "--out", tmp_path / "run", *small)
    assert done.exit_code == 0, done.output
    out = export(tmp_path / "run", tmp_path / "out")
    assert json.loads((out / "config.json").read_text())["architectures"] == ["MatMulFreeLM"]
    assert "| context | the whole text |" in (out / "README.md").read_text()
    model, _ = load_for_generation(out, uses=["generate"], progress=fl.Progress())
    assert isinstance(model, PackedModel)
    words = ["--prompt", "The people", "--max-tokens", 9, "--seed", 3]
    assert command("export", tmp_path / "run", tmp_path / "one.safetensors").exit_code == 0
    assert command("generate", out, *words).stdout == command("generate", tmp_path / "one.safetensors", *words).stdout


def test_the_names_of_a_served_model():
    assert name_of(Path("hf:somebody/tiny@v1")) == "tiny"
    assert name_of(Path("shared/tiny")) == "tiny"


def test_a_memory_goes_along_or_not(corpus, tmp_path):
    settings = [part for setting in TINY for part in ("--set", setting)]
    run = tmp_path / "run"
    done = command("train", corpus, "--memory", "ngrams", "--steps", 2, "--out", run, *settings)
    assert done.exit_code == 0, done.output
    whole, alone = export(run, tmp_path / "whole"), export(run, tmp_path / "alone", "--no-memory")
    assert json.loads(command("info", whole, "--json").stdout)["memory"]["ngrams"] > 0
    assert "n-grams of up to 5 tokens |" in (whole / "README.md").read_text()
    assert json.loads(command("info", alone, "--json").stdout)["memory"] is None
    assert "n-grams" not in (alone / "README.md").read_text()


@pytest.mark.parametrize("name", sorted(set(FILES) - {"SHA256SUMS"}))
@pytest.mark.parametrize("damage", ["cut", "flip", "missing"])
def test_a_damaged_file_is_refused_by_its_name(copy, name, damage):
    path = copy / name
    data = bytearray(path.read_bytes())
    if damage == "missing":
        path.unlink()
    else:
        data[len(data) // 2] ^= 1
        path.write_bytes(data[: len(data) // 2] if damage == "cut" else data)
    sentence = "is missing, though" if damage == "missing" else "is damaged: it does not match its SHA-256"
    refused(copy, f"{path} {sentence}")


@pytest.mark.parametrize("text", ["", "once upon a time\n", f"{'0' * 64}  ../model.safetensors\n"])
def test_damaged_checksums_are_refused(copy, text):
    (copy / "SHA256SUMS").write_text(text)
    refused(copy, f"{copy / 'SHA256SUMS'} is damaged: it is no list of SHA-256 and names")


def test_a_folder_of_others_needs_no_checksums_and_no_other_file(folder, copy):
    (copy / "SHA256SUMS").unlink()
    (copy / "notes.txt").write_text("mine")
    assert command("generate", copy, "--seed", 1).stdout == command("generate", folder, "--seed", 1).stdout
    for name in set(FILES) - {"SHA256SUMS", "model.safetensors"}:
        (copy / name).unlink()
    assert command("generate", copy, "--seed", 1).stdout == command("generate", folder, "--seed", 1).stdout


def test_without_checksums_the_files_must_still_belong_together(copy, tmp_path):
    (copy / "SHA256SUMS").unlink()
    whole = (copy / "config.json").read_text()
    config = json.loads(whole)
    config["settings"]["seed"] += 1
    for text, sentence in (
        (json.dumps(config), "config.json has other settings than model.safetensors beside it"),
        (json.dumps({"model_type": "llama"}), "has the model_type 'llama', which is no model of this program"),
        (json.dumps({"model_type": "hgrn_bit"}), f"import it with `flashlm-numba import {copy} FILE`"),
        (json.dumps([1]), "has the model_type None"),
        ("{", "config.json is not JSON"),
    ):
        (copy / "config.json").write_text(text)
        refused(copy, sentence)
    (copy / "config.json").write_text(whole)
    (copy / "tokenizer.json").write_text(vocabulary_named("bytes").to_json())
    refused(copy, "tokenizer.json is not the vocabulary of model.safetensors beside it")
    (copy / "tokenizer.json").write_text(GPT2.to_json())
    data = bytearray((copy / "model.safetensors").read_bytes())
    data[-1000] ^= 1
    (copy / "model.safetensors").write_bytes(data)
    refused(copy, "its tensors do not match its SHA-256")


def test_a_folder_is_no_run_to_resume_and_no_run_to_export(folder, tmp_path):
    done = command("train", "--resume", folder)
    assert done.exit_code == 1
    assert f"{folder} holds an exported model, which cannot be resumed; start from it with --init" in done.stderr
    for words in (["--hub", tmp_path / "x"], [tmp_path / "x.safetensors"]):
        done = command("export", folder, *words)
        assert done.exit_code == 1
        assert f"{folder} is already exported; give the folder of a run" in done.stderr
    for words in (["eval", folder, "--ema"], ["info", folder, "--checkpoint", "step-1"]):
        done = command(*words)
        assert done.exit_code == 1
        assert "holds one model; leave out --checkpoint and --ema" in done.stderr


# --- writing it ---


def test_only_an_empty_folder_is_replaced(run, tmp_path, monkeypatch):
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    for path, sentence in (
        (out, f"{out} is not empty (it holds mine.txt); choose another folder"),
        (tmp_path / "file", "already exists"),
        (tmp_path / "link", "already exists"),
        (".", "is the working folder, which cannot be replaced"),
        (tmp_path / "file" / "x", "cannot be written"),
    ):
        done = command("export", run, "--hub", path)
        assert done.exit_code == 1, path
        assert sentence in done.stderr
        assert len(done.stderr.splitlines()) == 1
    monkeypatch.chdir(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"out", "file", "link", "empty"}
    assert [path.name for path in out.iterdir()] == ["mine.txt"]
    export(run, tmp_path / "empty")
    assert {path.name for path in (tmp_path / "empty").iterdir()} == set(FILES)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ([], "Give FILE or --hub DIR"),
        (["x.safetensors", "--hub", "x"], "Give FILE or --hub DIR, not both"),
        (["x.safetensors", "--license", "mit"], "--license and --data are for the card of --hub DIR"),
        (["--hub", "x", "--license", "my own!"], "is no identifier of a licence"),
        (["--hub", ""], "it is empty"),
    ],
)
def test_mistakes_in_the_options_are_told(run, words, sentence):
    done = command("export", run, *words)
    assert done.exit_code == 2
    assert sentence in done.stderr


def test_a_run_that_cannot_be_exported_leaves_nothing(run, tmp_path):
    for words in ((tmp_path / "nowhere",), (run, "--checkpoint", "step-9")):
        done = command("export", *words, "--hub", tmp_path / "new")
        assert done.exit_code == 1
        assert len(done.stderr.splitlines()) == 1
        assert not list(tmp_path.iterdir())


@pytest.mark.skipif(os.name != "posix", reason="needs POSIX signals")
def test_an_interrupted_export_leaves_nothing(run, tmp_path):
    out = tmp_path / "out"
    code = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); import runpy, sys; "
    code += "sys.argv[0] = 'flashlm-numba'; runpy.run_module('flashlm_numba', run_name='__main__')"
    words = [sys.executable, "-c", code, "export", str(run), "--hub", str(out)]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 240
    while process.poll() is None and not list(tmp_path.glob(".out.*.tmp/model.safetensors")):  # half-way
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate()
    assert process.returncode == 130, errors
    assert "Traceback" not in errors
    assert not list(tmp_path.iterdir())


def test_two_exports_are_the_same_bytes(run, folder, tmp_path):
    again = export(run, tmp_path / folder.name, "--rows", "float")
    for name in FILES:
        digests = [hashlib.sha256((where / name).read_bytes()).hexdigest() for where in (folder, again)]
        assert digests[0] == digests[1], name
