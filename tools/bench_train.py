"""What does training buy? Runs heads and settings, ours and PyTorch's, on the same data and budget, and compares NLL.

\b
    python tools/bench_train.py DATA results/NAME.json --tokens 300000 dense tree    equal tokens
    python tools/bench_train.py DATA results/NAME.json --minutes 10 dense tree       equal time of training
    python tools/bench_train.py DATA results/NAME.json --tokens 300000 --set adamw_lr=1e-3,2e-3,4e-3 dense tree
    python tools/bench_train.py --table results/NAME.json                             the rows as a Markdown table

With --minutes, --marks 1,5,7 scores every run at these minutes of its training too, outside the clock; ours write a
text there and at the end, and their metrics.jsonl is kept in results/NAME/. With --runs DIR the runs are kept in DIR,
and one that was interrupted goes on there.

DATA is a folder that `flashlm-numba prepare` made. Every run is a process of its own, scored on all validation
documents by the rule of `flashlm-numba eval`. A row is written as soon as its run has ended, and a run whose row is in
the file already, by the recipe as it is today, is left out: after an interruption, or on another day, the same command
goes on. Runs on equal tokens may share the machine with other work (their times then mean nothing); runs on equal time
need it alone. A peer that is interrupted begins anew.
"""

from __future__ import annotations

import dataclasses
import fcntl
import hashlib
import importlib.util
import itertools
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

if __package__ in (None, ""):  # run as a file, the checkout is not on the path
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from flashlm_numba.data.shards import open_tokens
from flashlm_numba.model.config import SECTIONS, RunConfig
from flashlm_numba.model.recipes import from_recipe
from flashlm_numba.model.settings import run_from_json
from flashlm_numba.system.errors import UserError
from flashlm_numba.system.threads import available_cores
from tools import timing

ROOT = Path(__file__).resolve().parents[1]

WARMUP, DECAY_SHARE = 100, 0.4  # of the default recipe; the torch peers get the same schedule
# what our default recipe does, in the peer's words: the same trunk, batches, start of E, loss, schedule and AdamW, and
# the rules as published (five Newton-Schulz iterations, every row stepped)
TORCH = {
    "batch": "8x256",
    "mixer-scale": "0.0625",
    "glu-scale": "3.814697265625e-06",
    "average-decay": "0.98",
    "induction-orders": "1,1,1,2,2,3",
    "induction-reach": "1024",
    "ternary-threshold": "0.5",
    "dilations": "1,4,64",
    "start": "corpus",
    "positions": "1",
    "label-smoothing": "0",
    "z-loss": "0",
    "normuon": "published",
    "adamw-lr": "2e-3",
    "trunk-lr-factor": "4",
    "adamw-beta1": "0",
    "adamw-beta2": "0.99",
    "weight-decay": "0",
    "warmup": str(WARMUP),
}
# the name of a setting of ours in the peer's command line
TORCH_OPTION = {"phases": "batch", "warmup_steps": "warmup"} | {
    name: name.replace("_", "-")
    for name in (
        "adamw_lr",
        "nonembedding_lr_scale",
        "adamw_beta1",
        "adamw_beta2",
        "normuon_lr",
        "mixer_residual_scale",
        "ffn_residual_scale",
        "leaky_decay",
        "ngram_copy_orders",
        "ngram_copy_reach",
        "dilations",
        "ternary_threshold",
    )
}
# FlashLM v3 as published, in the peer's words; these are also its own defaults
TORCH_V3 = {
    "batch": "1000:4x64x4,4000:4x128x4,7000:4x256x8,10000:4x512x8",
    "mixer-scale": "1",
    "glu-scale": "1",
    "average-decay": "0",
    "induction-orders": "",
    "induction-reach": "1024",
    "ternary-threshold": "1",
    "dilations": "1,4,64",
    "start": "random",
    "positions": "0.25",
    "label-smoothing": "0.1",
    "z-loss": "1e-4",
    "normuon": "v3",
    "adamw-lr": "3e-4",
    "trunk-lr-factor": "1",
    "adamw-beta1": "0.9",
    "adamw-beta2": "0.95",
    "weight-decay": "0.1",
    "warmup": "200",
    "decay": "1000",
    "total": "10000",
}
LOG_EVERY = 20  # steps between the lines of a log that is kept
PROMPT, SAMPLE_TOKENS = "The", 60  # of the texts that runs write at marks and the end
OURS: dict[str, tuple[str, ...]] = {
    "dense": ("--head", "dense"),
    "dense@0.25": ("--head", "dense", "--set", "loss_fraction=0.25"),
    "sampled": ("--head", "sampled"),
    "tree": ("--head", "tree"),
    "tree:frequency": ("--head", "tree", "--set", "tree_clustering=frequency"),
    "tree:adaptive": ("--tree", "adaptive"),
    "tree:two-level": ("--tree", "two-level"),
    "tree:balanced": ("--tree", "balanced"),
    "tree:clustered": ("--tree", "clustered"),
    "tree:huffman": ("--tree", "huffman"),
    "v3": ("--recipe", "v3"),
}
PEERS: dict[str, dict[str, str]] = {
    "torch:v3": {"head": "dense", **TORCH_V3},
    "torch:eager": {"head": "dense"},
    "torch:adaptive": {"head": "adaptive", "div-value": "1"},
    "torch:adaptive-div4": {"head": "adaptive", "div-value": "4"},
    "torch:adaptive@random": {"head": "adaptive", "div-value": "1", "start": "random"},
    "torch:adaptive-div4@random": {"head": "adaptive", "div-value": "4", "start": "random"},
}


