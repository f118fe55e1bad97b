"""Training in PyTorch on prepared shards; validation, by the rule of `flashlm-numba eval`, is outside the clock."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flashlm_numba.data.shards import TokenData, open_tokens, sample_batch
from flashlm_numba.kernels.ngram_copy import ngram_copies
from flashlm_numba.model.config import ModelConfig, Phase
from flashlm_numba.model.embedding_init import cached_start
from flashlm_numba.model.settings import parse_phase
from flashlm_numba.system.display import peak_rss_mb
from flashlm_numba.system.errors import UserError
from flashlm_numba.system.threads import available_cores
from tools.baseline.evaluate import score
from tools.baseline.heads import frequency_ranks
from tools.baseline.model import BaselineModel
from tools.baseline.optimizer import Optimizers, parameter_groups, schedule
from tools.baseline.step import training_step
from tools.baseline.transformer import Transformer, TransformerConfig
from tools.bench import machine

V3_PHASES = "1000:4x64x4,4000:4x128x4,7000:4x256x8,10000:4x512x8"


def _option(default: Any, help: str = "", **more: Any) -> Any:
    """A field of Settings, with help and other arguments for its click option."""
    return field(default=default, metadata={"help": help, **more})


@dataclass(frozen=True)
class Settings:
    """Settings of a training run; the defaults are FlashLM v3 as published. Each field is an option of `train`."""

    trunk: str = _option("v3", "v3's, with the later additions below, or a transformer.", choices=("v3", "transformer"))
    layers: int = _option(4, "Of the transformer.")
    width: int = _option(256, "Of the transformer.")
    heads: int = _option(4, "Attention heads of the transformer.")
    head: str = _option("dense", "dense, or torch's adaptive softmax.", choices=("dense", "adaptive"))
    div_value: float = _option(4.0, "Of the adaptive head; 4 is torch's default.")
    batch: str = _option(V3_PHASES, "[LAST_STEP:]ROWSxLENGTH[xMICRO],...; default: v3's phases.")
    steps: int | None = _option(None, "Steps to train; default: to the end of the last phase.", type=int)
    minutes: float | None = _option(None, "Stop after this much training time, the start of E aside.", type=float)
    start: str = _option("random", "Of E: random, corpus, or a .npy of (V, C).")
    start_std: float = _option(0.02, "Of a random start.")
    frozen_steps: int = _option(0, "E is held fixed for this many steps.")
    positions: float = _option(0.25, "Fraction of the positions whose loss is computed (adaptive: 1).")
    label_smoothing: float = _option(0.1)
    z_loss: float = _option(1e-4)
    soft_cap: float | None = _option(None, type=float)
    log_prior: bool = _option(False, "Add the log frequency of the tokens to the logits.")
    matrices: str = _option("normuon", "What steps the block's matrices.", choices=("normuon", "adamw"))
    normuon: str = _option("v3", choices=("v3", "published"))
    normuon_lr: float = _option(0.02)
    mixer_residual_scale: float = _option(1.0, "Factor of the mixer's output; v3 has none.")
    ffn_residual_scale: float = _option(1.0, "Factor of the GLU's output; v3 has none.")
    dilations: str = _option("1,4,64", "Of the mixer's convolutions.")
    leaky_decay: float = _option(0.0, "Of the leaky average; 0, as in v3: none.")
    ngram_copy_orders: str = _option("", "Orders of the n-gram copy, such as 1,2,3; v3 has none.")
    ngram_copy_reach: int = _option(1024, "Tokens that the n-gram copy looks back.")
    ternary_threshold: float = _option(1.0, "Times the mean magnitude of a matrix.")
    adamw_lr: float = _option(3e-4)
    nonembedding_lr_scale: float = _option(1.0, "Times AdamW's rate: of convolutions and norms.")
    adamw_beta1: float = _option(0.9)
    adamw_beta2: float = _option(0.95)
    weight_decay: float = _option(0.1)
    fused: bool = _option(False, "torch's fused AdamW.")
    clip: float = _option(1.0, "Largest gradient norm.")
    warmup: int = _option(200, "Steps.")
    decay: int = _option(1000, "Last steps, over which the rates fall to 0.")
    total: int | None = _option(None, "Steps that the decay is laid out for; default: as trained.", type=int)
    validate_every: float = _option(60.0, "Seconds of training between validations.")
    validate_tokens: int = _option(32_768, "First tokens used for that; the end uses all.")
    marks: tuple[float, ...] = _option((), "Minutes of training at which all validation text is scored.", name="mark")
    no_final: bool = _option(False, "Leave out the validation on all documents at the end.")
    seed: int = _option(42)
    threads: int = _option(available_cores())

    @property
    def adaptive(self) -> bool:
        """Whether the head is torch's adaptive softmax."""
        return self.head == "adaptive"

    @property
    def phases(self) -> list[Phase]:
        """The batch shapes in order."""
        return [parse_phase(part) for part in self.batch.split(",")]

    @property
    def last_step(self) -> int | None:
        """Last step of training; None: only the time limits it."""
        return self.steps if self.steps is not None else self.phases[-1].last_step

    def model(self, vocab_size: int) -> ModelConfig | TransformerConfig:
        """The shape of the model. Raises UserError for one that cannot be built.

        The longest sequences of training are the context of a transformer.
        """
        if self.trunk == "transformer":
            context = max(phase.seq_len for phase in self.phases)
            return TransformerConfig(vocab_size, self.layers, self.width, self.heads, context)
        return ModelConfig(
            vocab_size=vocab_size,
            dilations=_integers(self.dilations),
            mixer_residual_scale=self.mixer_residual_scale,
            ffn_residual_scale=self.ffn_residual_scale,
            leaky_decay=self.leaky_decay,
            ngram_copy_orders=_integers(self.ngram_copy_orders),
            ngram_copy_reach=self.ngram_copy_reach,
            ternary_threshold=self.ternary_threshold,
        )

    def check(self) -> None:
        """Raise UserError for settings that cannot be trained."""
        for phase in self.phases:
            if min(phase.batch_size, phase.seq_len, phase.grad_accum) < 1:
                raise UserError(f"The sizes of a batch must be at least 1, got '{self.batch}'.")
        if self.trunk == "transformer" and self.adaptive:
            raise UserError("The transformer has a dense head; leave out --head adaptive.")
        if self.last_step is None and self.minutes is None:
            raise UserError("Give --steps or --minutes: the last phase has no end.")
        self.model(1)


