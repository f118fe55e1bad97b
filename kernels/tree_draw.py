"""Drawing the next token from a tree that is mixed with the n-gram copies, in one call of compiled code.

    p(v) = g_0 p_tree(v) + sum over the copies o of g_o [v = copy_o]

The shares g are those of copy_mixture.py, and the tree's part is that of tree_inference.py. With no ways of copying it
is the tree alone.
Letters: O ways of copying, C channels, V leaves, M nodes below the root, D levels, K likeliest rows.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np

from flashlm_numba.kernels import _check
from flashlm_numba.kernels._jit import helper, serial_kernel
from flashlm_numba.kernels._math import largest_magnitude
from flashlm_numba.kernels.copy_mixture import CopyWeights, shares_at
from flashlm_numba.kernels.draw import checked_temperature, draw_index
from flashlm_numba.kernels.tree_inference import descend, search_mixed
from flashlm_numba.kernels.tree_node import Tree


class CopyInputs(NamedTuple):
    """What the shares of the copies are computed with, and scratch."""

    embedding: np.ndarray  # (V, C)
    bias: np.ndarray  # as in CopyWeights
    hidden: np.ndarray
    match: np.ndarray
    scale: np.float32
    shares: np.ndarray  # (O + 1,) float64
    scores: np.ndarray  # (1, O)
    matches: np.ndarray  # (1, O)


class Descent(NamedTuple):
    """Scratch of a descent."""

    logits: np.ndarray  # (widest,)
    slopes: np.ndarray  # (widest,)


class Likeliest(NamedTuple):
    """How one of the K likeliest rows is drawn, and scratch of the search (tree_inference.search_mixed)."""

    temperature: float  # 0: take the likeliest
    top_p: float
    best: np.ndarray  # (K + O,) float64
    rows: np.ndarray  # (K + O,) int64
    keys: np.ndarray  # (M,) float64
    codes: np.ndarray  # (M,) int64
    nodes: np.ndarray  # (D,) int64
    shifts: np.ndarray  # (D,) float64
    logits: np.ndarray  # (D + 1, widest)
    slopes: np.ndarray  # (widest,)


_COPIES, _TREE = len(CopyInputs._fields), len(CopyInputs._fields) + len(Tree._fields)


@helper
def _find_shares(inputs, x, copies):
    """Compute inputs.shares for x (1, C) and the copied rows (O,), -1 for none. False if they are no distribution."""
    weights = CopyWeights(inputs.bias, inputs.hidden, inputs.match)
    rows = copies.reshape(1, copies.shape[0])
    return shares_at(inputs.shares, inputs.scores, inputs.matches, x, inputs.embedding, rows, weights, inputs.scale)


@serial_kernel
def _draw(choice, x, copies, uniforms, *fields):
    """choice (1,) int64: a row drawn after one position, for its x (1, C) and its copied rows (O,) int32; -1 if there
    is no distribution.

    uniforms (1 + D,) float64: for the choice between tree and copies, and for the levels
    fields : those of CopyInputs, Tree and Descent, one by one, as in decode.make_decode_step
    """
    inputs, tree, scratch = CopyInputs(*fields[:_COPIES]), Tree(*fields[_COPIES:_TREE]), Descent(*fields[_TREE:])
    choice[0] = -1
    if not _find_shares(inputs, x, copies):
        return
    bar, chosen = uniforms[0] - inputs.shares[0], -1
    while bar >= 0 and chosen < copies.shape[0] - 1:
        chosen += 1
        bar -= inputs.shares[chosen + 1]
    if bar < 0 and chosen >= 0 and copies[chosen] >= 0:
        choice[0] = copies[chosen]
    else:
        choice[0] = descend(scratch.logits, scratch.slopes, x[0], uniforms[1:], tree)


@serial_kernel
def _draw_likeliest(choice, x, copies, uniforms, *fields):
    """As _draw, but one of the K likeliest rows, by temperature and top-p.

    uniforms (1,) float64;  fields : those of CopyInputs, Tree and Likeliest
    """
    inputs, tree, own = CopyInputs(*fields[:_COPIES]), Tree(*fields[_COPIES:_TREE]), Likeliest(*fields[_TREE:])
    choice[0] = -1
    if not (_find_shares(inputs, x, copies) and largest_magnitude(x[0]) < np.inf):
        return
    search_mixed(
        *(own.best, own.rows, own.keys, own.codes, own.nodes, own.shifts, own.logits, own.slopes),
        *(x, tree, copies, inputs.shares),
    )
    at = 0
    if own.temperature > 0:
        at = draw_index(own.best[: own.best.shape[0] - copies.shape[0]], uniforms[0], own.temperature, own.top_p)
    elif not own.best[0] > -np.inf:
        at = -1
    if at >= 0:
        choice[0] = own.rows[at]


class Drawing(NamedTuple):
    """How the token after a position is drawn, with scratch: for one thread at a time."""

    function: Any  # the kernel: function(choice, x, copies, uniforms, *fields)
    fields: tuple[Any, ...]
    uniforms: int  # random numbers in [0, 1) per token


class CopyModel(NamedTuple):
    """The trained part of the shares: rows (V, C), and the weights of the scores."""

    embedding: np.ndarray
    weights: CopyWeights


def _inputs(tree: Tree, copies: CopyModel | None) -> CopyInputs:
    dim = tree.weight.shape[1]
    if copies is None:
        copies = CopyModel(tree.weight, CopyWeights(*(np.empty(shape, np.float32) for shape in ((0,), (0, dim), (0,)))))
    _check.array("drawing", "embedding", copies.embedding, tree.weight.shape)
    ways = len(copies.weights.bias)
    shapes = ((ways,), (ways, dim), (ways,))
    for name, value, shape in zip(copies.weights._fields, copies.weights, shapes, strict=True):
        _check.array("drawing", name, value, shape)
    return CopyInputs(
        embedding=_read_only(copies.embedding),
        bias=_read_only(copies.weights.bias),
        hidden=_read_only(copies.weights.hidden),
        match=_read_only(copies.weights.match),
        scale=np.float32(1 / math.sqrt(dim)),
        shares=np.empty(ways + 1),
        scores=np.empty((1, ways), np.float32),
        matches=np.empty((1, ways), np.float32),
    )


def _fixed(value: Any) -> Any:
    return _read_only(value) if isinstance(value, np.ndarray) else value


def _read_only(array: np.ndarray) -> np.ndarray:
    """A view: one type for the compiler, so that it compiles the kernels once."""
    view = array.view()
    view.flags.writeable = False
    return view


def plain_drawing(tree: Tree, copies: CopyModel | None = None) -> Drawing:
    """Drawing from the probabilities as they are, by descent. Raises ValueError if a shape or dtype is wrong.

    copies : of the mixture; None for the tree alone
    """
    scratch = Descent(np.empty(tree.widest, np.float32), np.empty(tree.widest, np.float32))
    return Drawing(_draw, (*_inputs(tree, copies), *map(_fixed, tree), *scratch), 1 + tree.depth)


def likeliest_drawing(
    tree: Tree, count: int, temperature: float, top_p: float | None = None, copies: CopyModel | None = None
) -> Drawing:
    """Drawing among the min(count, V) likeliest rows by p**(1 / temperature), of them those that first reach top_p.

    temperature : at 0 the likeliest row is taken
    Raises ValueError if a shape, a dtype or a setting is wrong.
    """
    if count < 1:
        raise ValueError(f"likeliest_drawing: count must be at least 1, got {count}")
    if temperature != 0:
        temperature = checked_temperature(temperature, top_p)
    inputs, count, nodes = _inputs(tree, copies), min(count, len(tree.weight)), len(tree.nodes)
    size = count + len(inputs.bias)
    own = Likeliest(
        temperature=float(temperature),
        top_p=float(top_p or 1.0),
        best=np.empty(size),
        rows=np.empty(size, np.int64),
        keys=np.empty(nodes),
        codes=np.empty(nodes, np.int64),
        nodes=np.empty(tree.depth, np.int64),
        shifts=np.empty(tree.depth),
        logits=np.empty((tree.depth + 1, tree.widest), np.float32),
        slopes=np.empty(tree.widest, np.float32),
    )
    return Drawing(_draw_likeliest, (*inputs, *map(_fixed, tree), *own), 1)


def draw_row(drawing: Drawing, x: np.ndarray, copies: np.ndarray, uniforms: np.ndarray) -> int:
    """A row drawn after one position, for its x (1, C) float32 and its copied rows (O,) int32, -1 for none.

    uniforms : (drawing.uniforms,) float64 in [0, 1)
    Raises ValueError if a shape, a dtype or a row is wrong, or if there is no distribution.
    """
    embedding, ways = drawing.fields[0], len(drawing.fields[1])
    _check.array("draw_row", "x", x, (1, embedding.shape[1]))
    _check.array("draw_row", "copies", copies, (ways,), np.int32)
    _check.array("draw_row", "uniforms", uniforms, (drawing.uniforms,), np.float64)
    if ways and not -1 <= copies.min() <= copies.max() < len(embedding):
        raise ValueError(f"draw_row: copies must be in [-1, {len(embedding)}), got {copies}")
    choice = np.empty(1, np.int64)
    # copies are writable whatever the caller has: see _read_only
    drawing.function(choice, x.copy(), copies.copy(), uniforms, *drawing.fields)
    if choice[0] < 0:
        raise ValueError("draw_row: the hidden state and the weights must be finite; nothing can be drawn from them")
    return int(choice[0])
