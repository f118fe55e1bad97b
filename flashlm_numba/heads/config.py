"""Settings of the head, the section `head` of a run's settings. This module imports no numerical package."""

from __future__ import annotations

from dataclasses import dataclass

from flashlm_numba.heads.table import HEADS
from flashlm_numba.system.fields import in_range as _in
from flashlm_numba.system.fields import one_of as _one_of


@dataclass(frozen=True)
class HeadConfig:
    """The output layer and the training loss. A head's `own_settings` names the settings that only this head reads."""

    name: str = _one_of("tree", HEADS)  # --head
    num_sampled: int = _in(4_096, 1)  # sampled: tokens in a micro-batch's softmax, targets included
    full_softmax_ratio: float = _in(0.05, 0, 1)  # sampled: final share of the steps, with the full softmax
    tree: str = "default"  # shape of the tree, --tree
    tree_clustering: str = _one_of("embedding", ("frequency", "embedding"))  # how tokens are grouped into nodes
    tree_root_tokens: int | None = _in(None, 0)  # adaptive: tokens in the root; none: derived from V
    tree_clusters: int | None = _in(None, 1)  # adaptive: nodes below the root; none: derived from V
    tree_classes: int | None = _in(None, 1)  # two-level: nodes below the root; none: derived from V
    tree_arity: int | None = _in(None, 2)  # balanced, clustered: children per node; none: derived from V
    tree_rank: int | None = _in(None, 1)  # rank of the inner nodes' rows, stored as a product; none: by shape
    loss_fraction: float = _in(1.0, 0, 1, open_low=True)  # fraction of the positions that enter the loss
    label_smoothing: float = _in(0.0, 0, 0.999)  # share of the target spread over all tokens (tree: over children)
    z_loss: float = _in(0.0, 0)  # weight of log(Z)**2, which limits the drift of the logits
    soft_cap: float | None = _in(None, 0, 1e6, open_low=True)  # logits become cap * tanh(logit / cap); none: no cap
    log_prior: bool = False  # add the fixed log frequency of each token to its logit
