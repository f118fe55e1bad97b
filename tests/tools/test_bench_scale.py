"""tools/bench_scale.py checks the packed model before it times it."""

import json

import numpy as np
import pytest
from click.testing import CliRunner

from flashlm_numba.kernels.bit_packed import PackedTrunk
from flashlm_numba.model.packed_model import random_packed_model
from tools import bench_scale
from tools.bench import timing


def run(*arguments):
    return CliRunner().invoke(bench_scale.main, [str(argument) for argument in arguments])


@pytest.mark.slow
def test_a_tiny_model_is_measured_beside_float32(tmp_path):
    path = tmp_path / "out.json"
    done = run("--quick", "--threads", 1, "--json", path)
    assert done.exit_code == 0, done.output
    assert "| tiny |" in done.output
    (row,) = json.loads(path.read_text())["models"]
    assert row["bytes_per_token"] == 3 * (64 * (4 * 80 + 2 * 300) + 128 * 80) + 64 * 300
    assert row["parameters"] == 3 * (4 * 80 * 80 + 3 * 300 * 80) + 2 * 300 * 80
    assert row["tokens_per_s"] > 0
    assert row["peak_bytes"] > 0
    assert not row["float32"]["computed"]
    assert row["float32"]["bytes_per_token"] == 4 * (row["parameters"] - 300 * 80)


@pytest.mark.slow
def test_float32_that_does_not_fit_is_computed_and_marked(tmp_path, monkeypatch):
    monkeypatch.setattr(bench_scale, "FLOAT_GIB", 1e-6)
    done = run("--quick", "--model", "tiny", "--threads", 1, "--json", tmp_path / "out.json")
    assert done.exit_code == 0, done.output
    (row,) = json.loads((tmp_path / "out.json").read_text())["models"]
    plain = row["float32"]
    assert plain["computed"]
    assert plain["token_seconds"]["median"] == plain["bytes_per_token"] / row["bandwidth"]["best"] * 1e-9
    assert "GiB* |" in done.output


def test_a_step_of_training_is_measured(tmp_path):
    done = run("--train", "--quick", "--model", "tiny", "--threads", 1, "--json", tmp_path / "out.json")
    assert done.exit_code == 0, done.output
    (row,) = json.loads((tmp_path / "out.json").read_text())["models"]
    assert row["step_seconds"] > 0
    assert row["peak_bytes"] > 0
    assert "tiny: a step of 4 x 16 tokens takes" in done.output


def test_a_wrong_hidden_state_ends_the_program(monkeypatch):
    def wrong(self, state, x, read=PackedTrunk.read):
        found = read(self, state, x)
        found[-1, -1] = np.nextafter(found[-1, -1], np.float32(9))
        return found

    monkeypatch.setattr(PackedTrunk, "read", wrong)
    done = run("--quick")
    assert done.exit_code == 1
    assert "Wrong result: the packed trunk's hidden states" in done.output


def test_a_wrong_matrix_is_found():
    model = random_packed_model(bench_scale.MODELS["tiny"], 0)
    bench_scale.check_matrix(model)
    matrix = model.trunk.matrix(2, "down")
    right = matrix[5, 7]

    def unpacked(packed, columns, unpack=bench_scale.unpack_ternary):
        matrix[5, 7] = right
        values = unpack(packed, columns)
        matrix[5, 7] = right ^ 1
        return values

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench_scale, "unpack_ternary", unpacked)
        with pytest.raises(timing.WrongResultError):
            bench_scale.check_matrix(model)


def test_the_shapes_are_the_published_ones():
    for name, millions in (("paper-370m", 374), ("paper-1.3b", 1_364), ("paper-2.7b", 2_701), ("7b", 6_738)):
        config = bench_scale.MODELS[name]
        assert round((bench_scale.float_bytes(config) / 4) / 1e6) == millions, name
    assert [bench_scale.MODELS[name].ffn_dim for name in bench_scale.DEFAULT] == [2816, 5632, 6912]
