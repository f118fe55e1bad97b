"""Continuing a text by several tokens in one call of compiled code: draw a token, read it with the trunk, and again.

Between two compiled calls Python takes as long as a quarter of a token. Any trunk's decoding and any Drawing fit
together, since they are called by address (_calls.py).
Letters: T tokens to draw, C channels, O ways of copying, U random numbers per token, V vocabulary.
"""

from __future__ import annotations

import numba
import numpy as np

from flashlm_numba.kernels import _check
from flashlm_numba.kernels._calls import address, call
from flashlm_numba.kernels._jit import serial_kernel
from flashlm_numba.kernels._text import TextState
from flashlm_numba.kernels.tree_draw import Drawing


@serial_kernel
def _write(rows, choice, uniforms, pending, position, draw, step, drawing, decoding, x, copies, embedding):
    """rows (T,) int64: rows of the embedding drawn one after another. Returns their number, less than T if one cannot
    be drawn.

    choice (1,) int64: scratch;  uniforms (T, U) float64
    pending : the row drawn last, which is read first; -1 if x is the hidden state after it
    position : the number of tokens read;  draw, step : addresses of what draws a token and of what reads one
    drawing, decoding : what they take beside the others
    x (1, C), copies (O,) int32: where step leaves the hidden state and the rows to copy
    """
    for t in range(rows.shape[0]):
        if pending >= 0:
            call(step, embedding, pending, position, decoding)
            position += 1
        call(draw, choice, x, copies, uniforms[t], drawing)
        pending = choice[0]
        if pending < 0:
            return t
        rows[t] = pending
    return rows.shape[0]


def compile_writing(state: TextState, drawing: Drawing, embedding: np.ndarray) -> None:
    """Compile what a Writer with arguments of these types calls, apart from what draws a token and what reads one."""
    if not numba.config.DISABLE_JIT:
        rows, uniforms, own = np.empty(1, np.int64), np.empty((1, 1)), state.state
        fields = drawing.fields, state.fields, own.out, own.copies, embedding
        _write.compile(tuple(map(numba.typeof, (rows, rows, uniforms, 0, 0, 0, 0, *fields))))


class Writer:
    """Continues the text of a decoding state.

    state : of the text, which the writer advances;  drawing : how its tokens are drawn
    embedding : (V, C) float32, the rows that the trunk reads
    token_of_row : (V,) int32, the token of each row; None if row v belongs to token v
    pending : the row of the token drawn last, which the state has not read; -1 if it has read all
    uniforms : random numbers per token
    Raises ValueError if a shape or dtype is wrong.
    """

    def __init__(
        self, state: TextState, drawing: Drawing, embedding: np.ndarray, token_of_row: np.ndarray | None = None
    ) -> None:
        x, copies = state.state.out, state.state.copies
        _check.array("Writer", "embedding", embedding, (None, x.shape[1]))
        _check.array("Writer", "the rows of drawing", drawing.fields[0], embedding.shape)
        if len(copies) != len(drawing.fields[1]) and len(drawing.fields[1]):
            raise ValueError(f"Writer: drawing has {len(drawing.fields[1])} ways of copying, the state {len(copies)}")
        if not len(drawing.fields[1]):
            copies = copies[:0]
        self.pending, self.uniforms = -1, drawing.uniforms
        self._state, self._token_of_row = state, token_of_row
        self._choice = np.empty(1, np.int64)
        draw = address(drawing.function, self._choice, x, copies, np.empty(self.uniforms), drawing.fields)
        step = address(state.step, embedding, 0, 0, state.fields)
        self._last = draw, step, drawing.fields, state.fields, x, copies, embedding

    def write(self, uniforms: np.ndarray) -> np.ndarray:
        """Draw T tokens, each from the hidden state after the tokens before it, with one thread.

        uniforms : (T, U) float64 in [0, 1)
        Returns the ids of the drawn tokens (t,), where t is less than T if the next one cannot be drawn. Any division
        of a text into calls gives the same tokens. Raises ValueError if a shape or dtype is wrong, and
        RuntimeError if another thread is using the state.
        """
        _check.array("Writer.write", "uniforms", uniforms, (None, self.uniforms), np.float64)
        rows, state = np.empty(len(uniforms), np.int64), self._state
        if not len(rows):
            return rows.astype(np.int32)
        with state.alone("Writer.write"):
            reads = int(self.pending >= 0)
            count = _write(rows, self._choice, uniforms, self.pending, state.position, *self._last)
            if count:
                reads += count - 1
                self.pending = int(rows[count - 1])
            if count < len(rows):  # the last row was read in vain
                reads, self.pending = reads + (count > 0), -1
            state.position += reads
        return rows[:count] if self._token_of_row is None else self._token_of_row[rows[:count]]
