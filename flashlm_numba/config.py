"""Settings as frozen dataclasses, one comment per field."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ModelConfig:
    """Shape of the model; the defaults are FlashLM v3's."""

    vocab_size: int = 50_257  # V, tokens
    dim: int = 256  # C, channels
    inner: int = 683  # I, width of the GLU
    groups: int = 16  # of every convolution; must divide dim
    taps: int = 4  # K, kernel size of every convolution
    dilations: tuple[int, ...] = (1, 4, 64)  # of the mixer's convolutions, in order
    recursions: int = 2  # passes through the one block

    def __post_init__(self) -> None:
        for name in ("vocab_size", "dim", "inner", "groups", "taps", "recursions"):
            if getattr(self, name) < 1:
                raise ValueError(f"model.{name} must be at least 1, got {getattr(self, name)}")
        if self.dim % self.groups:
            raise ValueError(f"model.groups must divide model.dim, got {self.groups} and {self.dim}")
        if not self.dilations or min(self.dilations) < 1:
            raise ValueError(f"model.dilations must be positive numbers, got {self.dilations}")

    @property
    def receptive_field(self) -> int:
        """Tokens that a hidden state can see, its own included (415 for v3)."""
        return 1 + self.recursions * (self.taps - 1) * sum(self.dilations)
