"""The recurrence of the MatMul-free LM's token mixer (MLGRU): a gated average per channel, in one pass over time.

    f[t] = b + (1 - b) sigmoid(forget[t])           b: the channel's lower bound, the same at every token
    h[t] = f[t] h[t - 1] + (1 - f[t]) silu(value[t])

h is zero before a sequence. No channel reads another one, so the work divides by sequences and channels. The backward
pass computes the gates again and keeps nothing but forget, value and h.
Letters: B batch, T time, N = B*T rows, H channels, P threads.
Source: Zhu et al. 2024, arXiv:2406.02528, section 3.3.1; the lower bound is that of the authors' code, after Qin et al.
2023, arXiv:2311.04823, section 3.2.
"""

from __future__ import annotations

import numba
import numpy as np
from numba import prange

from flashlm_numba.kernels import _check
from flashlm_numba.kernels._jit import helper, kernel
from flashlm_numba.kernels._math import exp32

REGISTER = 16  # channels of a share: floats of the widest register
_ZERO, _ONE = np.float32(0), np.float32(1)


@helper
def sigmoid32(x):
    """1 / (1 + exp(-x))."""
    return _ONE / (_ONE + exp32(-x))


@helper
def mlgru_sequence(h, before, forget, value, bound, first, last):
    """The channels first..last of h (T, H) of a sequence, for h before it (H,), forget, value (T, H), bound (H,)."""
    own = bound[first:last]
    for t in range(h.shape[0]):
        h_t, forget_t, value_t = h[t, first:last], forget[t, first:last], value[t, first:last]
        previous = before[first:last] if t == 0 else h[t - 1, first:last]
        for c in range(own.shape[0]):
            f = own[c] + (_ONE - own[c]) * sigmoid32(forget_t[c])
            h_t[c] = f * previous[c] + (_ONE - f) * (value_t[c] * sigmoid32(value_t[c]))


@helper
def mlgru_sequence_backward(dforget, dvalue, dbound, dh, h, before, forget, value, bound, first, last):
    """dforget, dvalue (T, H), and dbound (H,) +=, for dh (T, H), which becomes the gradient with the later tokens'.

    The channels first..last of a sequence; the other arrays are those of mlgru_sequence.
    """
    own, own_dbound, time = bound[first:last], dbound[first:last], h.shape[0]
    for back in range(time):
        t = time - 1 - back
        forget_t, value_t, dh_t = forget[t, first:last], value[t, first:last], dh[t, first:last]
        dforget_t, dvalue_t = dforget[t, first:last], dvalue[t, first:last]
        previous = before[first:last] if t == 0 else h[t - 1, first:last]
        for c in range(own.shape[0]):
            s, g, d = sigmoid32(forget_t[c]), sigmoid32(value_t[c]), dh_t[c]
            f, v = own[c] + (_ONE - own[c]) * s, value_t[c] * g
            # forward: h[t] = f h[t - 1] + (1 - f) v with f = b + (1 - b) s
            df = d * (previous[c] - v)
            own_dbound[c] += df * (_ONE - s)
            dforget_t[c] = df * (_ONE - own[c]) * s * (_ONE - s)
            dvalue_t[c] = d * (_ONE - f) * g * (_ONE + value_t[c] * (_ONE - g))
        if t > 0:
            dh_before = dh[t - 1, first:last]
            for c in range(own.shape[0]):
                s = sigmoid32(forget_t[c])
                dh_before[c] += (own[c] + (_ONE - own[c]) * s) * dh_t[c]


# --- regions: a unit is a sequence's share of the channels ---


@helper
def _unit(index, batch, channels, threads):
    """Sequence, first channel and last + 1 of a unit, of batch * units_per_sequence."""
    shares = _shares(batch, channels, threads)
    share, whole = index % shares, (channels + REGISTER - 1) // REGISTER
    first = min(channels, share * whole // shares * REGISTER)
    return index // shares, first, min(channels, (share + 1) * whole // shares * REGISTER)


@helper
def _shares(batch, channels, threads):
    """Shares of the channels of a sequence: as many as give every thread a unit, if there are as many registers."""
    return max(1, min((channels + REGISTER - 1) // REGISTER, (threads + batch - 1) // max(batch, 1)))


@helper
def _forward_units(h, before, forget, value, bound, thread, threads):
    batch, _, channels = h.shape
    units = batch * _shares(batch, channels, threads)
    for index in range(thread * units // threads, (thread + 1) * units // threads):
        b, first, last = _unit(index, batch, channels, threads)
        mlgru_sequence(h[b], before, forget[b], value[b], bound, first, last)


@kernel
def _mlgru_forward(h, before, forget, value, bound, threads):
    for thread in prange(threads):
        _forward_units(h, before, forget, value, bound, np.int64(thread), threads)


@helper
def _backward_units(dforget, dvalue, dbound, dh, h, before, forget, value, bound, thread, threads):
    batch, _, channels = h.shape
    units = batch * _shares(batch, channels, threads)
    for index in range(thread * units // threads, (thread + 1) * units // threads):
        b, first, last = _unit(index, batch, channels, threads)
        mlgru_sequence_backward(
            dforget[b], dvalue[b], dbound[b], dh[b], h[b], before, forget[b], value[b], bound, first, last
        )


@kernel
def _mlgru_backward(dforget, dvalue, dbound, dh, h, before, forget, value, bound, threads):
    for thread in prange(threads):
        _backward_units(dforget, dvalue, dbound, dh, h, before, forget, value, bound, np.int64(thread), threads)


def _check_inputs(where: str, forget: np.ndarray, value: np.ndarray, bound: np.ndarray) -> None:
    _check.array(where, "forget", forget, (None, None, None))
    _check.array(where, "value", value, forget.shape)
    _check.array(where, "bound", bound, (forget.shape[2],))


def mlgru_forward(forget: np.ndarray, value: np.ndarray, bound: np.ndarray) -> np.ndarray:
    """The states h (B, T, H) for forget, value (B, T, H) before their activations and bound (H,) in [0, 1], float32.

    Every number of threads gives the same bits. Raises ValueError if a shape or dtype is wrong. Cost: two exponentials
    and some ten flop per element. Source: arXiv:2406.02528, section 3.3.1.

    >>> forget, value = np.zeros((1, 3, 1), np.float32), np.full((1, 3, 1), 20, np.float32)
    >>> mlgru_forward(forget, value, np.zeros(1, np.float32)).ravel().tolist()
    [10.0, 15.0, 17.5]
    """
    _check_inputs("mlgru_forward", forget, value, bound)
    h = np.empty_like(forget)
    _mlgru_forward(h, np.zeros_like(bound), forget, value, bound, numba.get_num_threads())
    return h


def mlgru_backward(
    dh: np.ndarray, h: np.ndarray, forget: np.ndarray, value: np.ndarray, bound: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """dforget, dvalue (B, T, H) and dbound (H,) for dh (B, T, H), all float32; h is the result of mlgru_forward.

    Raises ValueError if a shape or dtype is wrong.
    """
    _check_inputs("mlgru_backward", forget, value, bound)
    _check.array("mlgru_backward", "dh", dh, forget.shape)
    _check.array("mlgru_backward", "h", h, forget.shape)
    dforget, dvalue = np.empty_like(forget), np.empty_like(value)
    dbound = np.zeros((len(forget), len(bound)), np.float32)
    zero, threads = np.zeros_like(bound), numba.get_num_threads()
    _mlgru_backward(dforget, dvalue, dbound, dh.copy(), h, zero, forget, value, bound, threads)
    return dforget, dvalue, dbound.sum(0)
