"""NumPy twin of the trunk, built from the twins of its parts, for any floating dtype.

The gradients of the ternary layers use the straight-through estimator.
Letters: B batch, T time, N = B*T positions, C channels.
"""

from __future__ import annotations

import re

import numpy as np

from flashlm_numba.kernels import reference as r

_TERNARY = re.compile(r"blocks\.\d+\.(mixer\.out|glu\.(gate|up|down))\.weight")


def is_ternary(name):
    """Whether the matrix of this name is evaluated as -1, 0 and +1."""
    return _TERNARY.fullmatch(name) is not None


def trunk_forward(
    parameters,
    ids,
    *,
    groups,
    dilations,
    n_passes,
    mixer_residual_scale=1.0,
    ffn_residual_scale=1.0,
    leaky_decay=0.0,
    ternary_threshold=1.0,
    ngram_copy_orders=(),
    ngram_copy_reach=1,
):
    """Hidden states (N, C) for token ids (B, T), and what the backward pass needs; parameters by the model's names."""
    p = {
        name: r.ternarize(value, ternary_threshold) if is_ternary(name) else value for name, value in parameters.items()
    }
    e, layers = p["embedding.weight"], []
    before = [ngram_copy_orders[:i].count(order) for i, order in enumerate(ngram_copy_orders)]
    copies = [
        r.ngram_copies(ids, order, ngram_copy_reach, skip).reshape(-1)
        for order, skip in zip(ngram_copy_orders, before, strict=True)
    ]
    x = r.embedding_forward(e, ids.reshape(-1))
    for o, rows in enumerate(copies):
        x = r.add_copies(x, e, rows, p[f"ngram_copy.inputs.{o}.weight"])
    blocks = sorted({name.split(".")[1] for name in p if name.startswith("blocks.")}, key=int)
    for block in [f"blocks.{b}." for b in blocks] * n_passes:
        m, rstd = r.rmsnorm_forward(x, p[f"{block}norm1.weight"])
        mixer_in = m.reshape(*ids.shape, -1)
        if leaky_decay:
            m = r.leaky_average_forward(mixer_in, p[f"{block}mixer.leaky.weight"], leaky_decay).reshape(m.shape)
        mixed = []
        for i, dilation in enumerate(dilations):
            normed, rstd_m = r.rmsnorm_forward(m, p[f"{block}mixer.norms.{i}.weight"])
            seen = normed.reshape(*ids.shape, -1)
            mixed.append((m, rstd_m, seen))
            gate, value = p[f"{block}mixer.gates.{i}.weight"], p[f"{block}mixer.values.{i}.weight"]
            m = m + r.gated_conv_forward(seen, gate, value, groups, dilation).reshape(m.shape)
        m = m * m.dtype.type(mixer_residual_scale)
        post_mixer = x + m @ p[f"{block}mixer.out.weight"].T
        n, rstd_n = r.rmsnorm_forward(post_mixer, p[f"{block}norm2.weight"])
        gate_up = n @ np.concatenate([p[f"{block}glu.gate.weight"], p[f"{block}glu.up.weight"]]).T
        hidden = r.glu_forward(gate_up) * m.dtype.type(ffn_residual_scale)
        layers.append((block, x, rstd, mixer_in, mixed, m, post_mixer, n, rstd_n, gate_up, hidden))
        x = post_mixer + hidden @ p[f"{block}glu.down.weight"].T
    out, rstd = r.rmsnorm_forward(x, p["final_norm.weight"])
    for o, rows in enumerate(copies if "ngram_copy.outputs.0.weight" in p else []):
        out = r.add_copies(out, e, rows, p[f"ngram_copy.outputs.{o}.weight"])
    scales = mixer_residual_scale, ffn_residual_scale, leaky_decay
    return out, (p, groups, dilations, scales, ids, copies, layers, x, rstd)


def trunk_backward(dout, saved):
    """Gradients by name of sum(dout * hidden states), dout (N, C); the router has none."""
    p, groups, dilations, (mixer_residual_scale, ffn_residual_scale, leaky_decay), ids, copies, layers, x, rstd = saved
    g = {name: np.zeros_like(value) for name, value in p.items() if not name.startswith("router.")}
    e, de = p["embedding.weight"], g["embedding.weight"]
    for o, rows in enumerate(copies if "ngram_copy.outputs.0.weight" in p else []):
        name = f"ngram_copy.outputs.{o}.weight"
        g[name] += r.add_copies_backward(dout, de, e, rows, p[name])
    dx, g["final_norm.weight"] = r.rmsnorm_backward(dout, x, p["final_norm.weight"], rstd)
    for block, x, rstd, mixer_in, mixed, m, post_mixer, n, rstd_n, gate_up, hidden in reversed(layers):
        g[f"{block}glu.down.weight"] += dx.T @ hidden
        dhidden = dx @ p[f"{block}glu.down.weight"] * dx.dtype.type(ffn_residual_scale)
        dgate_up = r.glu_backward(dhidden, gate_up)
        dgate, dup = np.split(dgate_up.T @ n, 2)
        g[f"{block}glu.gate.weight"] += dgate
        g[f"{block}glu.up.weight"] += dup
        dn = dgate_up @ np.concatenate([p[f"{block}glu.gate.weight"], p[f"{block}glu.up.weight"]])
        back, dweight = r.rmsnorm_backward(dn, post_mixer, p[f"{block}norm2.weight"], rstd_n)
        g[f"{block}norm2.weight"] += dweight
        dx = dx + back
        g[f"{block}mixer.out.weight"] += dx.T @ m
        dm = dx @ p[f"{block}mixer.out.weight"] * dx.dtype.type(mixer_residual_scale)
        for i in reversed(range(len(dilations))):
            before, rstd_m, seen = mixed[i]
            gate, value = p[f"{block}mixer.gates.{i}.weight"], p[f"{block}mixer.values.{i}.weight"]
            dseen, dgate, dvalue = r.gated_conv_backward(
                dm.reshape(seen.shape), seen, gate, value, groups, dilations[i]
            )
            g[f"{block}mixer.gates.{i}.weight"] += dgate
            g[f"{block}mixer.values.{i}.weight"] += dvalue
            back, dweight = r.rmsnorm_backward(
                dseen.reshape(before.shape), before, p[f"{block}mixer.norms.{i}.weight"], rstd_m
            )
            g[f"{block}mixer.norms.{i}.weight"] += dweight
            dm = dm + back
        if leaky_decay:
            gain = p[f"{block}mixer.leaky.weight"]
            back, dgain = r.leaky_average_backward(dm.reshape(mixer_in.shape), mixer_in, gain, leaky_decay)
            dm = back.reshape(dm.shape)
            g[f"{block}mixer.leaky.weight"] += dgain
        back, dweight = r.rmsnorm_backward(dm, x, p[f"{block}norm1.weight"], rstd)
        g[f"{block}norm1.weight"] += dweight
        dx = dx + back
    for o, rows in enumerate(copies):
        name = f"ngram_copy.inputs.{o}.weight"
        g[name] += r.add_copies_backward(dx, de, e, rows, p[name])
    r.embedding_backward(de, dx, ids.reshape(-1))
    return g
