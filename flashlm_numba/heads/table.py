"""HEADS: the output heads by the name that `--head` takes.

The command line reads this table, and `--help` must not wait for NumPy, so a head is imported on first use.
"""

from __future__ import annotations

import importlib
from typing import Any

# a class that inherits from heads.base.Head, or the text "module:class" of a class to import on first use
HEADS: dict[str, str | type[Any]] = {
    "dense": "flashlm_numba.heads.dense:DenseHead",
    "sampled": "flashlm_numba.heads.sampled:SampledHead",
    "tree": "flashlm_numba.heads.tree:TreeHead",
    "bitlinear": "flashlm_numba.heads.bitlinear:BitLinearHead",
}


def head_class(name: str) -> type[Any]:
    """The class of the head with this name in HEADS.

    >>> head_class("tree").__name__
    'TreeHead'
    """
    entry = HEADS[name]
    if not isinstance(entry, str):
        return entry
    module, _, attribute = entry.partition(":")
    return getattr(importlib.import_module(module), attribute)
