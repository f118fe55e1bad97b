"""tools/bench_ternary.py checks every product before it times it."""

import json

import pytest
from click.testing import CliRunner

from flashlm_numba.kernels import _ternary_dots
from flashlm_numba.kernels.ternary_gemv import ternary_gemv_int8
from tools import bench_ternary
from tools.bench import bandwidth, timing


def run(*arguments):
    return CliRunner().invoke(bench_ternary.main, [str(argument) for argument in arguments])


def test_every_candidate_is_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(bench_ternary, "QUICK", ((8, 300, 1, 1), (8, 300, 5, 0)))
    path = tmp_path / "out.json"
    done = run("--quick", "--repeats", 1, "--json", path)
    assert done.exit_code == 0, done.output
    for shape in json.loads(path.read_text())["shapes"]:
        assert {*_ternary_dots.available(), "with rounding", "numpy float32"} <= shape["gweights_per_s"].keys()
        assert all(rate["median"] > 0 for rate in shape["gweights_per_s"].values())


def test_a_wrong_product_ends_the_program(monkeypatch):
    def wrong(packed, q, *, variant=None):
        found = ternary_gemv_int8(packed, q, variant=variant)
        found[-1, -1] += 1
        return found

    monkeypatch.setattr(bench_ternary, "QUICK", ((8, 300, 1, 1),))
    monkeypatch.setattr(bench_ternary, "ternary_gemv_int8", wrong)
    done = run("--quick", "--repeats", 1)
    assert done.exit_code == 1
    assert "Wrong result: plain: 8 x 300, 1 rows: not the exact product." in done.output
    with pytest.raises(timing.WrongResultError):
        bench_ternary.make_calls(8, 300, 1, wrong)


@pytest.mark.slow
def test_readers_read_everything():
    found = bandwidth.read_bandwidth(1, megabytes=1, repeats=1)
    assert found["best"] > 0
    assert found["threads"] == 1
