"""NumPy twins of the public kernels: the executable specification.

They are plain formulas that share no code with the kernels and take any floating dtype. float64 gives the true values,
float32 the error that a kernel may have.
"""

from __future__ import annotations

import numpy as np


def sigmoid(x):
    """1 / (1 + exp(-x)) without overflow."""
    e = np.exp(-np.abs(x))
    return np.where(x >= 0, 1, e) / (1 + e)


def rmsnorm_forward(x, weight):
    rstd = 1 / np.sqrt((x * x).mean(1, dtype=x.dtype) + x.dtype.type(1e-8))
    return x * rstd[:, None] * weight, rstd


def rmsnorm_backward(dout, x, weight, rstd):
    """dx (N, C) and dweight (C,)."""
    normal = x * rstd[:, None]
    dnormal = dout * weight
    dx = (dnormal - normal * (dnormal * normal).mean(1, keepdims=True)) * rstd[:, None]
    return dx, (dout * normal).sum(0)


def glu_forward(gate_up):
    gate, up = np.split(gate_up, 2, axis=1)
    return np.maximum(gate, 0) ** 2 * up


def glu_backward(dout, gate_up):
    gate, up = np.split(gate_up, 2, axis=1)
    g = np.maximum(gate, 0)
    return np.concatenate([dout * 2 * g * up, dout * g * g], axis=1)


def embedding_forward(weight, rows):
    return weight[rows]


def embedding_backward(dweight, dout, rows):
    np.add.at(dweight, rows, dout)


def ternarize(weight, threshold=1.0):
    total = np.cumsum(np.abs(weight).ravel(), dtype=np.float64)[-1] if weight.size else 0.0  # in order
    t = weight.dtype.type(np.float32(threshold) * np.float32(total / max(weight.size, 1)))
    return ((weight > t).astype(weight.dtype) - (weight < -t)).astype(weight.dtype)


