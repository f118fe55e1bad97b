"""How fast are the heads, and what share of a training step is theirs?

    python tools/bench_head.py                      every candidate at 4,096 positions, then whole training steps
    python tools/bench_head.py --quick              the same in short form, under a minute once compiled
    python tools/bench_head.py --json out.json      write what was measured

All candidates get the same positions: hidden states drawn at random, the next tokens of the built-in text, and the rows
that training starts with. Every candidate's loss and gradients are checked against float64 before it is timed; a wrong
one ends the program with status 1. The candidates then take turns, and medians are printed with the 20 % and 80 %
quantiles. The PyTorch peers (tools/peer_torch.py) stand beside ours where torch is installed. Use a quiet machine.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np

if __package__ in (None, ""):  # run as a file, the checkout is not on the path
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from flashlm_numba import assemble, train
from flashlm_numba.config import Phase, RunConfig
from flashlm_numba.data import TokenData, default_corpus, open_tokens
from flashlm_numba.embeddings import cached_start
from flashlm_numba.errors import UserError
from flashlm_numba.heads import DenseHead, Head, TreeHead
from flashlm_numba.kernels import reference, reference_tree
from flashlm_numba.optim import Optimizer
from flashlm_numba.threads import set_threads
from flashlm_numba.tree import build_tree
from tools import timing

CHECKED_ROWS = 48  # positions of the check: the float64 reference of a tree goes position by position
SLACK = 4.0  # a candidate may err this many times as far as plain float32 NumPy does
STEP = Phase(None, 16, 128, 1)  # tokens of a training step
V3_LOSS = {
    "label_smoothing": 0.1,
    "z_loss": 1e-4,
}  # of the dense steps, ours and torch's; the others train on plain NLL
SHARES = ("embedding", "trunk", "head", "optimizer")

Gradients = dict[str, np.ndarray]


class WrongResultError(Exception):
    """A candidate's loss or gradient differs from the float64 reference."""


@dataclass(frozen=True)
class Problem:
    """One batch for every candidate."""

    h: np.ndarray  # (N, C) float32
    weight: np.ndarray  # (V, C) float32, rows by token id
    targets: np.ndarray  # (N,) int32
    counts: np.ndarray  # (V,) int64, of the training documents

    @property
    def weights(self) -> np.ndarray:
        """Each position's share of the mean loss, (N,) float32."""
        return np.full(len(self.targets), 1 / len(self.targets), np.float32)

    def first(self, rows: int) -> Problem:
        """The same with the first positions only."""
        return dataclasses.replace(self, h=self.h[:rows].copy(), targets=self.targets[:rows].copy())


def make_problem(data: TokenData, rows: int, dim: int, vocab: int, seed: int) -> Problem:
    """rows positions of the training text, folded into a smaller vocabulary where vocab asks for one."""
    rng = np.random.default_rng(seed)
    ids = data.train.windows(np.array([0]), min(rows + 1, data.train.n_tokens))[0]
    targets = np.resize(ids[1:], rows).astype(np.int32) % vocab
    folded = np.arange(data.manifest.vocab_size) % vocab
    counts = np.bincount(folded, data.train.counts(data.manifest.vocab_size), minlength=vocab)
    h = rng.standard_normal((rows, dim), np.float32)
    if vocab == data.manifest.vocab_size:
        weight = cached_start(data, dim, vocab_size=vocab)
    else:
        weight = rng.standard_normal((vocab, dim), np.float32) * np.float32(0.05)
    return Problem(h, weight, targets, counts[:vocab].astype(np.int64))


def make_head(name: str, problem: Problem) -> Head:
    """`dense`, or `tree:SHAPE` with its rows in leaf order."""
    if name == "dense":
        return DenseHead(problem.weight)
    tree = build_tree(name.removeprefix("tree:"), problem.counts, rows=problem.weight)  # as training does by default
    return TreeHead(tree, np.ascontiguousarray(problem.weight[tree.token_of_row]), counts=problem.counts)


