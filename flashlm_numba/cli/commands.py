"""The commands: parse, call, print.

Only click is imported here: the numerical packages take a second to load, and `--help` must not.
"""

from __future__ import annotations

import json
import math
import secrets
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from flashlm_numba.cli import options
from flashlm_numba.cli.options import HeadName, Number, PathOrSource, use_threads
from flashlm_numba.heads import HEADS, head_class
from flashlm_numba.model.config import RunConfig
from flashlm_numba.model.recipes import RECIPES, from_recipe
from flashlm_numba.system.display import peak_rss_mb, plural

if TYPE_CHECKING:
    from flashlm_numba.model.model import Model


@click.command()
@click.argument("source", required=False, type=PathOrSource())
@click.option("--out", type=PathOrSource(path_type=Path), help="Folder for the tokens. Needed if there is a SOURCE.")
@click.option(
    "--validation",
    type=PathOrSource(),
    metavar="SOURCE",
    help="Where the validation documents are. Default: files whose first word is validation, or else 5 % of all.",
)
@options.subset
@click.option(
    "--split",
    type=click.Choice(["auto", "train", "validation"]),
    default="auto",
    show_default=True,
    help="Put all documents into one split, or share them out.",
)
@click.option("--max-tokens", type=click.IntRange(min=1), help="Stop after this many tokens. Default: all.")
@click.option("--max-docs", type=click.IntRange(min=1), help="Stop after this many documents. Default: all.")
@options.lines
@options.column
@click.option("--workers", type=click.IntRange(min=1), help="Threads that tokenise. Default: all cores.")
def prepare(
    source: str | None,
    out: Path | None,
    validation: str | None,
    subset: str | None,
    split: Literal["auto", "train", "validation"],
    max_tokens: int | None,
    max_docs: int | None,
    lines: bool,
    column: str,
    workers: int | None,
) -> None:
    """Turn documents into GPT-2 tokens for training, in the folder --out.

    SOURCE is a .parquet, .jsonl (.gz, .zst) or .txt file, a folder or a quoted glob of them, or the name of a
    Hugging Face dataset. Without SOURCE: the built-in text, which `train` uses by default. A run that was
    stopped goes on when the same command is given again.
    """
    from flashlm_numba.data.builtin import default_corpus
    from flashlm_numba.data.prepare import prepare as prepare_tokens
    from flashlm_numba.data.shards import open_tokens

    if out is None:
        if (source, validation, subset, max_tokens, max_docs) != (None,) * 5 or lines or split != "auto":
            raise click.UsageError("Give --out DIR, the folder for the tokens.")
        out = default_corpus()
        manifest = open_tokens(out).manifest
    else:
        manifest = prepare_tokens(
            source,
            out,
            validation=validation,
            subset=subset,
            split=split,
            max_tokens=max_tokens,
            max_docs=max_docs,
            lines=lines,
            column=column,
            workers=workers,
        )
    for name, part in manifest.splits.items():
        click.echo(
            f"{name:<12} {plural(part.documents, 'document'):>21} {part.text_tokens:>14,} tokens "
            f"{part.text_bytes:>14,} bytes"
        )
    click.echo(f"in {out}")


