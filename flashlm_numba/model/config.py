"""Settings as frozen dataclasses, one comment per field; the recipes; `--set key=value`; config.json.

>>> run = RunConfig.recipe_named("default")
>>> run.with_settings(["adamw_lr=1e-3"]).optimizer.adamw_lr
0.001
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import json
import math
import types
import typing
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from flashlm_numba.heads.config import HeadConfig
from flashlm_numba.system.errors import UserError
from flashlm_numba.system.fields import in_range as _in
from flashlm_numba.system.fields import one_of as _one_of

ACTIVATIONS = ("float", "int8")


@dataclass(frozen=True)
class ModelConfig:
    """Shape of the model; the defaults are FlashLM v3's."""

    vocab_size: int = 50_257  # V, tokens
    dim: int = 256  # C, channels
    ffn_dim: int = 683  # I, width of the GLU
    groups: int = 16  # of every convolution; must divide dim
    kernel_size: int = 4  # K, kernel size of every convolution
    dilations: tuple[int, ...] = (1, 4, 64)  # of the mixer's convolutions, in order
    n_passes: int = 2  # passes through the one block
    mixer_residual_scale: float = _in(1.0, 0, 1e3, open_low=True, later=True)  # the mixer's output times this is added
    ffn_residual_scale: float = _in(1.0, 0, 1e3, open_low=True, later=True)  # the same for the GLU's output
    ngram_copy_orders: tuple[int, ...] = field(default=(), metadata={"later": True})  # repeated tokens to look up
    ngram_copy_reach: int = _in(1024, 1, 8192, later=True)  # tokens that they may lie back
    leaky_decay: float = _in(0.0, 0, 0.995, later=True)  # of the running average in the mixer, a token; 0: none
    ternary_threshold: float = _in(1.0, 0, 1, later=True)  # times a matrix's mean magnitude: where a weight is +1 or -1
    activations: str = _one_of("float", ACTIVATIONS, later=True)  # what ternary weights multiply, or rounded so

    def __post_init__(self) -> None:
        for name in ("vocab_size", "dim", "ffn_dim", "groups", "kernel_size", "n_passes"):
            if getattr(self, name) < 1:
                raise ValueError(f"model.{name} must be at least 1, got {getattr(self, name)}")
        if self.dim % self.groups:
            raise ValueError(f"model.groups must divide model.dim, got {self.groups} and {self.dim}")
        # beyond these nothing is learnt, and a file of settings could ask for all of the memory
        for name, most in (("kernel_size", 64), ("n_passes", 64)):
            if getattr(self, name) > most:
                raise ValueError(f"model.{name} must be at most {most}, got {getattr(self, name)}")
        if not self.dilations or not 1 <= min(self.dilations) <= max(self.dilations) <= 4096:
            raise ValueError(f"model.dilations must be numbers from 1 to 4096, got {self.dilations}")
        orders = self.ngram_copy_orders
        if len(orders) > 16 or not all(1 <= order <= 16 for order in orders):
            raise ValueError(
                f"model.ngram_copy_orders must be at most 16 numbers from 1 to 16, such as [1,2], got {list(orders)}"
            )

    @property
    def receptive_field(self) -> int:
        """Tokens that a hidden state can see, its own included (415 for v3).

        A running average is taken to end where a token's share of it is below 2**-24, float32's rounding.
        """
        reach = (self.kernel_size - 1) * sum(self.dilations)
        if self.leaky_decay:
            reach += math.ceil(math.log(2**-24) / math.log(self.leaky_decay))
        look_up = self.ngram_copy_reach + max(self.ngram_copy_orders) - 1 if self.ngram_copy_orders else 0
        return 1 + self.n_passes * reach + look_up