def run_head(head: Head, problem: Problem) -> tuple[np.ndarray, Gradients]:
    """loss (N,) and the gradients of the mean loss by name, those of the parameters freshly cleared."""
    gradients = {"dweight": head.dweight, **head.gradients}
    for gradient in gradients.values():
        gradient[...] = 0
    loss, _, dh = head.forward_backward(problem.h, problem.targets, problem.weights)
    return loss, {"dh": dh, **gradients}


def run_reference(head: Head, problem: Problem, dtype: type) -> tuple[np.ndarray, Gradients]:
    """The same by the plain NumPy twin, in float64 (the truth) or float32 (the yardstick)."""
    h, weight, weights = (array.astype(dtype) for array in (problem.h, head.weight, problem.weights))
    if isinstance(head, TreeHead):
        nodes = head.nodes.astype(dtype)
        dweight, dnodes = np.zeros_like(weight), np.zeros_like(nodes)
        rows = head.row_of_token[problem.targets]
        loss, _, dh = reference_tree.tree_head_forward_backward(
            h, weight, nodes, head.tree.spans, rows, weights, dweight, dnodes
        )
        return loss, {"dh": dh, "dweight": dweight, **({"nodes.weight": dnodes} if dnodes.size else {})}
    loss, _, _ = reference.dense_head_forward(h, weight, problem.targets)
    dh, dweight = reference.dense_head_backward(weights, h, weight, problem.targets)
    return loss, {"dh": dh, "dweight": dweight}


def compare(name: str, got: Mapping[str, np.ndarray], float32: Mapping, float64: Mapping) -> float:
    """Largest error of got relative to the largest value of its array; WrongResultError if one is too large."""
    worst = 0.0
    for key, truth in float64.items():
        scale = float(np.abs(truth).max(initial=0)) or 1.0
        error = float(np.abs(got[key] - truth).max(initial=0)) / scale
        yardstick = float(np.abs(float32[key] - truth).max(initial=0)) / scale
        allowed = SLACK * (yardstick + float(np.finfo(np.float32).eps))
        if not error <= allowed:
            raise WrongResultError(
                f"{name}: {key} errs by {error:.2g} of its largest value; plain float32 errs by {yardstick:.2g}, so "
                f"at most {allowed:.2g} was expected. The kernel is wrong on this machine; please report it."
            )
        worst = max(worst, error)
    return worst


def check_head(name: str, head: Head, problem: Problem) -> float:
    """Largest relative error of our head on a few positions; WrongResultError if it is wrong."""
    few = problem.first(CHECKED_ROWS)
    loss, gradients = run_head(head, few)
    loss32, gradients32 = run_reference(head, few, np.float32)
    loss64, gradients64 = run_reference(head, few, np.float64)
    got, plain, truth = (
        {"loss": value, **found} for value, found in ((loss, gradients), (loss32, gradients32), (loss64, gradients64))
    )
    return compare(name, got, plain, truth)


def torch_candidates(problem: Problem, threads: int) -> tuple[dict[str, Callable[[], Any]], dict[str, float]]:
    """The PyTorch heads on the same positions, checked like ours; empty where torch is missing."""
    if importlib.util.find_spec("torch") is None:
        return {}, {}
    import torch

    from tools import peer_torch

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    ranks = peer_torch.frequency_ranks(problem.counts)
    few = problem.first(CHECKED_ROWS)
    dense = DenseHead(problem.weight)
    errors = {}
    loss, dh, dweight = peer_torch.head_candidates(few.h, few.weight, few.targets, ranks)["torch:eager"]()
    got = {"loss": loss.numpy(), "dh": dh.numpy(), "dweight": dweight.numpy()}
    results = []
    for dtype in (np.float32, np.float64):
        losses, gradients = run_reference(dense, few, dtype)
        results.append({"loss": losses.mean(), **gradients})
    errors["torch:eager"] = compare("torch:eager", got, *results)
    for name, div_value in (("torch:adaptive", 1.0), ("torch:adaptive-div4", 4.0)):
        head = peer_torch.adaptive_head(problem.weight.shape[1], problem.weight.shape[0], div_value)
        y = torch.from_numpy(ranks[few.targets])
        results = []
        for dtype, direct in ((torch.float32, True), (torch.float32, False), (torch.float64, False)):
            h = torch.from_numpy(few.h).to(dtype).requires_grad_()
            head = head.to(dtype)
            # its loss, against the loss read off its table of all log-probabilities
            loss = head(h, y).loss if direct else -head.log_prob(h).gather(1, y[:, None]).mean()
            loss.backward()
            results.append({"loss": loss.detach().numpy(), "dh": h.grad.numpy()})
            head = head.float()
        errors[name] = compare(name, *results)
    candidates = peer_torch.head_candidates(problem.h, problem.weight, problem.targets, ranks)
    return {name: run for name, run in candidates.items() if name in errors}, errors


