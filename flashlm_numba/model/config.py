"""All settings of a run, as frozen dataclasses with a comment per field. The defaults are those of FlashLM v3.

settings.py changes them with `--set key=value` and reads config.json. recipes.py defines named sets of settings.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from dataclasses import dataclass, field
from typing import Any, ClassVar

from flashlm_numba.heads.config import HeadConfig
from flashlm_numba.memory.config import MemoryConfig
from flashlm_numba.model.mixers import MIXERS
from flashlm_numba.system.fields import in_range as _in
from flashlm_numba.system.fields import one_of as _one_of

ACTIVATIONS = ("float", "int8")
# kinds of ternary layers, and the fields of ModelConfig that only this kind reads
LINEARS: dict[str, tuple[str, ...]] = {
    "ternary": ("ffn_residual_scale", "ternary_threshold", "activations"),
    "bitlinear": ("norm_eps",),
}
ROWS = ("float", "int8", "int4")  # arithmetic of the embedding's rows in an exported file
COPY_OUTPUTS = ("add", "mixture")


@dataclass(frozen=True)
class ModelConfig:
    """Shape of the model; the defaults are FlashLM v3's."""

    vocab_size: int = 50_257  # V, number of tokens in the vocabulary
    dim: int = 256  # C, number of channels
    ffn_dim: int = 683  # I, hidden width of the GLU
    groups: int = 16  # groups of every convolution; must divide dim
    kernel_size: int = 4  # K, kernel size of every convolution
    dilations: tuple[int, ...] = (1, 4, 64)  # dilations of the mixer's convolutions, in order
    mixer: str = "conv"  # token mixer of every block: a name in MIXERS
    n_blocks: int = 1  # L, number of blocks; blocks share no weights
    n_passes: int = 2  # passes through all blocks
    mixer_residual_scale: float = _in(1.0, 0, 1e3, open_low=True)  # multiplies the mixer's output before it is added
    ffn_residual_scale: float = _in(1.0, 0, 1e3, open_low=True)  # multiplies the GLU's output before it is added
    ngram_copy_orders: tuple[int, ...] = ()  # n-gram lengths to match; k-th repetition: the k-th last occurrence
    ngram_copy_reach: int = _in(1024, 1, 8192)  # how many tokens back an earlier occurrence may end
    # what the copies do at the output: their rows are added to h, or they have shares beside the head
    # (heads/copy_mixture.py). Runs of earlier versions do not have it.
    ngram_copy_output: str = _one_of("add", COPY_OUTPUTS, optional=True)  # n-gram copy at the output
    leaky_decay: float = _in(0.0, 0, 0.995)  # decay per token of the mixer's leaky average; 0: no leaky average
    ternary_threshold: float = _in(1.0, 0, 1)  # times a matrix's mean magnitude; larger weights become +1 or -1
    activations: str = _one_of("float", ACTIVATIONS)  # precision of the activations that ternary weights multiply
    # ternary matrices: FlashLM v3's, or the MatMul-free LM's with a norm, int8 inputs and a scale; that has no
    # residual scales and no ternary_threshold. Runs of earlier versions have none of these three.
    linear: str = _one_of("ternary", LINEARS, optional=True)  # kind of the ternary layers
    norm_eps: float = _in(1e-6, 1e-12, 1, optional=True)  # epsilon of the trunk's norms with linear=bitlinear
    embedding_dim: int | None = _in(None, 1, optional=True)  # E, width of the embedding; none: dim, no projection

    def __post_init__(self) -> None:
        for name in ("vocab_size", "dim", "ffn_dim", "groups", "kernel_size", "n_blocks", "n_passes"):
            if getattr(self, name) < 1:
                raise ValueError(f"model.{name} must be at least 1, got {getattr(self, name)}")
        # larger values do not help, and a settings file could exhaust the memory with them
        for name, most in (("kernel_size", 64), ("n_blocks", 64), ("n_passes", 64)):
            if getattr(self, name) > most:
                raise ValueError(f"model.{name} must be at most {most}, got {getattr(self, name)}")
        if self.embedding_dim is not None and self.embedding_dim >= self.dim:
            raise ValueError(f"model.embedding_dim must be below model.dim, got {self.embedding_dim} and {self.dim}")
        if self.mixer not in MIXERS:
            raise ValueError(f"model.mixer must be one of {', '.join(MIXERS)}, got {self.mixer!r}")
        MIXERS[self.mixer].check(self)
        if (self.mixer == "mlgru") != (self.linear == "bitlinear"):
            raise ValueError(
                "model.mixer mlgru and model.linear bitlinear work with each other only, got mixer "
                f"{self.mixer} with linear {self.linear}"
            )
        orders = self.ngram_copy_orders
        if len(orders) > 16 or not all(1 <= order <= 16 for order in orders):
            raise ValueError(
                f"model.ngram_copy_orders must be at most 16 numbers from 1 to 16, such as [1,2], got {list(orders)}"
            )

    @property
    def copy_adds(self) -> bool:
        """Whether copied rows are added to the hidden states."""
        return self.ngram_copy_output == "add"

    @property
    def copy_shares(self) -> bool:
        """Whether the copies have shares beside the head."""
        return self.ngram_copy_output == "mixture" and bool(self.ngram_copy_orders)

    @property
    def receptive_field(self) -> int | None:
        """Number of tokens that a hidden state depends on, the current one included (415 for v3); None: all."""
        reach = MIXERS[self.mixer].reach(self)
        if reach is None:
            return None
        copies = self.ngram_copy_reach + max(self.ngram_copy_orders) - 1 if self.ngram_copy_orders else 0
        return 1 + self.n_blocks * self.n_passes * reach + copies


