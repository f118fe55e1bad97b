"""flashlm-numba: train and run ternary-weight language models on a CPU.

    import flashlm_numba as fl

    run = fl.train(minutes=10)
    print(run.load().generate("The people"))

docs/python.md describes the functions. The heads also work without the rest: `from flashlm_numba import TreeHead`.
"""

from __future__ import annotations

import importlib

__version__ = "0.1.0"

TYPE_CHECKING = False  # from typing, which is not imported: `python -m` would take a typing.py of the working folder
if TYPE_CHECKING:
    from typing import Any

    from flashlm_numba.api import Run, Score, TrainedModel, load, prepare, train
    from flashlm_numba.heads import BitLinearHead, DenseHead, SampledHead, TreeHead
    from flashlm_numba.model.model import Model
    from flashlm_numba.system.display import TERMINAL, Progress
    from flashlm_numba.system.errors import UserError

__all__ = [
    "TERMINAL",
    "BitLinearHead",
    "DenseHead",
    "Model",
    "Progress",
    "Run",
    "SampledHead",
    "Score",
    "TrainedModel",
    "TreeHead",
    "UserError",
    "__version__",
    "load",
    "prepare",
    "train",
]

_MODULES = {
    "api": ("Run", "Score", "TrainedModel", "load", "prepare", "train"),
    "heads": ("BitLinearHead", "DenseHead", "SampledHead", "TreeHead"),
    "model.model": ("Model",),
    "system.display": ("TERMINAL", "Progress"),
    "system.errors": ("UserError",),
}


def __getattr__(name: str) -> Any:
    """Import a public name on first use, since importing Numba would delay `flashlm-numba --help`."""
    for module, names in _MODULES.items():
        if name in names:
            return getattr(importlib.import_module(f"{__name__}.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
