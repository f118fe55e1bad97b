"""Generation at the sizes of the MatMul-free LM's paper, with random ternary weights: speed, memory, float32 beside it.

\b
    python tools/bench_scale.py                          370M, 1.3B and 2.7B parameters
    python tools/bench_scale.py --model paper-2.7b       one of them
    python tools/bench_scale.py --model 7b --model 13b   larger ones, without a published configuration
    python tools/bench_scale.py --train                  memory and time of a step of training at 370M instead
    python tools/bench_scale.py --json FILE              write what was measured

One stream: tokens per second, the time to the first token after a prompt of 512 tokens, and the peak resident memory of
a process per model. The packed weights of the trunk and of the head are read once per token, so the memory limits the
speed. The program prints the share of the read bandwidth that it measures in the same run. Beside it stand the products
of the same matrices in float32 by NumPy's BLAS, without norms and gates. Where float32 does not fit, its time is
computed from the bytes and the bandwidth, and marked with *.
First it compares the packed trunk, bit for bit, with the trunk that training uses, and a matrix of each model with
NumPy's exact product. A wrong result ends the program with status 1. FLASHLM_NUMBA_TERNARY chooses a variant. Use a
quiet machine. Where other programs run, OMP_PROC_BIND=true keeps the threads on different cores.
"""

from __future__ import annotations

import json
import math
import os
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import numba
import numpy as np

if __package__ in (None, ""):  # run as a file, the checkout is not on the path
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from flashlm_numba.kernels.bit_packed import PackedTrunk, matrix_shapes, packed_outputs
from flashlm_numba.kernels.bitlinear import _bit_inputs
from flashlm_numba.kernels.ternary import unpack_ternary
from flashlm_numba.kernels.ternary_gemv import best_variant
from flashlm_numba.model.build import model_from
from flashlm_numba.model.config import ModelConfig
from flashlm_numba.model.packed_model import PackedModel, random_packed_model
from flashlm_numba.model.parameters import initial_parameters
from flashlm_numba.model.recipes import from_recipe
from flashlm_numba.model.shapes import SHAPES
from flashlm_numba.model.training_memory import check_memory
from flashlm_numba.model.trunks import BitTrunk
from flashlm_numba.system.errors import UserError
from flashlm_numba.system.memory import available_mb
from flashlm_numba.system.threads import set_threads
from flashlm_numba.training.optimizer import Optimizer
from tools.bench import bandwidth, machine, output, processes, timing

_PAPER = SHAPES["paper-2.7b"]
_SMALL = replace(_PAPER, vocab_size=300, dim=80, ffn_dim=300, n_blocks=3)
MODELS: dict[str, ModelConfig] = {
    **{name: config for name, config in SHAPES.items() if name.startswith("paper-")},
    # widths and depths that are usual at these sizes, and the GLU's width by the authors' rule
    "7b": replace(_PAPER, dim=4096, ffn_dim=11008, n_blocks=32),
    "13b": replace(_PAPER, dim=5120, ffn_dim=13824, n_blocks=40),
    "tiny": _SMALL,
}
DEFAULT = ("paper-370m", "paper-1.3b", "paper-2.7b")
PROMPT = 512  # tokens
TRAINED = 4  # sequences of a step of training
FLOAT_GIB = 20.0  # float32 weights above this are not made
GIB = 2**30
CORES = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else None


def check_trunk() -> None:
    """Raise timing.WrongResultError unless the packed trunk has the bits of training's, however a text is divided."""
    parameters = initial_parameters(_SMALL, 0, embedding_std=1.0)
    trunk = BitTrunk(_SMALL)
    trunk.set_weights(parameters)
    ids = np.random.default_rng(0).integers(0, _SMALL.vocab_size, 200).astype(np.int32)
    expected = trunk.forward(trunk.new_buffers(1, len(ids)), parameters["embedding.weight"], ids)
    packed = PackedTrunk.from_trunk(trunk.weights)
    x = parameters["embedding.weight"][ids]
    for counts in ([200], [130, 1, 1, 68]):
        state = packed.new_state()
        found = np.concatenate([packed.read(state, part) for part in np.split(x, np.cumsum(counts)[:-1])])
        if not np.array_equal(found, expected):
            raise timing.WrongResultError("the packed trunk's hidden states are not those of training")


