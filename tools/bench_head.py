"""Speed of the heads, and their share of a training step.

\b
    python tools/bench_head.py                      every candidate at 4,096 positions, then whole training steps
    python tools/bench_head.py --quick              fewer positions, repeats and candidates; a minute once compiled
    python tools/bench_head.py --head dense --head tree:huffman --no-steps        only these
    python tools/bench_head.py --json out.json      write what was measured
    python tools/bench_head.py --plot out.png       draw each part's share of a training step (needs matplotlib)
    python tools/bench_head.py --scaling --plot out.png     also cost against V and N, drawn in out-scaling.png
    python tools/bench_head.py --table out.json     print the tables of a written file as Markdown; measures nothing

All candidates get the same positions: random hidden states, the next tokens of the built-in text, and the initial
embedding. Before timing a candidate, the program checks its loss and gradients, at all positions and of all rows,
against float64. A wrong result ends the program with status 1 (tools/bench/). Then it times the candidates alternately
and prints medians with the 20 % and 80 % quantiles. GFLOP/s count matrix products only. The GEMM rate is the best
median over 2048 cubed and the dense head's three products at N = 4,096 (quick: at the batch's N). GB/s count h, the
rows read, dh and all gradients once each, so they are a lower bound. Scratch is the size of the head's arrays after a
call.

Each kind of training step runs in processes of its own, which take turns. If torch is installed, the PyTorch baselines
(tools/baseline/) are measured too, eager and compiled. All processes keep the memory that they free, since PyTorch
otherwise spends up to half of a dense step in page faults (tools/bench/allocators.py); the candidates @untuned show
that. Ratios are of equal losses and to PyTorch's fastest candidate. Use a quiet machine.
"""

from __future__ import annotations

import importlib.util
import itertools
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

if __package__ in (None, ""):  # run as a file, the checkout is not on the path
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from flashlm_numba.data.builtin import default_corpus
from flashlm_numba.data.shards import open_tokens
from flashlm_numba.model.settings import parse_phase
from flashlm_numba.system.display import peak_rss_mb
from flashlm_numba.system.errors import UserError
from flashlm_numba.system.threads import set_threads
from tools.bench import allocators, charts, head_check, head_problem, head_report, machine, output, timing
from tools.bench.head_candidates import CANDIDATES, QUICK
from tools.bench.head_problem import Candidate, Problem, UnavailableError
from tools.bench.our_heads import forget_references
from tools.bench.processes import RunFailed, run_process
from tools.bench.steps import QUICK_STEPS, STEPS, measure_steps

BY_ROWS = 2048  # a second batch size, at which the dense heads are measured too
DENSE = ("dense", "torch:eager")
UNTUNED = ("torch:eager", "torch:adaptive", "torch:adaptive-div4")  # also with the system's allocator
SCALED = ("dense", "tree:adaptive", "torch:eager", "torch:tree")
VOCABULARIES = (1_000, 4_000, 16_000, 50_257, 256_000)  # at SCALED_ROWS positions
SCALED_ROWS = 1024
ROWS = (64, 256, 1024, 4096)  # at GPT-2's vocabulary
WIDEST_LOGITS = 1.1e9  # bytes: torch's dense head keeps the (N, V) logits several times over


def prepare(names: Sequence[str], problem: Problem) -> tuple[dict[str, Candidate], dict[str, float], dict[str, str]]:
    """Make and check the named candidates. Returns those available, their largest errors, and why others are missing.

    Raises WrongResultError, naming candidate and array, at the first wrong result.
    """
    candidates, errors, missing = {}, {}, {}
    for name in names:
        try:
            candidates[name] = CANDIDATES[name](problem)
        except UnavailableError as error:
            missing[name] = str(error)
            continue
        errors[name] = head_check.check(name, candidates[name])
    forget_references()
    return candidates, errors, missing


