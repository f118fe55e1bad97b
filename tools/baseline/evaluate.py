"""The NLL of documents in PyTorch, by the rule of `flashlm-numba eval`."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from tools.baseline.model import BaselineModel
from tools.baseline.transformer import Transformer

if TYPE_CHECKING:
    from flashlm_numba.data.shards import Split


def scored_windows(
    document: np.ndarray, context: int, length: int, eot: int
) -> Iterator[tuple[np.ndarray, np.ndarray, int]]:
    """Windows of a document (n,) that score each token once: inputs (t,), targets (t,), index of the first scored.

    The first token is predicted from the end of text, whose id is eot. Windows have at most `length` inputs and overlap
    by `context` inputs. If that is the receptive field minus 1, the result does not depend on `length`.
    """
    if length <= context:
        raise ValueError(f"windows of {length} tokens leave none to score after {context} of context")
    inputs = np.concatenate([[eot], document[:-1]]).astype(np.int64)
    done = 0
    while done < len(document):
        start = max(0, done - context)
        end = min(start + length, len(document))
        yield inputs[start:end], document[start:end].astype(np.int64), done - start
        done = end


@torch.no_grad()
def score(
    model: BaselineModel | Transformer,
    split: Split,
    *,
    eot: int,
    max_tokens: int | None = None,
    length: int = 1024,
    rows: int = 8,
    log_prior: Tensor | None = None,
    soft_cap: float | None = None,
) -> dict[str, float | int]:
    """NLL of a split by the rule of `flashlm-numba eval`: "nll", "tokens" and, for a complete split, "bits_per_byte".

    Every token of every document is scored once, with a context within its document: model.scoring_window says how
    much of it. eot : id of the end of text;  max_tokens : score only this many;  length : of the windows, if the model
    has no limit;  rows : windows at once
    """
    context, length = model.scoring_window(length)
    options: dict[str, Any] = {} if model.adaptive is not None else {"log_prior": log_prior, "soft_cap": soft_cap}
    windows = [w for d in split.documents(max_tokens) for w in scored_windows(d, context, length, eot)]
    windows.sort(key=lambda w: -len(w[0]))  # little padding, which stands at the end and is never looked at
    total, count = 0.0, 0
    for low in range(0, len(windows), rows):
        part = windows[low : low + rows]
        ids = np.full((len(part), len(part[0][0])), eot)
        for row, (inputs, _, _) in zip(ids, part, strict=True):
            row[: len(inputs)] = inputs
        hidden = model.hidden(torch.from_numpy(ids)).view(*ids.shape, -1)
        h = torch.cat([hidden[i, first : len(x)] for i, (x, _, first) in enumerate(part)])
        y = torch.from_numpy(np.concatenate([y[first:] for _, y, first in part]))
        for chunk in range(0, len(y), 512):
            nll = model.losses(h[chunk : chunk + 512], y[chunk : chunk + 512], **options)[1]
            assert nll is not None
            total += float(nll.double().sum())
        count += len(y)
    result: dict[str, float | int] = {"nll": total / max(1, count), "tokens": count}
    if max_tokens is None:
        result["bits_per_byte"] = total / (math.log(2) * max(1, split.n_bytes))
    return result
