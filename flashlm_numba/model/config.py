"""Everything that decides a run, as frozen dataclasses with a comment per field; the defaults are FlashLM v3's model.

settings.py changes them by `--set key=value` and reads config.json, recipes.py names sets of them.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from dataclasses import dataclass, field
from typing import Any, ClassVar

from flashlm_numba.heads.config import HeadConfig
from flashlm_numba.model.mixers import MIXERS
from flashlm_numba.system.fields import in_range as _in
from flashlm_numba.system.fields import one_of as _one_of

ACTIVATIONS = ("float", "int8")


@dataclass(frozen=True)
class ModelConfig:
    """Shape of the model; the defaults are FlashLM v3's."""

    vocab_size: int = 50_257  # V, number of tokens in the vocabulary
    dim: int = 256  # C, channels
    ffn_dim: int = 683  # I, width of the GLU
    groups: int = 16  # groups of every convolution; must divide dim
    kernel_size: int = 4  # K, kernel size of every convolution
    dilations: tuple[int, ...] = (1, 4, 64)  # dilations of the mixer's convolutions, in order
    mixer: str = "conv"  # token mixer of every block: a name in MIXERS
    n_blocks: int = 1  # L, number of blocks, each with weights of its own
    n_passes: int = 2  # passes through all blocks
    mixer_residual_scale: float = _in(1.0, 0, 1e3, open_low=True)  # scales what the mixer adds to the residual stream
    ffn_residual_scale: float = _in(1.0, 0, 1e3, open_low=True)  # scales what the GLU adds to the residual stream
    ngram_copy_orders: tuple[int, ...] = ()  # lengths of the n-grams whose earlier occurrences are looked up
    ngram_copy_reach: int = _in(1024, 1, 8192)  # how many tokens back an earlier occurrence may end
    leaky_decay: float = _in(0.0, 0, 0.995)  # decay per token of the mixer's leaky average; 0: there is none
    ternary_threshold: float = _in(1.0, 0, 1)  # times a matrix's mean magnitude: a weight beyond it is +1 or -1
    activations: str = _one_of("float", ACTIVATIONS)  # what ternary weights multiply: floats, or rounded to int8

    def __post_init__(self) -> None:
        for name in ("vocab_size", "dim", "ffn_dim", "groups", "kernel_size", "n_blocks", "n_passes"):
            if getattr(self, name) < 1:
                raise ValueError(f"model.{name} must be at least 1, got {getattr(self, name)}")
        # beyond these nothing is learnt, and a file of settings could ask for all of the memory
        for name, most in (("kernel_size", 64), ("n_blocks", 64), ("n_passes", 64)):
            if getattr(self, name) > most:
                raise ValueError(f"model.{name} must be at most {most}, got {getattr(self, name)}")
        if self.mixer not in MIXERS:
            raise ValueError(f"model.mixer must be one of {', '.join(MIXERS)}, got {self.mixer!r}")
        MIXERS[self.mixer].check(self)
        orders = self.ngram_copy_orders
        if len(orders) > 16 or not all(1 <= order <= 16 for order in orders):
            raise ValueError(
                f"model.ngram_copy_orders must be at most 16 numbers from 1 to 16, such as [1,2], got {list(orders)}"
            )

    @property
    def receptive_field(self) -> int:
        """Tokens that a hidden state can see, its own included (415 for v3)."""
        copies = self.ngram_copy_reach + max(self.ngram_copy_orders) - 1 if self.ngram_copy_orders else 0
        return 1 + self.n_blocks * self.n_passes * MIXERS[self.mixer].reach(self) + copies


# What a variant of NorMuon fixes: fields of kernels.normuon.NorMuonRule, which says what they mean
NORMUON_VARIANTS: dict[str, dict[str, Any]] = {
    # the authors' repository, arXiv:2510.05491
    "published": {"momentum": 0.95, "beta2": 0.95, "eps": 1e-10, "nesterov": True, "update_rms": None},
    # FlashLM v3
    "v3": {"momentum": 0.95, "beta2": 0.999, "eps": 1e-8, "nesterov": False, "update_rms": 0.2},
}


