"""The commands: each one parses its arguments, calls the library and prints the result.

This module imports only click at the top. The numerical packages take a second to load, and `--help` must not wait.
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
from flashlm_numba.cli.options import HeadName, Number, PathOrSource, Text, echo, use_threads
from flashlm_numba.heads import HEADS, head_class
from flashlm_numba.model.config import ROWS, RunConfig
from flashlm_numba.model.recipes import RECIPES, from_recipe, names_head
from flashlm_numba.model.shapes import SHAPES
from flashlm_numba.system.display import peak_rss_mb, plural

if TYPE_CHECKING:
    from flashlm_numba.model.model import Model


@click.command()
@click.argument("source", required=False, type=PathOrSource())
@click.option("--out", type=PathOrSource(path_type=Path), help="Folder for the tokens. Required with a SOURCE.")
@click.option(
    "--validation",
    type=PathOrSource(),
    metavar="SOURCE",
    help="Source of the validation documents. Default: files whose name starts with the word validation; if there "
    "are none, 5 % of all documents.",
)
@options.subset
@click.option(
    "--split",
    type=click.Choice(["auto", "train", "validation"]),
    default="auto",
    show_default=True,
    help="Put all documents into one split; auto divides them between the two.",
)
@click.option("--max-tokens", type=click.IntRange(min=1), help="Stop after this many tokens. Default: no limit.")
@click.option("--max-docs", type=click.IntRange(min=1), help="Stop after this many documents. Default: no limit.")
@options.lines
@options.column
@options.skip_missing
@click.option("--workers", type=click.IntRange(min=1), help="Number of tokeniser threads. Default: all cores.")
@click.option(
    "--vocab",
    type=PathOrSource(),
    metavar="gpt2|bytes|N|FILE",
    default="gpt2",
    show_default=True,
    help="Vocabulary. gpt2: GPT-2's 50,257 tokens. bytes: the 256 bytes. N: train a byte-level BPE of N tokens, 257 to "
    "65,536, on the training documents. FILE: a byte-level tokenizer.json in Hugging Face's format.",
)
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
    skip_missing: bool,
    workers: int | None,
    vocab: str,
) -> None:
    """Tokenise documents and write the tokens and their vocabulary to the folder --out.

    SOURCE is a .parquet, .jsonl (.gz, .zst) or .txt file, a folder or a quoted glob of such files, or the name of a
    Hugging Face dataset. Without SOURCE, the command prepares the built-in text, which `train` uses by default.
    To continue after an interruption, give the same command again.
    """
    from flashlm_numba.data.builtin import default_corpus
    from flashlm_numba.data.prepare import prepare as prepare_tokens
    from flashlm_numba.data.shards import open_tokens
    from flashlm_numba.data.vocabularies import DEFAULT_VOCABULARY

    if out is None:
        given = (source, validation, subset, max_tokens, max_docs) != (None,) * 5
        if given or lines or split != "auto" or vocab != DEFAULT_VOCABULARY:
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
            skip_missing=skip_missing,
            workers=workers,
            vocab=vocab,
        )
    for name, part in manifest.splits.items():
        click.echo(
            f"{name:<12} {plural(part.documents, 'document'):>21} {part.text_tokens:>14,} tokens "
            f"{part.text_bytes:>14,} bytes"
        )
    echo(f"{manifest.vocab_size:,} tokens in the vocabulary {manifest.tokenizer}")
    echo(f"in {out}")


@click.command()
@click.argument("data", required=False, type=PathOrSource())
@click.option(
    "--head",
    type=HeadName(HEADS),
    help="Output layer. dense: a softmax over all tokens. tree: a hierarchical softmax, much faster. sampled: a "
    "softmax over sampled tokens, in training only; its training loss reads low, because it estimates the other "
    "tokens. Default: tree for recipe default, dense for recipe v3 and for vocabularies below 2,048 tokens.",
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
    "Default: default.",
)
@click.option(
    "--model",
    "shape",
    type=click.Choice(list(SHAPES)),
    help="Shape of the model. v3: FlashLM v3's. default: with what the recipe default adds. nano, micro, mini: for "
    "vocabularies of 1,024, 4,096 and 8,192 tokens, in 224 KB, 960 KB and 4 MB. Default: the recipe's. --set "
    "changes single numbers of it.",
)
@click.option(
    "--init",
    type=PathOrSource(path_type=Path),
    metavar="RUN|EXPORT",
    help="Start from the trained weights of a run, of one of its checkpoints, or of a file written by `export`, with "
    "their model and head. The schedule and the optimiser's state are new. DATA needs the same vocabulary.",
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
    steps: int | None,
    tokens: int | None,
    minutes: float | None,
    out: Path | None,
    resume: Path | None,
    own_data: Path | None,
    checkpoint: str | None,
    seed: int | None,
    threads: int | None,
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
        done = resume_run(resume, length, checkpoint_name=checkpoint, settings=settings, threads=threads, data=own_data)
        raise SystemExit(done.status)
    if own_data is not None:
        raise click.UsageError("--data is for --resume RUN; name the data of a new run without it.")
    if checkpoint is not None:
        raise click.UsageError("--checkpoint selects where --resume continues; give --resume RUN too.")
    run, any_head = _run_settings(head, tree, recipe, shape, init, embeddings, settings)
    if seed is not None:
        run = replace(run, seed=seed)
    from flashlm_numba.training.plan import Length
    from flashlm_numba.training.run import start_run

    length = Length(steps, tokens, minutes)
    done = start_run(run, length, data=data, out=out, threads=use_threads(threads), any_head=any_head)
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
        _check_settings(run.head.name, settings, {})
        return run, False
    changes = [f"head.name={head or ('tree' if tree else None)}"] if head or tree else []
    changes += [f"head.tree={tree}"] if tree else []
    changes += [f"training.embedding_init={embeddings}"] if embeddings else []
    run = from_recipe(recipe or "default", [*changes, *settings], shape)
    _check_settings(run.head.name, settings, {"name": head or tree, "tree": tree, "embedding_init": embeddings})
    return run, not names_head([*changes, *settings], run.head.name)


def _check_settings(head: str, settings: tuple[str, ...], given: dict[str, str | None]) -> None:
    """Raise UsageError for a setting that an option sets too, or that has no effect with this head."""
    names = {setting.partition("=")[0].strip().split(".")[-1] for setting in settings}
    twice = sorted(name for name in names if given.get(name) is not None)
    if twice:
        raise click.UsageError(f"--set {twice[0]} repeats an option; give only one of the two.")
    for owner in HEADS:
        if idle := sorted(names & set(head_class(owner).own_settings) - set(head_class(head).own_settings)):
            raise click.UsageError(
                f"With the {head} head, {', '.join(idle)} has no effect; leave it out, or give --head {owner}."
            )


@click.command("eval")
@options.run
@click.argument("data", required=False, type=PathOrSource())
@options.own_data
@click.option("--smoothed", is_flag=True, help="Also report the loss with label smoothing 0.1 (slow).")
@options.subset
@options.lines
@options.column
@options.skip_missing
@options.activations
@options.ema
@options.checkpoint
@options.threads
@options.json
def evaluate(
    run: Path,
    data: str | None,
    own_data: Path | None,
    smoothed: bool,
    subset: str | None,
    lines: bool,
    column: str,
    skip_missing: bool,
    activations: str | None,
    ema: bool,
    checkpoint: str | None,
    threads: int | None,
    as_json: bool,
) -> None:
    """Score the text DATA with the model in RUN: NLL, perplexity and bits per byte.

    DATA is a prepared folder or any source that `prepare` takes. Of a prepared folder the command scores the
    validation documents. Of a source it scores the files named as validation, or all documents if there are none.
    Without DATA it scores the validation documents of the data that RUN was trained on. RUN may also be a file
    written by `export`.
    """
    if data is not None and own_data is not None:
        raise click.UsageError("DATA is the text to score, and --data the text of RUN; give only one of the two.")
    from flashlm_numba.data.vocabularies import DEFAULT_VOCABULARY
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
        skip_missing=skip_missing,
        own_data=own_data,
    )
    if as_json:
        click.echo(json.dumps(result, allow_nan=False))
        return
    scores = [
        f"NLL            {result['nll']:.4f} nats per token",
        f"perplexity     {math.inf if result['perplexity'] is None else result['perplexity']:.2f}",
        f"bits per byte  {result['bits_per_byte']:.4f}",
    ]
    if result["vocabulary"] != DEFAULT_VOCABULARY:  # nats per token of different vocabularies do not compare
        scores.insert(0, scores.pop())
    for line in scores:
        click.echo(line)
    if result["smoothed_loss"] is not None:
        click.echo(f"smoothed loss  {result['smoothed_loss']:.4f} nats per token (label smoothing 0.1)")
    echo(
        f"scored         {result['tokens']:,} tokens, {result['bytes']:,} bytes, "
        f"{plural(result['documents'], 'document')} of {result['data']}"
    )
    click.echo("causal         yes: changing a token changes no earlier hidden state, bit for bit")


@click.command()
@options.run
@click.option(
    "--prompt",
    type=Text(),
    default="",
    help="Text to continue. A space at its end becomes the beginning of the next word. Default: empty, a new document.",
)
@click.option(
    "--max-tokens",
    type=click.IntRange(min=1),
    default=200,
    show_default=True,
    help="Generate at most this many tokens.",
)
@click.option(
    "--temperature",
    type=Number(min=0),
    default=0.8,
    show_default=True,
    help="Below 1: more likely, more repetitive text. Above 1: more varied text. 0: always the likeliest token.",
)
@click.option("--top-k", type=click.IntRange(min=1), help="Sample from the K likeliest tokens. Default: all.")
@click.option(
    "--top-p",
    type=Number(0, 1, min_open=True),
    help="Sample from the fewest likeliest tokens whose probabilities sum to at least this. Default: all tokens.",
)
@click.option("--seed", type=click.IntRange(0, 2**63 - 1), help="The same seed gives the same text. Default: random.")
@click.option(
    "--int8-head",
    is_flag=True,
    help="Quantise the weights of the dense head to int8, which is faster. The logits of the likeliest tokens are "
    "still computed in float32.",
)
@click.option("--stats", is_flag=True, help="Afterwards report tokens per second and peak memory.")
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
    """Continue a text with the model in RUN, printed while it is generated.

    RUN may also be a file written by `export`. Sampling applies temperature, then top-k, then top-p.
    """
    from flashlm_numba.heads.sampling import kinds_of_sampling
    from flashlm_numba.inference.generate import generate_text
    from flashlm_numba.model.build import load_model

    use_threads(threads)
    uses = ["generate", *kinds_of_sampling(temperature, top_k, top_p), *filter(None, [activations])]
    loaded = load_model(run, checkpoint, ema=ema, uses=uses)
    model = loaded.model
    if activations is not None:
        model.use_activations(activations)
    if int8_head:
        if top_p is not None and top_k is None:
            raise click.UsageError("--int8-head with --top-p samples from all tokens; give --top-k too.")
        _use_int8_head(model, run)
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # a terminal that cannot show a character gets a question mark
    vocabulary = loaded.vocabulary
    vocabulary.load()  # reports a damaged vocabulary before the prompt is printed
    click.echo(prompt, nl=False)
    drawn: list[float] = []  # time at which each token was sampled, seconds
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
    """Quantise the dense head's weights to int8; another head is a usage error."""
    if not model.head.has_int8:
        raise click.UsageError(f"--int8-head is for the dense head, but {run} has the {model.head.name} head.")
    model.head.use_int8()