def measure_heads(
    names: Sequence[str], problem: Problem, repeats: int, gemm_gflops: float
) -> tuple[dict[str, Any], dict[str, str]]:
    """name -> entry of a head in the JSON, or None if it cannot run here; and the reasons of those that cannot."""
    candidates, errors, missing = prepare(names, problem)
    seconds = timing.measure({name: candidate.run for name, candidate in candidates.items()}, repeats, warmup=1)
    report: dict[str, Any] = {}
    for name in names:
        if name in missing:
            report[name] = None
            continue
        candidate, gflops = candidates[name], candidates[name].flop * 1e-9 / seconds[name]["median"]
        report[name] = {
            "positions_per_s": timing.rate(seconds[name], len(problem.targets)),
            "gflops": gflops,
            "share_of_gemm": gflops / gemm_gflops,
            "gbytes_per_s": candidate.nbytes * 1e-9 / seconds[name]["median"],
            "peak_scratch_mb": candidate.scratch_mb(),
            "max_grad_error": errors[name],
            "loss": {},  # plain
            "allocator": allocators.current(),
        }
    return report, missing


def measure_scaling(
    dim: int, repeats: int, vocabularies: Sequence[int] = VOCABULARIES, rows: Sequence[int] = ROWS
) -> dict[str, Any]:
    """Positions/s against V and against N: {"vocab": {name: {V: {median, p20, p80}}}, "rows": ..., the fixed sizes}.

    Tokens follow Zipf's law, and trees are built by frequency. Each candidate is checked on the first 64 positions of
    its batch. torch's dense head is left out if its logits would exceed WIDEST_LOGITS.
    """
    result: dict[str, Any] = {"vocab": {}, "rows": {}, "vocab_at_rows": SCALED_ROWS, "rows_at_vocab": 50_257}
    batches = [("vocab", v, SCALED_ROWS, v) for v in vocabularies] + [("rows", n, n, 50_257) for n in rows]
    for axis, size, n, vocab in batches:
        problem = head_problem.zipf_problem(n, dim, vocab)
        names = [name for name in SCALED if name != "torch:eager" or 4 * n * vocab <= WIDEST_LOGITS]
        _, _, missing = prepare(names, problem.first(64))
        names = [name for name in names if name not in missing]
        runs = {name: CANDIDATES[name](problem).run for name in names}
        for name, seconds in timing.measure(runs, repeats, warmup=1).items():
            result[axis].setdefault(name, {})[str(size)] = timing.rate(seconds, n)
            click.echo(f"  {name:<22} V = {vocab:>7,}, N = {n:>5,}: {n / seconds['median']:>11,.0f} positions/s")
    return result


def say_machine(machine: Mapping[str, Any]) -> None:
    """CPU, threads, BLAS and versions, three lines."""
    click.echo(f"{machine['cpu']}, {machine['threads']} threads of {machine['cores']}; load {machine['load_1min']}")
    click.echo("  BLAS: " + "; ".join(f"{b['library']} {b['version']}, core {b['core']}" for b in machine["blas"]))
    click.echo("  " + ", ".join(f"{name} {version}" for name, version in machine["versions"].items() if version))


def say_rate(name: str, rate: Mapping[str, float], unit: str, extra: str) -> None:
    """A line of the report."""
    click.echo(f"  {name:<22} {rate['median']:>9,.0f} {unit}  ({rate['p20']:,.0f} to {rate['p80']:,.0f})  {extra}")


def say_head(name: str, head: Mapping[str, Any] | None, missing: Mapping[str, str]) -> None:
    """A line of the report about a head, or why it is not there."""
    if head is None:
        click.echo(f"  {name:<22} {missing[name]}")
        return
    extra = (
        f"{head['gflops']:.1f} GFLOP/s, {head['share_of_gemm']:.0%} of the GEMM rate, {head['gbytes_per_s']:.1f} GB/s"
    )
    if head["peak_scratch_mb"] is not None:
        extra += f", scratch {head['peak_scratch_mb']:.0f} MB"
    say_rate(name, head["positions_per_s"], "positions/s", extra)