def check_matrix(model: PackedModel) -> None:
    """Raise timing.WrongResultError unless a matrix of the model's last block gives NumPy's exact product."""
    config, block = model.config, model.config.n_blocks - 1
    packed, columns = model.trunk.matrix(block, "down"), config.ffn_dim
    x = np.random.default_rng(1).standard_normal((3, columns), np.float32)
    norm = np.ones(columns, np.float32)
    q, totals = np.empty((3, 4 * packed.shape[1]), np.int8), np.empty(3, np.int32)
    steps, rstd = np.empty(3, np.float32), np.empty(3, np.float32)
    _bit_inputs(q, steps, totals, rstd, np.empty(columns, np.float32), x, norm, np.float32(1))
    exact = []
    for start in range(0, len(packed), 256):  # in parts, which take little memory
        weight = unpack_ternary(packed[start : start + 256], columns)
        exact.append(q[:, :columns].astype(np.float64) @ weight.T.astype(np.float64))
    expected = np.concatenate(exact, 1).astype(np.float32) * steps[:, None]
    if not np.array_equal(packed_outputs(x, norm, packed, 1.0), expected):
        raise timing.WrongResultError("a packed matrix does not give NumPy's product")


def peak_bytes() -> int:
    """The largest resident memory of this process so far."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise click.ClickException("this system does not say how much memory a process takes (/proc/self/status)")


def seconds_of(run: Callable[[], Any], seconds: float, least: int) -> list[float]:
    """Seconds of each call, for this many seconds and this many calls at least, after one call that does not count."""
    run()
    found: list[float] = []
    while len(found) < least or sum(found) < seconds:
        began = time.perf_counter()
        run()
        found.append(time.perf_counter() - began)
    return found


def measure_packed(config: ModelConfig, seconds: float, prompt: int) -> dict[str, Any]:
    """Speed and memory of this process. Raises timing.WrongResultError if a product is wrong."""
    model = random_packed_model(config, 0)
    check_matrix(model)
    ids = np.random.default_rng(2).integers(0, config.vocab_size, prompt).astype(np.int32)

    def first_token() -> int:
        _, h = model.prefill(ids)
        return int(model.head.logits(h)[0].argmax())

    first = seconds_of(first_token, 0, 3)
    state, h = model.prefill(ids[:1])

    def next_token() -> None:
        nonlocal h
        h = model.decode_step(state, int(model.head.logits(h)[0].argmax()))

    found = seconds_of(next_token, seconds, 5)
    matrices = sum(rows * columns for rows, columns in model.trunk.shapes.values())
    trunk, ends = config.n_blocks * matrices, config.vocab_size * config.dim
    return {
        "parameters": trunk + 2 * ends,
        "bytes_per_token": model.bytes_per_token,
        "token_seconds": timing.summary(found),
        "first_token_seconds": timing.summary(first),
        "peak_bytes": peak_bytes(),
    }


def measure_float(config: ModelConfig, seconds: float, prompt: int) -> dict[str, Any]:
    """The same products in float32, by NumPy's BLAS."""
    shapes = [*matrix_shapes(config.dim, config.ffn_dim).values()] * config.n_blocks
    shapes.append((config.vocab_size, config.dim))
    matrices = [np.full(shape, 0.01, np.float32) for shape in shapes]
    inputs = {columns: np.full((prompt, columns), 0.5, np.float32) for _, columns in shapes}

    def read(rows: int) -> None:
        for matrix in matrices[:-1]:
            inputs[matrix.shape[1]][:rows] @ matrix.T
        inputs[config.dim][:1] @ matrices[-1].T  # the head, of the last token

    found = seconds_of(lambda: read(1), seconds, 3)
    first = seconds_of(lambda: read(prompt), 0, 1)
    embedding = 4 * config.vocab_size * config.dim
    return {
        "bytes_per_token": sum(matrix.nbytes for matrix in matrices),
        "token_seconds": timing.summary(found),
        "first_token_seconds": timing.summary(first),
        "peak_bytes": peak_bytes() + embedding,  # of the rows that these products do not need
    }


