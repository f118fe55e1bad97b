"""The output heads: they turn hidden states into token probabilities, loss and gradients."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from flashlm_numba.heads.table import HEADS, head_class

if TYPE_CHECKING:
    from flashlm_numba.heads.base import Head
    from flashlm_numba.heads.bitlinear import BitLinearHead
    from flashlm_numba.heads.dense import DenseHead
    from flashlm_numba.heads.sampled import SampledHead
    from flashlm_numba.heads.tree import TreeHead

__all__ = ["HEADS", "BitLinearHead", "DenseHead", "Head", "SampledHead", "TreeHead", "head_class"]

_MODULES = {
    "BitLinearHead": "bitlinear",
    "DenseHead": "dense",
    "Head": "base",
    "SampledHead": "sampled",
    "TreeHead": "tree",
}


def __getattr__(name: str) -> Any:
    """Import a class, and with it Numba, on first use."""
    if name in _MODULES:
        return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
