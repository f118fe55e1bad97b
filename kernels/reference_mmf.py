"""NumPy twins of the MatMul-free LM's layers and of its trunk, for any floating dtype.

The gradients pass straight through both roundings of a BitLinear. With rounded=False nothing is rounded, neither
inputs nor weights, so that central differences can check the gradients.
Letters: B batch, T time, N = B*T positions, C channels, L blocks. Source: Zhu et al. 2024, arXiv:2406.02528, with the
authors' code where the two differ (docs/model.md).
"""

from __future__ import annotations

import contextlib

import numpy as np

from flashlm_numba.kernels import reference as r

LEAST = 1e-5  # of a row's largest magnitude and of a matrix's mean magnitude


def silu(x):
    return x * r.sigmoid(x)


def silu_slope(x):
    s = r.sigmoid(x)
    return s * (1 + x * (1 - s))


# --- the recurrence ---


def mlgru_forward(forget, value, bound):
    """h (B, T, H) for forget, value (B, T, H) and bound (H,)."""
    f = bound + (1 - bound) * r.sigmoid(forget)
    h, state = np.zeros_like(value), np.zeros_like(value[:, 0]) if value.shape[1] else None
    for t in range(value.shape[1]):
        state = f[:, t] * state + (1 - f[:, t]) * silu(value[:, t])
        h[:, t] = state
    return h


def mlgru_backward(dh, h, forget, value, bound):
    """dforget, dvalue (B, T, H) and dbound (H,) for dh (B, T, H)."""
    s = r.sigmoid(forget)
    f, df, dvalue = bound + (1 - bound) * s, np.zeros_like(forget), np.zeros_like(value)
    later = np.zeros_like(dh[:, 0]) if dh.shape[1] else None
    for t in reversed(range(dh.shape[1])):
        d = dh[:, t] + later
        before = h[:, t - 1] if t else np.zeros_like(d)
        df[:, t] = d * (before - silu(value[:, t]))
        dvalue[:, t] = d * (1 - f[:, t]) * silu_slope(value[:, t])
        later = f[:, t] * d
    return df * (1 - bound) * s * (1 - s), dvalue, (df * (1 - s)).sum((0, 1))


# --- layers ---


def rmsnorm(x, weight, eps):
    """The normed rows of x (N, C), and rstd (N,)."""
    rstd = 1 / np.sqrt((x * x).mean(1, dtype=x.dtype) + x.dtype.type(eps))
    return x * rstd[:, None] * weight, rstd


def absmean_ternary(weight):
    """Ternary values and scale of weight (R, K)."""
    sizes = np.abs(weight)
    alike = np.unique(sizes[sizes > 0]).size <= 1  # ternary values times a scale already
    total = np.cumsum(sizes.ravel(), dtype=np.float64)[-1] if weight.size else 0.0  # in order
    scale = sizes.max(initial=0) if alike else total / weight.size
    scale = weight.dtype.type(max(np.float32(scale), np.float32(LEAST)))
    return (weight > scale / 2).astype(weight.dtype) - (weight < -scale / 2), scale


_closest: list[list[float]] = []


@contextlib.contextmanager
def undecided():
    """Yields a list of one number, which becomes the least distance of an input from where its rounding changes."""
    _closest.append([0.5])
    try:
        yield _closest[-1]
    finally:
        _closest.pop()


def round_inputs(y):
    """Rows of y (N, K) in 127 steps of their largest magnitude: whole numbers (N, K), and the steps (N, 1)."""
    largest = np.maximum(np.abs(y).max(1, keepdims=True, initial=0), y.dtype.type(LEAST))
    steps = y * (y.dtype.type(127) / largest)
    for closest in _closest:
        closest[0] = min(closest[0], np.abs(steps - np.floor(steps) - 0.5).min(initial=0.5))
    return np.rint(steps), largest / y.dtype.type(127)


def bitlinear_forward(x, norm, weight, *, eps=1e-6, rounded=True):
    """Output (N, R) for x (N, K), and what the backward pass needs."""
    y, rstd = rmsnorm(x, norm, eps)
    values, scale = absmean_ternary(weight) if rounded else (weight, weight.dtype.type(1))
    q, step = round_inputs(y) if rounded else (y, np.ones_like(rstd[:, None]))
    return (q @ values.T) * (step * scale), (q * step, values * scale, x, norm, rstd)


def bitlinear_backward(dout, saved):
    """dx (N, K), dnorm (K,) and dweight (R, K) for dout (N, R)."""
    y, weight, x, norm, rstd = saved
    dx, dnorm = r.rmsnorm_backward(dout @ weight, x, norm, rstd)
    return dx, dnorm, dout.T @ y


def gated_forward(gate, h, weight, eps):
    """norm(gate) * silu(h) for gate, h (N, C), and rstd (N,)."""
    normed, rstd = rmsnorm(gate, weight, eps)
    return normed * silu(h), rstd


def gated_backward(dout, gate, h, weight, rstd):
    """dgate, dh (N, C) and dweight (C,) for dout (N, C)."""
    normed = gate * rstd[:, None] * weight
    dgate, dweight = r.rmsnorm_backward(dout * silu(h), gate, weight, rstd)
    return dgate, dout * normed * silu_slope(h), dweight


def swiglu_forward(gate_up):
    gate, up = np.split(gate_up, 2, axis=1)
    return silu(gate) * up


def swiglu_backward(dout, gate_up):
    gate, up = np.split(gate_up, 2, axis=1)
    return np.concatenate([dout * up * silu_slope(gate), dout * silu(gate)], axis=1)