def _integers(text: str) -> tuple[int, ...]:
    """Integers separated by commas, with or without brackets. Raises UserError for another text."""
    try:
        return tuple(int(number) for number in text.strip("[]").split(",") if number)
    except ValueError:
        raise UserError(f"Integers are separated by commas, like 1,4,64, got '{text}'.") from None


def make_model(settings: Settings, tokens: TokenData, counts: np.ndarray) -> tuple[BaselineModel | Transformer, float]:
    """The model before its first step, and the seconds that its initial embedding took."""
    config = settings.model(len(counts))
    model: BaselineModel | Transformer
    if isinstance(config, TransformerConfig):
        model = Transformer(config)
    else:
        ranks = frequency_ranks(counts) if settings.adaptive else None
        model = BaselineModel(config, ranks=ranks, div_value=settings.div_value, embedding_std=settings.start_std)
    if settings.start == "random":
        return model, 0.0
    seconds = 0.0
    if settings.start == "corpus":
        rows, seconds = cached_start(tokens, model.embedding.embedding_dim)
    else:
        rows = np.load(settings.start)
    with torch.no_grad():
        model.embedding.weight.copy_(torch.from_numpy(rows))
    return model, seconds


def make_optimizers(settings: Settings, model: BaselineModel | Transformer) -> Optimizers:
    """The optimisers with these settings."""
    return Optimizers(
        model,
        matrices=settings.matrices,
        normuon=settings.normuon,
        normuon_lr=settings.normuon_lr,
        adamw_lr=settings.adamw_lr,
        nonembedding_lr_scale=settings.nonembedding_lr_scale,
        betas=(settings.adamw_beta1, settings.adamw_beta2),
        weight_decay=settings.weight_decay,
        clip=settings.clip,
        fused=settings.fused,
    )


