"""Settings of the memory, the section `memory` of a run's settings. This module imports no numerical package."""

from __future__ import annotations

from dataclasses import dataclass

from flashlm_numba.system.fields import in_range as _in
from flashlm_numba.system.fields import one_of as _one_of

MEMORIES = ("none", "ngrams")


@dataclass(frozen=True)
class MemoryConfig:
    """What a run keeps of its training text beside the model."""

    memory: str = _one_of("none", MEMORIES)  # --memory: counted n-grams of up to 5 tokens, or nothing
    memory_least: int = _in(1, 1, 2**31 - 1)  # n-grams of three and more tokens that occur less often are left out

    def __post_init__(self) -> None:
        if self.memory == "none" and self.memory_least != 1:
            raise ValueError(
                f"memory.memory_least needs a memory, got {self.memory_least}; add --memory ngrams, or leave it out"
            )