def measure_training(config: ModelConfig, batch: int, length: int) -> dict[str, Any]:
    """Seconds and memory of the second step of training: all gradients in float32, and AdamW for everything."""
    run = from_recipe("mmf", ["head.name=bitlinear", f"phases={batch}x{length}"])
    run = replace(run, model=config, threads=numba.get_num_threads())
    needed = check_memory(run)
    model = model_from(run, initial_parameters(config, 0), np.ones(config.vocab_size, np.int64))
    optimizer = Optimizer(model.parameters, model.gradients, run.optimizer)
    ids = np.random.default_rng(0).integers(0, config.vocab_size, (batch, length)).astype(np.int32)
    targets, weights = np.roll(ids, -1, 1), np.full(ids.size, 1 / ids.size, np.float32)

    def step() -> None:
        model.sync_weights()
        loss, _, _ = model.loss_and_grad(ids, targets, weights, accumulate=False)
        if not np.isfinite(loss).all():
            raise timing.WrongResultError("the loss of training is not finite")
        optimizer.step(0.0, run.optimizer.adamw_lr * 1e-3, run.optimizer.clip)

    (seconds,) = seconds_of(step, 0, 1)
    return {
        "batch_size": batch,
        "seq_len": length,
        "step_seconds": seconds,
        "tokens_per_s": ids.size / seconds,
        "peak_bytes": peak_bytes(),
        "estimated_bytes": needed,
    }


def train(name: str, threads: int, quick: bool) -> dict[str, Any]:
    """The row of a model's training, which it prints."""
    found = in_a_process("train", name, threads, 0, 16 if quick else 256)
    click.echo(
        f"{name}: a step of {found['batch_size']} x {found['seq_len']} tokens takes {found['step_seconds']:.1f} s, "
        f"{found['tokens_per_s']:.1f} tokens/s, and {found['peak_bytes'] / GIB:.2f} GiB of memory "
        f"(estimate: {found['estimated_bytes'] / GIB:.2f} GiB). The norms, the rounded inputs and the gates are "
        "computed again in the backward pass."
    )
    return {"model": name, **found}


def float_bytes(config: ModelConfig) -> int:
    """Bytes of a float32 model's matrices and embedding."""
    block = sum(rows * columns for rows, columns in matrix_shapes(config.dim, config.ffn_dim).values())
    return 4 * (config.n_blocks * block + 2 * config.vocab_size * config.dim)


def in_a_process(kind: str, name: str, threads: int, seconds: float, prompt: int) -> dict[str, Any]:
    """What a process of its own measures, so that its peak memory is that of one model."""
    if CORES:  # with OMP_PROC_BIND OpenMP has bound this thread to one, and a process would inherit that
        os.sched_setaffinity(0, CORES)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "found.json"
        arguments = [str(Path(__file__).resolve()), "--one", kind, "--model", name, "--threads", str(threads)]
        arguments += ["--seconds", str(seconds), "--prompt", str(prompt), "--json", str(path)]
        processes.run_process(arguments)
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def compare(
    name: str, threads: int, seconds: float, prompt: int, *, megabytes: int | None, floats: bool
) -> dict[str, Any]:
    """The row of a model. megabytes : read for the bandwidth;  floats : whether to measure float32 if it fits"""
    config = MODELS[name]
    # before and after, since the speed of shared machines changes; the faster one counts
    before = bandwidth.read_bandwidth(threads, megabytes=megabytes)
    found = in_a_process("packed", name, threads, seconds, prompt)
    after = bandwidth.read_bandwidth(threads, megabytes=megabytes)
    read = max(before, after, key=lambda r: float(r["best"]))
    reading = read["best"]
    token, first = found["token_seconds"]["median"], found["first_token_seconds"]["median"]
    rate = found["bytes_per_token"] / token * 1e-9
    needed = float_bytes(config)
    free = available_mb()
    fits = floats and needed <= FLOAT_GIB * GIB and (free is None or needed * 1.05 + 0.5 * GIB < free * 1e6)
    if fits:
        plain = in_a_process("float", name, threads, seconds, prompt) | {"computed": False}
    else:
        per_token = needed - 4 * config.vocab_size * config.dim
        plain = {
            "bytes_per_token": per_token,
            "token_seconds": {"median": per_token / reading * 1e-9},
            "peak_bytes": needed,
            "computed": True,
        }
    return {
        "model": name,
        "dim": config.dim,
        "ffn_dim": config.ffn_dim,
        "n_blocks": config.n_blocks,
        "vocab_size": config.vocab_size,
        "variant": best_variant(),
        "prompt": prompt,
        **found,
        "tokens_per_s": 1 / token,
        "prompt_tokens_per_s": prompt / first,
        "prompt_rate_over_token_rate": prompt * token / first,
        "bandwidth": read,
        "packed_gbytes_per_s": rate,
        "share_of_read_bandwidth": rate / reading,
        "float32": plain,
    }