# update rules of the ternary matrices and schedules, with the fields of OptimizerConfig that only this one reads
MATRICES: dict[str, tuple[str, ...]] = {"normuon": ("normuon", "normuon_lr", "normuon_iterations"), "adamw": ()}
SCHEDULES: dict[str, tuple[str, ...]] = {"linear": ("warmdown_ratio", "early_warmdown"), "halved-cosine": ()}

# Fixed values of each NorMuon variant: fields of kernels.normuon.NorMuonRule, which documents them
NORMUON_VARIANTS: dict[str, dict[str, Any]] = {
    # the authors' repository, arXiv:2510.05491
    "published": {"momentum": 0.95, "beta2": 0.95, "eps": 1e-10, "nesterov": True, "update_rms": None},
    # FlashLM v3
    "v3": {"momentum": 0.95, "beta2": 0.999, "eps": 1e-8, "nesterov": False, "update_rms": 0.2},
}


@dataclass(frozen=True)
class OptimizerConfig:
    """The update rules and their learning rate schedule."""

    adamw_eps: ClassVar[float] = 1e-8  # added to the square root of the second moment

    # update rule of the ternary matrices; runs of earlier versions do not have this setting and the schedule
    matrices: str = _one_of("normuon", MATRICES, optional=True)  # their optimiser
    normuon: str = _one_of("published", NORMUON_VARIANTS)  # variant of NorMuon, for the ternary matrices
    normuon_lr: float = _in(0.02, 0)  # peak learning rate of NorMuon
    normuon_iterations: int = _in(5, 0, 20)  # Newton-Schulz iterations per step
    adamw_lr: float = _in(2e-3, 0)  # peak learning rate of AdamW, for all other parameters
    nonembedding_lr_scale: float = _in(1.0, 0, 1e3)  # multiplies adamw_lr for convolutions, norms and gains
    adamw_beta1: float = _in(0.9, 0, 0.9999)  # decay of the first moment, per step
    adamw_beta2: float = _in(0.95, 0, 0.9999)  # decay of the second moment, per step
    sparse_adamw: bool = False  # AdamW skips rows without a gradient, and their moments
    rowwise_exp_avg_sq: bool = False  # one second moment and step count per row; needs sparse_adamw
    weight_decay: float = _in(0.0, 0, 1)  # weight decay of AdamW's matrices, times the learning rate
    clip: float = _in(1.0, 0, open_low=True)  # maximum global norm of the gradient
    warmup_steps: int = _in(100, 0)  # steps of linear warm-up from 0 to the peak
    warmdown_ratio: float = _in(0.4, 0, 1)  # final share of the steps, over which the rate falls linearly to 0
    # begin the warm-down when validation stops improving, so that the run ends earlier (training/schedule.py); runs of
    # earlier versions do not have this setting
    early_warmdown: bool = field(default=False, metadata={"optional": True})  # if validation stops improving
    # after the warm-up: constant, then linear to 0; or a cosine to 0 that is halved from the middle on
    schedule: str = _one_of("linear", SCHEDULES, optional=True)  # of the learning rates

    @property
    def normuon_variant(self) -> dict[str, Any]:
        """Fixed values of the selected NorMuon variant; see NORMUON_VARIANTS."""
        return NORMUON_VARIANTS[self.normuon]

    def __post_init__(self) -> None:
        if self.rowwise_exp_avg_sq and not self.sparse_adamw:
            raise ValueError(
                "optimizer.rowwise_exp_avg_sq needs sparse_adamw, because its step counts per row count only steps "
                "with a gradient; add --set rowwise_exp_avg_sq=false or --set sparse_adamw=true"
            )