@click.command()
@click.argument("data", required=False, type=PathOrSource())
@click.option(
    "--head",
    type=HeadName(HEADS),
    help="Output layer: a softmax over all tokens (dense), over the nodes of a tree (much faster), or, in training "
    "only, over some drawn tokens (sampled: its training loss reads low, since the other tokens are only estimated). "
    "Default: the recipe's, tree for default, dense for v3.",
)
@click.option(
    "--tree",
    metavar="SHAPE",
    help="Shape of the tree: huffman, two-level, adaptive, ... Implies --head tree.",
)
@click.option(
    "--recipe",
    type=click.Choice(list(RECIPES)),
    default=None,
    help="Settings to start from: default is the best known now, v3 is FlashLM v3 as published. Default: default.",
)
@click.option("--steps", type=click.IntRange(min=1), help="Train for this many optimiser steps.")
@click.option("--tokens", type=click.IntRange(min=1), help="Train on at least this many tokens.")
@click.option(
    "--minutes",
    type=Number(min=0, min_open=True, max=1_000_000),
    help="Train for about this long, on the training clock: the speed is measured first, and the plan fixed in steps. "
    "Default when no length is given: 20 minutes; recipe v3: its 10,000 steps.",
)
@click.option(
    "--out",
    type=PathOrSource(path_type=Path),
    help="Folder of the run, new. Default: runs/<head>-<date>-<time>.",
)
@click.option(
    "--resume", type=PathOrSource(path_type=Path), help="Go on with this run, with its own data and settings."
)
@options.checkpoint
@click.option(
    "--seed",
    type=click.IntRange(0, 2**63 - 1),
    help="Of the weights, the batches and the positions. Default: 42.",
)
@options.threads
@click.option(
    "--embeddings",
    metavar="PATH",
    help="Start the embedding from a GPT-2 checkpoint: a .safetensors file, or hf:openai-community/gpt2. "
    "Default: computed from the training text.",
)
@click.option(
    "--set",
    "settings",
    metavar="KEY=VALUE",
    multiple=True,
    help="Change one setting of the recipe, such as --set adamw_lr=1e-3; may be repeated. docs/training.md lists them, "
    "and the few that --resume may change too.",
)
def train(
    data: str | None,
    head: str | None,
    tree: str | None,
    recipe: str | None,
    steps: int | None,
    tokens: int | None,
    minutes: float | None,
    out: Path | None,
    resume: Path | None,
    checkpoint: str | None,
    seed: int | None,
    threads: int | None,
    embeddings: str | None,
    settings: tuple[str, ...],
) -> None:
    """Train a model on DATA, a folder that `prepare` made.

    Without DATA, on the built-in text (two centuries of US presidential messages), prepared on first use.
    Ctrl-C finishes the step and saves; --resume goes on as if never stopped.
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
                "--out": out,
                "--seed": seed,
                "--embeddings": embeddings,
            }
        )
        from flashlm_numba.training.plan import Length
        from flashlm_numba.training.run import resume_run

        if threads is not None:
            use_threads(threads)  # a usage error, if it is one
        length = Length(steps, tokens, minutes)
        done = resume_run(resume, length, checkpoint_name=checkpoint, settings=settings, threads=threads)
        raise SystemExit(done.status)
    if checkpoint is not None:
        raise click.UsageError("--checkpoint says where --resume goes on; give --resume RUN too.")
    run = _run_settings(head, tree, recipe, embeddings, settings)
    if seed is not None:
        run = replace(run, seed=seed)
    from flashlm_numba.training.plan import Length
    from flashlm_numba.training.run import start_run

    length = Length(steps, tokens, minutes)
    done = start_run(run, length, data=data, out=out, threads=use_threads(threads))
    raise SystemExit(done.status)


def _check_resume(fixed: dict[str, Any]) -> None:
    """Raise UsageError for options that only a new run takes, by name."""
    given = [name for name, value in fixed.items() if value is not None]
    if given:
        raise click.UsageError(f"--resume goes on with the run's own settings; leave out {', '.join(given)}.")


def _run_settings(
    head: str | None, tree: str | None, recipe: str | None, embeddings: str | None, settings: tuple[str, ...]
) -> RunConfig:
    """The settings of a new run: the recipe's, what the options change, and --set."""
    if tree is not None and head not in (None, "tree"):
        raise click.UsageError("--tree shapes the tree head; leave it out, or give --head tree.")
    changes = [f"head.name={head or ('tree' if tree else None)}"] if head or tree else []
    changes += [f"head.tree={tree}"] if tree else []
    changes += [f"training.embedding_init={embeddings}"] if embeddings else []
    run = from_recipe(recipe or "default", [*changes, *settings])
    _check_settings(run.head.name, settings, {"name": head or tree, "tree": tree, "embedding_init": embeddings})
    return run


