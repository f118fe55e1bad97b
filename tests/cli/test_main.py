"""The group of commands: what loads, and how each kind of error ends."""

import os
import subprocess
import sys

import pytest
from helpers import TINY
from helpers import command as _run

from flashlm_numba.model import training_memory


def _settings(*settings):
    return [part for setting in (*TINY, *settings) for part in ("--set", setting)]


def test_help_loads_no_numerical_package():
    code = (
        "import sys; from flashlm_numba.cli.main import main\n"
        "try: main(['train', '--help'])\n"
        "except SystemExit: pass\n"
        "slow = {'numba', 'numpy', 'scipy', 'datasets', 'rich', 'tiktoken'} & set(sys.modules)\n"
        "sys.exit(f'loaded {slow}' if slow else 0)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "--resume" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["train", "--steps", "1", "--tokens", "1"], "Give only one of --steps, --tokens and --minutes."),
        (["train", "--resume", "x", "--head", "dense", "--seed", "1"], "leave out --head, --seed."),
        (["train", "--checkpoint", "step-1"], "give --resume RUN too"),
        (["train", "--head", "dense", "--tree", "huffman"], "--tree applies only to the tree head"),
        (["train", "--head", "flat"], "'flat' is not one of"),
        (["train", "--head", "sampled", "--tree", "huffman"], "--tree applies only to the tree head"),
        (["train", "--head", "dense", "--set", "head.name=tree"], "--set name repeats an option; give only one"),
        (["train", "--tree", "huffman", "--set", "tree=balanced"], "--set tree repeats an option"),
        (["train", "--threads", "100000", "--out", "x"], "threads must be between 1 and"),
        (["prepare", "", "--out", "x"], "it is empty."),
        (["train", "", "--steps", "1"], "it is empty."),
        (["train", "--out", ""], "it is empty."),
        (["eval", ""], "it is empty."),
        (["train", "--minutes", "0"], "--minutes"),
        (["prepare", "somewhere"], "Give --out DIR"),
        (["generate"], "Missing argument 'RUN'"),
        (["nonsense"], "No such command"),
    ],
)
def test_usage_errors_end_with_status_2(arguments, sentence):
    done = _run(*arguments)
    assert done.exit_code == 2
    assert sentence in done.stderr


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (
            ["train", "--head", "dense", "--set", "head.tree_rank=8"],
            "With the dense head, tree_rank has no effect",
        ),
        (
            ["train", "--set", "num_sampled=9"],
            "With the tree head, num_sampled has no effect; leave it out, or give",
        ),
        (["train", "--head", "dense", "--set", "full_softmax_ratio=1"], "give --head sampled."),
        (["train", "--set", "adamw_lrr=1"], "There is no setting 'adamw_lrr'; did you mean 'adamw_lr'?"),
        (
            ["train", "no-such-folder"],
            "There is no folder no-such-folder; make one with `flashlm-numba prepare",
        ),
        (["train", __file__], "is not a prepared folder; first run `flashlm-numba prepare"),
        (["train", "--resume", "no-such-run"], "There is no run at no-such-run"),
        (["train", "--recipe", "v3", "--steps", "10001", "DATA"], "end at step 10,000, but 10,001 steps"),
        (["train", "--set", "vocab_size=300", "--steps", "1", "DATA"], "have a vocabulary of 50,257"),
        (["train", "--tree", "oak", "--steps", "1", "DATA", *_settings()], "no tree shape 'oak'"),
        (["train", "--steps", "1", "DATA", *_settings("phases=1x99999")], "a sequence of 99999 needs"),
        (
            ["train", "--steps", "1", "DATA", *_settings("embedding_init=no.safetensors")],
            "There is no file no.safe",
        ),
        (["prepare", "no-such-source.txt", "--out", "OUT"], "no-such-source.txt"),
        (["eval", "no-such-run"], "There is no run at no-such-run"),
        (["eval", "RUN", "no-such-source.txt"], "no-such-source.txt"),
        (["eval", "RUN", "--checkpoint", "step-9"], "it has step-1, step-2, step-3."),
        (["generate", "no-such-run"], "There is no run at no-such-run"),
        (["info", "no-such-run"], "There is no run at no-such-run"),
    ],
)
def test_mistakes_are_one_sentence_and_status_1(run, corpus, tmp_path, arguments, sentence):
    names = {"RUN": run, "DATA": corpus, "OUT": tmp_path / "tokens"}
    arguments = [names.get(argument, argument) for argument in arguments]
    if arguments[0] == "train" and "--resume" not in arguments:
        arguments += ["--out", tmp_path / "run"]
    done = _run(*arguments)
    assert done.exit_code == 1
    assert sentence in done.stderr
    assert done.stderr.count("Error: ") == 1
    assert done.stderr.splitlines()[-1].startswith("Error: ")
    assert "Traceback" not in done.output


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="a device that is always full")
def test_a_full_standard_output_is_one_sentence(run):
    with open("/dev/full", "w") as full:
        words = [sys.executable, "-m", "flashlm_numba", "info", str(run), "--json"]
        done = subprocess.run(words, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr == "Error: The output cannot be written because no space is left.\n"


@pytest.mark.parametrize("words", [["eval", "RUN", "LONG"], ["prepare", "LONG", "--out", "OUT"]])
def test_a_path_that_cannot_be_is_one_sentence(run, tmp_path, words):
    words = [{"RUN": run, "LONG": "no file " * 50, "OUT": tmp_path / "out"}.get(word, word) for word in words]
    done = _run(*words)
    assert done.exit_code == 1
    assert done.stderr.splitlines()[-1].endswith("check the path.")


@pytest.mark.parametrize(
    ("known", "sentence"), [(True, "of memory, and this machine has"), (False, "There is not enough memory")]
)
def test_too_little_memory_is_one_sentence(corpus, tmp_path, monkeypatch, known, sentence):
    if not known:  # the system does not say how much there is
        monkeypatch.setattr(training_memory, "machine_bytes", lambda: None)
    words = ["train", corpus, "--steps", 1, "--out", tmp_path / "run", *_settings()]
    done = _run(*words, "--set", "phases=999999999999x64")
    assert done.exit_code == 1
    assert sentence in done.stderr
    assert _run(*words).exit_code == 0  # the folder is free for settings that fit


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("NUMBA_NUM_THREADS", "abc"),
        ("NUMBA_NUM_THREADS", "0"),
        ("NUMBA_NUM_THREADS", "-1"),
        ("NUMBA_THREADING_LAYER", "nonsense"),
    ],
)
def test_variables_that_numba_cannot_read_are_named(run, monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    done = _run("info", run)
    assert done.exit_code == 1
    assert f"The variable {name} must be" in done.stderr
    assert f"got {value!r}" in done.stderr


def test_a_threading_layer_that_cannot_be_loaded_is_named(run, monkeypatch):
    def broken(threads):
        raise ValueError("No threading layer could be loaded.\nHINT:\nintel tbb is required, try: ...")

    monkeypatch.setattr("numba.set_num_threads", broken)
    for more in ([], ["--threads", 1]):
        done = _run("eval", run, *more)
        assert done.exit_code == 1
        assert "threads: No threading layer could be loaded; unset NUMBA_THREADING_LAYER, or install" in done.stderr
        assert "HINT" not in done.stderr


def test_ctrl_c_while_modules_are_imported_is_no_traceback():
    code = (
        "import sys\n"
        "class Interrupted:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'click': raise KeyboardInterrupt\n"
        "sys.meta_path.insert(0, Interrupted())\n"
        "from flashlm_numba.__main__ import run\n"
        "run()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (130, "")


def test_ctrl_c_while_options_are_parsed_ends_as_it_does_later(monkeypatch):
    from flashlm_numba.cli.main import main

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(main, "parse_args", interrupted)
    done = _run("info", "nothing")
    assert done.exit_code == 130
    assert done.stderr == "Stopped.\n"


def test_ctrl_c_in_prepare_has_the_status_of_an_interrupt(corpus_files, tmp_path, monkeypatch):
    from flashlm_numba.data import prepare

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(prepare, "_write", interrupted)
    done = _run("prepare", corpus_files, "--out", tmp_path / "out")
    assert done.exit_code == 130
    assert done.stderr.endswith("holds the finished work: run the same command again to continue.\n")
    assert "Error" not in done.stderr