@dataclass(frozen=True)
class Phase:
    """Batch shape up to a given step, written LAST_STEP:BATCH_SIZExSEQ_LENxGRAD_ACCUM[:frozen]."""

    last_step: int | None = _in(None, 1)  # last step of the phase; none: the end of the run
    batch_size: int = _in(16, 1)  # sequences per micro-batch
    seq_len: int = _in(128, 1)  # tokens per sequence
    grad_accum: int = _in(1, 1)  # micro-batches per step
    frozen: bool = False  # freeze the embedding if its rows come from --embeddings

    @property
    def tokens(self) -> int:
        """Tokens per step."""
        return self.batch_size * self.seq_len * self.grad_accum


@dataclass(frozen=True)
class TrainingConfig:
    """Batches, initial embedding, and intervals of logging, validation and checkpoints."""

    phases: tuple[Phase, ...] = (Phase(),)  # in order; the end of the last one, if set, is the schedule's length
    embedding_init: str = "corpus"  # initial embedding: corpus, random, a GPT-2 .safetensors file, hf:NAME
    # dropout (model/dropout.py) on a text with fewer tokens than the model has parameters (dropout_share in
    # training/schedule.py); runs of earlier versions do not have these two
    hidden_dropout: float = _in(0.0, 0, 0.9, optional=True)  # largest share of the hidden states that becomes 0
    embedding_dropout: float = _in(0.0, 0, 0.9, optional=True)  # the same of the embedding's rows at the input
    ema: float = _in(0.0, 0, 0.99999)  # decay per step of the EMA of the weights; 0: no EMA
    log_every: int = _in(1, 1)  # steps between lines of metrics.jsonl
    validate_every: int = _in(500, 0)  # steps between validations; 0: only after the last step
    validation_tokens: int = _in(32_768, 1)  # tokens in the fixed validation subset
    checkpoint_every: int = _in(0, 0)  # steps between checkpoints; 0: about two minutes of training
    sample_tokens: int = _in(60, 0)  # length of the text that each validation adds to samples.txt
    checkpoint_minutes: tuple[float, ...] = ()  # training-clock minutes whose checkpoints are never deleted

    def __post_init__(self) -> None:
        if not self.phases:
            raise ValueError("training.phases must contain at least one phase")
        if not all(0 < minutes < math.inf for minutes in self.checkpoint_minutes):
            raise ValueError(f"training.checkpoint_minutes must be positive numbers, got {self.checkpoint_minutes}")
        ends = [phase.last_step for phase in self.phases]
        inner = [end for end in ends if end is not None]
        if None in ends[:-1] or inner != sorted(set(inner)):
            raise ValueError(f"training.phases need increasing last steps, and only the last may omit it, got {ends}")


