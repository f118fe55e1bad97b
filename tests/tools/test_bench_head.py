"""tools/bench_head.py checks before it times, and turns what it measured into tables and charts."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from helpers import import_torch

from flashlm_numba.kernels import reference
from tools import bench_head
from tools.bench import (
    allocators,
    charts,
    head_candidates,
    head_check,
    head_problem,
    head_report,
    machine,
    our_heads,
    steps,
)

ROOT = Path(__file__).resolve().parents[2]
MEASURED = sorted((ROOT / "results").glob("*-bench-head.json"))[-1]
SMALL = ["--vocab", "300", "--dim", "16", "--rows", "64", "--repeats", "1", "--no-steps"]
# compiling with a C++ compiler takes half a minute
HERE = [option for name in head_candidates.CANDIDATES if name != "torch:compile" for option in ("--head", name)]


def run(*arguments):
    """The command's result; it must succeed."""
    result = CliRunner().invoke(bench_head.main, [str(a) for a in arguments])
    assert result.exit_code == 0, result.output
    return result


@pytest.fixture
def no_gemm(monkeypatch):
    """Leave out the machine's GEMM rate, half of the time of a small run."""
    monkeypatch.setattr(machine, "gemm_rate", lambda *args, **settings: {"best": 1.0})


def test_every_candidate_is_checked_timed_and_written(corpus, tmp_path):
    out = tmp_path / "out.json"
    run(*SMALL, *HERE, "--data", corpus, "--json", out)
    written = json.loads(out.read_text())
    assert written["rows"] == 64
    assert written["gemm_gflops"] > 0
    ours = {name for name in written["heads"] if not name.startswith("torch:")}
    assert {f"tree:{s}" for s in ("two-level", "balanced", "adaptive", "clustered", "huffman", "default")} < ours
    for name, entry in written["heads"].items():
        if entry is None:  # no torch here
            assert name not in ours
            continue
        rate = entry["positions_per_s"]
        assert 0 < rate["p20"] <= rate["median"] <= rate["p80"]
        assert entry["max_grad_error"] < 1e-4
        assert entry["gflops"] > 0
        assert (entry["peak_scratch_mb"] is None) == (name not in ours)
    assert {"torch:tree", "torch:eager", "torch:adaptive", "torch:adaptive-div4"} <= written["heads"].keys()
    assert set(head_candidates.QUICK) <= head_candidates.CANDIDATES.keys()


def test_dense_heads_are_measured_at_half_the_batch_too(corpus, tmp_path, monkeypatch, no_gemm):
    monkeypatch.setattr(bench_head, "BY_ROWS", 32)
    out = tmp_path / "out.json"
    run(*SMALL, "--head", "dense", "--data", corpus, "--json", out)
    entry = json.loads(out.read_text())["heads"]["dense"]
    assert entry["by_rows"]["32"]["positions_per_s"]["median"] > 0
    assert "N = 32 |" in head_report.heads_table(json.loads(out.read_text()))


@pytest.mark.parametrize(
    ("wrong", "part"),
    [
        ("dense", "loss"),
        ("dense", "dh"),
        ("dense", "dweight"),
        ("sampled", "dweight"),
        ("tree:two-level", "dh"),
        ("tree:two-level", "dweight"),
        ("tree:two-level", "nodes.weight"),
    ],
)
@pytest.mark.parametrize("row", [0, -1])
def test_a_wrong_result_ends_with_status_1(corpus, monkeypatch, no_gemm, wrong, part, row):
    right = our_heads.run_head

    def planted(head, problem):
        found = right(head, problem)
        if head.name == wrong.split(":")[0]:
            rows = np.flatnonzero(found[part].reshape(len(found[part]), -1).any(1))  # others are zero, times anything
            found[part][rows[row]] *= 1.001
        return found

    monkeypatch.setattr(our_heads, "run_head", planted)
    result = CliRunner().invoke(bench_head.main, [*SMALL, "--head", wrong, "--data", str(corpus)])
    assert result.exit_code == 1
    assert f"{wrong}: {part} errs" in result.output
    assert "positions/s" not in result.output  # nothing was timed


