"""Optimisation: which parameter gets which update rule, the learning rate's schedule, and the step itself."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

import numpy as np

from flashlm_numba.kernels.optimizers import (
    NorMuonWorkspace,
    adamw_rows_step,
    adamw_step,
    normuon_step,
    sum_of_squares,
)
from flashlm_numba.system.errors import UserError

NORMUON, ADAMW_DECAY, ADAMW_PLAIN = "normuon", "adamw with decay", "adamw without decay"


@dataclass(frozen=True)
class OptimizerSettings:
    """Settings of both update rules; the defaults are FlashLM v3's."""

    normuon_lr: float = 0.02  # learning rate of NorMuon at full scale
    normuon_momentum: float = 0.95  # share of the momentum that a step keeps
    normuon_beta2: float = 0.999  # share of the rows' second moment that a step keeps
    normuon_eps: float = 1e-8  # added to the root of the second moment and to the update's norm
    normuon_nesterov: bool = False  # direction: False the momentum, True gradient and momentum blended
    normuon_update_rms: float | None = 0.2  # root mean square of an update before the learning rate; None: the
    # update keeps the orthogonalised direction's norm, times sqrt(max(1, rows / columns))
    normuon_decay: float = 0.0  # decoupled weight decay
    normuon_iterations: int = 5  # Newton-Schulz iterations a step
    adamw_lr: float = 3e-4  # learning rate of AdamW at full scale
    adamw_trunk_factor: float = 1.0  # times the rate, for what is no table of rows: convolutions and norms
    adamw_beta1: float = 0.9  # share of the first moment that a step keeps
    adamw_beta2: float = 0.95  # share of the second moment that a step keeps
    adamw_eps: float = 1e-8  # added to the root of the second moment
    adamw_lazy: bool = False  # rows of a table without a gradient are left alone, moments too
    adamw_rows: bool = False  # with adamw_lazy: each row of a table has one second moment, and counts its own steps
    adamw_decay: float = 0.1  # decoupled weight decay of tensors with more than one axis
    clip: float | None = 1.0  # largest norm of all gradients together; None: no clipping

    def __post_init__(self) -> None:
        if self.adamw_rows and not self.adamw_lazy:
            raise ValueError("optimizer.adamw_rows needs optimizer.adamw_lazy")
        for name in ("normuon_momentum", "normuon_beta2", "adamw_beta1", "adamw_beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"optimizer.{name} must be in [0, 1), got {getattr(self, name)}")
        for name in (
            "normuon_lr",
            "adamw_lr",
            "adamw_trunk_factor",
            "normuon_decay",
            "adamw_decay",
            "normuon_iterations",
        ):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"optimizer.{name} must be 0 or more, got {getattr(self, name)}")
        for name in ("normuon_eps", "adamw_eps", "normuon_update_rms", "clip"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"optimizer.{name} must be more than 0, got {value}")


PRESETS: dict[str, OptimizerSettings] = {
    "v3": OptimizerSettings(),
    # NorMuon as in its authors' repository (arXiv:2510.05491); AdamW as in v3
    "published": OptimizerSettings(
        normuon_beta2=0.95, normuon_eps=1e-10, normuon_nesterov=True, normuon_update_rms=None
    ),
}


# --- groups ---


def _is_row_table(name: str) -> bool:
    """Whether the parameter is a table with a row per token or tree node, and so no linear map."""
    return name.startswith(("embedding.", "head."))


GroupRules = Mapping[str, Callable[[str, np.ndarray], bool]]
RULES: GroupRules = {
    NORMUON: lambda name, value: value.ndim == 2 and not _is_row_table(name),
    ADAMW_DECAY: lambda name, value: value.ndim > 2 or (value.ndim == 2 and _is_row_table(name)),
    ADAMW_PLAIN: lambda name, value: value.ndim == 1,
}
# The published loss never reads the router's score, so its gradient is always zero, and torch leaves tensors
# without a gradient alone. They belong to their groups, and are never stepped.
WITHOUT_GRADIENT = frozenset({"router.weight", "router.bias"})


