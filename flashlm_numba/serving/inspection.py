"""What a model says of one token of a text: its probability, the likeliest others, and how a head comes to it.

A tree head gives the path from the root, with the softmax of every node on it. The copies and a memory beside the head
have shares of their own.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np

from flashlm_numba.heads.tree import Descent, TreeHead
from flashlm_numba.inference.generate import REMEMBERED, context_of
from flashlm_numba.serving.served import TOO_LARGE, Served, written
from flashlm_numba.system.errors import UserError

LIKELIEST = 10  # tokens
NEIGHBOURS = 5  # children of a node
EXAMPLES = 3  # tokens below a node
LEAVES = 256  # that are looked at to find the examples of a node: those of a binary tree's root would be half of all


def inspection_steps(served: Served, ids: list[int]) -> Iterator[dict[str, Any]]:
    """The answer about the last of some token ids, which the others precede: one step. Raises UserError as `steps`."""
    yield inspect(served, ids[:-1], ids[-1])


def inspect(served: Served, before: list[int], token: int) -> dict[str, Any]:
    """What the model says of a token after the ids before it, as JSON values."""
    model = served.model
    context = np.array(context_of(served.vocabulary, before), np.int32)
    _, h = model.prefill(context)
    head = model.head_after(context[-max(REMEMBERED, model.remembered) :])
    log_prob = float(written(head.log_prob_of(h[0], np.array([token], np.int32)))[0])
    try:
        ids, log_p = (found[0] for found in head.likeliest(h, LIKELIEST))
    except ValueError:
        raise UserError(TOO_LARGE) from None
    return {
        "token": _named(served, token, log_prob),
        "likeliest": [_named(served, int(i), float(p)) for i, p in zip(ids, written(log_p), strict=True)],
        "parts": [part._asdict() for part in head.parts(h, token)],
        "head": model.head.name,
        "path": _path(served, model.head, h[0], token) if isinstance(model.head, TreeHead) else None,
    }


def _named(served: Served, token: int, log_prob: float) -> dict[str, Any]:
    return {"id": token, "name": served.token_name(token), "log_prob": log_prob, "probability": math.exp(log_prob)}


def _path(served: Served, head: TreeHead, x: np.ndarray, token: int) -> list[dict[str, Any]]:
    """The nodes from the root to a token, and the likeliest children of each."""
    return [_node(served, head, x, step) for step in head.descent(x, token)]


def _node(served: Served, head: TreeHead, x: np.ndarray, step: Descent) -> dict[str, Any]:
    tree, n, log_p = head.tree, step.node, step.log_p
    tokens = int(tree.token_end[n] - tree.token_start[n])
    order = np.argsort(-log_p, kind="stable")
    shown = order[:NEIGHBOURS].tolist()
    if step.chosen not in shown:
        shown.append(step.chosen)
    children = []
    for child in shown:
        entry: dict[str, Any] = {"probability": math.exp(log_p[child]), "chosen": child == step.chosen}
        if child < tokens:
            entry["token"] = served.token_name(int(tree.token_of_row[tree.token_start[n] + child]))
        else:
            below = int(tree.child_start[n]) + child - tokens
            entry |= {"node": below, "tokens": int(tree.leaf_end[below] - tree.token_start[below])}
            entry["examples"] = _examples(served, head, x, below)
        children.append(entry)
    return {
        "node": n,
        "tokens": tokens,
        "nodes": len(log_p) - tokens,
        "rank": int(np.flatnonzero(order == step.chosen)[0]) + 1,
        "probability": math.exp(log_p[step.chosen]),
        "children": children,
    }


def _examples(served: Served, head: TreeHead, x: np.ndarray, node: int) -> list[str]:
    """The names of the likeliest tokens below a node, among its first ones."""
    start = int(head.tree.token_start[node])
    tokens = head.tree.token_of_row[start : min(int(head.tree.leaf_end[node]), start + LEAVES)]
    order = np.argsort(-head.log_prob_of(x, tokens), kind="stable")[:EXAMPLES]
    return [served.token_name(int(token)) for token in tokens[order]]
