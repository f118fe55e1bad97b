"""Decoding speed: tokens per second of one stream, compared with recomputing the window per token, here and in PyTorch.

\b
    python tools/bench_decode.py                     every candidate
    python tools/bench_decode.py --run runs/tree10   with a trained model
    python tools/bench_decode.py --json out.json     write what was measured

A model of v3's shape with the initial embedding (or of a run with the tree head) continues a held-out text as long as
its receptive field. Top-k visits fewer nodes of the tree the more confident the model is, so a trained model is faster.
First the program compares the decoder's hidden states with a forward pass over the text, token by token. An error above
float32 rounding ends the program with status 1. Then it times the candidates alternately and prints medians with the
20 % and 80 % quantiles. The decoder uses one thread; candidates that recompute the window use all threads. Finally it
measures the memory bandwidth of one thread, which limits the dense head, because each token reads all rows. Use a quiet
machine.
"""

from __future__ import annotations

import functools
import importlib.util
import itertools
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import click
import numpy as np

if __package__ in (None, ""):  # run as a file, the checkout is not on the path
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from flashlm_numba.data.builtin import default_corpus
from flashlm_numba.data.shards import TokenData, open_tokens
from flashlm_numba.heads import DenseHead, TreeHead
from flashlm_numba.inference.generate import generate_ids
from flashlm_numba.model import build as assemble
from flashlm_numba.model.model import Model
from flashlm_numba.model.recipes import from_recipe
from flashlm_numba.system.errors import UserError
from flashlm_numba.system.threads import set_threads
from flashlm_numba.training.inputs import with_vocabulary_of
from tools.bench import allocators, bandwidth, machine, output, timing

CHECKED = 64  # tokens that are decoded and compared with the whole forward pass
FEW = 4  # tokens of a call that reads the window again for each
SAMPLING: dict[str, dict[str, Any]] = {
    "temperature 1": {},
    "temperature 0.8, top-k 40": {"temperature": 0.8, "top_k": 40},
}


def make_model(data: TokenData, head: str) -> Model:
    """A model with the recipe default's shape and this head before its first step, except that no gain is zero."""
    settings = [f"head.name={head}", "log_prior=true", "activations=float"]
    run = with_vocabulary_of(data, from_recipe("default", settings), any_head=False)
    model = assemble.new_model(run, data, lambda line: None)[0]
    for name, value in model.parameters.items():
        if name.startswith(("blocks.0.mixer.leaky.", "ngram_copy.")):
            value[:] = 0.1
    return model


def held_out(data: TokenData, length: int) -> np.ndarray:
    """The first tokens (length,) of the validation text, repeated if it is shorter.

    A trained model knows the training text by heart. The surer it is, the fewer nodes top-k visits.
    """
    text = data.validation.windows(np.array([0]), min(length, data.validation.n_tokens))[0]
    return np.resize(text, length).astype(np.int32)


def decoding_errors(model: Model, text: np.ndarray) -> np.ndarray:
    """Error of each decoded hidden state against a forward pass over text (T,), relative to the largest value."""
    model.sync_weights()
    want = model.forward(text[None]).copy()
    state, h = model.prefill(text[:-CHECKED])
    found = [h[0]]
    for token in text[-CHECKED:-1]:
        found.append(model.decode_step(state, int(token))[0].copy())
    want = want[-CHECKED - 1 : -1]
    return np.abs(np.array(found) - want).max(1) / np.abs(want).max()


def decoding(model: Model, context: list[int], options: dict[str, Any]) -> Callable[[int], None]:
    """A function that generates this many tokens per call, with one endless stream."""
    ids = generate_ids(model, context, rng=np.random.default_rng(0), **options)

    def run(count: int) -> None:
        for _ in itertools.islice(ids, count):
            pass

    return run


def streams(model: Model, context: list[int], options: dict[str, Any], count: int) -> Callable[[int], None]:
    """A function that generates this many tokens per call with each of several streams, one thread per stream."""
    runs = [decoding(model, context, options) for _ in range(count)]
    for run in runs:
        run(1)  # reads the context; that pass uses all threads and the model's buffers
    pool = ThreadPoolExecutor(count)

    def all_of_them(tokens: int) -> None:
        list(pool.map(lambda run: run(tokens), runs))

    return all_of_them


def trunk_alone(model: Model, context: list[int]) -> Callable[[int], None]:
    """A function that feeds this many tokens per call, without a head."""
    state, _ = model.prefill(np.array(context, np.int32))

    def run(count: int) -> None:
        for token in range(count):
            model.decode_step(state, token)

    return run


def reading_again(model: Model, context: list[int]) -> Callable[[int], None]:
    """A function that samples this many tokens per call, each after a forward pass over the window."""
    window, rng = list(context), np.random.default_rng(0)

    def run(count: int) -> None:
        for _ in range(count):
            h = model.forward(np.array([window], np.int32))[-1:]
            window.append(int(model.head_after(np.array(window, np.int32)).sample(h, rng)[0]))
            del window[0]

    return run


