"""Self-checks: compare each kernel with plain code, on small inputs, on this machine.

A check returns the largest absolute error, relative to the largest true value.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

TOLERANCE = 1e-4  # of the largest value; float32 rounding stays below a tenth of it


def run_checks() -> tuple[dict[str, float | None], list[str]]:
    """The error of each check by name, None if it is not finite; and one sentence per failed check."""
    errors: dict[str, float | None] = {}
    problems = []
    for name, check in CHECKS.items():
        try:
            error = errors[name] = check()
        except Exception as broken:  # whatever the cause, the other lines help to find it
            errors[name] = None
            problems.append(f"The self-check of the {name} ended with {type(broken).__name__}: {broken}.")
            continue
        if not np.isfinite(error):
            errors[name] = None  # JSON has no NaN
        if not error <= TOLERANCE:
            problems.append(
                f"The self-check of the {name} failed: its relative error is {error:.2g}, expected at most "
                f"{TOLERANCE:g}. Results would be wrong; please report this with the complete output."
            )
    return errors, problems


def _relative(found: np.ndarray, truth: np.ndarray) -> float:
    error = np.abs(found.astype(np.float64) - truth).max(initial=0.0)
    return float(error / max(float(np.abs(truth).max(initial=0.0)), 1e-30))


def _worst(errors: Iterable[float]) -> float:
    """The largest error; NaN if one is NaN, which max() might skip."""
    return float(np.max(list(errors)))


def _check_dense_head() -> float:
    from flashlm_numba.heads.dense import DenseHead
    from flashlm_numba.kernels import reference

    rng = np.random.default_rng(0)
    h, weight = rng.standard_normal((37, 48), np.float32), rng.standard_normal((1_501, 48), np.float32)
    targets, weights = rng.integers(0, 1_501, 37).astype(np.int32), rng.random(37, np.float32)
    head = DenseHead(weight, np.zeros_like(weight))
    loss, _, dh = head.forward_backward(h, targets, weights)
    h64, weight64, weights64 = (a.astype(np.float64) for a in (h, weight, weights))
    want_loss, _, _ = reference.dense_head_forward(h64, weight64, targets)
    want_dh, want_dweight = reference.dense_head_backward(weights64, h64, weight64, targets)
    pairs = (loss, want_loss), (dh, want_dh), (head.dweight, want_dweight)
    return _worst(_relative(found, truth) for found, truth in pairs)


def _check_tree_head() -> float:
    from flashlm_numba.heads.tree import TreeHead
    from flashlm_numba.heads.tree_shapes import build_tree
    from flashlm_numba.kernels import reference_tree

    rng = np.random.default_rng(1)
    tree = build_tree("adaptive", np.arange(1_501)[::-1])
    h, weight = rng.standard_normal((37, 48), np.float32), rng.standard_normal((1_501, 48), np.float32)
    targets, weights = rng.integers(0, 1_501, 37).astype(np.int32), rng.random(37, np.float32)
    head = TreeHead(tree, weight, np.zeros_like(weight))
    loss, _, dh = head.forward_backward(h, targets, weights)
    h64, weight64, nodes64, weights64 = (a.astype(np.float64) for a in (h, weight, head.nodes, weights))
    dweight, dnodes = np.zeros(weight.shape), np.zeros(head.nodes.shape)
    want_loss, _, want_dh = reference_tree.tree_head_forward_backward(
        h64, weight64, nodes64, tree.spans, tree.row_of_token[targets], weights64, dweight, dnodes
    )
    pairs = (loss, want_loss), (dh, want_dh), (head.dweight, dweight), (head.dnodes, dnodes)
    return _worst(_relative(found, truth) for found, truth in pairs)


def _small_model() -> Any:
    """A narrow model with every optional part of the trunk, and no parameter at zero."""
    from flashlm_numba.heads.dense import DenseHead
    from flashlm_numba.model.config import ModelConfig
    from flashlm_numba.model.model import Model
    from flashlm_numba.model.parameters import initial_parameters

    config = ModelConfig(
        97,
        48,
        70,
        3,
        dilations=(1, 2, 8),
        mixer_residual_scale=2**-3,
        ffn_residual_scale=2**-10,
        leaky_decay=0.9,
        ngram_copy_orders=(1,),
    )

    def make_head(weight: np.ndarray, dweight: np.ndarray) -> Any:
        return DenseHead(weight, dweight)

    parameters = initial_parameters(config, 0, embedding_std=0.5)
    for name, value in parameters.items():
        if ".mixer.leaky." in name or name.startswith("ngram_copy."):
            value[:] = 0.5  # they start at zero
    return Model(config, parameters, make_head)


def _check_trunk() -> float:
    """Compare a forward pass over a text with the decoder, which uses none of the same products."""
    model = _small_model()
    ids = np.random.default_rng(2).integers(0, 97, (1, 40)).astype(np.int32)
    whole = model.forward(ids).copy()
    state, first = model.prefill(ids[0, :1])
    steps = [first[0].copy(), *(model.decode_step(state, int(token))[0].copy() for token in ids[0, 1:])]
    return _relative(np.array(steps), whole.astype(np.float64))


def _check_trunk_gradients() -> float:
    """Compare hidden states and all gradients with the float64 NumPy reference of the kernels."""
    from flashlm_numba.kernels import reference_trunk

    model = _small_model()
    config = model.config
    rng = np.random.default_rng(3)
    ids = rng.integers(0, 20, (2, 40)).astype(np.int32)  # few distinct tokens, so that n-grams repeat
    dout = rng.standard_normal((ids.size, config.dim), np.float32)
    want, saved = reference_trunk.trunk_forward(
        {name: value.astype(np.float64) for name, value in model.parameters.items()},
        ids,
        groups=config.groups,
        dilations=config.dilations,
        n_passes=config.n_passes,
        mixer_residual_scale=config.mixer_residual_scale,
        ffn_residual_scale=config.ffn_residual_scale,
        leaky_decay=config.leaky_decay,
        ternary_threshold=config.ternary_threshold,
        ngram_copy_orders=config.ngram_copy_orders,
        ngram_copy_reach=config.ngram_copy_reach,
    )
    error = _relative(model.forward(ids), want)
    model.backward(dout)
    gradients = reference_trunk.trunk_backward(dout.astype(np.float64), saved)
    return _worst([error, *(_relative(model.gradients[name], truth) for name, truth in gradients.items())])


def _check_weight_gradients() -> float:
    """Compare int8 gradients of ternary weights, exactly: the inputs are integers, which rounding does not change."""
    from flashlm_numba.kernels.ternary_wgrad import ternary_wgrad

    rng = np.random.default_rng(4)
    a, b = (rng.integers(-127, 128, (37, columns)).astype(np.float32) for columns in (21, 70))
    a[0], b[:, 0] = 127, 127  # the largest of each column, and of each row
    return _relative(ternary_wgrad(a, b), a.astype(np.float64).T @ b)


def _check_ternary() -> float:
    """Compare every variant of the packed ternary product that this processor supports with plain loops, exactly."""
    from flashlm_numba.kernels import _ternary_dots, ternary_gemv

    return max(0.0 if ternary_gemv._agrees_with_plain(name) else 1.0 for name in _ternary_dots.available())


CHECKS: dict[str, Callable[[], float]] = {
    "dense head": _check_dense_head,
    "tree head": _check_tree_head,
    "trunk": _check_trunk,
    "trunk's gradients": _check_trunk_gradients,
    "int8 gradients": _check_weight_gradients,
    "ternary products": _check_ternary,
}