QUIET = ("validate_every", "sample_tokens", "log_every", "checkpoint_minutes")  # settings that change no result


@dataclass(frozen=True)
class Job:
    """One run: what is trained, with which settings, for how long."""

    name: str
    settings: tuple[str, ...]  # key=value, beside the candidate's own
    seed: int
    tokens: int | None
    minutes: float | None
    threads: int
    marks: tuple[float, ...] = ()  # minutes of training before the end, to score at

    @property
    def slug(self) -> str:
        """A file name for this run, which no other recipe, setting or marks under the same name share."""
        budget = f"{self.tokens}tokens" if self.tokens is not None else f"{self.minutes:g}min"
        everything = json.dumps([self.key, self.recipe, self.marks], sort_keys=True)
        words = [self.name, budget, f"seed{self.seed}", hashlib.sha256(everything.encode()).hexdigest()[:8]]
        return "-".join(words).replace(":", "-")

    @property
    def key(self) -> dict[str, Any]:
        """What makes a row this job's: everything but the number of threads when the budget is in tokens."""
        budget = {"tokens_asked": self.tokens} if self.tokens is not None else {"minutes_asked": self.minutes}
        threads = {} if self.tokens is not None else {"threads": self.threads}
        return {"name": self.name, "settings": list(self.settings), "seed": self.seed, **budget, **threads}

    @property
    def recipe(self) -> dict[str, Any]:
        """What is trained: of ours the settings (see differences), of a peer its options."""
        if self.name in PEERS:
            return self.peer_settings
        words, recipe, settings = OURS[self.name], "default", list(self.settings)
        for option, value in zip(words[::2], words[1::2], strict=True):
            if option == "--recipe":
                recipe = value
            else:
                settings.insert(0, {"--head": f"head.name={value}", "--tree": f"head.tree={value}"}.get(option, value))
        return differences(from_recipe(recipe, settings))

    def made(self, row: dict[str, Any]) -> bool:
        """Whether a row of a results file is this job's: the same run by the same recipe, however it was asked for,
        with scores at these marks at least.

        Rows made before recipes were written down say by their settings how they differ from the recipe of the day.
        """
        if not set(self.marks) <= set(row.get("marks_asked", [mark["minutes"] for mark in row.get("marks", [])])):
            return False
        if "recipe" in row:
            asked = {**self.key, "recipe": self.recipe, "settings": row["settings"]}
            return asked.items() <= row.items()
        ordered = {**self.key, "settings": sorted(self.settings)}
        return ordered.items() <= {**row, "settings": sorted(row["settings"])}.items()

    @property
    def command(self) -> list[str]:
        """The arguments that train it, without the data and the run's folder; a peer's minutes become steps later."""
        if self.name in OURS:
            sets = itertools.chain.from_iterable(("--set", setting) for setting in self.settings)
            budget = ["--tokens", str(self.tokens)] if self.tokens is not None else ["--minutes", f"{self.minutes:g}"]
            return ["train", *OURS[self.name], *sets, *budget, "--seed", str(self.seed), "--threads", str(self.threads)]
        if self.tokens is None:
            return ["train", *self.peer_options(None), "--minutes", f"{self.minutes:g}", *self.peer_marks]
        return ["train", *self.peer_options(-(-self.tokens // self.peer_tokens))]

    @property
    def published(self) -> bool:
        """Whether this is a peer with a schedule of its own, that minutes only stop."""
        return "total" in PEERS.get(self.name, {})

    @property
    def peer_marks(self) -> list[str]:
        """The peer's options for marks."""
        return [word for mark in self.marks for word in ("--mark", f"{mark:g}")]

    @property
    def peer_settings(self) -> dict[str, str]:
        """The torch peer's options, but for its length."""
        options = {**TORCH, **PEERS[self.name]}
        for setting in self.settings:
            name, _, value = setting.partition("=")
            if name not in TORCH_OPTION:
                raise click.UsageError(f"{self.name} knows no setting {name}; it has {', '.join(TORCH_OPTION)}.")
            options[TORCH_OPTION[name]] = value
        return options

    @property
    def peer_tokens(self) -> int:
        """Tokens of a step of the torch peer, of batches of one shape."""
        return math.prod(int(size) for size in self.peer_settings["batch"].split("x"))

    def peer_options(self, steps: int | None) -> list[str]:
        """The torch peer's command line for so many steps; None: its own schedule."""
        options = self.peer_settings
        if steps is not None:
            options |= {"steps": str(steps), "decay": str(round(DECAY_SHARE * steps))}
        options |= {"seed": str(self.seed), "threads": str(self.threads)}
        return ["--fused", *itertools.chain.from_iterable((f"--{name}", value) for name, value in options.items())]


def differences(run: RunConfig) -> dict[str, Any]:
    """The settings of a run that differ from their fields' defaults (config.py), but for those of QUIET, as JSON gives
    them back: {"model.leaky_decay": 0.98, ...}. A setting that comes later does not change what older rows say.
    """
    found = {}
    for section in SECTIONS:
        part = getattr(run, section)
        for item in dataclasses.fields(part):
            if item.name not in QUIET and getattr(part, item.name) != item.default:
                found[f"{section}.{item.name}"] = getattr(part, item.name)
    return json.loads(json.dumps(found, default=dataclasses.asdict))


class RunFailed(click.ClickException):
    """A run that ended with an error of its own, as one whose loss diverged: the others can go on."""


def run_process(arguments: list[str]) -> tuple[str, float]:
    """Standard output of this Python with arguments, and its peak memory in MB; standard error is shown.

    RunFailed if it ends with status 1 or 2, an error of its own. ClickException if it was stopped: SIGINT, SIGTERM and
    SIGHUP are passed on to it, and it is waited for, since it may have something to save.
    """
    caught: list[int] = []

    def pass_on(number: int, frame: Any) -> None:
        caught.append(number)
        process.send_signal(number)

    with tempfile.TemporaryFile("w+", encoding="utf-8") as out:
        # a group of its own: Ctrl-C in a terminal reaches it through this process only, once
        process = subprocess.Popen([sys.executable, *arguments], stdout=out, cwd=ROOT, process_group=0)
        numbers = [n for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP) if signal.getsignal(n) != signal.SIG_IGN]
        before = {number: signal.signal(number, pass_on) for number in numbers}
        try:
            _, status, usage = os.wait4(process.pid, 0)
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
        process.returncode = os.waitstatus_to_exitcode(status)
        out.seek(0)
        text = out.read()
    if caught:
        stopped = click.ClickException(f"Stopped by {signal.Signals(caught[0]).name}.")
        stopped.exit_code = 128 + caught[0]
        raise stopped
    if process.returncode:
        failure = RunFailed if process.returncode in (1, 2) else click.ClickException
        raise failure(f"`{' '.join(arguments)}` ended with status {process.returncode}.")
    return text, usage.ru_maxrss * 1024e-6


def run_ours(job: Job, data: Path, folder: Path) -> dict[str, Any]:
    """Train and score one of our candidates."""
    run = folder / "run"
    marks = ",".join(f"{mark:g}" for mark in job.marks)
    quiet = ["--set", "validate_every=0", "--set", "sample_tokens=0", "--set", f"checkpoint_minutes={marks}"]
    quiet += ["--set", f"log_every={LOG_EVERY if job.marks else 1}"]
    words = [*job.command, str(data), *quiet, "--out"]
    resumed = (run / "config.json").exists()
    if resumed:
        check_same(run, job, data)
        words = ["train", "--resume"]
    _, peak = run_process(["-m", "flashlm_numba", *words, str(run)])
    last = json.loads((run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[-1])

    def scored(*which: str) -> dict[str, Any]:
        words = ["eval", str(run), *which, "--threads", str(job.threads), "--json"]
        return json.loads(run_process(["-m", "flashlm_numba", *words])[0])

    def written(*which: str) -> str:
        words = ["generate", str(run), *which, "--prompt", PROMPT, "--max-tokens", str(SAMPLE_TOKENS)]
        words += ["--temperature", "0.8", "--top-k", "40", "--seed", "1"]
        return run_process(["-m", "flashlm_numba", *words])[0].strip()

    score = scored()
    at_marks = []
    for mark, (name, state) in kept_checkpoints(run, job.marks).items():
        found = scored("--checkpoint", name)
        at_marks.append(
            {
                "minutes": mark,
                "seconds": state["seconds"],
                "tokens": state["tokens"],
                "nll": found["nll"],
                "bits_per_byte": found["bits_per_byte"],
                "text": written("--checkpoint", name),
            }
        )
    info = json.loads(run_process(["-m", "flashlm_numba", "info", str(run), "--json"])[0])
    return {
        "nll": score["nll"],
        "bits_per_byte": score["bits_per_byte"],
        "scored_tokens": score["tokens"],
        "steps": last["step"],
        "tokens": last["tokens"],
        "seconds": last["seconds"],
        "parameters": info["parameters"],
        "peak_rss_mb": peak,
        **({"marks": at_marks, "text": written()} if job.marks else {}),
        **({"remark": "it was interrupted; its peak memory is that of the last part."} if resumed else {}),
    }


def check_same(run: Path, job: Job, data: Path) -> None:
    """ClickException if a run that was kept is another than this job's: it would go on under the wrong name."""
    config = run_from_json((run / "config.json").read_text(encoding="utf-8"), run / "config.json")
    there, wanted = differences(config), job.recipe
    names = sorted(name for name in there.keys() | wanted.keys() if there.get(name) != wanted.get(name))
    pairs = {
        "seed": (config.seed, job.seed),
        "threads": (config.threads, job.threads),
        "marks": (config.training.checkpoint_minutes, job.marks),
        "data": (config.data_hash, open_tokens(data).hash),
        "settings": ({n: there.get(n) for n in names}, {n: wanted.get(n) for n in names}),
    }
    for name, (begun, asked) in pairs.items():
        if begun != asked:
            raise click.ClickException(
                f"{run} was begun with other {name} ({begun}, not {asked}); use the same, or another --runs."
            )


def kept_checkpoints(run: Path, marks: Iterable[float]) -> dict[float, tuple[str, dict[str, Any]]]:
    """Name and state of the checkpoint that `train` kept for each mark, in minutes; marks not reached are left out."""
    states = []
    for path in (run / "checkpoints").glob("step-*/state.json"):
        state = json.loads(path.read_text(encoding="utf-8"))
        if state.get("keep"):
            states.append((state["seconds"], path.parent.name, state))
    found = {}
    marks = sorted(marks)
    for mark, following in itertools.zip_longest(marks, marks[1:], fillvalue=float("inf")):
        reached = [item for item in sorted(states, key=lambda item: item[0]) if 60 * mark <= item[0] < 60 * following]
        if reached:
            found[mark] = (reached[0][1], reached[0][2])
    return found


def run_peer(job: Job, data: Path) -> dict[str, Any]:
    """Train and score one of the PyTorch peers; minutes become steps by its speed, measured first, as ours do."""
    command = job.command
    if job.minutes is not None and not job.published:
        # by training for a while: steps measured apart came out 40 % slower than those of a run, and the first half
        # minute 16 %
        rehearsal = ["--minutes", str(min(2, 0.1 * job.minutes)), "--no-final", "--validate-tokens", "1"]
        words = ["train", *job.peer_options(1_000_000), *rehearsal, str(data), "--validate-every", "1e9"]
        text, _ = run_process(["tools/peer_torch.py", *words])
        last = json.loads(text.splitlines()[-1])
        steps = int((60 * job.minutes - last["start_seconds"]) * last["tokens_per_s"] / job.peer_tokens)
        command = ["train", *job.peer_options(max(1, steps)), *job.peer_marks]
    text, _ = run_process(["tools/peer_torch.py", *command, str(data), "--validate-every", "1e9"])
    lines = [json.loads(line) for line in text.splitlines()]
    last = lines[-1]
    if not math.isfinite(last["val_nll"]):
        raise RunFailed(f"The loss of {job.name} is {last['val_nll']} after step {last['step']}.")
    at_marks = [
        {
            "minutes": line["mark"],
            "seconds": line["seconds"],
            "tokens": line["tokens"],
            "nll": line["val_nll"],
            "bits_per_byte": line["val_bits_per_byte"],
        }
        for line in lines
        if "mark" in line
    ]
    return {
        "nll": last["val_nll"],
        "bits_per_byte": last["val_bits_per_byte"],
        "scored_tokens": last["val_tokens"],
        "steps": last["step"],
        "tokens": last["tokens"],
        "seconds": last["seconds"],
        "parameters": next(line["parameters"] for line in lines if "parameters" in line),
        "peak_rss_mb": last["peak_rss_mb"],
        "command": command,
        **({"marks": at_marks} if at_marks else {}),
    }


def text_tokens(data: Path) -> dict[str, int]:
    """Tokens of text in each split of prepared data. UsageError where there is none to score by, or no data."""
    try:
        splits = open_tokens(data).manifest.splits
    except UserError as error:
        raise click.UsageError(str(error)) from None
    size = {name: split.text_tokens for name, split in splits.items()}
    if not size["validation"]:
        raise click.UsageError(f"{data} holds no validation text to score by; prepare it with some.")
    return size


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a results file; none if it is not there yet. BadParameter if it holds something else."""
    if not path.exists():
        return []
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
        if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
            raise TypeError("rows")
        return rows
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise click.BadParameter(
            f"{path} is no results file of this program ({type(error).__name__}); name another, or a new one."
        ) from None


def add_row(path: Path, row: dict[str, Any]) -> None:
    """Add a row to the file as it is now: another process may have added its own. All of it is written, or nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)  # until it is closed
        timing.write_json(path, {"rows": [*read_rows(path), row]})
    finally:
        os.close(folder)


def table(rows: Iterable[dict[str, Any]]) -> str:
    """The rows as a Markdown table, by budget, then NLL."""
    lines = [
        "| head | settings | seed | budget | NLL | bits/byte | seconds | tokens | tokens/s | parameters | peak MB |",
        "| --- | --- | ---: | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]

    def budget(row: dict[str, Any]) -> str:
        return f"{row['tokens_asked']:,} tokens" if "tokens_asked" in row else f"{row['minutes_asked']:g} minutes"

    for row in sorted(rows, key=lambda row: (budget(row), row["nll"])):
        lines.append(
            f"| {row['name']} | {' '.join(row['settings']) or '-'} | {row['seed']} | {budget(row)} | {row['nll']:.3f} "
            f"| {row['bits_per_byte']:.4f} | {row['seconds']:.0f} | {row['tokens']:,} "
            f"| {row['tokens'] / row['seconds']:,.0f} "
            f"| {row['parameters']:,} | {row['peak_rss_mb']:,.0f} |"
        )
    return "\n".join(lines)


def expand(settings: Iterable[str]) -> list[tuple[str, ...]]:
    """Every combination of `key=a,b` lists, as tuples of `key=value`.

    >>> expand(["adamw_lr=1e-3,2e-3", "clip=1"])
    [('adamw_lr=1e-3', 'clip=1'), ('adamw_lr=2e-3', 'clip=1')]
    >>> expand(["dilations=[1,4,16],[1,4,64]"])  # commas in brackets belong to the value
    [('dilations=[1,4,16]',), ('dilations=[1,4,64]',)]
    """
    lists = []
    for text in settings:
        name, equals, values = text.partition("=")
        if not equals:
            raise click.UsageError(f"--set takes key=value or key=value,value, got '{text}'.")
        lists.append([f"{name}={value}" for value in re.split(r",(?![^\[]*\])", values)])
    return list(itertools.product(*lists))


@click.command(help=__doc__)
@click.argument("data_and_results", nargs=-1, metavar="[DATA RESULTS.json NAME...]")
@click.option("--tokens", type=click.IntRange(min=1), help="Budget of every run in tokens.")
@click.option("--minutes", type=click.FloatRange(min=0, min_open=True), help="Budget in minutes of training.")
@click.option("--marks", default="", metavar="A,B", help="Score each run at these minutes of training too.")
@click.option("--runs", type=click.Path(path_type=Path, file_okay=False), help="Keep the runs here, and resume them.")
@click.option("--seed", "seeds", type=int, multiple=True, default=(1,), show_default=True)
@click.option(
    "--set", "settings", multiple=True, metavar="KEY=A,B", help="A setting, or several in turn; [A,B] is one."
)
@click.option("--threads", type=click.IntRange(min=1), default=available_cores(), show_default=True)
@click.option("--table", "table_path", type=click.Path(path_type=Path, exists=True), help="Print this file's rows.")
def main(
    data_and_results: tuple[str, ...],
    tokens: int | None,
    minutes: float | None,
    marks: str,
    runs: Path | None,
    seeds: tuple[int, ...],
    settings: tuple[str, ...],
    threads: int,
    table_path: Path | None,
) -> None:
    if table_path is not None:
        click.echo(table(read_rows(table_path)))
        return
    if len(data_and_results) < 3 or (tokens is None) == (minutes is None):
        raise click.UsageError("Give DATA, RESULTS.json, one name or more, and either --tokens or --minutes.")
    data, path, names = Path(data_and_results[0]).resolve(), Path(data_and_results[1]), data_and_results[2:]
    if unknown := [name for name in names if name not in OURS and name not in PEERS]:
        raise click.UsageError(f"There is no {unknown[0]}; there are {', '.join([*OURS, *PEERS])}.")
    if tokens is not None and (own := [name for name in names if "total" in PEERS.get(name, {})]):
        raise click.UsageError(
            f"{own[0]} has a schedule of its own and is stopped by --minutes; --tokens is for others."
        )
    if importlib.util.find_spec("torch") is None and (peers := [name for name in names if name in PEERS]):
        raise click.UsageError(f"{peers[0]} needs torch, which is not installed: pip install -e '.[peer]'")
    timing.check_writable(path)
    read_rows(path)
    combinations = expand(settings)
    try:
        at = tuple(sorted(float(mark) for mark in marks.split(",") if mark.strip()))
    except ValueError:
        raise click.UsageError(f"--marks takes minutes separated by commas, got '{marks}'.") from None
    if at and (minutes is None or not 0 < at[0] <= at[-1] < minutes):
        raise click.UsageError("--marks must lie between 0 and --minutes.")
    jobs = [
        Job(name, combination, seed, tokens, minutes, threads, at)
        for combination in combinations
        for seed in seeds
        for name in names
    ]
    try:
        for job in jobs:
            _ = job.recipe
    except UserError as error:
        raise click.UsageError(str(error)) from None
    size = text_tokens(data)
    runs = None if runs is None else runs.resolve()
    failures = []
    for number, job in enumerate(jobs, 1):
        if any(job.made(row) and row.get("data", size) == size for row in read_rows(path)):
            click.echo(f"[{number}/{len(jobs)}] {path} has its row already: {' '.join(job.command)}", err=True)
            continue
        click.echo(f"[{number}/{len(jobs)}] {' '.join(job.command)}", err=True)
        try:
            row = {**measured(job, data, path, runs), "data": size}
        except (RunFailed, UserError) as error:
            click.echo(f"Error: {error}", err=True)
            failures.append(job)
            continue
        try:
            add_row(path, row)
        except (OSError, click.ClickException) as error:  # hours of work: the row is not lost
            click.echo(json.dumps(row))
            why = error.message if isinstance(error, click.ClickException) else error.strerror
            raise click.ClickException(f"{path} cannot be written ({why}); the row is above.") from None
        click.echo(table([row]).splitlines()[-1], err=True)
    if failures:
        names = ", ".join(" ".join([job.name, *job.settings]) for job in failures)
        raise click.ClickException(f"{len(failures)} of {len(jobs)} runs failed, see above: {names}.")


def measured(job: Job, data: Path, path: Path, runs: Path | None) -> dict[str, Any]:
    """Do a job; returns its row for the results file at path, beside which the run's log is kept if it has marks."""
    # what runs is the code of now, not of when it has ended
    stamp = {
        "commit": timing.commit(),
        "machine": timing.environment(job.threads),
        "date": time.strftime("%Y-%m-%d"),
    }
    with tempfile.TemporaryDirectory() as temporary:
        folder = runs / job.slug if runs is not None else Path(temporary)
        result = run_ours(job, data, folder) if job.name in OURS else run_peer(job, data)
        if job.marks and job.name in OURS:
            log = path.with_suffix("") / f"{job.slug}.jsonl"
            try:
                log.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(folder / "run" / "metrics.jsonl", log)
            except OSError as error:
                click.echo(f"{log} cannot be written ({error.strerror}); the row is kept without it.", err=True)
    return {
        **job.key,
        **({"marks_asked": list(job.marks)} if job.marks else {}),
        "command": job.command,
        **result,
        "recipe": job.recipe,
        **stamp,
    }


if __name__ == "__main__":
    main()