@click.command(help=__doc__)
@click.option("--rows", type=click.IntRange(min=1), help="Positions in the batch. Default: 4,096 (quick: 1,024).")
@click.option("--vocab", type=click.IntRange(min=2), default=50_257, show_default=True, help="Tokens.")
@click.option("--dim", type=click.IntRange(min=1), default=256, show_default=True, help="Channels.")
@click.option("--threads", type=click.IntRange(min=1), help="Default: all cores.")
@click.option("--repeats", type=click.IntRange(min=1), help="Timed calls of each. Default: 7 (quick: 2).")
@click.option(
    "--head", "heads", multiple=True, type=click.Choice(list(CANDIDATES)), help="Only these; may be repeated."
)
@click.option("--data", type=click.Path(path_type=Path), help="Prepared tokens. Default: the built-in text.")
@click.option("--steps/--no-steps", default=True, help="Also measure whole training steps (v3's shape).")
@click.option("--batch", default="16x128", show_default=True, help="Of a step: ROWSxLENGTHxMICRO_BATCHES.")
@click.option("--scaling", is_flag=True, help="Also measure cost against V and N; takes minutes.")
@click.option("--quick", is_flag=True, help="Fewer positions, repeats and candidates.")
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Write the results to this file.")
@click.option("--plot", "plot_path", type=click.Path(path_type=Path), help="Draw the shares of a step into this PNG.")
@click.option("--table", "table_path", type=click.Path(exists=True, path_type=Path), help="Print this JSON's tables.")
def main(table_path: Path | None, **options: Any) -> None:
    """See the module's docstring."""
    if table_path is not None:
        result = json.loads(table_path.read_text(encoding="utf-8"))
        tables = (
            head_report.summary_table,
            head_report.ratios_table,
            head_report.savings_table,
            head_report.heads_table,
        )
        click.echo("\n\n".join(filter(None, (table(result) for table in tables))))
        return
    run(Options(**options))


@dataclass(frozen=True)
class Options:
    """Options of the command line. None stands for the default, which --quick changes."""

    rows: int | None
    vocab: int
    dim: int
    threads: int | None
    repeats: int | None
    heads: tuple[str, ...]
    data: Path | None
    steps: bool
    batch: str
    scaling: bool
    quick: bool
    json_path: Path | None
    plot_path: Path | None

    def check(self) -> None:
        """Raise a click exception before measuring if a plot cannot be drawn or a file cannot be written."""
        if self.plot_path is not None and not (self.steps or self.scaling):
            raise click.UsageError(
                "--plot draws training steps and --scaling; with --no-steps alone there is nothing to draw"
            )
        if self.plot_path is not None and not charts.can_plot():
            raise click.ClickException("--plot needs matplotlib: pip install -e '.[dev]', or pip install matplotlib")
        for path in (self.json_path, self.plot_path):
            if path is not None:
                output.check_writable(path)


def run(options: Options) -> None:
    """Measure, report and write according to the options."""
    options.check()
    quick, vocab, dim = options.quick, options.vocab, options.dim
    rows, repeats = options.rows or (1024 if quick else 4096), options.repeats or (2 if quick else 7)
    try:
        parse_phase(options.batch)
        threads = set_threads(options.threads)
        tokens = open_tokens(options.data or default_corpus())
    except (UserError, ValueError) as error:
        raise click.ClickException(str(error)) from None
    if has_torch():
        import torch

        torch.set_num_threads(threads)
    stamp = machine.stamp(threads)
    say_machine(stamp["machine"])
    problem = head_problem.make_problem(tokens, rows, dim, vocab, seed=0)
    gemm_rows = min(rows, 4096) if quick else 4096
    gemm = machine.gemm_rate(threads, rows=gemm_rows, dim=dim, vocab_size=vocab, repeats=min(repeats, 5))["best"]
    click.echo(f"  GEMM {gemm:.0f} GFLOP/s (NumPy's BLAS, float32, best of four shapes)")
    try:
        heads = report_heads(options.heads or (QUICK if quick else tuple(CANDIDATES)), problem, repeats, gemm)
        if not quick and allocators.current() != "default":
            heads |= untuned_heads(options, heads, rows, threads, repeats)
        curves = None
        if options.scaling:
            click.echo("Cost against the vocabulary and the batch:")
            curves = measure_scaling(dim, min(repeats, 5))
    except timing.WrongResultError as error:
        click.echo(str(error), err=True)
        sys.exit(1)
    steps = report_steps(options, tokens.folder, threads, repeats) if options.steps else {}
    result = {
        "machine": stamp["machine"],
        "rows": rows,
        "vocab_size": vocab,
        "dim": dim,
        "gemm_gflops": gemm,
        "heads": heads,
        "shares": {name: step["shares"] for name, step in steps.items()},
        "batch": options.batch,
        "steps": steps,
        **({"scaling": curves} if curves else {}),
        "peak_rss_mb": peak_rss_mb(),
        "commit": stamp["commit"],
        "date": stamp["date"],
    }
    for table in (head_report.ratios_table(result), head_report.savings_table(result)):
        click.echo(f"\n{table}\n" if table else "", nl=False)
    click.echo(f"Peak memory of this process: {result['peak_rss_mb'] or float('nan'):,.0f} MB")
    if options.json_path is not None:
        output.write_json(options.json_path, result)
    if options.plot_path is not None:
        for path in head_report.plot(result, options.plot_path):
            click.echo(f"wrote {path}")