def test_a_wrong_gradient_of_the_torch_tree_ends_with_status_1(corpus, monkeypatch, no_gemm):
    import_torch()
    from tools.baseline import tree_head

    right = tree_head.tree_head

    def planted(*arguments, **options):
        call = right(*arguments, **options)

        def run():
            loss, dh, dweight, dnodes = call()
            dnodes[-1] *= 1.001
            return loss, dh, dweight, dnodes

        return run

    monkeypatch.setattr(tree_head, "tree_head", planted)
    result = CliRunner().invoke(bench_head.main, [*SMALL, "--head", "torch:tree", "--data", str(corpus)])
    assert result.exit_code == 1
    assert "torch:tree: nodes.weight errs" in result.output


def test_a_rare_tokens_wrong_gradient_cannot_hide_behind_a_frequent_ones():
    truth = np.array([[1.0, 2.0], [1e-9, 3e-9], [0, 0]])
    assert head_check.relative_error(truth * (1 + 1e-7), truth) == pytest.approx(1e-7)
    for row, factor in ((1, 1.01), (0, np.nan)):
        wrong = truth.copy()
        wrong[row] *= factor
        assert not head_check.relative_error(wrong, truth) < 0.009
    wrong = truth.copy()
    wrong[2, 0] = 1e-30
    assert head_check.relative_error(wrong, truth) == np.inf
    with pytest.raises(head_check.WrongResultError, match="x: dweight errs"):
        head_check.compare("x", {"dweight": wrong}, {"dweight": truth.astype(np.float32)}, {"dweight": truth})


def test_the_dense_reference_is_that_of_the_kernels(monkeypatch):
    monkeypatch.setattr(our_heads, "CHUNK", 7)
    problem = head_problem.zipf_problem(20, 5, 30)
    found = our_heads.dense_reference(problem, np.float64)
    h, weight, weights = (a.astype(np.float64) for a in (problem.h, problem.weight, problem.weights))
    loss, _, _ = reference.dense_head_forward(h, weight, problem.targets)
    dh, dweight = reference.dense_head_backward(weights, h, weight, problem.targets)
    for name, truth in {"loss": loss, "dh": dh, "dweight": dweight}.items():
        np.testing.assert_allclose(found[name], truth, rtol=1e-9, atol=1e-15)


