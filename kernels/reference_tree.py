"""Plain NumPy twins of the tree head's kernels, position by position and node by node, without shared code.

All results have the dtype of h: float64 for the true values, float32 for the error of plain code.
Letters: N positions, V leaves (tokens in leaf order), M nodes below the root, C channels. spans (M + 1, 5) holds
token_start, token_end, child_start, child_end and leaf_end of every node.
"""

from __future__ import annotations

import numpy as np


def _node_logits(x, node, weight, nodes, spans, prior, soft_cap):
    """Logits of a node for one x (C,), tokens first, and the slope of each with respect to its product."""
    first, last, child, child_end, _ = (int(i) for i in spans[node])
    product = np.concatenate([weight[first:last], nodes[child - 1 : child_end - 1]]) @ x
    slope = np.ones_like(product)
    if soft_cap is not None:
        ratio = np.tanh(product / x.dtype.type(soft_cap))
        product, slope = x.dtype.type(soft_cap) * ratio, 1 - ratio * ratio
    if prior is not None:
        log_prior, node_log_prior = prior
        here = np.concatenate([log_prior[first:last], node_log_prior[child - 1 : child_end - 1]])
        product = product + here.astype(x.dtype)
    return product, slope


def _log_sum_exp(logits):
    top = logits.max()
    return top + np.log(np.exp(logits - top).sum())


def tree_head_forward_backward(
    h,
    weight,
    nodes,
    spans,
    targets,
    weights,
    dweight,
    dnodes,
    *,
    prior=None,
    label_smoothing=0.0,
    z_loss=0.0,
    soft_cap=None,
):
    """loss (N,), nll (N,), dh (N, C); adds the gradients of sum(weights * loss) to dweight and dnodes.

    prior : log_prior (V,) by leaf row and node_log_prior (M,), or None
    """
    kind = h.dtype.type
    s, z = kind(label_smoothing), kind(z_loss)
    loss, nll, dh = np.zeros(len(h), h.dtype), np.zeros(len(h), h.dtype), np.zeros_like(h)
    for i, row in enumerate(targets):
        node = 0
        while node >= 0:
            first, last, child, child_end, _ = (int(j) for j in spans[node])
            if first <= row < last:
                choice, following = row - first, -1
            else:
                following = next(c for c in range(child, child_end) if spans[c, 0] <= row < spans[c, 4])
                choice = last - first + following - child
            logits, slope = _node_logits(h[i], node, weight, nodes, spans, prior, soft_cap)
            if len(logits) > 1:  # a single child has probability one
                total = _log_sum_exp(logits)
                nll[i] += total - logits[choice]
                loss[i] += total - (1 - s) * logits[choice] - s * logits.mean() + z * total * total
                dlogits = np.exp(logits - total) * (1 + 2 * z * total) - s / len(logits)
                dlogits[choice] -= 1 - s
                dlogits *= slope * weights[i]
                rows = np.concatenate([weight[first:last], nodes[child - 1 : child_end - 1]])
                dh[i] += dlogits @ rows
                dweight[first:last] += np.outer(dlogits[: last - first], h[i])
                dnodes[child - 1 : child_end - 1] += np.outer(dlogits[last - first :], h[i])
            node = following
    return loss, nll, dh


def tree_head_log_distribution(h, weight, nodes, spans, *, prior=None, soft_cap=None):
    """log p of every leaf, (N, V), columns in leaf order."""
    out = np.empty((len(h), len(weight)), h.dtype)
    for i in range(len(h)):
        work = [(0, h.dtype.type(0))]
        while work:
            node, above = work.pop()
            first, last, child, child_end, _ = (int(j) for j in spans[node])
            logits, _ = _node_logits(h[i], node, weight, nodes, spans, prior, soft_cap)
            logp = above + logits - _log_sum_exp(logits)
            out[i, first:last] = logp[: last - first]
            work.extend(zip(range(child, child_end), logp[last - first :], strict=True))
    return out


def tree_head_sample(h, weight, nodes, spans, uniforms, *, prior=None, soft_cap=None):
    """A leaf row for each h, (N,): at depth d, the first child where the sum exceeds uniforms[:, d]."""
    out = np.empty(len(h), np.int64)
    for i in range(len(h)):
        node, depth = 0, 0
        while True:
            first, last, child, _, _ = (int(j) for j in spans[node])
            logits, _ = _node_logits(h[i], node, weight, nodes, spans, prior, soft_cap)
            cumulated = np.cumsum(np.exp(logits - logits.max()).astype(np.float64))
            choice = int(np.searchsorted(cumulated, uniforms[i, depth] * cumulated[-1], side="right"))
            choice = min(choice, len(logits) - 1)
            if choice < last - first:
                out[i] = first + choice
                break
            node, depth = child + choice - (last - first), depth + 1
    return out