@dataclass(frozen=True)
class OptimizerConfig:
    """Update rules and the schedule of their learning rates."""

    normuon: str = _one_of("published", ("published", "v3"))  # variant of NorMuon, for the ternary matrices
    normuon_lr: float = _in(0.02, 0)  # learning rate at its peak
    normuon_iterations: int = _in(5, 0, 20, later=True)  # Newton-Schulz iterations a step
    adamw_lr: float = _in(2e-3, 0)  # learning rate at its peak, for everything else
    nonembedding_lr_scale: float = _in(1.0, 0, 1e3, later=True)  # times adamw_lr: for the convolutions and norms
    adamw_beta1: float = _in(0.9, 0, 0.9999)  # decay of the first moment, per step
    adamw_beta2: float = _in(0.95, 0, 0.9999)  # decay of the second moment, per step
    sparse_adamw: bool = field(default=False, metadata={"later": True})  # AdamW leaves rows without a gradient alone
    rowwise_exp_avg_sq: bool = field(
        default=False, metadata={"later": True}
    )  # one second moment a row; needs sparse_adamw
    weight_decay: float = _in(0.0, 0, 1)  # of AdamW's matrices, times the learning rate
    clip: float = _in(1.0, 0, open_low=True)  # largest global norm of the gradient
    warmup_steps: int = _in(100, 0)  # steps of linear rise from 0 to the peak
    warmdown_ratio: float = _in(0.4, 0, 1)  # last share of the steps, in which the rate falls linearly to 0

    def __post_init__(self) -> None:
        if self.rowwise_exp_avg_sq and not self.sparse_adamw:
            raise ValueError(
                "optimizer.rowwise_exp_avg_sq needs sparse_adamw, since a row with moments of its own is stepped when "
                "it has a gradient; add --set rowwise_exp_avg_sq=false or --set sparse_adamw=true"
            )


@dataclass(frozen=True)
class Phase:
    """Shape of a step's batches up to a step; written LAST:ROWSxLENGTHxMICRO_BATCHES[:frozen]."""

    last_step: int | None = _in(None, 1)  # last step of the phase; none: the end of the run
    batch_size: int = _in(16, 1)  # sequences in a micro-batch
    seq_len: int = _in(128, 1)  # tokens in a sequence
    grad_accum: int = _in(1, 1)  # micro-batches a step
    frozen: bool = False  # hold the embedding fixed, where its rows come from --embeddings

    @property
    def tokens(self) -> int:
        """Tokens of one step."""
        return self.batch_size * self.seq_len * self.grad_accum

    @classmethod
    def parse(cls, text: str) -> Phase:
        """Read "1000:4x64x4:frozen"; the last step, the micro-batches and ":frozen" may be left out.

        >>> Phase.parse("1000:4x64x4:frozen").tokens, Phase.parse("16x128").last_step
        (1024, None)
        """
        parts = text.strip().split(":")
        frozen = parts[-1] == "frozen"
        parts = parts[: len(parts) - frozen]
        try:
            last = int(parts[-2]) if len(parts) > 1 else None
            sizes = [int(size) for size in parts[-1].split("x")]
            if len(parts) not in (1, 2) or len(sizes) not in (2, 3):
                raise ValueError
        except (ValueError, IndexError):
            raise UserError(
                f"A phase is written LAST_STEP:ROWSxLENGTHxMICRO_BATCHES, like 1000:4x64x4, got '{text}'."
            ) from None
        return cls(last, sizes[0], sizes[1], sizes[2] if len(sizes) == 3 else 1, frozen)


@dataclass(frozen=True)
class TrainingConfig:
    """Batches, the embedding's start, and how often things are written."""

    phases: tuple[Phase, ...] = (Phase(),)  # in order; the last one's end, if set, fixes the layout
    embedding_init: str = "corpus"  # start of E: corpus, random, a GPT-2 .safetensors file, hf:NAME
    ema: float = _in(0.0, 0, 0.99999)  # decay of a running average of the weights; 0: none is kept
    log_every: int = _in(1, 1)  # steps between lines of metrics.jsonl
    validate_every: int = _in(500, 0)  # steps between validations; 0: after the last step only
    validation_tokens: int = _in(32_768, 1)  # tokens of the fixed validation subset
    checkpoint_every: int = _in(0, 0)  # steps between checkpoints; 0: about two minutes of training
    sample_tokens: int = _in(60, 0)  # length of the text added to samples.txt at each validation
    checkpoint_minutes: tuple[float, ...] = field(  # minutes on the training clock whose checkpoints are never dropped
        default=(), metadata={"later": True}
    )

    def __post_init__(self) -> None:
        if not self.phases:
            raise ValueError("training.phases must hold at least one phase")
        if not all(0 < minutes < math.inf for minutes in self.checkpoint_minutes):
            raise ValueError(f"training.checkpoint_minutes must be positive numbers, got {self.checkpoint_minutes}")
        ends = [phase.last_step for phase in self.phases]
        inner = [end for end in ends if end is not None]
        if None in ends[:-1] or inner != sorted(set(inner)):
            raise ValueError(f"training.phases need rising last steps, only the last one open, got {ends}")


