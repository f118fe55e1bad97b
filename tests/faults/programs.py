"""Training in a process of its own, as a user has it, on a tiny model: what the tests of faults kill and resume."""

from __future__ import annotations

import collections
import json
import os
import subprocess
import sys
import time
from pathlib import Path

from helpers import TINY
from safetensors.numpy import load_file

from flashlm_numba.model import checkpoint

# how many random moments; the long form, by hand: FLASHLM_NUMBA_KILLS=50 pytest tests/faults
KILLS = int(os.environ.get("FLASHLM_NUMBA_KILLS", "3"))
STEPS = 160
INJECTED: collections.Counter[str] = collections.Counter()  # faults by kind, for the summary
SETTINGS = (*TINY, "checkpoint_every=4", "validate_every=20", "log_every=1")  # most of the time goes into saving


def train_command(corpus: Path, folder: Path, *more: object) -> list[str]:
    settings = [word for setting in SETTINGS for word in ("--set", setting)]
    words = ["train", corpus, "--out", folder, "--steps", STEPS, "--threads", 1, "--seed", 7, *settings, *more]
    return [sys.executable, "-m", "flashlm_numba", *map(str, words)]


def resume_command(folder: Path) -> list[str]:
    return [sys.executable, "-m", "flashlm_numba", "train", "--resume", str(folder)]


def begin(command: list[str]) -> subprocess.Popen[str]:
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def lines(folder: Path) -> list[dict]:
    """The log's whole lines."""
    path = folder / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]


def count_lines(folder: Path) -> int:
    path = folder / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def wait_for_lines(process: subprocess.Popen[str], folder: Path, count: int) -> None:
    """Until the log has so many lines, or the process has ended."""
    deadline = time.monotonic() + 240
    while process.poll() is None and count_lines(folder) < count:
        assert time.monotonic() < deadline
        time.sleep(0.002)


def losses(folder: Path) -> list[tuple]:
    return [(line["step"], line["loss"], line["nll"], line.get("val_nll")) for line in lines(folder)]


def bits(folder: Path) -> dict[str, bytes]:
    """Every tensor of the newest checkpoint, weights and moments."""
    path = checkpoint.find(folder)
    return {
        f"{file.stem}.{name}": value.tobytes()
        for file in sorted(path.glob("*.safetensors"))
        for name, value in load_file(file).items()
    }


def assert_every_checkpoint_is_whole(folder: Path) -> None:
    for path in (folder / "checkpoints").glob("step-*"):
        assert checkpoint.damage(path) is None, path
