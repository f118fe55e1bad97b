"""MIXERS: the token mixers that a block can have, by the name that the setting `mixer` takes.

A mixer is a module in kernels/ (its helpers, two regions for training and two kernels for decoding: see
kernels/_trunk_regions.py) and an entry here: its parameters, how far it sees, and how the kernels' object is made from
the settings. The trunk and the model know no mixer by name. docs/extending.md adds one.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple, Protocol


class Parameter(NamedTuple):
    """Shape of a parameter, and the values that it starts from: fill, or normal with this standard deviation."""

    shape: tuple[int, ...]
    std: float = 0.0  # 0: every number is fill
    fill: float = 0.0
    ternary: bool = False  # evaluated as -1, 0 and +1


class MixerType(Protocol):
    """What the model asks of a kind of mixer. config is a ModelConfig, of which each kind reads its own settings."""

    def check(self, config: Any) -> None:
        """Raise ValueError, naming the setting, if the settings cannot be."""
        ...

    def parameters(self, config: Any) -> dict[str, Parameter]:
        """By name relative to the block's mixer, in order; shapes in PyTorch's layouts."""
        ...

    def reach(self, config: Any) -> int:
        """Tokens before its own that one passage through the mixer can see."""
        ...

    def build(self, config: Any) -> Any:
        """The mixers of all blocks as the kernels want them, a kernels.trunk.Mixer."""
        ...


class ConvType:
    """FlashLM v3's: gated dilated convolutions, then a ternary layer; with a leaky average where leaky_decay is set."""

    def check(self, config: Any) -> None:
        """See MixerType."""
        if config.dim % config.groups:
            raise ValueError(f"model.groups must divide model.dim, got {config.groups} and {config.dim}")
        if not config.dilations or not 1 <= min(config.dilations) <= max(config.dilations) <= 4096:
            raise ValueError(f"model.dilations must be numbers from 1 to 4096, got {config.dilations}")

    def parameters(self, config: Any) -> dict[str, Parameter]:
        """See MixerType."""
        c, width, taps = config.dim, config.dim // config.groups, config.kernel_size
        conv, convs = Parameter((c, width, taps), (width * taps) ** -0.5), range(len(config.dilations))
        return {
            **({"leaky.weight": Parameter((c,))} if config.leaky_decay else {}),
            **{f"norms.{i}.weight": Parameter((c,), fill=1.0) for i in convs},
            **{f"gates.{i}.weight": conv for i in convs},
            **{f"values.{i}.weight": conv for i in convs},
            "out.weight": Parameter((c, c), 0.01, ternary=True),
        }

    def reach(self, config: Any) -> int:
        """See MixerType. A leaky average is taken to end where a token's share is below 2**-24, float32's rounding."""
        reach = (config.kernel_size - 1) * sum(config.dilations)
        if config.leaky_decay:
            reach += math.ceil(math.log(2**-24) / math.log(config.leaky_decay))
        return reach

    def build(self, config: Any) -> Any:
        """See MixerType."""
        from flashlm_numba.kernels.conv_mixer import ConvConfig, ConvMixer

        return ConvMixer(
            ConvConfig(
                config.dim,
                config.n_blocks,
                config.groups,
                config.kernel_size,
                config.dilations,
                config.mixer_residual_scale,
                config.leaky_decay,
            )
        )


MIXERS: dict[str, MixerType] = {"conv": ConvType()}
