"""The settings of a head, the section `head` of a run's settings; imports nothing numerical."""

from __future__ import annotations

from dataclasses import dataclass

from flashlm_numba.heads.table import HEADS
from flashlm_numba.system.fields import in_range as _in
from flashlm_numba.system.fields import one_of as _one_of


@dataclass(frozen=True)
class HeadConfig:
    """The output layer and what the training loss is; each head's `own_settings` names what only that head reads."""

    name: str = _one_of("tree", HEADS)  # the command line's --head
    num_sampled: int = _in(4_096, 1)  # sampled: tokens in a micro-batch's softmax, its targets included
    full_softmax_ratio: float = _in(0.05, 0, 1)  # sampled: last share of the steps, with the softmax over all tokens
    tree: str = "default"  # shape of the tree, --tree
    tree_clustering: str = _one_of("embedding", ("frequency", "embedding"))  # what tokens in a node have in common
    tree_root_tokens: int | None = _in(None, 0)  # adaptive: tokens in the root; none: from V
    tree_clusters: int | None = _in(None, 1)  # adaptive: nodes below the root
    tree_classes: int | None = _in(None, 1)  # two-level: nodes below the root
    tree_arity: int | None = _in(None, 2)  # balanced, clustered: children of a node
    tree_rank: int | None = _in(None, 1)  # of the inner nodes' rows, kept as a product; none: by shape
    loss_fraction: float = _in(1.0, 0, 1, open_low=True)  # share of the positions that the loss is taken at
    label_smoothing: float = _in(0.0, 0, 0.999)  # spread over all tokens (a tree: a node's children)
    z_loss: float = _in(0.0, 0)  # weight of log(Z)**2, which keeps the logits from drifting
    soft_cap: float | None = _in(None, 0, 1e6, open_low=True)  # logits become cap * tanh(logit / cap); none: off
    log_prior: bool = False  # add the tokens' fixed log frequency to the logits
