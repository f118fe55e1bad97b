"""NumPy twin of the whole trunk, put together from the twins of its parts: any floating dtype, a pass at a time.

The gradients of the ternary layers pass straight through to the weights that the ternary values were made from.
Letters: B batch, T time, N = B*T positions, C channels.
"""

from __future__ import annotations

import numpy as np

from flashlm_numba.kernels import reference as r

TERNARY = ("mixer.out.weight", "glu.gate.weight", "glu.up.weight", "glu.down.weight")


def trunk_forward(
    parameters, ids, *, groups, dilations, n_passes, mixer_residual_scale=1.0, ffn_residual_scale=1.0, leaky_decay=0.0,
    ternary_threshold=1.0, ngram_copy_orders=(), ngram_copy_reach=1,
):  # fmt: skip
    """Hidden states (N, C) for token ids (B, T), and what the backward pass needs; parameters by the model's names."""
    p = dict(parameters) | {name: r.ternarize(parameters[name], ternary_threshold) for name in TERNARY}
    e, passes = p["embedding.weight"], []
    before = [ngram_copy_orders[:i].count(order) for i, order in enumerate(ngram_copy_orders)]
    found = [
        r.followers(ids, order, ngram_copy_reach, skip).reshape(-1)
        for order, skip in zip(ngram_copy_orders, before, strict=True)
    ]
    x = r.embedding_forward(e, ids.reshape(-1))
    for o, rows in enumerate(found):
        x = r.add_followers(x, e, rows, p[f"induction.inputs.{o}.weight"])
    for _ in range(n_passes):
        m, rstd = r.rmsnorm_forward(x, p["norm1.weight"])
        first = m.reshape(*ids.shape, -1)
        if leaky_decay:
            m = r.average_forward(first, p["mixer.average.weight"], leaky_decay).reshape(m.shape)
        mixed = []
        for i, dilation in enumerate(dilations):
            normed, rstd_m = r.rmsnorm_forward(m, p[f"mixer.norms.{i}.weight"])
            seen = normed.reshape(*ids.shape, -1)
            mixed.append((m, rstd_m, seen))
            gate, value = p[f"mixer.gates.{i}.weight"], p[f"mixer.values.{i}.weight"]
            m = m + r.gated_conv_forward(seen, gate, value, groups, dilation).reshape(m.shape)
        m = m * m.dtype.type(mixer_residual_scale)
        x1 = x + m @ p["mixer.out.weight"].T
        n, rstd_n = r.rmsnorm_forward(x1, p["norm2.weight"])
        gate_up = n @ np.concatenate([p["glu.gate.weight"], p["glu.up.weight"]]).T
        hidden = r.glu_forward(gate_up) * m.dtype.type(ffn_residual_scale)
        passes.append((x, rstd, first, mixed, m, x1, n, rstd_n, gate_up, hidden))
        x = x1 + hidden @ p["glu.down.weight"].T
    out, rstd = r.rmsnorm_forward(x, p["final_norm.weight"])
    for o, rows in enumerate(found):
        out = r.add_followers(out, e, rows, p[f"induction.outputs.{o}.weight"])
    return out, (
        p,
        groups,
        dilations,
        (mixer_residual_scale, ffn_residual_scale, leaky_decay),
        ids,
        found,
        passes,
        x,
        rstd,
    )


def trunk_backward(dout, saved):
    """Gradients by name of sum(dout * hidden states), dout (N, C); the router has none."""
    p, groups, dilations, (mixer_residual_scale, ffn_residual_scale, leaky_decay), ids, found, passes, x, rstd = saved
    g = {name: np.zeros_like(value) for name, value in p.items() if not name.startswith("router.")}
    e, de = p["embedding.weight"], g["embedding.weight"]
    for o, rows in enumerate(found):
        name = f"induction.outputs.{o}.weight"
        g[name] += r.add_followers_backward(dout, de, e, rows, p[name])
    dx, g["final_norm.weight"] = r.rmsnorm_backward(dout, x, p["final_norm.weight"], rstd)
    for x, rstd, first, mixed, m, x1, n, rstd_n, gate_up, hidden in reversed(passes):
        g["glu.down.weight"] += dx.T @ hidden
        dgate_up = r.glu_backward(dx @ p["glu.down.weight"] * dx.dtype.type(ffn_residual_scale), gate_up)
        dgate, dup = np.split(dgate_up.T @ n, 2)
        g["glu.gate.weight"] += dgate
        g["glu.up.weight"] += dup
        dn = dgate_up @ np.concatenate([p["glu.gate.weight"], p["glu.up.weight"]])
        back, dweight = r.rmsnorm_backward(dn, x1, p["norm2.weight"], rstd_n)
        g["norm2.weight"] += dweight
        dx = dx + back
        g["mixer.out.weight"] += dx.T @ m
        dm = dx @ p["mixer.out.weight"] * dx.dtype.type(mixer_residual_scale)
        for i in reversed(range(len(dilations))):
            before, rstd_m, seen = mixed[i]
            gate, value = p[f"mixer.gates.{i}.weight"], p[f"mixer.values.{i}.weight"]
            dseen, dgate, dvalue = r.gated_conv_backward(
                dm.reshape(seen.shape), seen, gate, value, groups, dilations[i]
            )
            g[f"mixer.gates.{i}.weight"] += dgate
            g[f"mixer.values.{i}.weight"] += dvalue
            back, dweight = r.rmsnorm_backward(
                dseen.reshape(before.shape), before, p[f"mixer.norms.{i}.weight"], rstd_m
            )
            g[f"mixer.norms.{i}.weight"] += dweight
            dm = dm + back
        if leaky_decay:
            back, dgain = r.average_backward(dm.reshape(first.shape), first, p["mixer.average.weight"], leaky_decay)
            dm = back.reshape(dm.shape)
            g["mixer.average.weight"] += dgain
        back, dweight = r.rmsnorm_backward(dm, x, p["norm1.weight"], rstd)
        g["norm1.weight"] += dweight
        dx = dx + back
    for o, rows in enumerate(found):
        name = f"induction.inputs.{o}.weight"
        g[name] += r.add_followers_backward(dx, de, e, rows, p[name])
    r.embedding_backward(de, dx, ids.reshape(-1))
    return g