def lower_bounds(parameter):
    """(L, H) from (L, H)."""
    shares = np.exp(parameter - parameter.max(0))
    shares = shares / shares.sum(0)
    return np.cumsum(shares, 0) - shares[0], shares


def lower_bounds_backward(dbounds, shares):
    dshares = np.cumsum(dbounds[::-1], 0)[::-1].copy()
    dshares[0] = 0
    return shares * (dshares - (shares * dshares).sum(0))


# --- the trunk ---

INPUTS = ("input", "forget", "gate")  # the mixer's layers that read its input


def trunk_forward(parameters, ids, *, n_passes=1, eps=1e-6, rounded=True, ngram_copy_orders=(), ngram_copy_reach=1):
    """Hidden states (N, C) for token ids (B, T), and what the backward pass needs; parameters by the model's names."""
    p = parameters
    e, layers = p["embedding.weight"], []

    def layer(name, x):
        return bitlinear_forward(x, p[f"{name}.norm.weight"], p[f"{name}.weight"], rounded=rounded)

    before = [ngram_copy_orders[:i].count(order) for i, order in enumerate(ngram_copy_orders)]
    copies = [
        r.ngram_copies(ids, order, ngram_copy_reach, skip).reshape(-1)
        for order, skip in zip(ngram_copy_orders, before, strict=True)
    ]
    x = r.embedding_forward(e, ids.reshape(-1))
    for o, rows in enumerate(copies):
        x = r.add_copies(x, e, rows, p[f"ngram_copy.inputs.{o}.weight"])
    bounds, shares = lower_bounds(p["lower_bounds"])
    time = *ids.shape, -1
    for number in list(range(len(bounds))) * n_passes:
        block = f"blocks.{number}."
        y, rstd1 = rmsnorm(x, p[f"{block}norm1.weight"], eps)
        outs, saved = {}, {}
        for name in INPUTS:
            outs[name], saved[name] = layer(f"{block}mixer.{name}", y)
        forget, value = outs["forget"].reshape(time), outs["input"].reshape(time)
        h = mlgru_forward(forget, value, bounds[number])
        flat = h.reshape(len(x), -1)
        o, rstd_gate = gated_forward(outs["gate"], flat, p[f"{block}mixer.hidden_norm.weight"], eps)
        mixed, saved["out"] = layer(f"{block}mixer.out", o)
        post_mixer = x + mixed
        n, rstd2 = rmsnorm(post_mixer, p[f"{block}norm2.weight"], eps)
        gate_up, saved["gate_up"] = layer(f"{block}glu.gate_up", n)
        down, saved["down"] = layer(f"{block}glu.down", swiglu_forward(gate_up))
        layers.append((number, x, rstd1, outs["gate"], h, forget, value, rstd_gate, post_mixer, rstd2, gate_up, saved))
        x = post_mixer + down
    out, rstd = rmsnorm(x, p["final_norm.weight"], eps)
    for o, rows in enumerate(copies if "ngram_copy.outputs.0.weight" in p else []):
        out = r.add_copies(out, e, rows, p[f"ngram_copy.outputs.{o}.weight"])
    return out, (p, ids, copies, bounds, shares, layers, x, rstd)


def trunk_backward(dout, saved):
    """Gradients by name of sum(dout * hidden states), dout (N, C)."""
    p, ids, copies, bounds, shares, layers, x, rstd = saved
    g = {name: np.zeros_like(value) for name, value in p.items()}
    e, de, dbounds = p["embedding.weight"], g["embedding.weight"], np.zeros_like(bounds)

    def layer(name, dy, kept):
        dx, dnorm, dweight = bitlinear_backward(dy, kept)
        g[f"{name}.norm.weight"] += dnorm
        g[f"{name}.weight"] += dweight
        return dx

    def norm(name, dy, x, rstd):
        dx, dweight = r.rmsnorm_backward(dy, x, p[name], rstd)
        g[name] += dweight
        return dx

    for o, rows in enumerate(copies if "ngram_copy.outputs.0.weight" in p else []):
        name = f"ngram_copy.outputs.{o}.weight"
        g[name] += r.add_copies_backward(dout, de, e, rows, p[name])
    dx = norm("final_norm.weight", dout, x, rstd)
    for number, x, rstd1, gate, h, forget, value, rstd_gate, post_mixer, rstd2, gate_up, kept in reversed(layers):
        block = f"blocks.{number}."
        dhidden = layer(f"{block}glu.down", dx, kept["down"])
        dn = layer(f"{block}glu.gate_up", swiglu_backward(dhidden, gate_up), kept["gate_up"])
        dx = dx + norm(f"{block}norm2.weight", dn, post_mixer, rstd2)
        do = layer(f"{block}mixer.out", dx, kept["out"])
        name = f"{block}mixer.hidden_norm.weight"
        dgate, dh, dweight = gated_backward(do, gate, h.reshape(len(x), -1), p[name], rstd_gate)
        g[name] += dweight
        dforget, dvalue, dbound = mlgru_backward(dh.reshape(h.shape), h, forget, value, bounds[number])
        dbounds[number] += dbound
        flat = {"input": dvalue.reshape(len(x), -1), "forget": dforget.reshape(len(x), -1), "gate": dgate}
        dy = sum(layer(f"{block}mixer.{name}", flat[name], kept[name]) for name in INPUTS)
        dx = dx + norm(f"{block}norm1.weight", dy, x, rstd1)
    g["lower_bounds"] += lower_bounds_backward(dbounds, shares)
    for o, rows in enumerate(copies):
        name = f"ngram_copy.inputs.{o}.weight"
        g[name] += r.add_copies_backward(dx, de, e, rows, p[name])
    r.embedding_backward(de, dx, ids.reshape(-1))
    return g
