"""The program as a library: what a notebook calls gives what the commands give, and prints nothing."""

import contextlib
import io
import json
import shutil

import numpy as np
import pytest
from helpers import TINY, command

import flashlm_numba as fl


@pytest.fixture(scope="module")
def settings():
    return dict(setting.split("=", 1) for setting in TINY)


@pytest.fixture
def silent(capfd):
    """Nothing may be written to either stream, by this process or by one that it starts."""
    yield
    out, err = capfd.readouterr()
    assert (out, err) == ("", "")


def test_prepare_train_resume_load_without_a_word(corpus_files, settings, tmp_path, silent):
    folder = fl.prepare(corpus_files, tmp_path / "tokens")
    run = fl.train(folder, steps=3, seed=7, threads=1, out=tmp_path / "run", settings=settings)
    assert (run.folder, run.status) == (tmp_path / "run", 0)
    assert [line["step"] for line in run.metrics] == [1, 2, 3]
    assert run.resume(steps=4).metrics[-1]["step"] == 4
    model = run.load()
    assert model.trained["step"] == 4
    assert run.load("step-3").trained["step"] == 3


def test_train_is_the_command(corpus, settings, tmp_path):
    options = [part for setting in TINY for part in ("--set", setting)]
    done = command("train", corpus, "--steps", 2, "--seed", 3, "--threads", 1, "--out", tmp_path / "a", *options)
    assert done.exit_code == 0, done.output
    run = fl.train(corpus, steps=2, seed=3, threads=1, out=tmp_path / "b", settings=settings)
    logged = [json.loads(line) for line in (tmp_path / "a" / "metrics.jsonl").read_text().splitlines()]
    assert [line["loss"] for line in run.metrics] == [line["loss"] for line in logged]


def test_generate_is_the_command_and_streams(run):
    model = fl.load(run)
    text = model.generate("the people", max_tokens=9, seed=5)
    done = command("generate", run, "--prompt", "the people", "--max-tokens", 9, "--seed", 5)
    assert done.stdout == f"the people{text}\n"
    assert "".join(model.generate("the people", max_tokens=9, seed=5, stream=True)) == text
    assert fl.load(run / "checkpoints" / "step-2").trained["step"] == 2


def test_an_exported_file_loads_too(run, tmp_path):
    assert command("export", run, tmp_path / "model.safetensors", "--rows", "float").exit_code == 0
    a, b = fl.load(run), fl.load(tmp_path / "model.safetensors")
    assert a.generate(max_tokens=5, seed=1) == b.generate(max_tokens=5, seed=1)
    assert repr(a) == repr(b)


def test_score_is_eval_and_next_tokens_are_the_distribution(run, tmp_path):
    text = "the people of this nation have seen peace and war, " * 30
    (tmp_path / "text.txt").write_text(text)
    model = fl.load(run)
    score = model.score(text)
    done = json.loads(command("eval", run, tmp_path / "text.txt", "--json").stdout)
    assert score.nll == pytest.approx(done["nll"], rel=1e-5)
    assert score.bits_per_byte == pytest.approx(done["bits_per_byte"], rel=1e-5)
    assert "".join(score.tokens) == text
    likely = model.next_tokens("the people", k=5)
    assert [p for _, p in likely] == sorted((p for _, p in likely), reverse=True)
    everything = model.next_tokens("the people", k=10**6)
    assert len(everything) == model.vocabulary.size
    assert sum(p for _, p in everything) == pytest.approx(1, abs=1e-3)
    first = model.vocabulary.encode(" of")[0]
    nll = model.score("the people of").token_nll[-1]
    assert dict(everything)[model.vocabulary.decode_bytes([first]).decode()] == pytest.approx(np.exp(-nll), rel=1e-3)