def _check_settings(head: str, settings: tuple[str, ...], given: dict[str, str | None]) -> None:
    """Raise UsageError for a setting that an option has set already, or that would change nothing with this head."""
    names = {setting.partition("=")[0].strip().split(".")[-1] for setting in settings}
    twice = sorted(name for name in names if given.get(name) is not None)
    if twice:
        raise click.UsageError(f"--set {twice[0]} says again what an option says; give only one of the two.")
    for owner in HEADS:
        if idle := sorted(names & set(head_class(owner).own_settings) - set(head_class(head).own_settings)):
            raise click.UsageError(
                f"With the {head} head {', '.join(idle)} would change nothing; leave it out, or give --head {owner}."
            )


@click.command("eval")
@options.run
@click.argument("data", required=False, type=PathOrSource())
@click.option("--smoothed", is_flag=True, help="Also the loss with label smoothing 0.1 over all tokens (slow).")
@options.subset
@options.lines
@options.column
@options.activations
@options.ema
@options.checkpoint
@options.threads
@options.json
def evaluate(
    run: Path,
    data: str | None,
    smoothed: bool,
    subset: str | None,
    lines: bool,
    column: str,
    activations: str | None,
    ema: bool,
    checkpoint: str | None,
    threads: int | None,
    as_json: bool,
) -> None:
    """Score the text DATA with the model in RUN: NLL, perplexity, bits per byte.

    DATA is a prepared folder (its validation documents are scored) or any source that `prepare` takes (all
    its documents are, or those for validation where file names set some apart). Without DATA: the validation documents
    of the run's own data. RUN may also be a file that `export` wrote.
    """
    from flashlm_numba.inference.evaluate import evaluate_run

    use_threads(threads)
    result = evaluate_run(
        run,
        data,
        smoothed=smoothed,
        ema=ema,
        checkpoint_name=checkpoint,
        activations=activations,
        subset=subset,
        column=column,
        lines=lines,
    )
    if as_json:
        click.echo(json.dumps(result, allow_nan=False))
        return
    click.echo(f"NLL            {result['nll']:.4f} nats per token")
    click.echo(f"perplexity     {math.inf if result['perplexity'] is None else result['perplexity']:.2f}")
    click.echo(f"bits per byte  {result['bits_per_byte']:.4f}")
    if result["smoothed_loss"] is not None:
        click.echo(f"smoothed loss  {result['smoothed_loss']:.4f} nats per token (label smoothing 0.1)")
    click.echo(
        f"scored         {result['tokens']:,} tokens, {result['bytes']:,} bytes, "
        f"{plural(result['documents'], 'document')} of {result['data']}"
    )
    click.echo("causal         yes: another token changes no hidden state before it, bit for bit")


@click.command()
@options.run
@click.option("--prompt", default="", help="Text to continue. Default: none, a new document.")
@click.option(
    "--max-tokens",
    type=click.IntRange(min=1),
    default=200,
    show_default=True,
    help="Tokens to write at most.",
)
@click.option(
    "--temperature",
    type=Number(min=0),
    default=0.8,
    show_default=True,
    help="Below 1 safer and more repetitive, above 1 wilder; 0 always takes the likeliest token.",
)
@click.option("--top-k", type=click.IntRange(min=1), help="Sample among the K likeliest tokens. Default: all.")
@click.option(
    "--top-p",
    type=Number(0, 1, min_open=True),
    help="Sample among the likeliest tokens that make up this probability. Default: all.",
)
@click.option("--seed", type=click.IntRange(0, 2**63 - 1), help="Same seed, same text. Default: drawn anew each time.")
@click.option(
    "--int8-head",
    is_flag=True,
    help="Read the dense head's rows as int8, the likeliest tokens in float32 all the same: faster.",
)
@click.option("--stats", is_flag=True, help="Say afterwards how fast it was, and the memory it took.")
@options.activations
@options.ema
@options.checkpoint
@options.threads
def generate(
    run: Path,
    prompt: str,
    max_tokens: int,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    seed: int | None,
    int8_head: bool,
    stats: bool,
    activations: str | None,
    ema: bool,
    checkpoint: str | None,
    threads: int | None,
) -> None:
    """Let the model in RUN continue a text, printed as it is written. RUN may also be a file that `export` wrote.

    The options act in the order temperature, top-k, top-p.
    """
    from flashlm_numba.inference.generate import generate_text
    from flashlm_numba.model.build import load_model, vocabulary_of

    use_threads(threads)
    loaded = load_model(run, checkpoint, ema=ema)
    model = loaded.model
    if activations is not None:
        model.use_activations(activations)
    if int8_head:
        if top_p is not None and top_k is None:
            raise click.UsageError("--int8-head with --top-p needs --top-k too: the rest is drawn from all tokens.")
        _use_int8_head(model, run)
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # a terminal that cannot show a character gets a question mark
    vocabulary = vocabulary_of(loaded.run)
    vocabulary.load()  # a damaged one is told of before the prompt is shown
    click.echo(prompt, nl=False)
    drawn: list[float] = []  # when each token was
    pieces = generate_text(
        model,
        vocabulary,
        prompt,
        max_tokens=max_tokens,
        seed=secrets.randbits(32) if seed is None else seed,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        on_token=lambda: drawn.append(time.perf_counter()),
    )
    for piece in pieces:
        click.echo(piece, nl=False)
        sys.stdout.flush()
    click.echo()
    if stats:
        click.echo(_stats(drawn), err=True)


