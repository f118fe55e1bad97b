"""flashlm-numba: train and run a ternary-weight language model on a CPU.

For researchers of large vocabularies, the heads stand alone:
`from flashlm_numba import DenseHead, SampledHead, TreeHead`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["DenseHead", "SampledHead", "TreeHead", "__version__"]

if TYPE_CHECKING:
    from flashlm_numba.heads import DenseHead, SampledHead, TreeHead


def __getattr__(name: str) -> Any:
    """Import the heads, and with them Numba, when they are asked for: `flashlm-numba --help` does not wait."""
    if name in ("DenseHead", "SampledHead", "TreeHead"):
        from flashlm_numba import heads

        return getattr(heads, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