def parameter_groups(params: Mapping[str, np.ndarray], rules: GroupRules = RULES) -> dict[str, list[str]]:
    """Names of the parameters in every group, in the order of params.

    Raises ValueError if a parameter fits no rule, and so would never be trained, or more than one.
    """
    groups: dict[str, list[str]] = {group: [] for group in rules}
    for name, value in params.items():
        fitting = [group for group, fits in rules.items() if fits(name, value)]
        if len(fitting) != 1:
            found = " and ".join(fitting) or "no group"
            raise ValueError(
                f"parameter_groups: {name} {value.shape} is in {found}, expected exactly one group; change the rules"
            )
        groups[fitting[0]].append(name)
    return groups


def describe_groups(params: Mapping[str, np.ndarray], rules: GroupRules = RULES) -> str:
    """A line per group: its name, parameters, tensors and their names; then the total."""
    lines, total = [], 0
    for group, names in parameter_groups(params, rules).items():
        count = sum(params[name].size for name in names)
        total += count
        tensors = f"{len(names)} tensor" + ("s" if len(names) != 1 else "")
        lines.append(f"{group:<20} {count:>12,} parameters in {tensors}: {', '.join(names) or '-'}")
    return "\n".join([*lines, f"{'all':<20} {total:>12,} parameters"])


# --- schedule ---


def lr_scale(step: float, *, total: float | None = None, warmup: float = 0, decay: float = 0) -> float:
    """Factor of both learning rates: linear warm-up, constant, linear decay to 0.

    step : steps done before this one; never time, since a slow or sleeping machine would then follow another schedule
    total : where the schedule ends; None: there is no decay.  warmup, decay : lengths of the two ramps, in steps
    The first step has 1 / warmup, the step at total - decay is the last at 1, from total on it is 0.

    >>> [lr_scale(step, total=10, warmup=4, decay=4) for step in range(10)]
    [0.25, 0.5, 0.75, 1.0, 1.0, 1.0, 1.0, 0.75, 0.5, 0.25]
    """
    up = min(1.0, (step + 1) / warmup) if warmup > 0 else 1.0
    if total is None or decay <= 0:
        return up
    return min(up, max(0.0, (total - step) / decay))


# --- step ---