def test_the_hook_sees_what_happens(corpus, settings, tmp_path):
    class Hook(fl.Progress):
        def __init__(self):
            self.notes, self.steps_seen = [], []

        def note(self, text):
            self.notes.append(text)

        def step(self, line, seconds_left):
            self.steps_seen.append(line["step"])

    hook = Hook()
    fl.train(corpus, steps=2, out=tmp_path / "run", settings=settings, progress=hook)
    assert hook.steps_seen == [1, 2]
    assert any("Training" in note for note in hook.notes)
    assert hook.notes[-1] == f"Done: {tmp_path / 'run'}"


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: fl.load("nowhere"), "There is no run at nowhere"),
        (lambda: fl.train("nowhere", steps=1), "There is no folder nowhere"),
        (lambda: fl.train(steps=1, recipe="best"), "There is no recipe 'best'"),
        (lambda: fl.train(steps=1, settings={"dimm": 3}), "There is no setting 'dimm'"),
        (lambda: fl.prepare("nowhere.txt"), "Give out, the folder for the tokens."),
        (lambda: fl.prepare(max_docs=2), "Give out, the folder for the tokens."),
        (lambda: fl.prepare(lines=True), "Give out, the folder for the tokens."),
        (lambda: fl.prepare("a.txt", "out", max_tokens=1.5), "max_tokens must be a whole number, got 1.5"),
        (lambda: fl.prepare("a.txt", "out", workers=-1), "workers must be at least 1, got -1"),
        (lambda: fl.prepare("a.txt", ""), "The path is empty: name a file or a folder"),
        (lambda: fl.prepare("a\0b", "out"), "contains a NUL character"),
        (lambda: fl.load("a\0b"), "contains a NUL character"),
        (lambda: fl.load(""), "The path is empty"),
        (lambda: fl.train(steps=1, out="a\0b"), "contains a NUL character"),
        (lambda: fl.train(steps=1, seed=-1), "seed must be at least 0, got -1"),
        (lambda: fl.train(steps=1, seed=2**70), "seed must be at least 0 and at most"),
        (lambda: fl.train(steps=1, seed=1.5), "seed must be a whole number, got 1.5"),
        (lambda: fl.train(steps=1, threads=1.5), "threads must be a whole number, got 1.5"),
        (lambda: fl.train(minutes=-1), "minutes must be a number above 0"),
        (lambda: fl.Run("nowhere").metrics, "nowhere has no log that can be read"),
    ],
)
def test_mistakes_are_a_sentence(call, sentence):
    with pytest.raises(fl.UserError, match=sentence):
        call()


def test_a_length_that_is_none_leaves_the_run_as_it_was(run, tmp_path):
    """config.json was written with minutes that no command reads."""
    shutil.copytree(run, tmp_path / "run")
    mine = fl.Run(tmp_path / "run")
    before = (mine.folder / "config.json").read_bytes()
    for length in ({"minutes": -1}, {"minutes": float("nan")}, {"steps": 10.5}):
        with pytest.raises(fl.UserError):
            mine.resume(**length)
    assert (mine.folder / "config.json").read_bytes() == before
    mine.load()


def test_numpys_integers_are_numbers(corpus, settings, tmp_path):
    one = np.int64(1)
    run = fl.train(corpus, steps=one, seed=one, threads=one, out=tmp_path / "run", settings=settings)
    assert run.load().config.seed == 1


def test_a_line_of_the_log_that_is_torn_is_left_out(run, tmp_path):
    whole = (run / "metrics.jsonl").read_bytes()
    (tmp_path / "metrics.jsonl").write_bytes(whole + b'{"step": 9, "lo')
    assert fl.Run(str(tmp_path)).metrics == fl.Run(run).metrics


def test_wrong_arguments_of_generate_are_refused_at_once(run):
    model = fl.load(run)
    wrong = ({"max_tokens": -1}, {"max_tokens": 1.5}, {"seed": -1}, {"seed": "a"}, {"top_k": 0}, {"temperature": -1})
    for options in wrong:
        for stream in (False, True):
            with pytest.raises((fl.UserError, ValueError), match=f"{next(iter(options))} must be"):
                model.generate("the", **options, stream=stream)


def test_a_checkpoint_within_its_folder(run, monkeypatch):
    monkeypatch.chdir(run / "checkpoints")
    assert fl.load("step-2").trained["step"] == fl.load(run, 2).trained["step"] == 2


def test_an_empty_text_has_no_score(run):
    with pytest.raises(ValueError, match="at least one token"):
        fl.load(run).score("")


def test_everything_promised_is_there():
    with contextlib.redirect_stdout(io.StringIO()) as out:
        for name in fl.__all__:
            assert getattr(fl, name) is not None
    assert out.getvalue() == ""
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = fl.nothing
