"""The optimiser: the update rule of each parameter, the update, and its state."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from typing import Any

import numpy as np

from flashlm_numba.kernels.adamw import adamw_rowwise_step, adamw_step
from flashlm_numba.kernels.grad_norm import sum_of_squares
from flashlm_numba.kernels.normuon import NorMuonRule, NorMuonWorkspace, normuon_step
from flashlm_numba.model.config import OptimizerConfig
from flashlm_numba.system.calls import OneCall
from flashlm_numba.system.errors import UserError

# --- groups ---

NORMUON, ADAMW_DECAY, ADAMW_PLAIN = "normuon", "adamw with decay", "adamw without decay"


def _is_row_table(name: str) -> bool:
    """Whether the parameter is a table with one row per token or tree node, not a linear map."""
    return name.startswith(("embedding.", "head."))


def _has_gradient(name: str) -> bool:
    """Whether the loss depends on the parameter.

    The published loss does not use the router's score, so the router's gradient is always zero. PyTorch skips tensors
    without a gradient. Router tensors therefore belong to their groups but are never updated.
    """
    return not name.startswith("router.")


def _is_vector(name: str, value: np.ndarray) -> bool:
    """Whether the parameter holds numbers per channel; some have those of all blocks, or of all n-gram copies."""
    return value.ndim == 1 or name in ("lower_bounds", "ngram_copy.mixture.hidden")


def _is_matrix(name: str, value: np.ndarray) -> bool:
    """Whether the parameter is a matrix of a linear map."""
    return value.ndim == 2 and not _is_row_table(name) and not _is_vector(name, value)


GroupRules = Mapping[str, Callable[[str, np.ndarray], bool]]
RULES: GroupRules = {
    NORMUON: _is_matrix,
    ADAMW_DECAY: lambda name, value: value.ndim > 2 or (value.ndim == 2 and _is_row_table(name)),
    ADAMW_PLAIN: _is_vector,
}
ADAMW_RULES: GroupRules = {  # with matrices=adamw
    NORMUON: lambda name, value: False,
    ADAMW_DECAY: lambda name, value: value.ndim >= 2 and not _is_vector(name, value),
    ADAMW_PLAIN: _is_vector,
}


def parameter_groups(params: Mapping[str, np.ndarray], rules: GroupRules = RULES) -> dict[str, list[str]]:
    """Names of the parameters in each group, in the order of params.

    Raises ValueError if a parameter fits no rule, so that it would never be trained, or fits several rules.
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
    """One line per group with its name, parameters, tensors and their names; then the total."""
    lines, total = [], 0
    for group, names in parameter_groups(params, rules).items():
        count = sum(params[name].size for name in names)
        total += count
        tensors = f"{len(names)} tensor" + ("s" if len(names) != 1 else "")
        lines.append(f"{group:<20} {count:>12,} parameters in {tensors}: {', '.join(names) or '-'}")
    return "\n".join([*lines, f"{'all':<20} {total:>12,} parameters"])


# --- update ---


