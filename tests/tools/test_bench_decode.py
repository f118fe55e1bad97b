"""tools/bench_decode.py checks the decoder before it times it."""

import json

import pytest
from click.testing import CliRunner

from flashlm_numba.model.model import Model
from flashlm_numba.model.recipes import from_recipe
from tools import bench_decode
from tools.bench import bandwidth

SMALL = ("dim=16", "ffn_dim=24", "groups=4", "dilations=1,2", "embedding_init=random")


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(bandwidth, "MEGABYTES", 1)
    monkeypatch.setattr(bench_decode, "from_recipe", lambda name, settings: from_recipe(name, [*SMALL, *settings]))


def run(*arguments):
    return CliRunner().invoke(bench_decode.main, [str(argument) for argument in arguments])


def test_every_candidate_is_measured(small, corpus, tmp_path):
    path = tmp_path / "out.json"
    done = run("--data", corpus, "--repeats", 1, "--tokens", 5, "--json", path)
    assert done.exit_code == 0, done.output
    rates = json.loads(path.read_text())["tokens_per_s"]
    assert {
        "trunk alone",
        "tree, temperature 0.8, top-k 40",
        "dense, temperature 1",
        "dense, temperature 1, int8 rows",
        "tree, temperature 1, int8 activations",
        "tree, window again",
    } <= rates.keys()
    assert all(rate["median"] > 0 for rate in rates.values())


def test_a_wrong_decoder_ends_the_program(small, corpus, monkeypatch):
    right = Model.decode_step
    monkeypatch.setattr(Model, "decode_step", lambda self, state, token: right(self, state, token) * 1.001)
    done = run("--data", corpus, "--repeats", 1)
    assert done.exit_code == 1
    assert "tree: decoded hidden states err by 0.001" in done.output