def make_session(data: TokenData, head: str, threads: int, positions: float) -> train.Session:
    """A model of v3's shape with this head and both optimisers, on the data's first step."""
    settings = [f"head.name={head}", f"positions={positions}", "log_prior=false"]
    if head == "dense":
        settings += [f"{name}={value}" for name, value in V3_LOSS.items()]
    run = RunConfig.recipe_named("default").with_settings(settings)
    run = dataclasses.replace(run, threads=threads, data=str(data.folder), data_hash=data.hash)
    model = assemble.new_model(run, data, lambda line: None)
    optimizer = Optimizer(model.parameters, model.gradients, train.optimizer_settings(run))
    return train.Session(run, data.folder, data, model, optimizer, {})


def measure_steps(data: TokenData, threads: int, repeats: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Whole training steps: tokens/s and shares of the step's time, ours and torch's, by candidate."""
    rates: dict[str, Any] = {}
    shares: dict[str, Any] = {}
    for name, head, positions in (
        ("dense", "dense", 1.0),
        ("dense@0.25", "dense", 0.25),
        ("tree", "tree", 1.0),
    ):
        session = make_session(data, head, threads, positions)
        seconds, parts = [], []
        for step in range(repeats + 2):
            done = train.do_step(session, STEP, step, lr=1e-3)
            if step >= 2:
                seconds.append(done.seconds)
                parts.append(done.shares)
        rates[name] = timing.rate(timing.summary(seconds), STEP.tokens)
        shares[name] = {part: round(float(np.median([p[part] for p in parts])), 4) for part in SHARES}
    if importlib.util.find_spec("torch") is None:
        return rates, shares
    import torch

    from tools import peer_torch

    torch.set_num_threads(threads)
    batch = f"{STEP.rows}x{STEP.length}"
    peers: dict[str, dict[str, Any]] = {
        "torch": V3_LOSS,
        "torch@0.25": {"positions": 0.25, **V3_LOSS},
        "torch:adaptive": {"adaptive_div": 1.0},
        "torch:adaptive-div4": {"adaptive_div": 4.0},
    }
    for name, options in peers.items():
        result = peer_torch.measure_step(batch, repeats=max(2, repeats // 2), data=data.folder, **options)
        rates[name], shares[name] = result["tokens_per_s"], result["shares"]
    return rates, shares


def say_rate(name: str, rate: Mapping[str, float] | None, unit: str, extra: str = "") -> None:
    """A line of the report."""
    if rate is None:
        click.echo(f"  {name:<22} torch is not installed: pip install -e '.[peer]'")
        return
    click.echo(f"  {name:<22} {rate['median']:>9,.0f} {unit}  ({rate['p20']:,.0f} to {rate['p80']:,.0f}){extra}")


@click.command(help=__doc__)
@click.option("--rows", type=click.IntRange(min=1), help="Positions in the batch. Default: 4,096 (quick: 1,024).")
@click.option("--vocab", type=click.IntRange(min=2), default=50_257, show_default=True, help="Tokens.")
@click.option("--dim", type=click.IntRange(min=1), default=256, show_default=True, help="Channels.")
@click.option("--threads", type=click.IntRange(min=1), help="Default: all cores.")
@click.option("--repeats", type=click.IntRange(min=1), help="Timed calls of each. Default: 7 (quick: 2).")
@click.option("--data", type=click.Path(path_type=Path), help="Prepared tokens. Default: the built-in text.")
@click.option("--steps/--no-steps", default=True, help="Also measure whole training steps (v3's shape).")
@click.option("--quick", is_flag=True, help="Fewer positions and repeats.")
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Write the results to this file.")
def main(
    rows: int | None,
    vocab: int,
    dim: int,
    threads: int | None,
    repeats: int | None,
    data: Path | None,
    steps: bool,
    quick: bool,
    json_path: Path | None,
) -> None:
    """See the module's docstring."""
    rows, repeats = rows or (1024 if quick else 4096), repeats or (2 if quick else 7)
    try:
        threads = set_threads(threads)
        tokens = open_tokens(data or default_corpus())
    except (UserError, ValueError) as error:
        raise click.ClickException(str(error)) from None
    problem = make_problem(tokens, rows, dim, vocab, seed=0)
    click.echo(f"{timing.cpu_name()}, {threads} threads; N = {rows:,} positions, V = {vocab:,}, C = {dim}")
    gemm = timing.gemm_rate(threads, rows=min(rows, 4096), dim=dim, vocab_size=vocab, repeats=min(repeats, 5))
    click.echo(f"  GEMM {gemm['best']:.0f} GFLOP/s (NumPy's BLAS, float32, best of four shapes)")

    names = ("dense", "tree:default", "tree:two-level")
    heads = {name: make_head(name, problem) for name in names}
    try:
        errors = {name: check_head(name, head, problem) for name, head in heads.items()}
        peers, peer_errors = torch_candidates(problem, threads)
    except WrongResultError as error:
        click.echo(str(error), err=True)
        sys.exit(1)
    errors |= peer_errors
    candidates: dict[str, Callable[[], Any]] = {
        name: (lambda head=head: run_head(head, problem)) for name, head in heads.items()
    }
    seconds = timing.measure({**candidates, **peers}, repeats, warmup=1)
    flop = 6.0 * vocab * dim  # of a position, dense: three products
    report: dict[str, Any] = {}
    click.echo("Forward and backward with all gradients, zeroing them included:")
    for name in (*names, "torch:eager", "torch:adaptive", "torch:adaptive-div4"):
        if name not in seconds:
            report[name] = None
            say_rate(name, None, "")
            continue
        rate = timing.rate(seconds[name], rows)
        extra = ""
        if name in ("dense", "torch:eager"):
            gflops = rate["median"] * flop * 1e-9
            extra = f"  {gflops:.0f} GFLOP/s, {gflops / gemm['best']:.0%} of the GEMM rate"
        report[name] = {"positions_per_s": rate, "max_grad_error": errors[name]}
        say_rate(name, rate, "positions/s", extra)
    step_rates: dict[str, Any] = {}
    shares: dict[str, Any] = {}
    if steps:
        step_rates, shares = measure_steps(tokens, threads, repeats)
        click.echo(f"Whole training steps, v3's shape, {STEP.rows} x {STEP.length} tokens, both optimisers:")
        for name, rate in step_rates.items():
            parts = ", ".join(f"{part} {share:.0%}" for part, share in shares[name].items())
            say_rate(name, rate, "tokens/s", f"  {parts}")
    if json_path is not None:
        timing.write_json(
            json_path,
            {
                "machine": timing.environment(threads),
                "rows": rows,
                "vocab_size": vocab,
                "dim": dim,
                "gemm_gflops": gemm["best"],
                "heads": report,
                "shares": shares,
                "steps": {name: {"tokens_per_s": rate} for name, rate in step_rates.items()},
                "peak_rss_mb": timing.peak_rss_mb(),
            },
        )


if __name__ == "__main__":
    main()
