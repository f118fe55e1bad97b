"""The heads: from hidden states to the probability of a token, its loss and its gradients."""

from flashlm_numba.heads.base import Head
from flashlm_numba.heads.dense import DenseHead
from flashlm_numba.heads.sampled import SampledHead
from flashlm_numba.heads.tree import TreeHead

__all__ = ["DenseHead", "Head", "SampledHead", "TreeHead"]
