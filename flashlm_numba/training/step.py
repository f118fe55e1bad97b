"""One optimiser step: its batches, the positions that count in its loss, forward, backward and update.

All random choices of a step are functions of the seed and the step's number, which seed the generators of batches and
positions. A resumed run therefore needs no stored position and continues bit for bit.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

import numpy as np

from flashlm_numba.data.shards import sample_batch
from flashlm_numba.model.config import Phase
from flashlm_numba.model.dropout import NO_DROPOUT, Dropout
from flashlm_numba.model.model import Model
from flashlm_numba.system.errors import UserError
from flashlm_numba.training.schedule import dropout_share
from flashlm_numba.training.session import Session

EMBEDDING = "embedding.weight"
# random streams of the positions, the head and the dropout; the batches have another
_POSITIONS, _CANDIDATES, _DROPOUT = 1, 2, 3


@dataclass(frozen=True)
class Step:
    """The results of one step."""

    loss: float  # nats per position: the minimised loss, including label smoothing and z-loss
    nll: float  # nats per token at the same positions: plain -ln p
    lr: float  # learning rate of AdamW
    seconds: float
    shares: dict[str, float]  # fractions of the step's time: embedding, trunk, head, optimizer


def train_step(session: Session, phase: Phase, step: int, *, lr: float, full: bool = False) -> Step:
    """Do one optimiser step on the batches of `step`.

    lr : the schedule's factor; 0 changes no parameter
    full : let the sampled head use the softmax over all tokens
    Raises UserError, before any parameter is changed, if the loss or a gradient is not finite.
    """
    run, model = session.run, session.model
    start = time.perf_counter()
    model.sync_weights()
    loss = nll = 0.0
    shares = {"embedding": 0.0, "trunk": 0.0, "head": 0.0, "optimizer": 0.0}
    for micro in range(phase.grad_accum):
        ids, targets = sample_batch(session.data.train, run.seed, step, micro, phase.batch_size, phase.seq_len)
        weights = loss_weights(run.seed, step, micro, targets.size, run.head.loss_fraction, phase.grad_accum)
        model.head.begin(np.random.default_rng((run.seed, step, micro, _CANDIDATES)), full=full)
        dropout = _dropout(session, step, micro)
        losses, nlls, seconds = model.loss_and_grad(ids, targets, weights, accumulate=micro > 0, dropout=dropout)
        share = 1 / (len(losses) * phase.grad_accum)  # equal for all positions that count in the loss
        loss += float(losses.sum(dtype=np.float64)) * share
        nll += float(nlls.sum(dtype=np.float64)) * share
        for name, spent in seconds.items():
            shares[name] += spent
    before = time.perf_counter()
    if not math.isfinite(loss):
        raise UserError(
            f"The loss is {loss} ({_not_finite(model)} not finite), so training has diverged; nothing was updated."
        )
    config = session.optimizer.config
    rates = config.normuon_lr * lr, config.adamw_lr * lr
    # the embedding is frozen only if its rows come from a checkpoint
    frozen = {EMBEDDING} if phase.frozen and run.embedding_given else set()
    session.optimizer.step(*rates, config.clip, frozen=frozen)
    end = time.perf_counter()
    shares["optimizer"] = end - before
    seconds_of_step = end - start
    return Step(
        loss,
        nll,
        rates[1],
        seconds_of_step,
        {name: round(spent / seconds_of_step, 4) for name, spent in shares.items()},
    )


def _dropout(session: Session, step: int, micro: int) -> Dropout:
    """The dropout of a micro-batch, drawn from (seed, step, micro)."""
    run = session.run
    # the memory's gate does not count, so that a model learns beside a memory as without one
    counted = (value for name, value in session.model.parameters.items() if not name.startswith("memory."))
    parameters = sum(value.size for value in counted)
    share = dropout_share(run.tokens_until(step - 1), session.data.train.n_tokens, parameters)
    rates = share * run.training.hidden_dropout, share * run.training.embedding_dropout
    return Dropout(np.random.default_rng((run.seed, step, micro, _DROPOUT)), *rates) if any(rates) else NO_DROPOUT


def loss_weights(seed: int, step: int, micro: int, positions: int, fraction: float, micros: int) -> np.ndarray:
    """The weight of each position in the step's loss, (positions,) float32; over the micro-batches they sum to 1.

    A random `fraction` of the positions (at least one) counts, chosen from (seed, step, micro). The others weigh 0.

    >>> sorted(loss_weights(0, 1, 0, 8, 0.25, 2).tolist())
    [0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.25, 0.25]
    """
    kept = max(1, int(positions * fraction))
    if kept == positions:
        return np.full(positions, 1 / (positions * micros), np.float32)
    rng = np.random.default_rng((seed, step, micro, _POSITIONS))
    weights = np.zeros(positions, np.float32)
    weights[rng.permutation(positions)[:kept]] = 1 / (kept * micros)
    return weights


def _not_finite(model: Model) -> str:
    """The name of the first parameter or gradient that is not finite, or "the logits"."""
    named = [*model.parameters.items(), *((f"the gradient of {name}", g) for name, g in model.gradients.items())]
    return next((name for name, value in named if not np.isfinite(value).all()), "the logits")
