"""Recipes: named sets of settings to start from.

>>> from_recipe("default", ["adamw_lr=1e-3"]).optimizer.adamw_lr
0.001
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from flashlm_numba.heads import head_class
from flashlm_numba.model.config import HeadConfig, OptimizerConfig, Phase, RunConfig, TrainingConfig
from flashlm_numba.model.settings import with_settings
from flashlm_numba.model.shapes import SHAPES
from flashlm_numba.system.errors import UserError

# settings that are not named here have the default of their field
RECIPES: dict[str, RunConfig] = {
    # the best settings known so far
    "default": RunConfig(
        recipe="default",
        model=SHAPES["default"],
        optimizer=OptimizerConfig(
            normuon_iterations=3,
            nonembedding_lr_scale=4.0,
            adamw_beta1=0.0,
            adamw_beta2=0.99,
            sparse_adamw=True,
            rowwise_exp_avg_sq=True,
            early_warmdown=True,
        ),
        training=TrainingConfig(
            phases=(Phase(batch_size=8, seq_len=256),), hidden_dropout=0.12, embedding_dropout=0.24
        ),
    ),
    # FlashLM v3 as published; without --embeddings the initial embedding is this project's and is not frozen
    "v3": RunConfig(
        recipe="v3",
        model=SHAPES["v3"],
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
    # the MatMul-free LM (Zhu et al. 2024, arXiv:2406.02528) with its schedule and AdamW for everything. The authors
    # publish no training code; what they do not say is this project's choice.
    "mmf": RunConfig(
        recipe="mmf",
        model=SHAPES["mmf"],
        head=HeadConfig(name="bitlinear"),
        optimizer=OptimizerConfig(
            matrices="adamw",
            adamw_lr=4e-3,
            weight_decay=0.1,
            schedule="halved-cosine",
        ),
        training=TrainingConfig(phases=(Phase(batch_size=8, seq_len=256),), embedding_init="random"),
    ),
}


def names_head(settings: Iterable[str], head: str) -> bool:
    """Whether `key=value` texts choose this head, by a name or by a setting that only this head has."""
    keys = {text.partition("=")[0].strip().removeprefix("head.") for text in settings}
    return "name" in keys or bool(keys & set(head_class(head).own_settings))


def from_recipe(name: str, settings: Iterable[str] = (), shape: str | None = None, *, idle: bool = False) -> RunConfig:
    """The settings of a recipe in RECIPES, with another shape in SHAPES, changed by `key=value` texts, in this order.

    idle : as in with_settings
    Raises UserError for an unknown recipe, shape or setting.
    """
    if name not in RECIPES:
        raise UserError(f"There is no recipe '{name}'; the recipes are {', '.join(RECIPES)}.")
    if shape is not None and shape not in SHAPES:
        raise UserError(f"There is no model '{shape}'; the models are {', '.join(SHAPES)}.")
    run = RECIPES[name]
    if shape is not None and run.model.linear == "bitlinear" != SHAPES[shape].linear:
        fitting = ", ".join(other for other, model in SHAPES.items() if model.linear == "bitlinear")
        raise UserError(f"The model '{shape}' is no MatMul-free LM, which {name} trains; these are {fitting}.")
    return with_settings(run if shape is None else replace(run, model=SHAPES[shape]), settings, idle=idle)