def test_the_documentation_has_the_table_of_the_results():
    printed = run("--table", MEASURED).output
    table, _, heads = printed.partition("\n\n")
    pages = [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    assert any(table in page.read_text(encoding="utf-8") for page in pages)
    assert "| `tree:default` |" in heads


def result_of(steps):
    """What bench_head writes, of steps only: name -> (tokens/s, loss)."""
    shares = {"embedding": 0.0, "trunk": 0.5, "head": 0.25, "optimizer": 0.25}
    entries = {
        name: {"tokens_per_s": {"median": rate}, "loss": loss, "shares": shares} for name, (rate, loss) in steps.items()
    }
    return {"heads": {}, "steps": entries, "batch": "4x250"}


def test_ratios_are_to_the_fastest_candidate_of_pytorch():
    result = result_of(
        {"tree": (900.0, {}), "torch": (20.0, {}), "torch:compile": (30.0, {}), "torch@untuned": (9.0, {})}
    )
    assert [(ours, peer, ratio) for _, ours, peer, ratio in head_report.ratios(result)] == [
        ("tree", "torch:compile", 30.0),
        ("tree", "torch@untuned", 100.0),
    ]
    assert "| training step | `tree` | `torch:compile` | 30.00 |" in head_report.ratios_table(result)


def test_a_ratio_of_unequal_losses_is_refused():
    result = result_of({"dense": (900.0, {}), "torch": (20.0, {"label_smoothing": 0.1})})
    with pytest.raises(ValueError, match="dense and torch have different losses"):
        head_report.ratios(result)


def test_every_ratio_is_of_candidates_with_the_same_loss():
    for kind, ours, peers in head_report.RATIOS:
        if kind == "steps":
            assert steps.STEPS[ours].loss == steps.STEPS[peers[0]].loss
            assert len({str(steps.STEPS[peer].loss) for peer in peers}) == 1


def test_the_savings_of_a_step_are_split_into_its_parts():
    result = result_of({"tree": (2000.0, {}), "torch:adaptive": (500.0, {}), "torch:adaptive-div4": (1000.0, {})})
    table = head_report.savings_table(result)
    assert "| head | 250.0 | 125.0 | 125.0 |" in table
    assert "| trunk and embedding | 500.0 | 250.0 | 250.0 |" in table


@pytest.mark.slow
def test_steps_are_measured_in_processes_of_their_own(corpus):
    said = []
    found = steps.measure_steps(["tree"], corpus, 1, 1, "2x16", said.append, turns=2)["tree"]
    assert said == ["tree, turn 1 of 2", "tree, turn 2 of 2"]
    assert found["tokens_per_s"]["median"] > 0
    assert set(found["shares"]) == set(steps.PARTS)
    assert all(0 < share < 1 for share in found["shares"].values())
    assert (found["loss"], found["allocator"], found["activations"]) == ({}, "keep", "int8")


@pytest.mark.slow
def test_pytorchs_steps_take_the_same_loss(corpus):
    import_torch()
    names = ["torch@v3-loss", "torch:adaptive-div4@untuned"]
    found = steps.measure_steps(names, corpus, 1, 1, "1x8", lambda line: None, turns=1)
    assert [found[name]["loss"] for name in names] == [steps.V3_LOSS, {}]
    assert [found[name]["allocator"] for name in names] == ["keep", "default"]


def test_a_program_starts_again_with_its_allocator():
    code = (
        "from tools.bench import allocators; allocators.restart(); import os; print(allocators.current(), os.environ)"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=without_allocator(), capture_output=True, text=True, check=True
    )
    assert run.stdout.startswith("keep ")
    assert f"'MALLOC_TRIM_THRESHOLD_': '{allocators.NEVER}'" in run.stdout
    default = {**without_allocator(), allocators.CHOICE: "default"}
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=default, capture_output=True, text=True, check=True
    )
    assert run.stdout.startswith("default ")
    assert "MALLOC" not in run.stdout


def without_allocator():
    """The environment without a choice of allocator."""
    return {n: v for n, v in os.environ.items() if n != allocators.CHOICE and not n.startswith("MALLOC_")}


@pytest.mark.slow
def test_scaling_and_shares_are_drawn(tmp_path):
    pytest.importorskip("matplotlib", reason="needs matplotlib: pip install matplotlib")
    bench_head.set_threads(None)
    scaling = bench_head.measure_scaling(8, 1, vocabularies=(100, 400), rows=())
    assert scaling["vocab"]["tree:adaptive"].keys() == {"100", "400"}
    result = json.loads(MEASURED.read_text(encoding="utf-8")) | {"scaling": scaling}
    written = head_report.plot(result, tmp_path / "out.png")
    assert [path.name for path in written] == ["out.png", "out-scaling.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in written)


def test_what_cannot_be_drawn_is_said_before_anything_is_measured(monkeypatch):
    monkeypatch.setattr(charts, "can_plot", lambda: False)
    result = CliRunner().invoke(bench_head.main, ["--plot", "out.png"])
    assert result.exit_code == 1
    assert "--plot needs matplotlib: pip install" in result.output
    result = CliRunner().invoke(bench_head.main, ["--plot", "out.png", "--no-steps"])
    assert result.exit_code == 2
    assert "nothing to draw" in result.output
    result = CliRunner().invoke(bench_head.main, ["--json", f"{__file__}/out.json"])
    assert result.exit_code == 2
    assert "cannot be written: Not a directory" in result.output