@dataclass(frozen=True)
class Plan:
    """The length of the run in steps, whether steps, tokens or minutes were requested."""

    steps: int = _in(0, 0)  # last step of the run
    schedule_steps: int = _in(0, 0)  # length of the schedule and the phases; `steps` may be smaller
    minutes: float | None = _in(None, 0, open_low=True)  # value of --minutes, if given
    step_seconds: tuple[float, ...] = ()  # seconds per step of each phase, as --minutes measured them
    # steps that were planned before an early warm-down made the run shorter; runs of earlier versions do not have it
    asked_steps: int | None = _in(None, 1, optional=True)
    # whether the run was given more steps after its warm-down had begun, so that its best validation may be one that a
    # constant rate does not reach; it is then not shortened
    lengthened: bool = field(default=False, metadata={"optional": True})


@dataclass(frozen=True)
class RunConfig:
    """All settings of a run, as stored in RUN/config.json."""

    recipe: str = "default"  # the recipe that the settings started from
    seed: int = _in(42, 0, 2**63 - 1)  # seed of the initial weights, the batches and the sampled positions
    threads: int = _in(1, 1)  # number of threads; the same number gives the same bits
    data: str = ""  # folder of the prepared tokens; see data_place.py
    # the same as an absolute path; runs of earlier versions do not have it
    data_absolute: str = field(default="", metadata={"optional": True})
    data_hash: str = ""  # SHA-256 over the shards, so that a resumed run reads the same tokens
    tokenizer_hash: str = ""  # SHA-256 of tokenizer.json, the vocabulary that the ids belong to
    # SHA-256 of ngrams.safetensors, the counted n-grams, if the run has a memory
    memory_hash: str = field(default="", metadata={"optional": True})
    init: str = ""  # checkpoint or exported file with the weights that the run starts from; empty: new weights
    model: ModelConfig = ModelConfig()
    head: HeadConfig = field(default_factory=HeadConfig)
    optimizer: OptimizerConfig = OptimizerConfig()
    training: TrainingConfig = TrainingConfig()
    memory: MemoryConfig = field(default=MemoryConfig(), metadata={"optional": True})
    plan: Plan = Plan()

    @property
    def model_hash(self) -> str:
        """SHA-256 (hex) of the settings of model, head and memory, on which the meaning of the weights depends."""
        sections = {name: dataclasses.asdict(getattr(self, name)) for name in ("model", "head", "memory")}
        for item in dataclasses.fields(self.model):  # a setting that earlier versions lacked counts once it is used
            if item.metadata.get("optional") and sections["model"][item.name] == item.default:
                del sections["model"][item.name]
        if self.memory.memory == "none":
            del sections["memory"]
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
        """Total steps of the phases, or None if the last phase continues to the end of the run."""
        return self.training.phases[-1].last_step

    def tokens_until(self, step: int) -> int:
        """Number of tokens seen up to and including a step."""
        tokens, start = 0, 0
        for phase in self.training.phases:
            end = step if phase.last_step is None else min(step, phase.last_step)
            tokens += max(0, end - start) * phase.tokens
            start = max(start, end)
        return tokens

    @property
    def embedding_given(self) -> bool:
        """Whether the initial embedding comes from a checkpoint, not from the corpus or a random generator."""
        return self.training.embedding_init not in ("corpus", "random")


SECTIONS = ("model", "head", "optimizer", "training", "memory")  # sections of RunConfig that `--set` can change