def report_heads(names: Sequence[str], problem: Problem, repeats: int, gemm_gflops: float) -> dict[str, Any]:
    """Measure the named heads, the dense ones also at BY_ROWS positions, and print one line per head."""
    report, missing = measure_heads(names, problem, repeats, gemm_gflops)
    rows, vocab = len(problem.targets), len(problem.weight)
    click.echo(f"Forward and backward with all gradients, zeroing them included; {rows:,} positions, V = {vocab:,}:")
    for name in names:
        say_head(name, report[name], missing)
    dense = [name for name in DENSE if report.get(name)]
    if rows > BY_ROWS and dense:
        click.echo(f"The same at {BY_ROWS:,} positions:")
        for name, entry in measure_heads(dense, problem.first(BY_ROWS), repeats, gemm_gflops)[0].items():
            report[name]["by_rows"] = {str(BY_ROWS): entry}
            say_head(name, entry, {})
    return report


def untuned_heads(
    options: Options, heads: Mapping[str, Any], rows: int, threads: int, repeats: int
) -> dict[str, dict[str, Any]]:
    """PyTorch's heads among `heads` with the system's allocator as it comes, measured by another process."""
    names = [name for name in UNTUNED if heads.get(name)]
    if not names:
        return {}
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "heads.json"
        words = [str(Path(__file__).resolve()), "--no-steps", "--json", str(out), "--rows", str(rows)]
        words += ["--vocab", str(options.vocab), "--dim", str(options.dim), "--threads", str(threads)]
        words += ["--repeats", str(repeats), *itertools.chain.from_iterable(("--head", name) for name in names)]
        words += [] if options.data is None else ["--data", str(options.data.resolve())]
        say_progress("PyTorch's heads with the system's allocator")
        run_process(words, allocators.environment_of("default"))
        found = json.loads(out.read_text(encoding="utf-8"))["heads"]
    found = {f"{name}@untuned": entry for name, entry in found.items()}
    for name, entry in found.items():
        say_head(name, entry, {})
    return found


def report_steps(options: Options, data: Path, threads: int, repeats: int) -> dict[str, dict[str, Any]]:
    """Measure complete training steps, each kind in processes of its own, and print one line per kind."""
    names = [name for name, step in STEPS.items() if not step.peer or has_torch()]
    if options.quick:
        names = [name for name in names if name in QUICK_STEPS]
    if shutil.which(os.environ.get("CXX", "g++")) is None:
        names = [name for name in names if not STEPS[name].options.get("compiled")]
    try:
        steps = measure_steps(
            names, data, threads, repeats, options.batch, say_progress, turns=1 if options.quick else 3
        )
    except RunFailed as error:
        raise click.ClickException(f"A training step could not be measured: {error.message}") from None
    click.echo(f"Whole training steps, v3's shape, {options.batch} tokens, both optimisers:")
    for name, step in steps.items():
        parts = ", ".join(f"{part} {share:.0%}" for part, share in step["shares"].items())
        say_rate(name, step["tokens_per_s"], "tokens/s", f"{parts}; {step['peak_rss_mb']:,} MB")
    return steps


def say_progress(text: str) -> None:
    """Show what is measured now, on a terminal or in a log."""
    click.echo(f"  measuring {text} ...", err=True)


def has_torch() -> bool:
    """Whether PyTorch is installed."""
    return importlib.util.find_spec("torch") is not None


if __name__ == "__main__":
    allocators.restart()
    main()