def pack_ternary(weight):
    rows, columns = weight.shape
    codes = np.ones((rows, -(-columns // 256) * 256), np.uint8)
    codes[:, :columns] = weight + 1
    blocks = codes.shape[1] // 256
    codes = codes.reshape(rows, blocks, 4, 64) << np.array([0, 2, 4, 6], np.uint8)[:, None]
    return codes.sum(2, dtype=np.uint8).reshape(rows, 64 * blocks)


def quantize_rows(x):
    """q (N, K) int8 and scale (N,); see the kernel for rows without size."""
    largest = np.abs(x).max(1, initial=0)
    with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
        q = np.rint(x * (x.dtype.type(127) / largest)[:, None])
    usable = np.isfinite(largest) & (largest >= 2.0**-100)
    scale = np.where(usable, largest * x.dtype.type(1 / 127), np.where(np.isfinite(largest), 0, np.nan))
    return np.where(usable[:, None], q, 0).astype(np.int8), scale.astype(x.dtype)


def ternary_wgrad_int8(a, b):
    """a.T @ b with b rounded to int8 row by row, and a times b's scales column by column."""

    def rounded(x, axis):
        scale = np.abs(x).max(axis, keepdims=True, initial=0) * x.dtype.type(1 / 127)
        return np.rint(x / np.where(scale > 0, scale, 1)).astype(np.int64), scale

    p, s = rounded(b, 1)
    q, t = rounded(a * s, 0)
    return t.T * (q.T @ p).astype(b.dtype)


def ternary_gemv_int8(weight, q):
    return q.astype(np.int32) @ weight.astype(np.int32).T


def ternary_matvec(weight, x):
    return weight @ x


def _leaky_average(x, decay):
    """y (B, T, C): y[t] = decay * y[t - 1] + sqrt(1 - decay**2) * x[t]."""
    d, share = x.dtype.type(decay), x.dtype.type(np.sqrt(1 - decay**2))
    y, state = np.empty_like(x), np.zeros_like(x[:, 0] if x.shape[1] else x.sum(1))
    for t in range(x.shape[1]):
        state = y[:, t] = d * state + share * x[:, t]
    return y


def leaky_average_forward(x, gain, decay):
    return x + gain * _leaky_average(x, decay)


def leaky_average_backward(dout, x, gain, decay):
    """dx, dgain."""
    back = _leaky_average((gain * dout)[:, ::-1], decay)[:, ::-1]
    return dout + back, (dout * _leaky_average(x, decay)).sum((0, 1))


def ngram_copies(rows, order, reach, skip=0):
    """(B, T): rows[b, j + 1] for the last j < t, no more than reach back, where the `order` rows that end at j equal
    those that end at t, or for the one `skip` such j before it; -1 where there is none.
    """
    found = np.full_like(rows, -1)
    for b, t in np.ndindex(rows.shape):
        now = rows[b, t - order + 1 : t + 1]
        before = range(max(order - 1, t - reach), t)
        same = [j for j in before if np.array_equal(rows[b, j - order + 1 : j + 1], now)]
        if len(same) > skip:
            found[b, t] = rows[b, same[-1 - skip] + 1]
    return found


def add_copies(x, embedding, found, gain):
    """x (N, C) + gain (C,) * embedding[found], for found (N,) that are not -1."""
    return x + gain * np.where(found[:, None] >= 0, embedding[found], 0).astype(x.dtype)


def add_copies_backward(dout, dembedding, embedding, found, gain):
    """dgain (C,); the embedding's gradient is added to dembedding (V, C)."""
    at = np.flatnonzero(found >= 0)
    np.add.at(dembedding, found[at], gain * dout[at])
    return (dout[at] * embedding[found[at]]).sum(0)


def _conv(x, weight, groups, dilation):
    """Causal grouped convolution of x (B, T, C) with weight (C, C/groups, K)."""
    batch, time, channels = x.shape
    taps, width = weight.shape[2], channels // groups
    padded = np.concatenate([np.zeros((batch, (taps - 1) * dilation, channels), x.dtype), x], axis=1)
    out = np.zeros_like(x)
    for k in range(taps):
        seen = padded[:, k * dilation : k * dilation + time].reshape(batch, time, groups, width)
        w = weight[:, :, k].reshape(groups, width, width)
        out += np.einsum("btgi,goi->btgo", seen, w).reshape(x.shape)
    return out


def gated_conv_forward(x, gate, value, groups, dilation):
    return sigmoid(_conv(x, gate, groups, dilation)) * _conv(x, value, groups, dilation)


def _conv_backward(dout, x, weight, groups, dilation):
    batch, time, channels = x.shape
    taps, width = weight.shape[2], channels // groups
    reach = (taps - 1) * dilation
    padded = np.concatenate([np.zeros((batch, reach, channels), x.dtype), x], axis=1)
    dpadded, dweight = np.zeros_like(padded), np.zeros_like(weight)
    d = dout.reshape(batch, time, groups, width)
    for k in range(taps):
        seen = padded[:, k * dilation : k * dilation + time].reshape(batch, time, groups, width)
        w = weight[:, :, k].reshape(groups, width, width)
        back = np.einsum("btgo,goi->btgi", d, w).reshape(x.shape)
        dpadded[:, k * dilation : k * dilation + time] += back
        dweight[:, :, k] = np.einsum("btgo,btgi->goi", d, seen).reshape(channels, width)
    return dpadded[:, reach:], dweight


def gated_conv_backward(dout, x, gate, value, groups, dilation):
    """dx, dgate, dvalue."""
    s, v = sigmoid(_conv(x, gate, groups, dilation)), _conv(x, value, groups, dilation)
    dx_gate, dgate = _conv_backward(dout * v * s * (1 - s), x, gate, groups, dilation)
    dx_value, dvalue = _conv_backward(dout * s, x, value, groups, dilation)
    return dx_gate + dx_value, dgate, dvalue


def dense_head_forward(h, weight, targets, log_prior=None, label_smoothing=0.0, z_loss=0.0, soft_cap=None):
    """loss (N,), nll (N,), logits (N, V)."""
    logits = h @ weight.T
    if soft_cap is not None:
        logits = soft_cap * np.tanh(logits / soft_cap)
    if log_prior is not None:
        logits = logits + log_prior
    top = logits.max(1, keepdims=True)
    lse = np.log(np.exp(logits - top).sum(1)) + top[:, 0]
    target = np.take_along_axis(logits, targets[:, None].astype(np.int64), 1)[:, 0]
    loss = lse - (1 - label_smoothing) * target - label_smoothing * logits.mean(1) + z_loss * lse**2
    return loss, lse - target, logits


def dense_head_backward(weights, h, weight, targets, log_prior=None, label_smoothing=0.0, z_loss=0.0, soft_cap=None):
    """dh (N, C) and dweight (V, C) of sum(weights * loss)."""
    _, nll, logits = dense_head_forward(h, weight, targets, log_prior, label_smoothing, z_loss, soft_cap)
    target = targets[:, None].astype(np.int64)
    lse = nll + np.take_along_axis(logits, target, 1)[:, 0]
    dlogits = np.exp(logits - lse[:, None]) * (1 + 2 * z_loss * lse)[:, None] - label_smoothing / weight.shape[0]
    np.put_along_axis(dlogits, target, np.take_along_axis(dlogits, target, 1) - (1 - label_smoothing), 1)
    if soft_cap is not None:
        capped = logits if log_prior is None else logits - log_prior
        dlogits = dlogits * (1 - (capped / soft_cap) ** 2)
    dlogits = (dlogits * weights[:, None]).astype(h.dtype)
    return dlogits @ weight, dlogits.T @ h


def copy_scores(h, embedding, copies, bias, hidden, match):
    """Scores of the copies (N, O), -inf where copies is -1."""
    scale = h.dtype.type(h.shape[1] ** -0.5)
    scores = bias + (h @ hidden.T + match * np.einsum("nc,noc->no", h, embedding[copies])) * scale
    return np.where(copies >= 0, scores, -np.inf).astype(h.dtype)


def copy_scores_backward(dscores, h, embedding, copies, hidden, match):
    """dh, dembedding, dbias, dhidden, dmatch."""
    scale = h.dtype.type(h.shape[1] ** -0.5)
    d = np.where(copies >= 0, dscores, 0).astype(h.dtype)
    rows = embedding[copies]
    dh = (d @ hidden + np.einsum("no,noc->nc", d * match, rows)) * scale
    dembedding = np.zeros_like(embedding)
    np.add.at(dembedding, copies, (d * match)[:, :, None] * h[:, None] * scale)
    dmatch = (d * np.einsum("nc,noc->no", h, rows)).sum(0) * scale
    return dh, dembedding, d.sum(0), d.T @ h * scale, dmatch


def copy_shares(scores):
    """The shares (N, O + 1) of the head and of the copies."""
    scores = np.concatenate([np.zeros_like(scores[:, :1]), scores], axis=1)
    shares = np.exp(scores - scores.max(1, keepdims=True))
    return shares / shares.sum(1, keepdims=True)
