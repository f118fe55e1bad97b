"""Complete training steps of FlashLM v3's shape, ours and PyTorch's: tokens per second, and the share of each part."""

from __future__ import annotations

import dataclasses
import importlib.util
from typing import Any

import numpy as np

from flashlm_numba.data.shards import TokenData
from flashlm_numba.model import build
from flashlm_numba.model.config import Phase
from flashlm_numba.model.recipes import from_recipe
from flashlm_numba.training.optimizer import Optimizer
from flashlm_numba.training.session import Session
from flashlm_numba.training.step import train_step
from tools.bench import timing

V3_LOSS = {"label_smoothing": 0.1, "z_loss": 1e-4}  # of the dense steps, ours and torch's; the others train on NLL
SHARES = ("embedding", "trunk", "head", "optimizer")
OURS: dict[str, dict[str, Any]] = {
    "dense": {"head": "dense"},
    "dense@0.25": {"head": "dense", "loss_fraction": 0.25},
    "tree": {"head": "tree", "activations": "int8"},  # the default recipe, but for batches and v3's trunk
    "tree@float": {"head": "tree"},  # with float32 products, as the baselines
}
# torch's fused AdamW, the faster; "plain": its default one, as in FlashLM v3
BASELINES: dict[str, dict[str, Any]] = {
    "torch": {"fused": True, **V3_LOSS},
    "torch-plain": V3_LOSS,
    "torch@0.25": {"fused": True, "positions": 0.25, **V3_LOSS},
    "torch:adaptive": {"fused": True, "adaptive_div": 1.0},
    "torch:adaptive-div4": {"fused": True, "adaptive_div": 4.0},
    "torch:adaptive-plain": {"adaptive_div": 1.0},
    "torch:adaptive-div4-plain": {"adaptive_div": 4.0},
}


def make_session(
    data: TokenData, head: str, threads: int, loss_fraction: float = 1.0, activations: str = "float"
) -> Session:
    """A model of v3's shape with this head and both optimisers, on the data's first step."""
    settings = [f"head.name={head}", f"loss_fraction={loss_fraction}", "log_prior=false", f"activations={activations}"]
    settings += ["leaky_decay=0", "ngram_copy_orders=[]"]  # v3's trunk, as the baselines'
    if head == "dense":
        settings += [f"{name}={value}" for name, value in V3_LOSS.items()]
    run = from_recipe("default", settings)
    run = dataclasses.replace(run, threads=threads, data=str(data.folder), data_hash=data.hash)
    model, _ = build.new_model(run, data, lambda line: None)
    optimizer = Optimizer(model.parameters, model.gradients, run.optimizer)
    return Session(run, data.folder, data, model, optimizer, {})


def measure_steps(data: TokenData, threads: int, repeats: int, batch: Phase) -> tuple[dict[str, Any], dict[str, Any]]:
    """Tokens/s and shares of the step's time of complete training steps, ours and torch's, by candidate.

    Ours use the default recipe's AdamW without a first moment. torch's fused AdamW always has a first moment.
    """
    rates: dict[str, Any] = {}
    shares: dict[str, Any] = {}
    for name, options in OURS.items():
        session = make_session(data, threads=threads, **options)
        seconds, parts = [], []
        for step in range(repeats + 2):
            done = train_step(session, batch, step, lr=1e-3)
            if step >= 2:
                seconds.append(done.seconds)
                parts.append(done.shares)
        rates[name] = timing.rate(timing.summary(seconds), batch.tokens)
        shares[name] = {part: round(float(np.median([p[part] for p in parts])), 4) for part in SHARES}
    if importlib.util.find_spec("torch") is None:
        return rates, shares
    import torch

    from tools.baseline.speed import measure_step

    torch.set_num_threads(threads)
    for name, options in BASELINES.items():
        result = measure_step(batch, repeats=max(2, repeats), data=data.folder, **options)
        rates[name], shares[name] = result["tokens_per_s"], result["shares"]
    return rates, shares
