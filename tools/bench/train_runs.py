"""Train and score one job of tools/bench_train.py, ours or PyTorch's, in a separate process."""

from __future__ import annotations

import itertools
import json
import math
import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import click

from flashlm_numba.data.shards import open_tokens
from flashlm_numba.model.settings import run_from_json
from tools.bench import machine
from tools.bench.processes import RunFailed, run_process
from tools.bench.train_candidates import OURS
from tools.bench.train_jobs import Job, differences

LOG_EVERY = 20  # steps between the lines of a log that is kept
PROMPT, SAMPLE_TOKENS = "The", 60  # of the texts that runs write at marks and the end


def measured(job: Job, data: Path, path: Path, runs: Path | None) -> dict[str, Any]:
    """Run a job. Returns its row for the results file at path. If it has marks, the run's log is saved next to path."""
    # what runs is the code of now, not of when it has ended
    stamp = machine.stamp(job.threads)
    with tempfile.TemporaryDirectory() as temporary:
        folder = runs / job.slug if runs is not None else Path(temporary)
        result = run_ours(job, data, folder) if job.name in OURS else run_baseline(job, data)
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
        **({"speed": dict(job.speed)} if job.speed else {}),
        "command": job.command,
        **result,
        "recipe": job.recipe,
        **stamp,
    }


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
                **_memory(found),
                "text": written("--checkpoint", name),
            }
        )
    info = json.loads(run_process(["-m", "flashlm_numba", "info", str(run), "--json"])[0])
    train = open_tokens(data).train
    return {
        "nll": score["nll"],
        "bits_per_byte": score["bits_per_byte"],
        **_memory(score),
        "scored_tokens": score["tokens"],
        "steps": last["step"],
        "tokens": last["tokens"],
        "seconds": last["seconds"],
        "parameters": info["parameters"],
        "peak_rss_mb": peak,
        "vocabulary": info["vocabulary"],
        "vocab_size": info["vocab_size"],
        "packed_bytes": info["bytes"]["packed"],
        "train_bytes_per_token": round(train.n_bytes / train.n_text_tokens, 4),
        **({"marks": at_marks, "text": written()} if job.marks else {}),
        **({"note": "it was interrupted; its peak memory is that of the last part."} if resumed else {}),
    }


def _memory(score: dict[str, Any]) -> dict[str, Any]:
    """The scores of a memory and of the model without it, if there is one, and its size."""
    return {"memory": score["memory"]} if "memory" in score else {}


def check_same(run: Path, job: Job, data: Path) -> None:
    """Raise ClickException if a saved run is not that of this job, since it would continue under the wrong name."""
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
    """Name and state of the checkpoint that `train` saved for each mark, in minutes, without marks not reached."""
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


def run_baseline(job: Job, data: Path) -> dict[str, Any]:
    """Train and score a PyTorch baseline. As in our runs, the measured speed converts minutes to steps."""
    command = job.command
    if job.minutes is not None and not job.published:
        # by training for a while: steps measured apart came out 40 % slower than those of a run, and the first half
        # minute 16 %
        rehearsal = ["--minutes", str(min(2, 0.1 * job.minutes)), "--no-final", "--validate-tokens", "1"]
        words = ["train", *job.baseline_words(1_000_000), *rehearsal, str(data), "--validate-every", "1e9"]
        text, _ = run_process(["-m", "tools.baseline", *words])
        last = json.loads(text.splitlines()[-1])
        steps = int((60 * job.minutes - last["start_seconds"]) * last["tokens_per_s"] / job.tokens_per_step)
        command = ["train", *job.baseline_words(max(1, steps)), *job.mark_words]
    text, _ = run_process(["-m", "tools.baseline", *command, str(data), "--validate-every", "1e9"])
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
