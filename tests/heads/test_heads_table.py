"""HEADS is all that the settings and the commands choose a head by."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from helpers import TINY, command
from safetensors.numpy import load_file

from flashlm_numba.heads import HEADS, Head, head_class
from flashlm_numba.heads.config import HeadConfig
from flashlm_numba.model.recipes import from_recipe

ROOT = Path(__file__).resolve().parents[2]
# of a layout of 6 steps, so that a run that stops before is the same run
OWN = "phases=6:2x16x2", "ngram_copy_output=add"  # the loss is the head's alone
SETTINGS = [part for setting in (*TINY[:4], *OWN, *TINY[5:]) for part in ("--set", setting)]


@pytest.fixture
def unigram(monkeypatch):
    """The head of docs/extending.md, in the table."""
    monkeypatch.setitem(HEADS, "unigram", "")  # goes at the end
    page = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```", page, re.M | re.S)
    example = next(block for block in blocks if "class UnigramHead" in block)
    definition = example[: example.index("\nconfig = ")]  # what comes after trains it
    exec(definition, {})


def run_command(*arguments):
    done = command(*arguments)
    assert done.exit_code == 0, done.output
    return done.stdout


def test_head_registered_in_the_table_works_in_every_command(unigram, corpus, tmp_path):
    whole, run, file = tmp_path / "whole", tmp_path / "run", tmp_path / "model.safetensors"
    train = ("train", corpus, "--head", "unigram", "--threads", 1, *SETTINGS, "--set", "adamw_lr=0.1", "--out")
    run_command(*train, whole, "--steps", 6)
    run_command(*train, run, "--steps", 4)
    run_command("train", "--resume", run, "--steps", 6)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 7))
    assert lines[-1]["loss"] < lines[0]["loss"] == pytest.approx(np.log(50_257), rel=1e-6)
    once, twice = (load_file(folder / "checkpoints/step-6/model.safetensors")["head.bias"] for folder in (whole, run))
    assert np.array_equal(once, twice)
    assert np.abs(once).max() > 0.1

    run_command("export", run, file)
    for path in (run, file):
        info = json.loads(run_command("info", path, "--json"))
        assert (info["head"], info["tree"], info["parameters_by_group"]["head"]) == ("unigram", None, 50_257)
        text = run_command("generate", path, "--seed", 1, "--max-tokens", 5, "--temperature", 0)
        assert text
    scores = [json.loads(run_command("eval", path, corpus, "--json"))["nll"] for path in (run, file)]
    assert scores[0] == scores[1] < lines[0]["loss"]
    refused = command("generate", run, "--int8-head")
    assert "has the unigram head" in refused.stderr


def test_a_head_that_is_not_in_the_table_is_refused_with_the_names_that_are(unigram):
    assert from_recipe("default", ["head.name=unigram"]).head.name == "unigram"
    for arguments in (("--head", "bigram"), ("--set", "head.name=bigram")):
        done = command("train", *arguments)
        assert done.exit_code
        assert "unigram" in done.stderr
    done = command("train", "--head", "unigram", "--set", "num_sampled=9")
    assert "With the unigram head, num_sampled has no effect" in done.stderr


@pytest.mark.parametrize("name", HEADS)
def test_every_entry_is_a_head_of_that_name_with_settings_that_are_there(name):
    head = head_class(name)
    assert issubclass(head, Head)
    assert head.name == name
    assert set(head.own_settings) <= set(vars(HeadConfig(name=name)))


@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize("log_prior", [False, True])
def test_a_head_made_of_what_another_saved_computes_the_same(name, log_prior):
    rng = np.random.default_rng(0)
    counts, rows = rng.integers(0, 99, 200), rng.standard_normal((200, 16), np.float32)
    settings = HeadConfig(name=name, log_prior=log_prior, num_sampled=50, soft_cap=5.0)
    constants = head_class(name).constants_from_data(settings, counts, rows)
    order = head_class(name).token_of_row(constants)
    weight = rows if order is None else rows[order]

    def make(constants, parameters, counts):
        return head_class(name).from_settings(
            settings, weight, np.zeros_like(weight), constants=constants, parameters=parameters, counts=counts
        )

    new = make(constants, {}, counts)
    assert new.constants().keys() == constants.keys()
    assert ("log_prior" in constants) == log_prior
    saved = make(new.constants(), new.parameters, None)
    h = rng.standard_normal((7, 16), np.float32)
    assert np.array_equal(saved.distribution(h), new.distribution(h))
    if order is not None:
        assert np.array_equal(new.row_of_token[order], np.arange(200))


def test_package_offers_the_heads_and_nothing_else_by_name():
    import flashlm_numba
    from flashlm_numba import heads

    for name in ("BitLinearHead", "DenseHead", "SampledHead", "TreeHead"):
        assert getattr(flashlm_numba, name) is getattr(heads, name)
    with pytest.raises(AttributeError, match="no attribute 'FlatHead'"):
        heads.FlatHead  # noqa: B018