@dataclass(frozen=True)
class Plan:
    """How far the run goes, in steps, however it was asked for."""

    steps: int = _in(0, 0)  # the run ends after this step
    schedule_steps: int = _in(0, 0)  # steps that phases and decay are laid out for; `steps` may stop earlier
    minutes: float | None = _in(None, 0, open_low=True)  # what --minutes asked for
    step_seconds: tuple[float, ...] = ()  # seconds a step of each phase that --minutes measured


@dataclass(frozen=True)
class RunConfig:
    """Everything that decides a run; RUN/config.json."""

    recipe: str = "default"  # the recipe that the settings started from
    seed: int = _in(42, 0, 2**63 - 1)  # of the weights, the batches and the positions
    threads: int = _in(1, 1)  # threads used; the same number gives the same bits
    data: str = ""  # folder of the prepared tokens
    data_hash: str = ""  # sha256 over the shards, so that a resumed run reads the same tokens
    model: ModelConfig = ModelConfig()
    head: HeadConfig = field(default_factory=HeadConfig)
    optimizer: OptimizerConfig = OptimizerConfig()
    training: TrainingConfig = TrainingConfig()
    plan: Plan = Plan()

    @classmethod
    def recipe_named(cls, name: str) -> RunConfig:
        """The settings of a recipe of RECIPES."""
        if name not in RECIPES:
            raise UserError(f"There is no recipe '{name}'; the recipes are {', '.join(RECIPES)}.")
        return RECIPES[name]

    def with_settings(self, settings: Iterable[str]) -> RunConfig:
        """Apply `key=value` texts; a key is a field's name, with or without its section."""
        changes: dict[str, dict[str, Any]] = {section: {} for section in SECTIONS}
        for text in settings:
            key, equals, value = text.partition("=")
            if not equals:
                raise UserError(f"--set takes key=value, for example --set clip=0.5, got '{text}'.")
            section, name = _find(key.strip())
            kind = type(getattr(self, section))
            where = f"{section}.{name}"
            parsed = _parse(where, value.strip(), _hints(kind)[name])
            _check(where, parsed, _field(kind, name))
            changes[section][name] = parsed
        try:  # a section at once, for values that only fit together
            return replace(self, **{part: replace(getattr(self, part), **changes[part]) for part in SECTIONS})
        except ValueError as error:
            raise UserError(f"{error}.") from None

    @property
    def model_hash(self) -> str:
        """SHA-256 (hex) over the settings of the model and its head: with others, weights compute something else.

        A setting that came later counts only where it is not what older runs did.
        """
        sections = {}
        for name, part in (("model", self.model), ("head", self.head)):
            sections[name] = {
                item.name: getattr(part, item.name)
                for item in dataclasses.fields(part)
                if not (item.metadata.get("later") and getattr(part, item.name) == item.default)
            }
        return hashlib.sha256(json.dumps(sections, sort_keys=True).encode()).hexdigest()

    def to_json(self) -> str:
        """The text of config.json."""
        return json.dumps(dataclasses.asdict(self), indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str, path: Path | str = "config.json") -> RunConfig:
        """Read config.json back; every key, type and range is checked."""
        try:
            values = json.loads(text)
        except json.JSONDecodeError as error:
            raise UserError(f"{path} is not JSON ({error}); restore it, or start a new run.") from None
        try:
            return _build(cls, values, "")
        except UserError as error:
            raise UserError(f"{path}: {error}") from None

    def phase_at(self, step: int) -> Phase:
        """The phase of a step; steps count from 1."""
        for phase in self.training.phases:
            if phase.last_step is None or step <= phase.last_step:
                return phase
        raise ValueError(f"step {step} lies after the last phase")

    @property
    def fixed_schedule(self) -> int | None:
        """Steps that the phases are laid out for, or None if they are as long as the run."""
        return self.training.phases[-1].last_step

    def tokens_until(self, step: int) -> int:
        """Tokens seen after a step."""
        tokens, start = 0, 0
        for phase in self.training.phases:
            end = step if phase.last_step is None else min(step, phase.last_step)
            tokens += max(0, end - start) * phase.tokens
            start = max(start, end)
        return tokens

    @property
    def embedding_given(self) -> bool:
        """Whether the rows of E come from a checkpoint, not from the corpus or at random."""
        return self.training.embedding_init not in ("corpus", "random")


