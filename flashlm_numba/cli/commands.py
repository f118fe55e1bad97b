"""The commands: each one parses its arguments, calls the library and prints the result.

This module imports only click at the top. The numerical packages take a second to load, and `--help` must not wait.
"""

from __future__ import annotations

import json
import math
import secrets
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from flashlm_numba.cli import options
from flashlm_numba.cli.compress_command import compress, decompress
from flashlm_numba.cli.options import Number, PathOrSource, Text, echo, use_threads
from flashlm_numba.cli.plot_command import plot
from flashlm_numba.cli.serve_command import serve
from flashlm_numba.cli.train_command import train
from flashlm_numba.memory.config import MEMORIES
from flashlm_numba.model.config import ROWS
from flashlm_numba.system.display import peak_rss_mb, plural
from flashlm_numba.system.errors import UserError

if TYPE_CHECKING:
    from flashlm_numba.model.model import Model
    from flashlm_numba.model.packed_model import PackedModel


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
@click.option(
    "--memory",
    type=click.Choice(MEMORIES),
    help="ngrams: if RUN has no memory, also score a mixture with the n-grams of the text that it was trained on. "
    "none: score the model without its memory.",
)
@click.option(
    "--memory-weight",
    type=Number(min=0, max=1),
    help="Share of the memory in the mixture, for a RUN without a memory. Default: 0.4.",
)
@click.option(
    "--memory-least",
    type=click.IntRange(min=1),
    help="Leave out n-grams of three and more tokens that occur less often, for a RUN without a memory. Default: 1.",
)
@click.option(
    "--lm-eval",
    "tasks",
    type=Text(),
    metavar="TASKS",
    help="Instead of a text, run these tasks of lm-evaluation-harness, with commas between their names "
    "(docs/harness.md).",
)
@click.option(
    "--lm-eval-path",
    "tasks_folder",
    type=PathOrSource(path_type=Path),
    metavar="DIR",
    help="Folder with the YAML files of further tasks for --lm-eval.",
)
@click.option("--limit", type=click.IntRange(min=1), help="With --lm-eval, documents per task. Default: all.")
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
    memory: str | None,
    memory_weight: float | None,
    memory_least: int | None,
    tasks: str | None,
    tasks_folder: Path | None,
    limit: int | None,
    threads: int | None,
    as_json: bool,
) -> None:
    """Score the text DATA with the model in RUN: NLL, perplexity and bits per byte.

    DATA is a prepared folder or any source that `prepare` takes. Of a prepared folder the command scores the
    validation documents. Of a source it scores the files named as validation, or all documents if there are none.
    Without DATA it scores the validation documents of the data that RUN was trained on. RUN may also be a file or a
    folder written by `export`, or hf:USER/NAME on the Hugging Face hub.
    """
    given: dict[str, Any] = {"share": memory_weight, "least": memory_least}
    chosen = {name: value for name, value in given.items() if value is not None}
    if data is not None and own_data is not None and memory != "ngrams":
        raise click.UsageError("DATA is the text to score, and --data the text of RUN; give only one of the two.")
    if chosen and memory != "ngrams":
        raise click.UsageError("--memory-weight and --memory-least need --memory ngrams.")
    if tasks is not None:
        texts = (data, own_data, subset, column) != (None, None, None, "text") or smoothed or lines or skip_missing
        if texts or memory == "ngrams":
            raise click.UsageError(
                "--lm-eval runs tasks instead of scoring a text; leave out DATA, the options of a text, --smoothed and "
                "--memory ngrams."
            )
        model = {"checkpoint": checkpoint, "ema": ema, "activations": activations, "memory": memory, "threads": threads}
        _run_tasks(run, tasks, tasks_folder, limit, as_json, model)
        return
    if tasks_folder is not None or limit is not None:
        raise click.UsageError("--lm-eval-path and --limit need --lm-eval.")
    from flashlm_numba.data.vocabularies import DEFAULT_VOCABULARY
    from flashlm_numba.inference.evaluate import CountedMemory, evaluate_run

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
        memory=CountedMemory(**chosen) if memory == "ngrams" else None,
        alone=memory == "none",
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
    if found := result.get("memory"):
        counted = found["weight"] is not None
        parts = {"with n-grams": "", "without them": "head_", "n-grams alone": "alone_"}
        for label, prefix in list(parts.items())[0 if counted else 1 :]:
            note = f", at a weight of {found['weight']:g}" if label == "with n-grams" else ""
            nll, bits = found[f"{prefix}nll"], found[f"{prefix}bits_per_byte"]
            click.echo(f"{label:<14} {nll:.4f} nats per token, {bits:.4f} bits per byte{note}")
        click.echo(
            f"n-grams        {found['ngrams']:,} of up to {found['order']} tokens, {found['bytes'] / 1e6:,.0f} MB"
            + (f", counted in {found['seconds']:.1f} s" if counted else "")
        )
    click.echo("causal         yes: changing a token changes no earlier hidden state, bit for bit")