def _stats(drawn: list[float]) -> str:
    """A line with tokens per second and peak memory, from the time in seconds at which each token was sampled."""
    rate = f"{(len(drawn) - 1) / (drawn[-1] - drawn[0]):,.0f} tokens/s" if len(drawn) > 1 else "no rate"
    peak = peak_rss_mb()
    memory = "unknown on this system" if peak is None else f"{peak:,.0f} MB"
    return f"{len(drawn):,} tokens, {rate} after the first; peak memory {memory}"


@click.command()
@options.run
@click.argument("file", type=PathOrSource(path_type=Path))
@click.option(
    "--rows",
    type=click.Choice(ROWS),
    default="int8",
    show_default=True,
    help="Precision of the embedding's rows, which are most of the file. int8 and int4 round them. float keeps them, "
    "and the exported model then computes exactly the same results as RUN.",
)
@options.ema
@options.checkpoint
def export(run: Path, file: Path, rows: str, ema: bool, checkpoint: str | None) -> None:
    """Write the model in RUN to one FILE (.safetensors), to store or to share.

    The file packs ternary weights into 1.6 bits each, rounds the rows of the embedding, and stores all other weights
    in full precision. It names the arithmetic of the rows, and `eval` and `generate` compute with that.
    """
    from flashlm_numba.model.export import export_run

    size = export_run(run, file, checkpoint, ema=ema, rows=rows).stat().st_size
    echo(f"{file}: {size / 1e6:,.1f} MB with {rows} rows")


@click.command()
@options.run
@options.checkpoint
@options.json
def info(run: Path, checkpoint: str | None, as_json: bool) -> None:
    """Describe RUN: parameters, sizes, shape of the tree, training progress.

    RUN may also be a file written by `export`.
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
            echo(f"{key:<30} {_show(value)}")


@click.command()
@options.threads
@options.json
def doctor(threads: int | None, as_json: bool) -> None:
    """Examine this machine, check the kernels, and report any problem.

    The report covers processor, threads, BLAS, memory, caches and versions. It takes a few seconds; the first time,
    compiling the kernels takes one to two minutes more. The exit status is 1 if a kernel computes wrong results.
    """
    from flashlm_numba.cli.doctor import examine, report

    found = examine(use_threads(threads))
    click.echo(json.dumps(found, allow_nan=False) if as_json else report(found))
    raise SystemExit(1 if found["problems"] else 0)


def _show(value: Any) -> str:
    """A value of `info` on one line."""
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
