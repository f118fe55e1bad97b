"""How a training step's time depends on the number of threads: the division's own limit, and a fit of measured times.

A part of a step takes `serial + divided * share(P)` seconds on P threads. For the trunk, share(P) is the work of the
busiest thread, added over the regions between which threads wait for one another; for the other parts it is 1 / P.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from scipy.optimize import nnls

from flashlm_numba.kernels import _bit_regions
from flashlm_numba.kernels._division import Division, Stage, divide
from flashlm_numba.kernels._steps import BEFORE_MIXER, FFN, FFN_WEIGHTS, Step, backward_steps, forward_steps
from flashlm_numba.kernels.bit_trunk import bit_steps
from flashlm_numba.model.config import ModelConfig
from flashlm_numba.model.trunks import TernaryTrunk

ROW_COST = 20  # a row's elementwise work in a step, per channel, in multiply-adds


def _costs(config: ModelConfig, steps: list[Step], *, backward: bool) -> list[float]:
    """Multiply-adds per row of each step, of a model with the conv mixer."""
    ffn, out = 3 * config.dim * config.ffn_dim, config.dim**2
    conv = 2 * config.kernel_size * config.dim * config.dim // config.groups
    last = 2 * len(config.dilations) + 1
    found = []
    for step in steps:
        if step.operation in (FFN, FFN_WEIGHTS):
            cost = ffn
        elif step.operation == BEFORE_MIXER:
            cost = 0
        elif backward:  # the ternary layer and its weights, then a convolution and a norm by turns
            even = step.stage % 2 == 0 and step.stage <= last
            cost = out if step.stage < 2 else 2 * conv if even else 0
        else:  # the average, then a norm and a convolution by turns, and the ternary layer
            cost = out if step.stage == last else conv if step.stage and step.stage % 2 == 0 else 0
        found.append(float(cost + ROW_COST * config.dim))
    return found


def _bit_costs(config: ModelConfig, steps: list[Step]) -> list[float]:
    """The same of a MatMul-free LM."""
    inputs, outputs = 3 * config.dim**2, config.dim**2 + 3 * config.dim * config.ffn_dim
    costs = {_bit_regions.INPUTS: inputs, _bit_regions.SCAN: 0, _bit_regions.OUTPUTS: outputs}
    costs[_bit_regions.WEIGHTS] = inputs + outputs
    return [float(costs[step.operation] + ROW_COST * config.dim) for step in steps]


def region_work(division: Division, stages: list[Stage], costs: list[float]) -> np.ndarray:
    """The work of every thread in every region, (regions, P)."""
    regions, starts, parts = division.plan(stages)
    work = np.zeros((len(regions), division.threads))
    rows = (parts[:, 1] - parts[:, 0]) * (parts[:, 6] - parts[:, 5]) / np.maximum(parts[:, 7], 1)
    for i, (first, last, table) in enumerate(regions):
        for thread in range(division.threads):
            own = rows[starts[table, thread] : starts[table, thread + 1]]
            work[i, thread] = own.sum() * sum(costs[first:last])
    return work


def trunk_work(config: ModelConfig, batch: int, time: int, threads: int) -> np.ndarray:
    """The work of every thread in every region of both passes, (regions, P), in multiply-adds."""
    division = divide(batch, time, threads)
    if config.linear == "bitlinear":
        layers = config.n_passes * config.n_blocks
        both = [bit_steps(layers, config.dim, backward=backward) for backward in (False, True)]
        passes = [(steps, _bit_costs(config, steps)) for steps in both]
    else:
        weights = TernaryTrunk(config).weights
        forward = forward_steps(weights.layers, weights.mixer.forward_stages())
        back = backward_steps(weights.layers, weights.mixer.backward_stages())
        passes = [(forward, _costs(config, forward, backward=False)), (back, _costs(config, back, backward=True))]
    return np.concatenate([region_work(division, [step.divides for step in steps], costs) for steps, costs in passes])


def trunk_share(config: ModelConfig, batch: int, time: int, threads: int) -> float:
    """The part of the trunk's work for which P threads have to wait; 1 / P at best."""
    work = trunk_work(config, batch, time, threads)
    return float(work.max(1).sum() / work.sum())


def fit(seconds: Mapping[int, float], shares: Mapping[int, float]) -> tuple[float, float]:
    """serial and divided seconds, neither negative, from the seconds of a part by number of threads."""
    counts = sorted(seconds)
    matrix = np.array([[1.0, shares[count]] for count in counts])
    (serial, divided), _ = nnls(matrix, np.array([seconds[count] for count in counts]))
    return float(serial), float(divided)