def _run_tasks(
    run: Path, tasks: str, folder: Path | None, limit: int | None, as_json: bool, model: dict[str, Any]
) -> None:
    """Run tasks of lm-evaluation-harness and print their results. model : options of FlashLM"""
    import importlib.util

    if importlib.util.find_spec("lm_eval") is None:
        raise UserError("--lm-eval needs lm_eval; install it with `pip install 'flashlm-numba[eval]'`.")
    names = [name.strip() for name in tasks.split(",") if name.strip()]
    if not names:
        raise click.BadParameter("it names no task.", param_hint="'--lm-eval'")
    from flashlm_numba.inference.harness import evaluate_tasks

    use_threads(model["threads"])
    results = evaluate_tasks(run, names, folder=folder, limit=limit, **model)
    table = results.pop("table")
    click.echo(json.dumps(results, allow_nan=False) if as_json else table)


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

    RUN may also be a file or a folder written by `export`, or hf:USER/NAME on the Hugging Face hub. Sampling applies
    temperature, then top-k, then top-p.
    """
    from flashlm_numba.heads.sampling import kinds_of_sampling
    from flashlm_numba.inference.generate import generate_text
    from flashlm_numba.model.packed_reading import load_for_generation

    use_threads(threads)
    uses = ["generate", *kinds_of_sampling(temperature, top_k, top_p), *filter(None, [activations])]
    model, vocabulary = load_for_generation(run, checkpoint, ema=ema, uses=uses)
    if activations is not None:
        model.use_activations(activations)
    if int8_head:
        if top_p is not None and top_k is None:
            raise click.UsageError("--int8-head with --top-p samples from all tokens; give --top-k too.")
        _use_int8_head(model, run)
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # a terminal that cannot show a character gets a question mark
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


def _use_int8_head(model: Model | PackedModel, run: Path) -> None:
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
@click.argument("file", required=False, type=PathOrSource(path_type=Path))
@click.option(
    "--hub",
    metavar="DIR",
    type=PathOrSource(path_type=Path),
    help="Write a folder for the Hugging Face hub instead of FILE, with a model card and checksums (docs/sharing.md). "
    "DIR must be new or empty.",
)
@click.option(
    "--license",
    "licence",
    type=Text(),
    metavar="ID",
    help="Licence of the model in the card of --hub, such as apache-2.0. Default: that of the training text, if it is "
    "known.",
)
@click.option(
    "--rows",
    type=click.Choice(ROWS),
    default="int8",
    show_default=True,
    help="Precision of the embedding's rows, which are most of the file. int8 and int4 round them. float keeps them, "
    "and the exported model then computes exactly the same results as RUN.",
)
@options.own_data
@click.option("--no-memory", is_flag=True, help="Leave out the memory of RUN. The model then predicts without it.")
@options.ema
@options.checkpoint
def export(
    run: Path,
    file: Path | None,
    hub: Path | None,
    licence: str | None,
    own_data: Path | None,
    rows: str,
    no_memory: bool,
    ema: bool,
    checkpoint: str | None,
) -> None:
    """Write the model in RUN to one FILE (.safetensors), or to a folder for the Hugging Face hub (--hub).

    The file packs ternary weights into 1.6 bits each, rounds the rows of the embedding, and stores all other weights
    in full precision. It names the arithmetic of the rows, and `eval` and `generate` compute with that.
    """
    choices: dict[str, Any] = {"ema": ema, "rows": rows, "memory": not no_memory}
    if hub is not None:
        if file is not None:
            raise click.UsageError("Give FILE or --hub DIR, not both.")
        _export_folder(run, hub, checkpoint, licence, own_data, choices)
        return
    if file is None:
        raise click.UsageError("Give FILE or --hub DIR, the place for the model.")
    if licence is not None or own_data is not None:
        raise click.UsageError("--license and --data are for the card of --hub DIR; leave them out.")
    from flashlm_numba.model.export import export_run

    size = export_run(run, file, checkpoint, **choices).stat().st_size
    echo(f"{file}: {size / 1e6:,.1f} MB with {rows} rows")


def _export_folder(
    run: Path, folder: Path, checkpoint: str | None, licence: str | None, data: Path | None, choices: dict[str, Any]
) -> None:
    """`export --hub`."""
    from flashlm_numba.inference.sharing import export_folder
    from flashlm_numba.model.model_card import is_licence

    licence = licence and licence.lower()
    if licence is not None and not is_licence(licence):
        raise click.BadParameter(
            f"'{licence}' is no identifier of a licence; write one such as mit, apache-2.0, cc-by-4.0 or other.",
            param_hint="'--license'",
        )
    found = export_folder(run, folder, checkpoint, licence=licence, data=data, **choices)
    size = sum(path.stat().st_size for path in found.iterdir())
    echo(f"{folder}: {size / 1e6:,.1f} MB with {choices['rows']} rows")
    echo(f"upload it with: flashlm-numba push {folder} USER/NAME")


@click.command()
@click.argument("folder", metavar="DIR", type=PathOrSource(path_type=Path))
@click.argument("name", metavar="USER/NAME")
@click.option("--private", is_flag=True, help="If the repository is new, let only its owner read it.")
@click.option("--dry-run", is_flag=True, help="Check everything and list the files, but upload nothing.")
def push(folder: Path, name: str, private: bool, dry_run: bool) -> None:
    """Upload DIR, a folder written by `export --hub`, to the model repository USER/NAME on the Hugging Face hub.

    The repository is created if there is none. All commands then read the model as hf:USER/NAME. Uploading needs a
    token that may write: log in with `hf auth login`, or set HF_TOKEN.
    """
    from flashlm_numba.inference.sharing import push_folder

    target, sizes = push_folder(folder, name, private=private, dry_run=dry_run)
    for file, size in sizes.items():
        click.echo(f"{file:<24} {size:>14,} bytes")
    echo(f"{'would be uploaded' if dry_run else 'uploaded'} to {target}{' (private if new)' if private else ''}")


@click.command("import")
@click.argument("folder", type=PathOrSource(path_type=Path))
@click.argument("file", metavar="OUT", type=PathOrSource(path_type=Path))
@click.option(
    "--rows",
    type=click.Choice(ROWS),
    default="float",
    show_default=True,
    help="Precision of the embedding's rows in OUT, as in `export`. float keeps the published numbers.",
)
def import_model(folder: Path, file: Path, rows: str) -> None:
    """Import a published MatMul-free LM from FOLDER to one file OUT (.safetensors).

    FOLDER holds config.json, model.safetensors or its shards, and tokenizer.json, as ridger/MMfreeLM-370M does when it
    has been downloaded. OUT holds 1.6 bits per ternary weight; `eval`, `generate` and `info` read it. Without a
    tokenizer.json the model takes token ids only, from Python.
    """
    from flashlm_numba.model.importing import import_folder

    size = import_folder(folder, file, rows=rows).stat().st_size
    echo(f"{file}: {size / 1e6:,.1f} MB with {rows} rows")


@click.command()
@options.run
@options.checkpoint
@options.json
def info(run: Path, checkpoint: str | None, as_json: bool) -> None:
    """Describe RUN: parameters, sizes, shape of the tree, training progress.

    RUN may also be a file or a folder written by `export`, or hf:USER/NAME on the Hugging Face hub.
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
        elif key == "receptive_field" and value is None:
            click.echo(f"{key:<30} the whole text")
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


ALL = (
    *(prepare, train, plot, evaluate, generate, serve, export, push, import_model, compress, decompress),
    *(info, doctor),
)
