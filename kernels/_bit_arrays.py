"""The arrays of the MatMul-free trunk that its regions share, in NamedTuples.

Letters: B batch, T time, N = B*T rows, C channels, I FFN width, L blocks, R layers, P threads, Q chunks of sequences, M
rows of a part, X places of scratch that is kept between steps, Y rows of each (_division.Division.places); O ways of
copying. Layouts of a BitMatrices are written (L, *).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


class BitBatch(NamedTuple):
    """The inputs of the forward pass."""

    rows: np.ndarray  # (N,) int32: rows of the embedding
    embedding: np.ndarray  # (V, C)
    before: np.ndarray  # (R, C): states before the first token of every sequence
    search: bool  # whether to find what is copied; False: Activations.copies holds it


class BitWeights(NamedTuple):
    """Weights of all blocks. The panels, which only the backward pass reads, are empty in the forward pass."""

    norm1: np.ndarray  # (L, C): before the mixer
    norm2: np.ndarray  # (L, C): before the GLU
    hidden_norm: np.ndarray  # (L, C): of the mixer's gate
    final_norm: np.ndarray  # (C,)
    eps: np.float32  # of these four
    bounds: np.ndarray  # (L, C): lower bounds of the forget gates
    value_norm: np.ndarray  # (L, C): of the six layers, then their scales and layouts
    forget_norm: np.ndarray
    gate_norm: np.ndarray
    out_norm: np.ndarray
    gate_up_norm: np.ndarray
    down_norm: np.ndarray  # (L, I)
    value_scale: np.ndarray  # (L,)
    forget_scale: np.ndarray
    gate_scale: np.ndarray
    out_scale: np.ndarray
    gate_up_scale: np.ndarray
    down_scale: np.ndarray
    value_codes: np.ndarray  # (L, *)
    forget_codes: np.ndarray
    gate_codes: np.ndarray
    out_codes: np.ndarray
    gate_up_codes: np.ndarray
    down_codes: np.ndarray
    value_plain: np.ndarray
    forget_plain: np.ndarray
    gate_plain: np.ndarray
    out_plain: np.ndarray
    gate_up_plain: np.ndarray
    down_plain: np.ndarray
    value_panels: np.ndarray
    forget_panels: np.ndarray
    gate_panels: np.ndarray
    out_panels: np.ndarray
    gate_up_panels: np.ndarray
    down_panels: np.ndarray
    copy_order: np.ndarray  # (O,) int64: see _trunk_arrays.Weights
    copy_skip: np.ndarray  # (O,) int64
    copy_reach: int
    gain_in: np.ndarray  # (O, C)
    gain_out: np.ndarray  # (O, C); (0, C) where nothing is added to the output


class BitActivations(NamedTuple):
    """Activations saved for the backward pass."""

    x: np.ndarray  # (R + 1, N, C): input of each layer; the last: of the final norm
    post_mixer: np.ndarray  # (R, N, C)
    value: np.ndarray  # (R, N, C): of the mixer's three layers, before their activations
    forget: np.ndarray  # (R, N, C)
    gate: np.ndarray  # (R, N, C)
    h: np.ndarray  # (R, N, C): states
    gate_up: np.ndarray  # (R, N, 2 I)
    rstd_norm1: np.ndarray  # (R, N): of all norms
    rstd_inputs: np.ndarray  # (R, N): of value, forget and gate, which read the same row
    rstd_gate: np.ndarray  # (R, N): of hidden_norm
    rstd_out_layer: np.ndarray  # (R, N)
    rstd_norm2: np.ndarray  # (R, N)
    rstd_gate_up: np.ndarray  # (R, N)
    rstd_down: np.ndarray  # (R, N)
    copies: np.ndarray  # (O, N) int32: rows of the embedding, or -1
    out: np.ndarray  # (N, C)
    rstd_out: np.ndarray  # (N,): of the final norm


class BitScratch(NamedTuple):
    """Scratch: within a step, per thread; and between the steps of the backward pass."""

    normed: np.ndarray  # (P, M, C)
    dnormed: np.ndarray  # (P, M, C)
    dinput: np.ndarray  # (P, M, C)
    hidden: np.ndarray  # (P, M, I)
    dhidden: np.ndarray  # (P, M, I)
    dinner: np.ndarray  # (P, M, I)
    dlayer: np.ndarray  # (X, Y, C): gradient of a layer's output
    dpost: np.ndarray  # (X, Y, C): of post_mixer
    dgate_up: np.ndarray  # (X, Y, 2 I)
    dvalue: np.ndarray  # (X, Y, C)
    dforget: np.ndarray  # (X, Y, C)
    dgate: np.ndarray  # (X, Y, C)
    dh: np.ndarray  # (X, Y, C)
    value_in: np.ndarray  # (X, Y, C): rounded inputs of the layers
    forget_in: np.ndarray  # (X, Y, C)
    gate_in: np.ndarray  # (X, Y, C)
    out_in: np.ndarray  # (X, Y, C)
    gate_up_in: np.ndarray  # (X, Y, C)
    down_in: np.ndarray  # (X, Y, I)
    zeros: np.ndarray  # (C,): states before a sequence


class BitGradients(NamedTuple):
    """dx, and copies of the gradients of the weights (_gradient_copies.py)."""

    dx: np.ndarray  # (N, C): of the trunk's input
    norm1: np.ndarray  # (P, L, C)
    norm2: np.ndarray  # (P, L, C)
    hidden_norm: np.ndarray  # (P, L, C)
    final_norm: np.ndarray  # (P, C)
    value_norm: np.ndarray  # (P, L, C)
    forget_norm: np.ndarray  # (P, L, C)
    gate_norm: np.ndarray  # (P, L, C)
    out_norm: np.ndarray  # (P, L, C)
    gate_up_norm: np.ndarray  # (P, L, C)
    down_norm: np.ndarray  # (P, L, I)
    gain_in: np.ndarray  # (P, O, C)
    gain_out: np.ndarray  # (P, O, C), or (P, 0, C)
    bounds: np.ndarray  # (P or Q, L, C)
    value: np.ndarray  # (P or Q, L, C, C)
    forget: np.ndarray  # (P or Q, L, C, C)
    gate: np.ndarray  # (P or Q, L, C, C)
    out: np.ndarray  # (P or Q, L, C, C)
    gate_up: np.ndarray  # (P or Q, L, 2 I, C)
    down: np.ndarray  # (P or Q, L, C, I)
    pool: np.ndarray  # (any,): contains all but dx
    segments: np.ndarray  # (any, 3) int64