# The recipes; everything not named here is a field's default.
RECIPES: dict[str, RunConfig] = {
    # the best known now
    "default": RunConfig(
        recipe="default",
        # scales of about fan_in**-0.5 for each ternary matrix that a branch goes through
        model=ModelConfig(
            mixer_residual_scale=2**-4,
            ffn_residual_scale=2**-18,
            leaky_decay=0.98,
            ternary_threshold=0.5,
            activations="int8",
            ngram_copy_orders=(1, 1, 1, 2, 2, 3),
        ),
        optimizer=OptimizerConfig(
            normuon_iterations=3,
            nonembedding_lr_scale=4.0,
            adamw_beta1=0.0,
            adamw_beta2=0.99,
            sparse_adamw=True,
            rowwise_exp_avg_sq=True,
        ),
        training=TrainingConfig(phases=(Phase(batch_size=8, seq_len=256),)),
    ),
    # FlashLM v3 as published; without --embeddings the start of E is ours and is not frozen
    "v3": RunConfig(
        recipe="v3",
        head=HeadConfig(name="dense", loss_fraction=0.25, label_smoothing=0.1, z_loss=1e-4),
        optimizer=OptimizerConfig(
            normuon="v3",
            normuon_lr=0.02,
            adamw_lr=3e-4,
            weight_decay=0.1,
            warmup_steps=200,
            warmdown_ratio=0.1,
        ),
        training=TrainingConfig(
            phases=(
                Phase(1_000, 4, 64, 4, frozen=True),
                Phase(4_000, 4, 128, 4),
                Phase(7_000, 4, 256, 8),
                Phase(10_000, 4, 512, 8),
            ),
            ema=0.999,
        ),
    ),
}

SECTIONS = ("model", "head", "optimizer", "training")


def plan_for(run: RunConfig, *, steps: int | None = None, tokens: int | None = None) -> RunConfig:
    """Give run a plan of `steps`, or of as many steps as `tokens` need.

    Raises UserError if the phases end before that.
    """
    fixed = run.fixed_schedule
    if tokens is not None:
        steps = _steps_for_tokens(run, tokens)
    if steps is None:
        raise ValueError("plan_for: give steps or tokens")
    if steps < 1:
        raise UserError(f"A run needs at least one step, got {steps}.")
    if fixed is not None and steps > fixed:
        raise UserError(
            f"The phases of recipe '{run.recipe}' end at step {fixed:,}, but {steps:,} steps were asked for; "
            "ask for fewer, or set longer phases with --set phases=..."
        )
    return replace(run, plan=Plan(steps=steps, schedule_steps=fixed or steps))


def _steps_for_tokens(run: RunConfig, tokens: int) -> int:
    """Fewest steps that see at least this many tokens."""
    steps, left = 0, tokens
    for phase in run.training.phases:
        need = math.ceil(left / phase.tokens)
        if phase.last_step is None or steps + need <= phase.last_step:
            return steps + need
        left -= (phase.last_step - steps) * phase.tokens
        steps = phase.last_step
    raise UserError(
        f"The phases of recipe '{run.recipe}' see {run.tokens_until(steps):,} tokens, but {tokens:,} were "
        "asked for; ask for fewer, or set longer phases with --set phases=..."
    )


def _hints(cls: type) -> dict[str, Any]:
    return typing.get_type_hints(cls)


def _field(cls: type, name: str) -> dataclasses.Field:
    return next(item for item in dataclasses.fields(cls) if item.name == name)


def _find(key: str) -> tuple[str, str]:
    """Section and field of a `--set` key."""
    names = {}  # both spellings of every key
    for section in SECTIONS:
        for item in dataclasses.fields(_hints(RunConfig)[section]):
            names[f"{section}.{item.name}"] = (section, item.name)
            names[item.name] = (section, item.name)
    if key in names:
        return names[key]
    near = difflib.get_close_matches(key, names, n=1, cutoff=0.5)
    hint = f"did you mean '{near[0]}'?" if near else f"the settings are {', '.join(k for k in names if '.' not in k)}."
    raise UserError(f"There is no setting '{key}'; {hint}")


