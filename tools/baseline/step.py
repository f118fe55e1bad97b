"""One training step in PyTorch, with separate times of trunk, head and optimiser."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tools.baseline.model import BaselineModel
from tools.baseline.optimizer import Optimizers
from tools.baseline.transformer import Transformer


def training_step(
    model: BaselineModel | Transformer,
    optimizers: Optimizers,
    batches: Sequence[tuple[Tensor, Tensor]],
    *,
    positions: float = 1.0,
    scale: float = 1.0,
    generator: torch.Generator | None = None,
    clock: dict[str, float] | None = None,
    **options: Any,
) -> float:
    """Do one optimiser step on micro-batches of ids and targets (B, T). Returns the mean training loss.

    positions : fraction of the positions, chosen at random, whose loss is computed
    scale : factor on the learning rates;  options : those of dense_loss
    clock : seconds are added to its keys "trunk", "head" and "optimizer"
    """
    clock = {} if clock is None else clock
    optimizers.zero_grad()
    total = 0.0
    for ids, targets in batches:
        start = time.perf_counter()
        h, y = model.hidden(ids), targets.flatten()
        if positions < 1:
            kept = torch.randperm(len(y), generator=generator)[: max(1, round(positions * len(y)))]
            h, y = h[kept], y[kept]
        cut = h.detach().requires_grad_()  # two graphs, so that trunk and head are timed apart
        middle = time.perf_counter()
        loss, _ = model.losses(cut, y, want_nll=False, **options)
        mean = loss.mean() / len(batches)
        mean.backward()
        total += mean.item()
        late = time.perf_counter()
        h.backward(cut.grad)
        end = time.perf_counter()
        clock["head"] = clock.get("head", 0.0) + late - middle
        clock["trunk"] = clock.get("trunk", 0.0) + (middle - start) + (end - late)
    start = time.perf_counter()
    optimizers.step(scale)
    clock["optimizer"] = clock.get("optimizer", 0.0) + time.perf_counter() - start
    return total
