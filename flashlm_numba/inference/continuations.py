"""Scoring continuations of a context: their probability, and whether temperature 0 generates them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from flashlm_numba.inference.generate import REMEMBERED
from flashlm_numba.memory.gate import Recalled
from flashlm_numba.model.model import Model
from flashlm_numba.model.packed_model import PackedModel
from flashlm_numba.system.errors import UserError


@dataclass(frozen=True)
class ScoredContinuation:
    """The score of a continuation."""

    log_prob: float  # sum of ln p over its tokens
    greedy: bool  # whether every token is the likeliest after the tokens before it


def score_continuations(
    model: Model | PackedModel, context: Sequence[int], continuations: Sequence[Sequence[int]]
) -> list[ScoredContinuation]:
    """Score continuations of one context. The model reads the context once.

    context : ids of a text, from the one that begins it;  continuations : ids; no ids have the probability 1
    If parameters have changed, call sync_weights first. The hidden states are those of generation. Raises ValueError if
    the context is empty, and UserError if the model's weights give no probabilities.
    """
    if not any(len(ids) for ids in continuations):
        return [ScoredContinuation(0.0, True)] * len(continuations)
    before = np.array(context, np.int32)
    state, first = model.prefill(before)
    targets = [np.array(ids, np.int32) for ids in continuations]
    hidden = [first[: len(ids)] for ids in targets]  # (n, C): they predict the targets
    for n, ids in enumerate(targets):
        if len(ids) > 1:
            hidden[n] = np.concatenate([first, model.read(model.copy_state(state), ids[:-1])])
    log_probs = _log_probs(model, before, hidden, targets)
    try:
        likeliest = _likeliest(model, before, first)
        greedy = [
            not len(ids) or (int(ids[0]) == likeliest and _rest_is_greedy(model, before, ids, h))
            for ids, h in zip(targets, hidden, strict=True)
        ]
    except ValueError as error:
        raise UserError(f"{error}: the model's weights are too large; use an earlier checkpoint.") from None
    return [ScoredContinuation(float(part.sum()), each) for part, each in zip(log_probs, greedy, strict=True)]


def _log_probs(
    model: Model | PackedModel, before: np.ndarray, hidden: list[np.ndarray], targets: list[np.ndarray]
) -> list[np.ndarray]:
    """ln p of the targets of each continuation, (n,) float64. The head is asked once, since it reads all its rows."""
    # the copies, and the memory, at a token depend on the last ids before it
    start = before[-max(REMEMBERED, model.remembered) :]
    texts = np.zeros((len(targets), len(start) + max(map(len, targets))), np.int32)
    texts[:, : len(start)] = start
    for text, ids in zip(texts, targets, strict=True):
        text[len(start) : len(start) + len(ids)] = ids  # what follows is padding, which changes nothing before it
    copies, recalled = [], []
    if (found := model.copied(texts)) is not None:
        at = found.reshape(*texts.shape, -1)[:, len(start) - 1 :]
        copies = [part[: len(ids)] for part, ids in zip(at, targets, strict=True)]
    if model.memory is not None:
        for text, ids in zip(texts, targets, strict=True):
            known = model.memory.recall(text[: len(start) + len(ids)])
            recalled.append(known.at(slice(len(start), None)))
    log_prob = model.log_prob(
        np.concatenate(hidden),
        np.concatenate(targets),
        Recalled(*map(np.concatenate, zip(*recalled, strict=True))) if recalled else None,
        np.concatenate(copies) if copies else None,
    )
    return np.split(log_prob.astype(np.float64), np.cumsum([len(ids) for ids in targets])[:-1])


def _likeliest(model: Model | PackedModel, text: np.ndarray, h: np.ndarray) -> int:
    """The token that temperature 0 generates after a text, for its last hidden state (1, C)."""
    head = model.head_after(text[-max(REMEMBERED, model.remembered) :])
    return int(head.sample(h, np.random.default_rng(0), temperature=0)[0])


def _rest_is_greedy(model: Model | PackedModel, before: np.ndarray, ids: np.ndarray, h: np.ndarray) -> bool:
    """Whether the second and later ids (n,), which h (n, C) predict, are each the likeliest."""
    return all(ids[n] == _likeliest(model, np.concatenate([before, ids[:n]]), h[n : n + 1]) for n in range(1, len(ids)))
