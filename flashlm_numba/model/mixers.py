"""MIXERS: the token mixers that a block can use, by the name that the setting `mixer` takes.

A mixer consists of a module in kernels/ and an entry here. The module has helpers, two regions for training and two
kernels for decoding; see kernels/_trunk_regions.py. The entry describes the parameters and the reach, and builds the
kernels' object from the settings. The trunk and the model know no mixer by name. docs/extending.md adds one. mlgru is
the exception: it is part of the trunk of linear=bitlinear (trunks.py), and its entry describes it only.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar, NamedTuple, Protocol


class Parameter(NamedTuple):
    """Shape and initial values of a parameter: normal with standard deviation std, or the constant fill."""

    shape: tuple[int, ...]
    std: float = 0.0  # 0: every element is fill
    fill: float = 0.0
    ternary: bool = False  # whether the model evaluates it as -1, 0 and +1


class MixerType(Protocol):
    """The interface of a mixer type. config is a ModelConfig; each type reads the settings that belong to it.

    own_settings : fields of ModelConfig that have no effect with some other mixer
    """

    own_settings: ClassVar[tuple[str, ...]]

    def check(self, config: Any) -> None:
        """Raise ValueError, naming the setting, if a setting is invalid."""
        ...

    def parameters(self, config: Any) -> dict[str, Parameter]:
        """The parameters in order, by name within the mixer. Shapes follow PyTorch's layouts."""
        ...

    def reach(self, config: Any) -> int | None:
        """Number of earlier tokens that one pass through the mixer can see; None: all of them."""
        ...

    def state_bytes(self, config: Any) -> int:
        """Bytes of the decoding state of one layer in int8."""
        ...

    def activation_floats(self, config: Any) -> int:
        """Float32 numbers that training keeps of one position in one layer."""
        ...

    def build(self, config: Any) -> Any:
        """The mixers of all blocks as one kernels._mixer.Mixer."""
        ...


class ConvType:
    """FlashLM v3's mixer: gated dilated convolutions and a ternary layer; leaky_decay adds a leaky average."""

    own_settings: ClassVar[tuple[str, ...]] = (
        "groups",
        "kernel_size",
        "dilations",
        "mixer_residual_scale",
        "leaky_decay",
    )

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
        """See MixerType. The leaky average ends where a token's share falls below 2**-24, the rounding of float32."""
        reach = (config.kernel_size - 1) * sum(config.dilations)
        if config.leaky_decay:
            reach += math.ceil(math.log(2**-24) / math.log(config.leaky_decay))
        return reach

    def state_bytes(self, config: Any) -> int:
        """See MixerType: rings of normed rows with a scale each, and the leaky average in float32."""
        rows = sum((config.kernel_size - 1) * dilation + 1 for dilation in config.dilations)
        return rows * (config.dim + 4) + (4 * config.dim if config.leaky_decay else 0)

    def activation_floats(self, config: Any) -> int:
        """See MixerType: the input, the factor of the norm, and gate and value of each convolution."""
        from flashlm_numba.kernels.conv import padded_width

        padded = padded_width(config.dim, config.groups) * config.groups
        return config.dim + len(config.dilations) * (config.dim + 1 + 2 * padded)

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


# the BitLinears of a block: fields of kernels.bit_trunk, and names of the parameters
BIT_LAYERS = {
    "value": "mixer.input",
    "forget": "mixer.forget",
    "gate": "mixer.gate",
    "out": "mixer.out",
    "gate_up": "glu.gate_up",
    "down": "glu.down",
}


class MlgruType:
    """The MatMul-free LM's mixer: a gated recurrence per channel between BitLinears (kernels/bit_trunk.py)."""

    own_settings: ClassVar[tuple[str, ...]] = ()

    def check(self, config: Any) -> None:
        """See MixerType."""

    def parameters(self, config: Any) -> dict[str, Parameter]:
        """See MixerType. Initial values as in the authors' code."""
        c, norm = config.dim, Parameter((config.dim,), fill=1.0)
        inner = Parameter((c, c), 0.02, ternary=True)
        last = inner._replace(std=0.02 / math.sqrt(2 * config.n_blocks))
        return {
            "input.weight": inner,
            "input.norm.weight": norm,
            "forget.weight": inner,
            "forget.norm.weight": norm,
            "gate.weight": inner,
            "gate.norm.weight": norm,
            "hidden_norm.weight": norm,
            "out.weight": last,
            "out.norm.weight": norm,
        }

    def reach(self, config: Any) -> int | None:
        """See MixerType."""
        return None

    def state_bytes(self, config: Any) -> int:
        """See MixerType: a vector in float32."""
        return 4 * config.dim

    def activation_floats(self, config: Any) -> int:
        """See MixerType: what the three layers give, the states, and the factors of seven norms, without the two of
        every trunk.
        """
        return 4 * config.dim + 5

    def build(self, config: Any) -> Any:
        """Never called: the trunk of linear=bitlinear contains this mixer."""
        raise NotImplementedError("MlgruType.build: the mixer is part of kernels/bit_trunk.py")


MIXERS: dict[str, MixerType] = {"conv": ConvType(), "mlgru": MlgruType()}