def line(row: dict[str, Any]) -> str:
    """A row of the table."""
    plain = row["float32"]
    star = "*" if plain["computed"] else ""
    first = plain.get("first_token_seconds", {}).get("median", math.nan)
    reached = f"{row['packed_gbytes_per_s']:.1f} of {row['bandwidth']['best']:.1f} GB/s"
    cells = [
        row["model"],
        f"{row['parameters'] / 1e6:,.0f}M",
        f"{row['bytes_per_token'] / 1e6:,.1f} MB",
        f"{row['tokens_per_s']:.2f}",
        f"{reached}, {row['share_of_read_bandwidth']:.0%}",
        f"{row['first_token_seconds']['median']:.2f} s",
        f"{row['prompt_rate_over_token_rate']:.2f}",
        f"{row['peak_bytes'] / GIB:.2f} GiB",
        f"{1 / plain['token_seconds']['median']:.2f}{star}",
        "-" if math.isnan(first) else f"{first:.2f} s",
        f"{plain['peak_bytes'] / GIB:.2f} GiB{star}",
    ]
    return "| " + " | ".join(cells) + " |"


HEADER = """\
| model | parameters | read per token | tokens/s | of the read bandwidth | first token | prompt/decode | memory \
| float32: tokens/s | first token | memory |
| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |"""


@click.command(help=__doc__)
@click.option("--model", "models", multiple=True, type=click.Choice(list(MODELS)), help="Default: the paper's three.")
@click.option("--threads", type=click.IntRange(min=1), help="Default: every core.")
@click.option("--seconds", type=click.FloatRange(min=0), default=5.0, show_default=True, help="Of decoding, timed.")
@click.option("--prompt", type=click.IntRange(min=1), default=PROMPT, show_default=True, help="Tokens of the prompt.")
@click.option("--quick", is_flag=True, help="A tiny model, a short prompt, a small array for the bandwidth.")
@click.option("--float/--no-float", "floats", default=True, help="Measure float32, or compute it.")
@click.option("--train", "training", is_flag=True, help="Measure a step of training instead.")
@click.option("--one", type=click.Choice(["packed", "float", "train"]), hidden=True)
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Write the results to this file.")
def main(
    models: tuple[str, ...],
    threads: int | None,
    seconds: float,
    prompt: int,
    quick: bool,
    floats: bool,
    training: bool,
    one: str | None,
    json_path: Path | None,
) -> None:
    """See the module's docstring."""
    if json_path is not None:
        output.check_writable(json_path)
    try:
        threads = set_threads(threads)
        variant = best_variant()
    except ValueError as error:
        raise click.ClickException(str(error)) from None
    try:
        if one is not None:
            assert json_path is not None
            config = MODELS[models[0]]
            if one == "train":
                output.write_json(json_path, measure_training(config, TRAINED, prompt))
            else:
                measure = measure_packed if one == "packed" else measure_float
                output.write_json(json_path, measure(config, seconds, prompt))
            return
        check_trunk()
    except UserError as error:
        raise click.ClickException(str(error)) from None
    except timing.WrongResultError as error:
        click.echo(f"Wrong result: {error}.", err=True)
        sys.exit(1)
    if quick:
        models, seconds, prompt = models or ("tiny",), min(seconds, 0.1), min(prompt, 70)
    stamp = machine.stamp(threads)
    click.echo(f"{stamp['machine']['cpu']}, {threads} threads, variant {variant}")
    if training:
        trained = [train(name, threads, quick) for name in models or DEFAULT[:1]]
        if json_path is not None:
            output.write_json(json_path, {**stamp, "variant": variant, "models": trained})
        return
    click.echo(HEADER)
    rows = []
    for name in models or DEFAULT:
        rows.append(compare(name, threads, seconds, prompt, megabytes=8 if quick else None, floats=floats))
        click.echo(line(rows[-1]))
        if json_path is not None:
            output.write_json(json_path, {**stamp, "variant": variant, "models": rows})


if __name__ == "__main__":
    main()