def _parse(where: str, text: str, hint: Any) -> Any:
    """The value of a `--set` text for a field of this type."""
    if isinstance(hint, types.UnionType):
        inner = next(kind for kind in typing.get_args(hint) if kind is not type(None))
        return None if text.lower() in ("none", "null") else _parse(where, text, inner)
    if typing.get_origin(hint) is tuple:
        item = typing.get_args(hint)[0]
        parts = [part for part in text.strip("()[]").split(",") if part.strip()]
        if item is Phase:
            return tuple(_build(Phase, dataclasses.asdict(Phase.parse(part)), where) for part in parts)
        try:
            return tuple(_parse(where, part.strip(), item) for part in parts)
        except UserError:
            raise UserError(
                f"{where} must be {'whole ' if item is int else ''}numbers with commas between them, got '{text}'."
            ) from None
    if hint is bool:
        words = dict.fromkeys(("true", "yes", "on", "1"), True) | dict.fromkeys(("false", "no", "off", "0"), False)
        if text.lower() not in words:
            raise UserError(f"{where} must be true or false, got '{text}'.")
        return words[text.lower()]
    try:
        return hint(text.replace("_", "")) if hint is not str else text
    except ValueError:
        raise UserError(f"{where} must be {_KINDS[hint]}, got '{text}'.") from None


_KINDS = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}


def _check(where: str, value: Any, item: dataclasses.Field) -> None:
    """Raise UserError unless value lies in the field's range or choices."""
    choices = item.metadata.get("choices")
    if choices is not None and value not in choices:
        raise UserError(f"{where} must be one of {', '.join(choices)}, got '{value}'.")
    if "low" not in item.metadata or value is None:
        return
    low, high, open_low = item.metadata["low"], item.metadata["high"], item.metadata["open_low"]
    if isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"{where} must be a finite number, got {value:g}.")
    fits = value <= high and (value > low if open_low else value >= low)
    if not fits:
        bound = f"above {low:g}" if open_low else f"at least {low:g}"
        bound += f" and at most {high:g}" if high < math.inf else ""
        raise UserError(f"{where} must be {bound}, got {value:g}.")


def _build(cls: type, values: Any, where: str) -> Any:
    """A dataclass from the values of a JSON object; every key must be there and fit."""
    if not isinstance(values, dict):
        raise UserError(f"{where or 'the file'} must be an object, got {type(values).__name__}.")
    names = [item.name for item in dataclasses.fields(cls)]
    values = {item.name: item.default for item in dataclasses.fields(cls) if item.metadata.get("later")} | values
    prefix = f"{where}." if where else ""
    for name in names:
        if name not in values:
            raise UserError(f"{prefix}{name} is missing.")
    for key in values:
        if key not in names:
            near = difflib.get_close_matches(key, names, n=1, cutoff=0.5)
            hint = f"; did you mean '{near[0]}'?" if near else "."
            raise UserError(f"there is no setting '{prefix}{key}'{hint}")
    hints = _hints(cls)
    made = {}
    for item in dataclasses.fields(cls):
        name = f"{prefix}{item.name}"
        made[item.name] = _from_json(name, values[item.name], hints[item.name])
        _check(name, made[item.name], item)
    try:
        return cls(**made)
    except ValueError as error:
        raise UserError(f"{error}.") from None


def _from_json(where: str, value: Any, hint: Any) -> Any:
    """A field's value from its JSON form."""
    if isinstance(hint, types.UnionType):
        if value is None:
            return None
        hint = next(kind for kind in typing.get_args(hint) if kind is not type(None))
    if dataclasses.is_dataclass(hint):
        return _build(typing.cast(type, hint), value, where)
    if typing.get_origin(hint) is tuple:
        if not isinstance(value, list | tuple):
            raise UserError(f"{where} must be a list, got {value!r}.")
        return tuple(_from_json(f"{where}[{i}]", item, typing.get_args(hint)[0]) for i, item in enumerate(value))
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if type(value) is not hint:
        raise UserError(f"{where} must be {_KINDS[hint]}, got {value!r}.")
    return value
