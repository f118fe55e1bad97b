"""Recipes: named sets of settings to start from.

>>> from_recipe("default", ["adamw_lr=1e-3"]).optimizer.adamw_lr
0.001
"""

from __future__ import annotations

from collections.abc import Iterable

from flashlm_numba.heads import head_class
from flashlm_numba.model.config import HeadConfig, ModelConfig, OptimizerConfig, Phase, RunConfig, TrainingConfig
from flashlm_numba.model.settings import with_settings
from flashlm_numba.system.errors import UserError

# settings that are not named here have the default of their field
RECIPES: dict[str, RunConfig] = {
    # the best settings known so far
    "default": RunConfig(
        recipe="default",
        # a factor of about fan_in**-0.5 for each ternary matrix in the branch
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
    # FlashLM v3 as published; without --embeddings the initial embedding is this project's and is not frozen
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


def names_head(settings: Iterable[str], head: str) -> bool:
    """Whether `key=value` texts choose this head, by a name or by a setting that only this head has."""
    keys = {text.partition("=")[0].strip().removeprefix("head.") for text in settings}
    return "name" in keys or bool(keys & set(head_class(head).own_settings))


def from_recipe(name: str, settings: Iterable[str] = ()) -> RunConfig:
    """The settings of a recipe in RECIPES, changed by `key=value` texts. Raises UserError for an unknown recipe."""
    if name not in RECIPES:
        raise UserError(f"There is no recipe '{name}'; the recipes are {', '.join(RECIPES)}.")
    return with_settings(RECIPES[name], settings)
