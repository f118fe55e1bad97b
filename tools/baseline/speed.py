"""PyTorch's speed for the heads, the trunk and complete training steps."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from flashlm_numba.data.shards import open_tokens
from flashlm_numba.model.config import ModelConfig, Phase
from tools.baseline.heads import frequency_ranks, head_candidates
from tools.baseline.model import BaselineModel
from tools.baseline.optimizer import Optimizers
from tools.baseline.step import training_step
from tools.bench import timing


def ids_and_counts(data: Path | None, n: int, vocab_size: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """n token ids in order and the counts (V,) of all ids, from prepared data or sampled by Zipf's law."""
    if data is None:
        frequency = 1 / np.arange(2.0, vocab_size + 2)
        counts = np.maximum(1, 1e9 * frequency / frequency.sum()).astype(np.int64)
        return np.random.default_rng(seed).choice(vocab_size, n, p=frequency / frequency.sum()), counts
    train = open_tokens(data).train
    return train.windows(np.array([0]), n)[0].astype(np.int64), train.counts(vocab_size)


def measure_heads(
    rows: int, vocab: int, dim: int, *, repeats: int, seed: int, data: Path | None = None, compiled: bool = False
) -> dict[str, dict[str, Any]]:
    """Summary of the seconds of forward and backward of each head, by name."""
    rng = np.random.default_rng(seed)
    weight = rng.standard_normal((vocab, dim), dtype=np.float32) * np.float32(0.02)
    targets, counts = ids_and_counts(data, rows, vocab, seed)
    h = rng.standard_normal((rows, dim), dtype=np.float32)
    return timing.measure(head_candidates(h, weight, targets, frequency_ranks(counts), compiled=compiled), repeats)


def measure_trunk(phase: Phase, *, repeats: int, seed: int, data: Path | None = None) -> dict[str, Any]:
    """Summary of the seconds of hidden states, forward and backward, with the embedding's gradient."""
    model = BaselineModel()
    n = phase.batch_size * phase.seq_len
    ids, _ = ids_and_counts(data, n, model.config.vocab_size, seed)
    batch = torch.from_numpy(ids).view(phase.batch_size, phase.seq_len)
    cotangent = torch.randn(n, model.config.dim)

    def run() -> None:
        model.zero_grad(set_to_none=True)
        model.hidden(batch).backward(cotangent)

    return timing.measure({"trunk": run}, repeats)["trunk"]


def measure_step(
    phase: Phase,
    *,
    positions: float = 1.0,
    adaptive_div: float | None = None,
    repeats: int = 5,
    seed: int = 0,
    data: Path | None = None,
    normuon: str = "v3",
    fused: bool = False,
    **options: Any,
) -> dict[str, Any]:
    """Time complete training steps of one batch shape: {"tokens_per_s": {median, p20, p80}, "shares": {...}}.

    positions, options : as in training_step;  adaptive_div : use the adaptive head with this div_value
    """
    config = ModelConfig()
    n = phase.batch_size * phase.seq_len
    ids, counts = ids_and_counts(data, n * phase.grad_accum + 1, config.vocab_size, seed)
    ranks = frequency_ranks(counts) if adaptive_div else None
    model = BaselineModel(config, ranks=ranks, div_value=adaptive_div or 4.0)
    optimizers = Optimizers(model, normuon=normuon, fused=fused)
    flat = torch.from_numpy(ids)
    pairs = [
        (
            flat[i * n : (i + 1) * n].view(phase.batch_size, -1),
            flat[i * n + 1 : (i + 1) * n + 1].view(phase.batch_size, -1),
        )
        for i in range(phase.grad_accum)
    ]
    clock: dict[str, float] = {}
    spent = []
    for turn in range(repeats + 2):  # one after another, as in training, and as ours are timed
        if turn == 2:
            clock.clear()  # of the warm-up
        start = time.perf_counter()
        training_step(model, optimizers, pairs, positions=positions, clock=clock, **options)
        spent.append(time.perf_counter() - start)
    seconds = timing.summary(spent[2:])
    whole = sum(clock.values())
    return {
        "tokens_per_s": timing.rate(seconds, phase.tokens),
        "shares": {part: round(clock[part] / whole, 4) for part in ("trunk", "head", "optimizer")},
    }