@dataclass(frozen=True)
class OptimizerConfig:
    """Update rules and the schedule of their learning rates."""

    adamw_eps: ClassVar[float] = 1e-8  # added to the root of the second moment

    normuon: str = _one_of("published", NORMUON_VARIANTS)  # variant of NorMuon, for the ternary matrices
    normuon_lr: float = _in(0.02, 0)  # learning rate at its peak
    normuon_iterations: int = _in(5, 0, 20)  # Newton-Schulz iterations a step
    adamw_lr: float = _in(2e-3, 0)  # learning rate at its peak, for everything else
    nonembedding_lr_scale: float = _in(1.0, 0, 1e3)  # times adamw_lr: for the convolutions and norms
    adamw_beta1: float = _in(0.9, 0, 0.9999)  # decay of the first moment, per step
    adamw_beta2: float = _in(0.95, 0, 0.9999)  # decay of the second moment, per step
    sparse_adamw: bool = False  # AdamW leaves rows without a gradient alone
    rowwise_exp_avg_sq: bool = False  # one second moment a row; needs sparse_adamw
    weight_decay: float = _in(0.0, 0, 1)  # of AdamW's matrices, times the learning rate
    clip: float = _in(1.0, 0, open_low=True)  # largest global norm of the gradient
    warmup_steps: int = _in(100, 0)  # steps of linear rise from 0 to the peak
    warmdown_ratio: float = _in(0.4, 0, 1)  # last share of the steps, in which the rate falls linearly to 0

    @property
    def normuon_variant(self) -> dict[str, Any]:
        """What the variant of NorMuon fixes, see NORMUON_VARIANTS."""
        return NORMUON_VARIANTS[self.normuon]

    def __post_init__(self) -> None:
        if self.rowwise_exp_avg_sq and not self.sparse_adamw:
            raise ValueError(
                "optimizer.rowwise_exp_avg_sq needs sparse_adamw, since a row with moments of its own is stepped when "
                "it has a gradient; add --set rowwise_exp_avg_sq=false or --set sparse_adamw=true"
            )


@dataclass(frozen=True)
class Phase:
    """Shape of a step's batches up to a step; written LAST_STEP:BATCH_SIZExSEQ_LENxGRAD_ACCUM[:frozen]."""

    last_step: int | None = _in(None, 1)  # last step of the phase; none: the end of the run
    batch_size: int = _in(16, 1)  # sequences per micro-batch
    seq_len: int = _in(128, 1)  # tokens per sequence
    grad_accum: int = _in(1, 1)  # micro-batches per step
    frozen: bool = False  # hold the embedding fixed, where its rows come from --embeddings

    @property
    def tokens(self) -> int:
        """Tokens per step."""
        return self.batch_size * self.seq_len * self.grad_accum


@dataclass(frozen=True)
class TrainingConfig:
    """Batches, the embedding's start, and how often things are written."""

    phases: tuple[Phase, ...] = (Phase(),)  # in order; the last one's end, if set, fixes the schedule's length
    embedding_init: str = "corpus"  # start of E: corpus, random, a GPT-2 .safetensors file, hf:NAME
    ema: float = _in(0.0, 0, 0.99999)  # decay per step of the EMA of the weights; 0: none is kept
    log_every: int = _in(1, 1)  # steps between lines of metrics.jsonl
    validate_every: int = _in(500, 0)  # steps between validations; 0: after the last step only
    validation_tokens: int = _in(32_768, 1)  # tokens in the fixed validation subset
    checkpoint_every: int = _in(0, 0)  # steps between checkpoints; 0: about two minutes of training
    sample_tokens: int = _in(60, 0)  # length of the text that each validation adds to samples.txt
    checkpoint_minutes: tuple[float, ...] = ()  # minutes of training whose checkpoints are never dropped

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

    steps: int = _in(0, 0)  # last step of the run
    schedule_steps: int = _in(0, 0)  # steps that phases and decay are laid out for; `steps` may stop earlier
    minutes: float | None = _in(None, 0, open_low=True)  # what --minutes asked for
    step_seconds: tuple[float, ...] = ()  # seconds per step of each phase, as --minutes measured them


@dataclass(frozen=True)
class RunConfig:
    """Everything that decides a run; RUN/config.json."""

    recipe: str = "default"  # the recipe that the settings started from
    seed: int = _in(42, 0, 2**63 - 1)  # seeds the weights, the batches and the positions
    threads: int = _in(1, 1)  # threads used; the same number gives the same bits
    data: str = ""  # folder of the prepared tokens
    data_hash: str = ""  # SHA-256 over the shards, so that a resumed run reads the same tokens
    model: ModelConfig = ModelConfig()
    head: HeadConfig = field(default_factory=HeadConfig)
    optimizer: OptimizerConfig = OptimizerConfig()
    training: TrainingConfig = TrainingConfig()
    plan: Plan = Plan()

    @property
    def model_hash(self) -> str:
        """SHA-256 (hex) over the settings of the model and its head: with others, weights compute something else."""
        sections = {"model": dataclasses.asdict(self.model), "head": dataclasses.asdict(self.head)}
        return hashlib.sha256(json.dumps(sections, sort_keys=True).encode()).hexdigest()

    def to_json(self) -> str:
        """The text of config.json; settings.run_from_json reads it."""
        return json.dumps(dataclasses.asdict(self), indent=2) + "\n"

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


SECTIONS = ("model", "head", "optimizer", "training")  # of RunConfig, what `--set` changes
