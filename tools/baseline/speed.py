"""PyTorch's speed for complete training steps."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from flashlm_numba.data.shards import open_tokens
from flashlm_numba.model.config import ModelConfig, Phase
from tools.baseline.heads import frequency_ranks
from tools.baseline.model import BaselineModel
from tools.baseline.optimizer import Optimizers
from tools.baseline.step import training_step


def ids_and_counts(data: Path | None, n: int, vocab_size: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """n token ids in order and the counts (V,) of all ids, from prepared data or sampled by Zipf's law."""
    if data is None:
        frequency = 1 / np.arange(2.0, vocab_size + 2)
        counts = np.maximum(1, 1e9 * frequency / frequency.sum()).astype(np.int64)
        return np.random.default_rng(seed).choice(vocab_size, n, p=frequency / frequency.sum()), counts
    train = open_tokens(data).train
    return train.windows(np.array([0]), n)[0].astype(np.int64), train.counts(vocab_size)


def step_seconds(
    phase: Phase,
    *,
    steps: int,
    warmup: int = 2,
    positions: float = 1.0,
    adaptive_div: float | None = None,
    seed: int = 0,
    data: Path | None = None,
    normuon: str = "v3",
    fused: bool = False,
    compiled: bool = False,
    **options: Any,
) -> list[dict[str, float]]:
    """Time complete training steps, one after another as in training: the seconds of each, whole and by part.

    positions, options : as in training_step;  adaptive_div : use the adaptive head with this div_value
    compiled : through torch.compile, which needs a C++ compiler
    """
    config = ModelConfig()
    n = phase.batch_size * phase.seq_len
    ids, counts = ids_and_counts(data, n * phase.grad_accum + 1, config.vocab_size, seed)
    ranks = frequency_ranks(counts) if adaptive_div else None
    model = BaselineModel(config, ranks=ranks, div_value=adaptive_div or 4.0)
    if compiled:
        model.compile_calls()
    optimizers = Optimizers(model, normuon=normuon, fused=fused)
    flat = torch.from_numpy(ids)
    pairs = [
        (
            flat[i * n : (i + 1) * n].view(phase.batch_size, -1),
            flat[i * n + 1 : (i + 1) * n + 1].view(phase.batch_size, -1),
        )
        for i in range(phase.grad_accum)
    ]
    found = []
    for _ in range(warmup + steps):
        clock = {"embedding": 0.0}  # its rows and their gradient count as trunk
        start = time.perf_counter()
        training_step(model, optimizers, pairs, positions=positions, clock=clock, **options)
        found.append({"seconds": time.perf_counter() - start, **clock})
    return found[warmup:]