def _use_int8_head(model: Model, run: Path) -> None:
    """Read the dense head's rows as int8; another head is a usage error."""
    if not model.head.has_int8:
        raise click.UsageError(f"--int8-head is for the dense head, but {run} has the {model.head.name} head.")
    model.head.use_int8()


def _stats(drawn: list[float]) -> str:
    """How fast tokens were drawn, from the seconds at which each one was, and the memory it took."""
    rate = f"{(len(drawn) - 1) / (drawn[-1] - drawn[0]):,.0f} tokens/s" if len(drawn) > 1 else "no rate"
    peak = peak_rss_mb()
    memory = "unknown on this system" if peak is None else f"{peak:,.0f} MB"
    return f"{len(drawn):,} tokens, {rate} after the first; peak memory {memory}"


@click.command()
@options.run
@click.argument("file", type=PathOrSource(path_type=Path))
@options.ema
@options.checkpoint
def export(run: Path, file: Path, ema: bool, checkpoint: str | None) -> None:
    """Write the model in RUN to one FILE (.safetensors), to keep or to pass on.

    The ternary weights are packed, 1.6 bits each; all others are kept in full, so the model computes what it computed.
    """
    from flashlm_numba.model.export import export_run

    size = export_run(run, file, checkpoint, ema=ema).stat().st_size
    click.echo(f"{file}: {size / 1e6:,.1f} MB")


@click.command()
@options.run
@options.checkpoint
@options.json
def info(run: Path, checkpoint: str | None, as_json: bool) -> None:
    """Show what is in RUN: parameters, sizes, the tree's shape, how far it was trained.

    RUN may also be a file that `export` wrote.
    """
    from flashlm_numba.model.describe import describe_run

    description = describe_run(run, checkpoint)
    if as_json:
        click.echo(json.dumps(description, allow_nan=False))
        return
    for key, value in description.items():
        if isinstance(value, dict):
            click.echo(f"{key}:")
            for name, item in value.items():
                click.echo(f"  {name:<28} {_show(item)}")
        else:
            click.echo(f"{key:<30} {_show(value)}")


@click.command()
@options.threads
@options.json
def doctor(threads: int | None, as_json: bool) -> None:
    """Look at this machine: processor, threads, BLAS, memory, cache, versions; check the kernels; say what is wrong.

    Takes some seconds (one to two minutes more the first time, which compiles the kernels). Ends with status 1
    if a kernel computes wrongly here.
    """
    from flashlm_numba.cli.doctor import examine, report

    found = examine(use_threads(threads))
    click.echo(json.dumps(found, allow_nan=False) if as_json else report(found))
    raise SystemExit(1 if found["problems"] else 0)


def _show(value: Any) -> str:
    """A value of `info` in a line."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, dict):
        return ", ".join(
            f"{_show(item)} {name.removesuffix('s') if item == 1 else name}" for name, item in value.items()
        )
    if isinstance(value, list):
        return "; ".join(_show(item) for item in value)
    return "none" if value in (None, "") else str(value)


ALL = (prepare, train, evaluate, generate, export, info, doctor)
