"""tools/bench_trunk.py checks the trunk before it times it, and draws what it measured."""

import importlib.util
import json

import pytest
from click.testing import CliRunner

from flashlm_numba.kernels._ternary_dots import available
from flashlm_numba.model.config import ModelConfig
from flashlm_numba.model.model import Model
from tools import bench_trunk
from tools.bench import bandwidth, machine

SMALL = ModelConfig(vocab_size=2_000, dim=32, ffn_dim=40, groups=4, dilations=(1, 2))


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(bandwidth, "MEGABYTES", 1)
    monkeypatch.setattr(bench_trunk, "ROWS", 2)
    monkeypatch.setattr(bench_trunk, "LENGTH", 16)
    monkeypatch.setattr(bench_trunk, "ModelConfig", lambda: SMALL)
    monkeypatch.setattr(machine, "gemm_rate", lambda threads, repeats: {"best": 100.0})
    if importlib.util.find_spec("torch") is not None:  # compiling for it takes longer than the rest
        import torch

        monkeypatch.setattr(torch, "compile", lambda function: function)


def run(*arguments):
    return CliRunner().invoke(bench_trunk.main, [str(argument) for argument in arguments])


@pytest.mark.slow
def test_every_candidate_is_measured_and_drawn(small, tmp_path):
    json_path, plot_path = tmp_path / "out.json", tmp_path / "out.png"
    done = run("--repeats", 1, "--json", json_path, "--plot", plot_path)
    assert done.exit_code == 0, done.output
    result = json.loads(json_path.read_text())
    assert result["tokens_per_s"]["ours"]["median"] > 0
    assert len(result["roofline"]) == 6
    assert all(point["flop"] > 0 < point["seconds"] for point in result["roofline"].values())
    assert plot_path.read_bytes().startswith(b"\x89PNG")


def test_operations_are_those_of_the_design():
    assert bench_trunk.flop_per_token(ModelConfig()) == pytest.approx(8.3e6, rel=0.02)


@pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="the gradients are checked against torch")
def test_a_wrong_gradient_ends_the_program(small, monkeypatch):
    right = Model.backward

    def wrong(self, dh):
        right(self, dh)
        self.gradients["blocks.0.glu.up.weight"][3, 5] *= 1.01

    monkeypatch.setattr(Model, "backward", wrong)
    done = run("--repeats", 1)
    assert done.exit_code == 1
    assert "Wrong result: trunk: blocks.0.glu.up.weight errs by" in done.output


def test_a_wrong_hidden_state_ends_the_program_without_torch(small, monkeypatch):
    monkeypatch.setattr(bench_trunk.importlib.util, "find_spec", lambda name: None)
    assert run("--repeats", 1).exit_code == 0
    right = Model.decode_step
    monkeypatch.setattr(Model, "decode_step", lambda self, state, token: right(self, state, token) * 1.001)
    done = run("--repeats", 1)
    assert done.exit_code == 1
    assert "Wrong result: hidden states differ from the decoder's by 0.001" in done.output


@pytest.mark.skipif(len(available()) == 1, reason="this processor has no int8 products to plant a mistake in")
def test_a_wrong_int8_product_ends_the_program(small, monkeypatch):
    right = bench_trunk.make_rounded

    def wrong(model, variant=None):
        rounded = right(model, variant)
        if variant is None:
            codes = rounded._weights.gate_up.forward.codes[0]
            codes[0, 0, 0] = 2 - codes[0, 0, 0] // 2
        return rounded

    monkeypatch.setattr(bench_trunk, "make_rounded", wrong)
    done = run("--repeats", 1)
    assert done.exit_code == 1
    assert "Wrong result: int8 activations: hidden is off by" in done.output