def loss_options(settings: Settings, counts: np.ndarray) -> tuple[dict[str, Any], dict[str, Any]]:
    """Options of dense_loss in training and in scoring."""
    prior: Tensor | None = None
    if settings.log_prior and not settings.adaptive:
        prior = torch.from_numpy(np.log((counts + 1) / (counts + 1).sum()).astype(np.float32))
    scoring = {"log_prior": prior, "soft_cap": settings.soft_cap}
    if settings.adaptive:
        return {}, scoring
    return {"label_smoothing": settings.label_smoothing, "z_loss": settings.z_loss, **scoring}, scoring


def sample_step(tokens: TokenData, seed: int, step: int, phase: Phase) -> Sequence[tuple[Tensor, Tensor]]:
    """The micro-batches of a step, the same as in our training: ids and targets (B, T)."""
    pairs = [
        sample_batch(tokens.train, seed, step, micro, phase.batch_size, phase.seq_len)
        for micro in range(phase.grad_accum)
    ]
    return [(torch.from_numpy(ids).long(), torch.from_numpy(targets).long()) for ids, targets in pairs]


def train(data: Path, settings: Settings, emit: Callable[..., None]) -> dict[str, Any]:
    """Train on prepared tokens. Emits one row per validation and returns the last.

    Raises UserError for settings that cannot be trained, and if neither steps nor minutes limit it.
    """
    settings.check()
    torch.set_num_threads(settings.threads)
    torch.manual_seed(settings.seed)
    generator = torch.Generator().manual_seed(settings.seed)
    tokens, phases, end = open_tokens(data), settings.phases, settings.last_step
    limit = math.inf if settings.minutes is None else 60 * settings.minutes
    counts = tokens.train.counts(tokens.vocabulary.size)
    model, start_seconds = make_model(settings, tokens, counts)
    optimizers = make_optimizers(settings, model)
    options, scoring = loss_options(settings, counts)
    emit(**machine.environment(settings.threads))
    emit(
        data=str(data),
        head=f"adaptive-div{settings.div_value:g}" if settings.adaptive else settings.head,
        parameters=sum(p.numel() for p in model.parameters()),
        groups={name: len(members) for name, members in parameter_groups(model, settings.matrices).items()},
    )
    ngram_copies(np.zeros((1, 1), np.int32), 1, 1)  # compiled outside the clock
    seconds = start_seconds  # of training: the start of E out of the corpus, and steps
    seen, step, due, loss = 0, 0, seconds + settings.validate_every, math.nan
    left, clock = sorted(settings.marks), dict[str, float]()
    peak: float | None = None
    while True:
        done = (end is not None and step >= end) or seconds - start_seconds >= limit
        marked = bool(left) and seconds >= 60 * left[0] and not done
        if seconds >= due or done or marked:
            whole = marked or (done and not settings.no_final)
            if whole and peak is None:  # of training: scoring whole documents takes more
                peak = peak_rss_mb()
            most = None if whole else settings.validate_tokens
            found = score(model, tokens.validation, eot=tokens.vocabulary.eot, max_tokens=most, **scoring)
            result = {
                **({"mark": left.pop(0)} if marked else {}),
                "step": step,
                "tokens": seen,
                "seconds": seconds,
                "loss": None if math.isnan(loss) else loss,
                "validation": "all" if whole else f"first {found['tokens']} tokens",
                **{f"val_{name}": value for name, value in found.items()},
                "start_seconds": start_seconds,
                "tokens_per_s": seen / (seconds - start_seconds) if seen else None,
                "shares": {part: round(t / (seconds - start_seconds), 4) for part, t in clock.items()},
                "peak_rss_mb": peak_rss_mb() if peak is None else peak,
            }
            emit(**result)
            due = seconds + settings.validate_every
            if done:
                return result
        begin = time.perf_counter()
        phase = next((p for p in phases if p.last_step is None or step < p.last_step), phases[-1])
        model.embedding.weight.requires_grad_(step >= settings.frozen_steps)
        total = settings.total or phases[-1].last_step or settings.steps
        loss = training_step(
            model,
            optimizers,
            sample_step(tokens, settings.seed, step, phase),
            positions=1.0 if settings.adaptive else settings.positions,
            scale=schedule(step, warmup=settings.warmup, total=total, decay=settings.decay),
            generator=generator,
            clock=clock,
            **options,
        )
        seconds += time.perf_counter() - begin
        seen += phase.tokens
        step += 1
