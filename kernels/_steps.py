"""The steps of a pass through the trunk, in order: what a layer does before its mixer, the mixer's stages, the FFN."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from flashlm_numba.kernels._division import ANY, ROWS, SEQUENCES, Stage

# operations of a step; FFN_WEIGHTS: the gradients of the FFN's weights
BEFORE_MIXER, MIXER, FFN, FFN_WEIGHTS = range(4)
_BY_ROWS = Stage(ROWS)


class Step(NamedTuple):
    """A step of a pass."""

    layer: int
    operation: int
    stage: int  # which of the mixer's, if it is one
    divides: Stage


def forward_steps(layers: int, mixer: Sequence[Stage]) -> list[Step]:
    """The steps of the forward pass through R layers. mixer : the stages of the mixer's forward pass"""
    steps = []
    for layer in range(layers):
        stages = [Step(layer, MIXER, i, stage) for i, stage in enumerate(mixer)]
        steps += [Step(layer, BEFORE_MIXER, 0, _BY_ROWS), *stages, Step(layer, FFN, 0, _BY_ROWS)]
    return steps


def backward_steps(layers: int, mixer: Sequence[Stage]) -> list[Step]:
    """The steps of the backward pass. The mixer's first stages join the FFN's region if they divide by rows too."""
    early = next((i for i, stage in enumerate(mixer) if stage != _BY_ROWS), len(mixer))
    steps = []
    for layer in reversed(range(layers)):
        stages = [Step(layer, MIXER, i, stage) for i, stage in enumerate(mixer)]
        weights = Step(layer, FFN_WEIGHTS, 0, Stage(SEQUENCES, ANY))
        steps += [Step(layer, FFN, 0, _BY_ROWS), *stages[:early], weights, *stages[early:]]
        steps.append(Step(layer, BEFORE_MIXER, 0, _BY_ROWS))
    return steps
