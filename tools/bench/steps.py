"""Complete training steps of FlashLM v3's shape, ours and PyTorch's: tokens per second, and the share of each part.

Every candidate runs in a process of its own, which starts with the candidate's allocator (allocators.py). The processes
take turns, so that a drift of the machine affects all of them equally. Two candidates do the same work only if their
losses are the same.
"""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from flashlm_numba.data.shards import TokenData, open_tokens
from flashlm_numba.model import build
from flashlm_numba.model.config import Phase
from flashlm_numba.model.recipes import from_recipe
from flashlm_numba.model.settings import parse_phase
from flashlm_numba.system.display import peak_rss_mb
from flashlm_numba.system.threads import set_threads
from flashlm_numba.training.inputs import with_vocabulary_of
from flashlm_numba.training.optimizer import Optimizer
from flashlm_numba.training.session import Session
from flashlm_numba.training.step import train_step
from tools.bench import allocators, timing
from tools.bench.processes import run_process

PARTS = ("embedding", "trunk", "head", "optimizer")
WARMUP = 2  # steps of every process that are not timed
V3_LOSS = {"label_smoothing": 0.1, "z_loss": 1e-4}


@dataclasses.dataclass(frozen=True)
class Step:
    """A kind of training step.

    peer : whether it is PyTorch's;  options : the head and what else differs, as make_session or step_seconds take it
    loss : label smoothing and z-loss; empty is the plain negative log-likelihood
    """

    peer: bool = False
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    loss: Mapping[str, float] = dataclasses.field(default_factory=dict)
    allocator: str = "keep"

    @property
    def described(self) -> dict[str, Any]:
        """What a results file says of it besides the rates."""
        return {"loss": dict(self.loss), "allocator": self.allocator, **self.options}


STEPS = {
    "dense": Step(options={"head": "dense"}),
    "dense@v3-loss": Step(options={"head": "dense"}, loss=V3_LOSS),
    "dense@0.25": Step(options={"head": "dense", "loss_fraction": 0.25}),
    "tree": Step(options={"head": "tree", "activations": "int8"}),  # the default recipe, but for batches and v3's trunk
    "tree@float": Step(options={"head": "tree"}),  # with float32 products, as PyTorch's
    # PyTorch's with its fused AdamW, the faster one
    "torch": Step(True),
    "torch:compile": Step(True, {"compiled": True}),
    "torch@untuned": Step(True, allocator="default"),
    "torch@v3-loss": Step(True, loss=V3_LOSS),
    "torch@0.25": Step(True, {"positions": 0.25}),
    "torch:adaptive": Step(True, {"adaptive_div": 1.0}),
    "torch:adaptive-div4": Step(True, {"adaptive_div": 4.0}),
    "torch:adaptive-div4:compile": Step(True, {"adaptive_div": 4.0, "compiled": True}),
    "torch:adaptive-div4@untuned": Step(True, {"adaptive_div": 4.0}, allocator="default"),
}
QUICK_STEPS = ("dense", "tree", "torch", "torch:adaptive-div4")


def make_session(
    data: TokenData,
    head: str,
    threads: int,
    loss_fraction: float = 1.0,
    activations: str = "float",
    loss: Mapping[str, float] | None = None,
) -> Session:
    """A model of v3's shape with this head and both optimisers, on the data's first step."""
    settings = [f"head.name={head}", f"loss_fraction={loss_fraction}", "log_prior=false", f"activations={activations}"]
    settings += ["leaky_decay=0", "ngram_copy_orders=[]"]  # v3's trunk, as the baselines'
    settings += [f"{name}={value}" for name, value in (loss or {}).items()]
    run = from_recipe("default", settings)
    run = dataclasses.replace(run, threads=threads, data=str(data.folder), data_hash=data.hash)
    run = with_vocabulary_of(data, run, any_head=False)
    model, _ = build.new_model(run, data, lambda line: None)
    optimizer = Optimizer(model.parameters, model.gradients, run.optimizer)
    return Session(run, data.folder, data, model, optimizer, {})


def our_turn(name: str, data: TokenData, threads: int, steps: int, batch: Phase) -> list[dict[str, float]]:
    """Time steps of ours: the seconds of each, whole and by part. AdamW has no first moment, as in recipe `default`."""
    candidate, found = STEPS[name], []
    session = make_session(data, threads=threads, loss=candidate.loss, **candidate.options)
    for step in range(WARMUP + steps):
        done = train_step(session, batch, step, lr=1e-3)
        found.append({"seconds": done.seconds, **{part: done.shares[part] * done.seconds for part in PARTS}})
    return found[WARMUP:]


def peer_turn(name: str, data: TokenData, threads: int, steps: int, batch: Phase) -> list[dict[str, float]]:
    """Time steps of PyTorch's, as our_turn; its fused AdamW always has a first moment."""
    import torch

    from tools.baseline.speed import step_seconds

    torch.set_num_threads(threads)
    candidate = STEPS[name]
    return step_seconds(
        batch, steps=steps, warmup=WARMUP, data=data.folder, fused=True, **candidate.options, **candidate.loss
    )


def measure_steps(
    names: Sequence[str],
    data: Path,
    threads: int,
    repeats: int,
    batch: str,
    say: Callable[[str], None],
    turns: int = 3,
) -> dict[str, dict[str, Any]]:
    """name -> {"tokens_per_s": {median, p20, p80}, "shares": part -> share of the step, "peak_rss_mb", what it is}.

    Each candidate gets `turns` processes with together at least `repeats` timed steps. Raises RunFailed if one fails.
    """
    steps: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    peaks: dict[str, float] = {}
    for turn in range(turns):
        for name in names:
            say(f"{name}, turn {turn + 1} of {turns}")
            count = max(1, math.ceil(repeats / turns))
            words = ["-m", "tools.bench.steps", name, str(data), str(threads), str(count), batch]
            text, _ = run_process(words, allocators.environment_of(STEPS[name].allocator))
            found = json.loads(text.splitlines()[-1])
            steps[name] += found["steps"]
            peaks[name] = max(found["peak_rss_mb"] or 0, peaks.get(name, 0))
    tokens = parse_phase(batch).tokens
    result = {}
    for name, timed in steps.items():
        seconds = [step["seconds"] for step in timed]
        shares = {part: float(np.median([step[part] / step["seconds"] for step in timed])) for part in PARTS}
        result[name] = {
            "tokens_per_s": timing.rate(timing.summary(seconds), tokens),
            "shares": {part: round(share, 4) for part, share in shares.items()},
            "peak_rss_mb": round(peaks[name]),
            **STEPS[name].described,
        }
    return result


def main(name: str, data: str, threads: str, steps: str, batch: str) -> None:
    """One turn of a candidate: print its steps and its peak memory as JSON."""
    set_threads(int(threads))
    turn = peer_turn if STEPS[name].peer else our_turn
    timed = turn(name, open_tokens(Path(data)), int(threads), int(steps), parse_phase(batch))
    print(json.dumps({"steps": timed, "peak_rss_mb": peak_rss_mb()}))


if __name__ == "__main__":
    main(*sys.argv[1:])