class Optimizer:
    """NorMuon and AdamW over a model's parameters, changed in place.

    params, grads : float32 arrays under the same names; kept, and read at every step
    settings : of both rules
    A tensor's moments and its step counter begin at its first step, so a tensor that was frozen until then
    gets AdamW's bias correction of step 1, as in torch.
    """

    def __init__(
        self,
        params: Mapping[str, np.ndarray],
        grads: Mapping[str, np.ndarray],
        settings: OptimizerSettings | None = None,
    ) -> None:
        if params.keys() != grads.keys():
            odd = ", ".join(sorted(params.keys() ^ grads.keys()))
            raise ValueError(f"Optimizer: params and grads must have the same names, only one has {odd}")
        self.params, self.grads = params, grads
        self.settings = settings or PRESETS["v3"]
        self.groups = parameter_groups(params)
        self.steps: dict[str, int] = {}  # steps that a tensor has had; absent: none
        # momentum or AdamW's first moment, in the shape of the tensor; where adamw_beta1 is 0, AdamW's has none
        self._first: dict[str, np.ndarray] = {}
        # AdamW's second moment in the shape of the tensor; NorMuon's, and that of adamw_rows, (rows,)
        self._second: dict[str, np.ndarray] = {}
        self._row_steps: dict[str, np.ndarray] = {}  # steps that each row of a table has had, where adamw_rows
        self._workspaces: dict[tuple[str, ...], NorMuonWorkspace] = {}

    def summary(self) -> str:
        """The groups with their parameter counts, for people."""
        return describe_groups(self.params)

    def grad_norm(self, frozen: Collection[str] = ()) -> float:
        """Norm of all gradients together, without the frozen tensors'; not finite if one is not."""
        names = self._active(self.params, frozen)
        return math.sqrt(math.fsum(sum_of_squares(self.grads[name]) for name in names))

    def step(
        self,
        lr_normuon: float,
        lr_adamw: float,
        clip: float | None,
        *,
        frozen: Collection[str] = (),
    ) -> dict[str, float]:
        """Update every parameter that is not frozen, from the gradients as they are; these stay unchanged.

        lr_normuon, lr_adamw : learning rates of this step, the schedule's factor included
        clip : largest norm of all gradients together, as in torch.nn.utils.clip_grad_norm_; None: no clip
        frozen : names of tensors that get no update and no moments in this step, and do not count in the norm
        Returns grad_norm (before clipping) and clip_scale (the factor that the gradients got).
        Raises UserError, before anything is changed, if a gradient is not finite.
        """
        unknown = set(frozen) - self.params.keys()
        if unknown:
            raise ValueError(f"Optimizer.step: frozen has no parameter called {', '.join(sorted(unknown))}")
        norm = self.grad_norm(frozen)
        if not math.isfinite(norm):
            bad = [n for n in self._active(self.params, frozen) if not math.isfinite(sum_of_squares(self.grads[n]))]
            raise UserError(
                f"The gradient of {', '.join(bad)} is not finite (NaN or infinity), so training has diverged "
                "and this step was not taken. Go on from the last checkpoint with a lower learning rate."
            )
        scale = 1.0 if clip is None else min(1.0, clip / (norm + 1e-6))
        self._step_normuon(self._active(self.groups[NORMUON], frozen), lr_normuon, scale)
        self._step_adamw(self._active(self.groups[ADAMW_DECAY], frozen), lr_adamw, scale, self.settings.adamw_decay)
        self._step_adamw(self._active(self.groups[ADAMW_PLAIN], frozen), lr_adamw, scale, 0.0)
        return {"grad_norm": norm, "clip_scale": scale}

    def _active(self, names: Collection[str], frozen: Collection[str]) -> list[str]:
        return [name for name in names if name not in WITHOUT_GRADIENT and name not in frozen]

    def _second_shape(self, name: str) -> tuple[int, ...]:
        shape = self.params[name].shape
        return shape[:1] if name in self.groups[NORMUON] or self._by_rows(name) else shape

    def _is_table(self, name: str) -> bool:
        return self.params[name].ndim == 2 and _is_row_table(name)

    def _by_rows(self, name: str) -> bool:
        return self.settings.adamw_rows and self._is_table(name)

    def _has_first(self, name: str) -> bool:
        return name in self.groups[NORMUON] or self.settings.adamw_beta1 > 0

    def _count_step(self, name: str) -> None:
        """Count a step of this tensor, making its moments at the first."""
        if name not in self.steps:
            if self._has_first(name):
                self._first[name] = np.zeros(self.params[name].shape, np.float32)
            self._second[name] = np.zeros(self._second_shape(name), np.float32)
            if self._by_rows(name):
                self._row_steps[name] = np.zeros(len(self.params[name]), np.int64)
        self.steps[name] = self.steps.get(name, 0) + 1

    def _step_normuon(self, names: list[str], lr: float, scale: float) -> None:
        for name in names:
            self._count_step(name)
        key = tuple(names)
        if key not in self._workspaces:  # one for every set of tensors that are stepped together
            self._workspaces[key] = NorMuonWorkspace([self.params[name].shape for name in names])
        s = self.settings
        normuon_step(
            [self.params[name] for name in names],
            [self._first[name] for name in names],
            [self._second[name] for name in names],
            [self.grads[name] for name in names],
            lr=lr,
            momentum=s.normuon_momentum,
            beta2=s.normuon_beta2,
            eps=s.normuon_eps,
            nesterov=s.normuon_nesterov,
            update_rms=s.normuon_update_rms,
            decay=s.normuon_decay,
            steps=s.normuon_iterations,
            scale=scale,
            workspace=self._workspaces[key],
        )

    def _step_adamw(self, names: list[str], lr: float, scale: float, decay: float) -> None:
        s = self.settings
        for name in names:
            self._count_step(name)
            weight, grad, first, second = self.params[name], self.grads[name], self._first.get(name), self._second[name]
            table = self._is_table(name)
            rate = lr if table else s.adamw_trunk_factor * lr
            if self._by_rows(name):
                adamw_rows_step(
                    weight,
                    first,
                    second,
                    self._row_steps[name],
                    grad,
                    lr=rate,
                    beta1=s.adamw_beta1,
                    beta2=s.adamw_beta2,
                    eps=s.adamw_eps,
                    decay=decay,
                    scale=scale,
                )
            else:
                adamw_step(
                    weight,
                    first,
                    second,
                    grad,
                    step=self.steps[name],
                    lr=rate,
                    beta1=s.adamw_beta1,
                    beta2=s.adamw_beta2,
                    eps=s.adamw_eps,
                    decay=decay,
                    scale=scale,
                    lazy=s.adamw_lazy and table,
                )

    def state_dict(self) -> dict[str, np.ndarray]:
        """The whole state as flat arrays, for safetensors: `first.`, `second.`, `steps.` and `row_steps.NAME`.

        first is the momentum or AdamW's first moment, second the second moment (NorMuon's, and a table's with
        adamw_rows, has one number per row), steps (1,) int64, row_steps (rows,) int64. A tensor that was never stepped
        has no entries, one of AdamW's with beta1 = 0 no first, and only a table with adamw_rows has row_steps. The
        arrays are the live ones, no copies.
        """
        state: dict[str, np.ndarray] = {}
        for name in self.params:
            if name in self.steps:
                if name in self._first:
                    state[f"first.{name}"] = self._first[name]
                state[f"second.{name}"] = self._second[name]
                state[f"steps.{name}"] = np.array([self.steps[name]], np.int64)
                if name in self._row_steps:
                    state[f"row_steps.{name}"] = self._row_steps[name]
        return state

    def load_state_dict(self, state: Mapping[str, np.ndarray]) -> None:
        """Take over a copy of a state_dict(); training then continues bit for bit.

        Raises UserError, before anything is changed, if the state is not of these parameters.
        """
        # a run with beta1 = 0 from before such moments were left out has them still
        needless = {f"first.{name}" for name in self.params if not self._has_first(name)}
        state = {key: value for key, value in state.items() if key not in needless}
        names = [key.removeprefix("steps.") for key in state if key.startswith("steps.")]
        expected: dict[str, tuple[tuple[int, ...], type]] = {}
        for name in names:
            if name not in self.params:
                raise UserError(self._misfit(f"it has a parameter {name} that the model lacks"))
            if self._has_first(name):
                expected[f"first.{name}"] = self.params[name].shape, np.float32
            expected[f"second.{name}"] = self._second_shape(name), np.float32
            expected[f"steps.{name}"] = (1,), np.int64
            if self._by_rows(name):
                expected[f"row_steps.{name}"] = self._second_shape(name), np.int64
        if expected.keys() != state.keys():
            odd = ", ".join(sorted(expected.keys() ^ state.keys()))
            raise UserError(self._misfit(f"these entries are missing or stand alone: {odd}"))
        for key, (shape, dtype) in expected.items():
            value = state[key]
            if value.shape != shape or value.dtype != np.dtype(dtype):
                raise UserError(
                    self._misfit(f"{key} is {value.dtype} {value.shape}, expected {np.dtype(dtype)} {shape}")
                )
            if np.dtype(dtype).kind == "i" and value.min(initial=0) < 0:
                raise UserError(self._misfit(f"{key} counts {value.min()} steps"))
        self.steps = {name: int(state[f"steps.{name}"][0]) for name in names}
        self._first = {name: np.array(state[f"first.{name}"], order="C") for name in names if self._has_first(name)}
        self._second = {name: np.array(state[f"second.{name}"], order="C") for name in names}
        self._row_steps = {name: state[f"row_steps.{name}"].copy() for name in names if self._by_rows(name)}

    @staticmethod
    def _misfit(why: str) -> str:
        return (
            f"The saved optimiser state does not fit this model: {why}. Resume with the settings the run was "
            "started with, or from another checkpoint."
        )
