"""tools/bench_head.py checks before it times."""

import json

import pytest
from click.testing import CliRunner

from tools import bench_head

SMALL = ["--vocab", "300", "--dim", "16", "--rows", "64", "--repeats", "1", "--no-steps"]


def test_every_candidate_is_checked_timed_and_written(corpus, tmp_path):
    out = tmp_path / "out.json"
    result = CliRunner().invoke(bench_head.main, [*SMALL, "--data", str(corpus), "--json", str(out)])
    assert result.exit_code == 0, result.output
    written = json.loads(out.read_text())
    assert written["rows"] == 64
    assert written["gemm_gflops"] > 0
    for name in ("dense", "tree:default", "tree:two-level"):
        entry = written["heads"][name]
        rate = entry["positions_per_s"]
        assert 0 < rate["p20"] <= rate["median"] <= rate["p80"]
        assert entry["max_grad_error"] < 1e-4
    assert {"torch:eager", "torch:adaptive", "torch:adaptive-div4"} <= written["heads"].keys()


@pytest.mark.parametrize("wrong", ["dense", "tree:two-level"])
@pytest.mark.parametrize("part", [0, 1])
def test_a_wrong_gradient_ends_with_status_1(corpus, monkeypatch, wrong, part):
    right = bench_head.run_head

    def planted(head, problem):
        loss, gradients = right(head, problem)
        if head.name == wrong.split(":")[0]:
            gradients[("dh", "dweight")[part]][0] *= 1.001
        return loss, gradients

    monkeypatch.setattr(bench_head, "run_head", planted)
    monkeypatch.setattr(bench_head.timing, "gemm_rate", lambda *args, **settings: {"best": 1.0})
    result = CliRunner().invoke(bench_head.main, [*SMALL, "--data", str(corpus)])
    assert result.exit_code == 1
    assert ("dh", "dweight")[part] in result.output
