"""The heads: from hidden states to the probability of a token, its loss and its gradients.

Nothing is imported until a head is asked for: the command line reads HEADS, and `--help` must not wait for NumPy.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flashlm_numba.heads.base import Head
    from flashlm_numba.heads.dense import DenseHead
    from flashlm_numba.heads.sampled import SampledHead
    from flashlm_numba.heads.tree import TreeHead

__all__ = ["HEADS", "DenseHead", "Head", "SampledHead", "TreeHead", "head_class"]

# by the name that `--head` takes: a class, or "module:class" to import when it is needed
HEADS: dict[str, str | type[Head]] = {
    "dense": "flashlm_numba.heads.dense:DenseHead",
    "sampled": "flashlm_numba.heads.sampled:SampledHead",
    "tree": "flashlm_numba.heads.tree:TreeHead",
}


def head_class(name: str) -> type[Head]:
    """The class of the head with this name in HEADS.

    >>> head_class("tree").__name__
    'TreeHead'
    """
    entry = HEADS[name]
    return _imported(entry) if isinstance(entry, str) else entry


def _imported(entry: str) -> Any:
    module, _, name = entry.partition(":")
    return getattr(importlib.import_module(module), name)


def __getattr__(name: str) -> Any:
    entries = ["flashlm_numba.heads.base:Head", *(entry for entry in HEADS.values() if isinstance(entry, str))]
    for entry in entries:
        if name == entry.partition(":")[2]:
            return _imported(entry)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