class Optimizer:
    """NorMuon and AdamW for a model's parameters, which are updated in place.

    params, grads : float32 arrays under the same names; the optimiser holds references and reads them at every step
    config : hyperparameters of both rules
    A tensor's moments and step counter start at its first update. A tensor that was frozen until then gets the bias
    correction of step 1 in AdamW, as in PyTorch.
    """

    def __init__(
        self,
        params: Mapping[str, np.ndarray],
        grads: Mapping[str, np.ndarray],
        config: OptimizerConfig | None = None,
    ) -> None:
        if params.keys() != grads.keys():
            odd = ", ".join(sorted(params.keys() ^ grads.keys()))
            raise ValueError(f"Optimizer: params and grads must have the same names, but only one of them has {odd}")
        self.params, self.grads = params, grads
        self.config = config or OptimizerConfig()
        self._rules = ADAMW_RULES if self.config.matrices == "adamw" else RULES
        self.groups = parameter_groups(params, self._rules)
        for name, value in params.items():
            if not value.flags.writeable:
                raise ValueError(f"Optimizer: {name} is read-only and cannot be trained; build the model from copies")
        self._updating = OneCall("Optimizer: another thread is in step; train from one thread at a time")
        self.state: dict[str, dict[str, np.ndarray]] = {}  # per tensor, entries as in state_dict; absent: never updated
        self._workspaces: dict[tuple[str, ...], NorMuonWorkspace] = {}

    def summary(self) -> str:
        """A readable list of the groups with their parameter counts."""
        return describe_groups(self.params, self._rules)

    def grad_norm(self, frozen: Collection[str] = ()) -> float:
        """Global norm of the gradients, without those of frozen tensors; not finite if one of these is not.

        The gate of a memory does not count, since it learns beside the model and must not change the model's steps.
        """
        names = [name for name in self._active(self.params, frozen) if not name.startswith("memory.")]
        return math.sqrt(math.fsum(sum_of_squares(self.grads[name]) for name in names))

    def step(
        self,
        lr_normuon: float,
        lr_adamw: float,
        clip: float | None,
        *,
        frozen: Collection[str] = (),
    ) -> dict[str, float]:
        """Update every parameter that is not frozen. The gradients stay unchanged.

        lr_normuon, lr_adamw : learning rates of this step, including the schedule's factor
        clip : maximum global norm of the gradients, as in torch.nn.utils.clip_grad_norm_; None: no clipping
        frozen : names of tensors whose values and moments this step does not change; they do not count in the norm
        Returns grad_norm (before clipping) and clip_scale (the factor applied to the gradients).
        Raises UserError, before anything is changed, if a gradient is not finite, and RuntimeError if another thread is
        in step.
        """
        unknown = set(frozen) - self.params.keys()
        if unknown:
            raise ValueError(f"Optimizer.step: frozen names unknown parameters: {', '.join(sorted(unknown))}")
        with self._updating.alone():
            return self._update(lr_normuon, lr_adamw, clip, frozen)

    def _update(
        self, lr_normuon: float, lr_adamw: float, clip: float | None, frozen: Collection[str]
    ) -> dict[str, float]:
        norm = self.grad_norm(frozen)
        if not math.isfinite(norm):
            bad = [n for n in self._active(self.params, frozen) if not math.isfinite(sum_of_squares(self.grads[n]))]
            raise UserError(
                f"The gradient of {', '.join(bad)} is not finite (NaN or infinity), so training has diverged "
                "and this step was skipped. Resume from the last checkpoint with a lower learning rate."
            )
        scale = 1.0 if clip is None else min(1.0, clip / (norm + 1e-6))
        self._step_normuon(self._active(self.groups[NORMUON], frozen), lr_normuon, scale)
        self._step_adamw(self._active(self.groups[ADAMW_DECAY], frozen), lr_adamw, scale, self.config.weight_decay)
        self._step_adamw(self._active(self.groups[ADAMW_PLAIN], frozen), lr_adamw, scale, 0.0)
        return {"grad_norm": norm, "clip_scale": scale}

    def _active(self, names: Collection[str], frozen: Collection[str]) -> list[str]:
        return [name for name in names if _has_gradient(name) and name not in frozen]

    def _is_table(self, name: str) -> bool:
        return self.params[name].ndim == 2 and _is_row_table(name)

    def _entries(self, name: str) -> dict[str, tuple[tuple[int, ...], type]]:
        """Shape and dtype of every entry of a tensor's state."""
        shape, normuon = self.params[name].shape, name in self.groups[NORMUON]
        rowwise = self.config.rowwise_exp_avg_sq and self._is_table(name)
        entries: dict[str, tuple[tuple[int, ...], type]] = {}
        if normuon or self.config.adamw_beta1 > 0:
            entries["exp_avg"] = shape, np.float32
        entries["exp_avg_sq"] = shape[:1] if normuon or rowwise else shape, np.float32
        entries["steps"] = (1,), np.int64
        if rowwise:
            entries["row_steps"] = shape[:1], np.int64
        return entries

    def _stepped(self, name: str) -> dict[str, np.ndarray]:
        """The tensor's state, created at its first step, with this step counted."""
        if name not in self.state:
            self.state[name] = {key: np.zeros(*entry) for key, entry in self._entries(name).items()}
        self.state[name]["steps"] += 1
        return self.state[name]

    def _step_normuon(self, names: list[str], lr: float, scale: float) -> None:
        if not names:
            return
        states = [self._stepped(name) for name in names]
        key = tuple(names)
        if key not in self._workspaces:  # one workspace per set of tensors that are updated together
            self._workspaces[key] = NorMuonWorkspace([self.params[name].shape for name in names])
        normuon_step(
            [self.params[name] for name in names],
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [self.grads[name] for name in names],
            NorMuonRule(**self.config.normuon_variant, iterations=self.config.normuon_iterations),
            lr=lr,
            scale=scale,
            workspace=self._workspaces[key],
        )

    def _step_adamw(self, names: list[str], lr: float, scale: float, weight_decay: float) -> None:
        config = self.config
        numbers: dict[str, Any] = {
            "beta1": config.adamw_beta1,
            "beta2": config.adamw_beta2,
            "eps": config.adamw_eps,
            "weight_decay": weight_decay,
            "scale": scale,
        }
        for name in names:
            weight, grad, state, table = self.params[name], self.grads[name], self._stepped(name), self._is_table(name)
            moments = state.get("exp_avg"), state["exp_avg_sq"]
            numbers["lr"] = lr if table else config.nonembedding_lr_scale * lr
            if "row_steps" in state:
                adamw_rowwise_step(weight, *moments, state["row_steps"], grad, **numbers)
            else:
                sparse = config.sparse_adamw and table
                adamw_step(weight, *moments, grad, step=int(state["steps"][0]), sparse=sparse, **numbers)

    # --- state ---

    def state_dict(self) -> dict[str, np.ndarray]:
        """The state as flat arrays for safetensors: `exp_avg.NAME`, `exp_avg_sq.NAME`, `steps.NAME`, `row_steps.NAME`.

        exp_avg : NorMuon's momentum or AdamW's first moment; absent for AdamW with beta1 = 0
        exp_avg_sq : second moment; one number per row for NorMuon, and for a table with rowwise_exp_avg_sq
        steps : (1,) int64;  row_steps : (rows,) int64, only for a table with rowwise_exp_avg_sq
        A tensor that was never updated has no entries. The arrays are the live ones, not copies.
        """
        states = ((name, self.state[name]) for name in self.params if name in self.state)
        return {f"{key}.{name}": value for name, state in states for key, value in state.items()}

    def load_state_dict(self, state: Mapping[str, np.ndarray]) -> None:
        """Load a copy of a state_dict(). Training then continues bit for bit.

        Raises UserError, before anything is changed, if the state does not fit these parameters.
        """
        names = [key.removeprefix("steps.") for key in state if key.startswith("steps.")]
        for name in names:
            if name not in self.params:
                raise UserError(self._misfit(f"it has a parameter {name}, which the model lacks"))
        expected = {f"{key}.{name}": entry for name in names for key, entry in self._entries(name).items()}
        if expected.keys() != state.keys():
            odd = ", ".join(sorted(expected.keys() ^ state.keys()))
            raise UserError(self._misfit(f"these entries are missing or unexpected: {odd}"))
        for key, (shape, dtype) in expected.items():
            value, kind = state[key], np.dtype(dtype)
            if value.shape != shape or value.dtype != kind:
                raise UserError(self._misfit(f"{key} is {value.dtype} {value.shape}, expected {kind} {shape}"))
            if kind.kind == "i" and value.min(initial=0) < 0:
                raise UserError(self._misfit(f"{key} counts {value.min()} steps"))
        self.state = {
            name: {key: np.array(state[f"{key}.{name}"], order="C") for key in self._entries(name)} for name in names
        }

    @staticmethod
    def _misfit(why: str) -> str:
        return (
            f"The saved optimiser state does not fit this model: {why}. Resume with the original settings of the "
            "run, or from another checkpoint."
        )
