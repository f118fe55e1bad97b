"""The arrays and numbers that the trunk's regions and its mixers' kernels share, in NamedTuples.

Letters: B batch, T time, N = B*T rows, C channels, I FFN width, L blocks, R layers, P threads, Q chunks of sequences, M
rows of a part, X places of scratch that is kept between steps, Y rows of each (_division.Division.places); O ways of
copying.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np


class Shape(NamedTuple):
    """The steps of a pass, their division, and the addresses of the functions that a thread calls (_calls.py)."""

    time: int  # T, rows of a sequence
    tile: int  # rows of a tile
    threads: int  # P
    layers: int  # R
    blocks: int  # L
    steps: np.ndarray  # (any, 3) int64: layer, operation, and which stage of the mixer
    regions: np.ndarray  # of a _division.Plan
    starts: np.ndarray
    parts: np.ndarray
    forward: Any = 0  # address of forward_thread
    backward: Any = 0  # of backward_thread
    mixer_forward: Any = 0  # of the mixer's functions: see _mixer.Mixer
    mixer_backward: Any = 0


class Unit(NamedTuple):
    """The unit of work of a mixer's kernel: one stage at one layer, for some rows."""

    stage: int  # an index of the mixer's stages
    layer: int  # r, where activations are kept
    block: int  # r % L, whose weights are read
    low: int  # first row
    high: int  # last row + 1; complete sequences, except where the stage divides by rows
    time: int  # T
    tile: int  # rows that the gradient of a ternary weight quantises at a time
    thread: int  # whose scratch is used
    copy: int  # of the gradients, to which is added
    place: int  # of the scratch that is kept between stages,
    origin: int  # and the row of the batch that is row 0 there
    share: int  # first share of the channel groups, or of what the stage divides by
    share_end: int  # last share + 1
    shares: int  # number of shares


class Batch(NamedTuple):
    """The inputs of the forward pass."""

    rows: np.ndarray  # (N,) int32: rows of the embedding
    embedding: np.ndarray  # (V, C)


class BatchGradient(NamedTuple):
    """The inputs of the backward pass."""

    dout: np.ndarray  # (N, C)
    embedding: np.ndarray  # (V, C)


class Weights(NamedTuple):
    """Weights of all blocks, without their mixers'. In the backward pass the layouts are those of the transposes."""

    norm1: np.ndarray  # (L, C): before the mixer
    norm2: np.ndarray  # (L, C): before the FFN
    final_norm: np.ndarray  # (C,)
    gate_up_panels: np.ndarray  # of Layouts, (2 I', C) matrices
    gate_up_codes: np.ndarray
    gate_up_plain: np.ndarray
    down_panels: np.ndarray  # of Layouts, (C, I') matrices
    down_codes: np.ndarray
    down_plain: np.ndarray
    ffn_residual_scale: np.float32
    copy_order: np.ndarray  # (O,) int64: tokens that must be the same
    copy_skip: np.ndarray  # (O,) int64: later occurrences that are passed over
    copy_reach: int  # tokens that an occurrence may lie back
    gain_in: np.ndarray  # (O, C): of the copies, at the input
    gain_out: np.ndarray  # (O, C): at the output; (0, C) where nothing is added there


class Activations(NamedTuple):
    """Activations saved for the backward pass."""

    x: np.ndarray  # (R + 1, N, C): input of each layer; the last: of the final norm
    post_mixer: np.ndarray  # (R, N, C)
    rstd_mixer: np.ndarray  # (R, N): of norm1
    rstd_ffn: np.ndarray  # (R, N): of norm2
    gate_up: np.ndarray  # (R, N, 2 I')
    copies: np.ndarray  # (O, N) int32: rows of the embedding, or -1
    out: np.ndarray  # (N, C)
    rstd_out: np.ndarray  # (N,)


class Scratch(NamedTuple):
    """Scratch: within a step, per thread; and between steps."""

    normed: np.ndarray  # (P, M, C)
    inner: np.ndarray  # (P, M, I')
    mixer_in: np.ndarray  # (X, Y, C)
    dmixer_in: np.ndarray  # (X, Y, C)
    ffn_in: np.ndarray  # (X, Y, C)
    hidden: np.ndarray  # (X, Y, I')
    dgate_up: np.ndarray  # (X, Y, 2 I')
    dlayer: np.ndarray  # (X, Y, C): gradient of a layer's output


class Gradients(NamedTuple):
    """dx, and copies of the gradients of the weights (_gradient_copies.py)."""

    dx: np.ndarray  # (N, C): of the trunk's input
    norm1: np.ndarray  # (P, L, C)
    norm2: np.ndarray  # (P, L, C)
    final_norm: np.ndarray  # (P, C)
    gain_in: np.ndarray  # (P, O, C)
    gain_out: np.ndarray  # (P, O, C), or (P, 0, C)
    gate_up: np.ndarray  # (P or Q, L, 2 I', C)
    down: np.ndarray  # (P or Q, L, C, I')
    pool: np.ndarray  # (any,): contains all but dx, and the mixer's
    segments: np.ndarray  # (any, 3) int64