def torch_reading_again(context: list[int]) -> Callable[[int], None]:
    """The same in PyTorch, with its dense head and FlashLM v3's trunk, over the 415 tokens that this one sees."""
    import torch

    from tools.baseline.model import BaselineModel

    model = BaselineModel()
    window = torch.tensor(context[-model.config.receptive_field :])

    @torch.no_grad()
    def run(count: int) -> None:
        nonlocal window
        for _ in range(count):
            logits = model.hidden(window[None])[-1] @ model.embedding.weight.T
            window = torch.cat([window[1:], torch.multinomial(torch.softmax(logits, 0), 1)])

    return run


@click.command(help=__doc__)
@click.option("--repeats", type=click.IntRange(min=1), default=7, show_default=True, help="Timed turns of each.")
@click.option("--tokens", type=click.IntRange(min=1), default=200, show_default=True, help="Written in a call.")
@click.option("--data", type=click.Path(path_type=Path), help="Prepared tokens. Default: the built-in text.")
@click.option("--run", "trained", type=click.Path(path_type=Path), help="A run with the tree head, trained.")
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Write the results to this file.")
def main(repeats: int, tokens: int, data: Path | None, trained: Path | None, json_path: Path | None) -> None:
    """See the module's docstring."""
    if json_path is not None:
        output.check_writable(json_path)
    try:
        threads = set_threads(None)
        corpus = open_tokens(data or default_corpus())
        tree = make_model(corpus, "tree") if trained is None else assemble.load_model(trained).model
        if not isinstance(tree.head, TreeHead):
            raise UserError(f"{trained} was trained with the {tree.head.name} head; give a run with the tree head.")
    except (UserError, ValueError) as error:
        raise click.ClickException(str(error)) from None
    dense = make_model(corpus, "dense")
    field, few = tree.config.receptive_field, max(1, tokens // 4)
    text = held_out(corpus, field + CHECKED)
    tree.use_activations("float")
    tree_int8 = Model(tree.config, dict(tree.parameters), lambda weight, dweight: tree.head)
    tree_int8.use_activations("int8")
    dense_int8 = make_model(corpus, "dense")
    assert isinstance(dense_int8.head, DenseHead)
    dense_int8.head.use_int8()
    for name, model in (("tree", tree), ("tree, int8 activations", tree_int8), ("dense", dense)):
        errors = decoding_errors(model, text)
        # int8: a number whose last bit differs before it is rounded moves what follows by a step of that
        error = np.median(errors) if model is tree_int8 else errors.max()
        if not error < 1e-4 or not errors.max() < 0.1:
            click.echo(f"{name}: decoded hidden states err by {error:.2g} of the largest; expected rounding.", err=True)
            sys.exit(1)
    context = text[:field].tolist()
    calls: dict[str, tuple[int, Callable[[int], None]]] = {
        "trunk alone": (tokens, trunk_alone(tree, context)),
        "trunk alone, int8 activations": (tokens, trunk_alone(tree_int8, context)),
    }
    for how, options in SAMPLING.items():
        calls[f"tree, {how}"] = (tokens, decoding(tree, context, options))
        calls[f"tree, {how}, int8 activations"] = (tokens, decoding(tree_int8, context, options))
    calls[f"tree, temperature 1, {threads} streams"] = (tokens, streams(tree, context, {}, threads))
    for how, options in SAMPLING.items():
        calls[f"dense, {how}"] = (few, decoding(dense, context, options))
        calls[f"dense, {how}, int8 rows"] = (few, decoding(dense_int8, context, options))
    calls["tree, window again"] = (FEW, reading_again(tree, context))
    if importlib.util.find_spec("torch") is not None:
        import torch

        torch.set_num_threads(threads)
        calls["torch, dense, window again"] = (FEW, torch_reading_again(context))
    seconds = timing.measure({name: functools.partial(run, n) for name, (n, run) in calls.items()}, repeats)
    rates = {
        name: timing.rate(seconds[name], n * threads if name.endswith("streams") else n)
        for name, (n, _) in calls.items()
    }
    for name, rate in rates.items():
        click.echo(f"  {name:<46} {rate['median']:>9,.0f} tokens/s  ({rate['p20']:,.0f} to {rate['p80']:,.0f})")
    reading = bandwidth.read_bandwidth(1, repeats=repeats)
    limit = reading["best"] * 1e9 / dense.parameters["embedding.weight"].nbytes
    share = rates["dense, temperature 1"]["median"] / limit
    click.echo(
        f"One thread reads {reading['best']:.1f} GB/s: the dense head's rows {limit:,.0f} times per second; "
        f"{share:.0%} of that is reached."
    )
    if json_path is not None:
        result = {
            **machine.stamp(threads),
            "trained": trained is not None,
            "context": field,
            "tokens_per_s": rates,
            "read_gbytes_per_s": reading["best"],
        }
        output.write_json(json_path, result)


if __name__ == "__main__":
    allocators.restart()
    main()
