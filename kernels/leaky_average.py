"""A leaky average of the tokens so far, added per channel. It carries the topic of the text beyond the convolutions.

    y[t] = d y[t - 1] + sqrt(1 - d**2) x[t],   out[t] = x[t] + gain * y[t]

with y zero before the sequence begins. The square root gives y the size of x if the tokens are independent.
Letters: T time, C channels. Source: a linear recurrence with one fixed decay, the simplest case of Gu et al. 2021,
arXiv:2111.00396, section 3.
"""

from __future__ import annotations

import math

import numpy as np

from flashlm_numba.kernels import _check
from flashlm_numba.kernels._jit import helper, serial_kernel


@helper
def add_leaky_average_next(x, y, gain, decay, share):
    """Of a token: update the average y (C,) with x (C,), then x += gain * y; gain (C,), share = sqrt(1 - decay**2)."""
    for c in range(x.shape[0]):
        y[c] = decay * y[c] + share * x[c]
        x[c] += gain[c] * y[c]


@helper
def add_leaky_average(x, y, gain, decay, share, first, last):
    """The channels first..last of a sequence x (T, C) += gain * its average; y (C,) becomes the last average."""
    own = y[first:last]
    for c in range(own.shape[0]):
        own[c] = np.float32(0)
    for t in range(x.shape[0]):
        add_leaky_average_next(x[t, first:last], own, gain[first:last], decay, share)


@helper
def add_leaky_average_backward(dx, dgain, x, gain, decay, share, first, last):
    """dx (T, C), the gradient of add_leaky_average's result, becomes that of x; dgain (C,) +=. Destroys x (T, C).

    Channels first..last only.
    """
    own_gain, own_dgain = gain[first:last], dgain[first:last]
    time, width = x.shape[0], own_gain.shape[0]
    for t in range(time):
        x_t, dx_t, before = x[t, first:last], dx[t, first:last], x[max(t - 1, 0), first:last]
        for c in range(width):
            before_c = before[c] if t > 0 else np.float32(0)
            x_t[c] = decay * before_c + share * x_t[c]  # the average
            own_dgain[c] += dx_t[c] * x_t[c]
    for back in range(time):
        t = time - 1 - back
        x_t, dx_t, after = x[t, first:last], dx[t, first:last], x[min(t + 1, time - 1), first:last]
        for c in range(width):
            # forward: y[t + 1] = d y[t] + ..., so dy[t] = gain * dout[t] + d dy[t + 1]
            after_c = after[c] if t < time - 1 else np.float32(0)
            x_t[c] = own_gain[c] * dx_t[c] + decay * after_c
            dx_t[c] += share * x_t[c]


@serial_kernel
def _leaky_average_forward(out, y, gain, decay, share):
    for b in range(out.shape[0]):
        add_leaky_average(out[b], y, gain, decay, share, 0, out.shape[2])


@serial_kernel
def _leaky_average_backward(dx, dgain, x, gain, decay, share):
    for b in range(dx.shape[0]):
        add_leaky_average_backward(dx[b], dgain, x[b], gain, decay, share, 0, dx.shape[2])


def leaky_share(decay: float) -> np.float32:
    """The new token's share sqrt(1 - decay**2) of the average."""
    return np.float32(math.sqrt(1 - decay * decay))


def _check_decay(where: str, decay: float) -> None:
    if not 0 <= decay < 1:
        raise ValueError(f"{where}: decay must be in [0, 1), got {decay}")


def leaky_average_forward(x: np.ndarray, gain: np.ndarray, decay: float) -> np.ndarray:
    """x + gain * (leaky average of x over time), causal, for x (B, T, C) and gain (C,), float32; 0 <= decay < 1.

    Raises ValueError if a shape, a dtype or the decay is wrong.

    >>> x = np.array([[[1], [0], [0]]], np.float32)
    >>> [round(float(value), 3) for value in leaky_average_forward(x, np.ones(1, np.float32), 0.8).ravel()]
    [1.6, 0.48, 0.384]
    """
    _check.array("leaky_average_forward", "x", x, (None, None, None))
    _check.array("leaky_average_forward", "gain", gain, (x.shape[2],))
    _check_decay("leaky_average_forward", decay)
    out = x.copy()
    _leaky_average_forward(out, np.empty(x.shape[2], np.float32), gain, np.float32(decay), leaky_share(decay))
    return out


def leaky_average_backward(
    dout: np.ndarray, x: np.ndarray, gain: np.ndarray, decay: float
) -> tuple[np.ndarray, np.ndarray]:
    """Gradients dx (B, T, C) and dgain (C,) for dout (B, T, C), all float32.

    Raises ValueError as leaky_average_forward.
    """
    _check.array("leaky_average_backward", "dout", dout, (None, None, None))
    _check.array("leaky_average_backward", "x", x, dout.shape)
    _check.array("leaky_average_backward", "gain", gain, (x.shape[2],))
    _check_decay("leaky_average_backward", decay)
    dx, dgain = dout.copy(), np.zeros_like(gain)
    _leaky_average_backward(dx, dgain, x.copy(), gain, np.float32(decay), leaky_share(decay))
    return dx, dgain
