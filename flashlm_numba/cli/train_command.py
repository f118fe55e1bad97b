"""The command `train`: its options, and the settings of a run that they make."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from flashlm_numba.cli import options
from flashlm_numba.cli.options import HeadName, Number, PathOrSource, use_threads
from flashlm_numba.heads import HEADS
from flashlm_numba.memory.config import MEMORIES
from flashlm_numba.model.config import RunConfig
from flashlm_numba.model.recipes import RECIPES, from_recipe, names_head
from flashlm_numba.model.shapes import SHAPES


@click.command()
@click.argument("data", required=False, type=PathOrSource())
@click.option(
    "--head",
    type=HeadName(HEADS),
    help="Output layer. dense: a softmax over all tokens. tree: a hierarchical softmax, much faster. sampled: a "
    "softmax over sampled tokens, in training only; its training loss reads low, because it estimates the other "
    "tokens. bitlinear: a softmax over all tokens by ternary weights of its own, as in the MatMul-free LM. Default: "
    "tree for recipe default, bitlinear for mmf, dense for v3 and for vocabularies below 2,048 tokens.",
)
@click.option(
    "--tree",
    metavar="SHAPE",
    help="Shape of the tree: huffman, two-level, adaptive, and others. Implies --head tree.",
)
@click.option(
    "--recipe",
    type=click.Choice(list(RECIPES)),
    default=None,
    help="Settings to start from. default: the best settings known so far. v3: FlashLM v3 as published. "
    "mmf: the MatMul-free LM. Default: default.",
)
@click.option(
    "--model",
    "shape",
    type=click.Choice(list(SHAPES)),
    help="Shape of the model. v3: FlashLM v3's. default: with what the recipe default adds. nano, micro, mini: for "
    "vocabularies of 1,024, 4,096 and 8,192 tokens, in 224 KB, 960 KB and 4 MB. mmf: the MatMul-free LM's, "
    "paper-*: the published ones. Default: the recipe's. --set changes single numbers of it.",
)
@click.option(
    "--init",
    type=PathOrSource(path_type=Path),
    metavar="RUN|EXPORT",
    help="Start from the trained weights of a run, of one of its checkpoints, of a file or folder written by `export`, "
    "or of hf:USER/NAME on the Hugging Face hub, with their model and head. The schedule and the optimiser's state are "
    "new. DATA needs the same vocabulary.",
)
@click.option(
    "--memory",
    type=click.Choice(MEMORIES),
    help="ngrams: count the n-grams of the training text and train the model beside them; its probabilities are then "
    "those of both, mixed. Default: none.",
)
@click.option("--steps", type=click.IntRange(min=1), help="Train for this many optimiser steps.")
@click.option("--tokens", type=click.IntRange(min=1), help="Train on at least this many tokens.")
@click.option(
    "--minutes",
    type=Number(min=0, min_open=True, max=1_000_000),
    help="Train for about this many minutes of training time. The command first measures the speed and converts the "
    "minutes to a fixed number of steps. Default without --steps or --tokens: 20 minutes; recipe v3: 10,000 steps.",
)
@click.option(
    "--out",
    type=PathOrSource(path_type=Path),
    help="New folder for the run. Default: runs/<head>-<date>-<time>.",
)
@click.option(
    "--resume", type=PathOrSource(path_type=Path), help="Resume this run with the data and settings it started with."
)
@options.own_data
@options.checkpoint
@click.option(
    "--seed",
    type=click.IntRange(0, 2**63 - 1),
    help="Seed of the initial weights, the batches and the sampled positions. Default: 42.",
)
@options.threads
@click.option(
    "--tensorboard",
    type=PathOrSource(path_type=Path),
    metavar="DIR",
    help="Also write the values of every step to DIR, for `tensorboard --logdir DIR`. Needs the package of "
    "`pip install 'flashlm-numba[tensorboard]'`.",
)
@click.option(
    "--embeddings",
    metavar="PATH",
    help="Initialise the embedding from a GPT-2 checkpoint: a .safetensors file, or hf:openai-community/gpt2. "
    "Default: compute the initial embedding from the training text.",
)
@click.option(
    "--set",
    "settings",
    metavar="KEY=VALUE",
    multiple=True,
    help="Change one setting of the recipe or the model, such as --set adamw_lr=1e-3; may be repeated. "
    "docs/training.md lists all settings, and the few that can change with --resume.",
)
def train(
    data: str | None,
    head: str | None,
    tree: str | None,
    recipe: str | None,
    shape: str | None,
    init: Path | None,
    memory: str | None,
    steps: int | None,
    tokens: int | None,
    minutes: float | None,
    out: Path | None,
    resume: Path | None,
    own_data: Path | None,
    checkpoint: str | None,
    seed: int | None,
    threads: int | None,
    tensorboard: Path | None,
    embeddings: str | None,
    settings: tuple[str, ...],
) -> None:
    """Train a model on DATA, a folder written by `prepare`.

    Without DATA, the command trains on the built-in text (two centuries of US presidential messages) and prepares it
    on first use. Ctrl-C finishes the step and saves a checkpoint; --resume continues bit for bit.
    """
    if sum(length is not None for length in (steps, tokens, minutes)) > 1:
        raise click.UsageError("Give only one of --steps, --tokens and --minutes.")
    if resume is not None:
        _check_resume(
            {
                "DATA": data,
                "--head": head,
                "--tree": tree,
                "--recipe": recipe,
                "--model": shape,
                "--init": init,
                "--memory": memory,
                "--out": out,
                "--seed": seed,
                "--embeddings": embeddings,
            }
        )
        from flashlm_numba.training.plan import Length
        from flashlm_numba.training.run import resume_run

        if threads is not None:
            use_threads(threads)  # reports a wrong number as a usage error
        length = Length(steps, tokens, minutes)
        done = resume_run(
            resume,
            length,
            checkpoint_name=checkpoint,
            settings=settings,
            threads=threads,
            data=own_data,
            tensorboard=tensorboard,
        )
        raise SystemExit(done.status)
    if own_data is not None:
        raise click.UsageError("--data is for --resume RUN; name the data of a new run without it.")
    if checkpoint is not None:
        raise click.UsageError("--checkpoint selects where --resume continues; give --resume RUN too.")
    if memory is not None:
        if any(setting.partition("=")[0].strip() in ("memory", "memory.memory") for setting in settings):
            raise click.UsageError("--set memory repeats an option; give only one of the two.")
        settings = (f"memory.memory={memory}", *settings)
    run, any_head = _run_settings(head, tree, recipe, shape, init, embeddings, settings)
    if seed is not None:
        run = replace(run, seed=seed)
    from flashlm_numba.training.plan import Length
    from flashlm_numba.training.run import start_run

    length = Length(steps, tokens, minutes)
    done = start_run(
        run,
        length,
        data=data,
        out=out,
        threads=use_threads(threads),
        any_head=any_head,
        tensorboard=tensorboard,
    )
    raise SystemExit(done.status)


def _check_resume(fixed: dict[str, Any]) -> None:
    """Raise UsageError naming the options that only a new run takes."""
    given = [name for name, value in fixed.items() if value is not None]
    if given:
        raise click.UsageError(f"--resume uses the settings of the run; leave out {', '.join(given)}.")


def _run_settings(
    head: str | None,
    tree: str | None,
    recipe: str | None,
    shape: str | None,
    init: Path | None,
    embeddings: str | None,
    settings: tuple[str, ...],
) -> tuple[RunConfig, bool]:
    """Settings of a new run: the recipe's, with a shape or trained weights; then the options', then those of --set.

    Also whether none of these chooses a head.
    """
    if tree is not None and head not in (None, "tree"):
        raise click.UsageError("--tree applies only to the tree head; leave it out, or give --head tree.")
    if init is not None:
        fixed = {"--head": head, "--tree": tree, "--model": shape, "--embeddings": embeddings}
        if given := [name for name, value in fixed.items() if value is not None]:
            raise click.UsageError(
                f"--init takes model and head from the trained weights; leave out {', '.join(given)}."
            )
        from flashlm_numba.model.trained import settings_from

        run = settings_from(from_recipe(recipe or "default"), settings, init)
        return run, False
    changes = [f"head.name={head or ('tree' if tree else None)}"] if head or tree else []
    changes += [f"head.tree={tree}"] if tree else []
    changes += [f"training.embedding_init={embeddings}"] if embeddings else []
    run = from_recipe(recipe or "default", [*changes, *settings], shape)
    _check_repeated(settings, {"name": head or tree, "tree": tree, "embedding_init": embeddings})
    return run, not names_head([*changes, *settings], run.head.name)


def _check_repeated(settings: tuple[str, ...], given: dict[str, str | None]) -> None:
    """Raise UsageError for a setting that an option sets too."""
    names = {setting.partition("=")[0].strip().split(".")[-1] for setting in settings}
    twice = sorted(name for name in names if given.get(name) is not None)
    if twice:
        raise click.UsageError(f"--set {twice[0]} repeats an option; give only one of the two.")
