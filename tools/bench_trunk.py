"""Speed of the trunk, compared with PyTorch and with the machine's matrix products.

\b
    python tools/bench_trunk.py                    ours, PyTorch eager and compiled
    python tools/bench_trunk.py --plot FILE.png    a roofline: work per byte against work per second, every kernel
    python tools/bench_trunk.py --json FILE        write what was measured

The program times all passes through the block, forward and backward, including the embedding rows and their gradient,
for 16 x 256 tokens of v3's shape. Our trunk is also timed with int8 inputs of its ternary products, which is less work.
First hidden states and all gradients are compared with PyTorch's autograd in float64. Without PyTorch, only the hidden
states are compared, with the decoder. The int8 results are compared with the same products by BLAS. A wrong result ends
the program with status 1. Then the candidates are timed alternately; the results are medians with the 20 % and 80 %
quantiles. Use a quiet machine.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import numpy as np

if __package__ in (None, ""):  # run as a file, the checkout is not on the path
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from flashlm_numba.heads import DenseHead
from flashlm_numba.kernels.reference_trunk import is_ternary
from flashlm_numba.model.config import ModelConfig
from flashlm_numba.model.model import Model
from flashlm_numba.model.parameters import initial_parameters, parameter_shapes
from flashlm_numba.system.errors import UserError
from flashlm_numba.system.threads import set_threads
from flashlm_numba.training.optimizer import Optimizer
from tools.bench import (
    allocators,
    bandwidth,
    charts,
    head_candidates,
    head_check,
    head_problem,
    machine,
    output,
    timing,
)

Call = Callable[[], dict[str, np.ndarray]]

ROWS, LENGTH = 16, 256
CHECKED = (3, 70)  # rows and tokens of the batch that is checked


def flop_per_token(config: ModelConfig) -> float:
    """flop per token of all products of the trunk, forward and backward: three times those of the forward pass."""
    c, width = config.dim, config.dim // config.groups
    convs = 2 * len(config.dilations) * c * width * config.kernel_size  # gate and value
    return 3.0 * 2 * config.n_passes * (convs + c * c + 3 * c * config.ffn_dim)


def make_model(config: ModelConfig) -> Model:
    """A model before its first step, with embedding rows of the size that they have after training."""
    return Model(config, initial_parameters(config, 0, embedding_std=0.5), DenseHead)


def make_batch(config: ModelConfig, rows: int, length: int) -> tuple[np.ndarray, np.ndarray]:
    """ids (B, T) int32 and the gradient of the hidden states (B * T, C) float32."""
    rng = np.random.default_rng(1)
    ids = rng.integers(0, config.vocab_size, (rows, length)).astype(np.int32)
    return ids, rng.standard_normal((rows * length, config.dim), np.float32) / np.float32(rows * length)


def run_ours(model: Model, ids: np.ndarray, dh: np.ndarray) -> dict[str, np.ndarray]:
    """A function that clears the gradients and computes hidden states and all gradients."""
    model.zero_grad()
    hidden = model.forward(ids)
    model.backward(dh)
    return {"hidden": hidden, **model.gradients}


def torch_call(model: Model, ids: np.ndarray, dh: np.ndarray, **options: Any) -> tuple[Call, Call]:
    """The same in PyTorch, and a function that also returns the gradients. options : dtype, or compile"""
    import torch

    from tools.baseline.model import BaselineModel

    dtype = options.get("dtype", torch.float32)
    baseline = BaselineModel(model.config).to(dtype)
    baseline.state_from_numpy({name: model.parameters[name] for name in baseline.params_to_numpy()})
    hidden = torch.compile(baseline.hidden) if options.get("compile") else baseline.hidden
    tokens, gradient = torch.from_numpy(ids.astype(np.int64)), torch.from_numpy(dh).to(dtype)

    def run() -> dict[str, np.ndarray]:
        baseline.zero_grad(set_to_none=False)
        h = hidden(tokens)
        h.backward(gradient)
        return {"hidden": h.detach().numpy()}

    def found() -> dict[str, np.ndarray]:
        return run() | baseline.grads_to_numpy()

    return run, found


def check(model: Model) -> float:
    """Largest relative error of our hidden states and gradients. Raises timing.WrongResultError."""
    ids, dh = make_batch(model.config, *CHECKED)
    ours = run_ours(model, ids, dh)
    if importlib.util.find_spec("torch") is None:
        want = ours["hidden"].reshape(*CHECKED, -1)[0].copy()
        state, h = model.prefill(ids[0, :1])
        decoded = [h[0], *(model.decode_step(state, int(token))[0].copy() for token in ids[0, 1:])]
        error = float(np.abs(np.array(decoded) - want).max() / np.abs(want).max())
        if not error < 1e-4:
            raise timing.WrongResultError(f"hidden states differ from the decoder's by {error:.2g} of the largest")
        return error
    import torch

    names = [name for name in ours if not name.startswith("router")]
    wide, narrow = (torch_call(model, ids, dh, dtype=dtype)[1]() for dtype in (torch.float64, torch.float32))
    # a vector is one row: held to its own value alone, an entry that sums to almost nothing has no correct digit
    rows = [{name: np.atleast_2d(found[name]) for name in names} for found in (ours, narrow, wide)]
    rows = [{name: a.reshape(len(a), -1) for name, a in found.items()} for found in rows]
    return head_check.compare("trunk", *rows)


def make_rounded(model: Model, variant: str | None = None) -> Model:
    """The same model with int8 inputs of its ternary products, multiplied by this variant."""
    config = dataclasses.replace(model.config, activations="int8")
    rounded = Model(config, {name: model.parameters[name] for name in parameter_shapes(config)}, DenseHead)
    if variant is not None:
        rounded._weights.use_int8(True, variant)
        rounded.sync_weights()
    return rounded


def check_rounded(model: Model) -> None:
    """Compare int8 products with the same products by BLAS in float32. Raises timing.WrongResultError.

    The comparison uses norms, because a difference in the last bit before quantisation can change a result by one int8
    step. Only the int8 products quantise the gradients of ternary weights, which changes them by one or two percent.
    """
    ids, dh = make_batch(model.config, *CHECKED)
    found, want = (run_ours(make_rounded(model, variant), ids, dh) for variant in (None, "plain"))
    for name, value in want.items():
        error = np.linalg.norm(found[name] - value)
        if not error <= (3e-2 if is_ternary(name) else 5e-3) * np.linalg.norm(value):
            raise timing.WrongResultError(f"int8 activations: {name} is off by {error / np.linalg.norm(value):.2g}")


def measure(model: Model, threads: int, repeats: int) -> dict[str, Any]:
    """Tokens/s by candidate."""
    ids, dh = make_batch(model.config, ROWS, LENGTH)
    rounded = make_rounded(model)
    calls: dict[str, Callable[[], Any]] = {
        "ours": lambda: run_ours(model, ids, dh),
        "ours, int8 activations": lambda: run_ours(rounded, ids, dh),
    }
    if importlib.util.find_spec("torch") is not None:
        import torch

        torch.set_num_threads(threads)
        calls["torch eager"], _ = torch_call(model, ids, dh)
        compiled, _ = torch_call(model, ids, dh, compile=True)
        try:
            compiled()
            calls["torch.compile"] = compiled
        except Exception as error:
            click.echo(f"  torch.compile does not work here: {str(error).splitlines()[0]}")
    seconds = timing.measure(calls, repeats, warmup=2)
    return {name: timing.rate(found, ids.size) for name, found in seconds.items()}


def roofline(model: Model, trunk_rate: float, repeats: int) -> dict[str, dict[str, float]]:
    """name -> flop, minimum bytes moved and seconds per call, for each kernel.

    The bytes count every input and result once, and the activations saved for the backward pass as one write and one
    read.
    """
    from flashlm_numba.kernels import ternary, ternary_gemv

    config, tokens = model.config, ROWS * LENGTH
    points = {
        "trunk, training": {
            "flop": flop_per_token(config) * tokens,
            "bytes": 2.0 * _kept_bytes(model),
            "seconds": tokens / trunk_rate,
        }
    }
    problem = head_problem.zipf_problem(4096, config.dim, config.vocab_size)
    heads = {name: head_candidates.CANDIDATES[name](problem) for name in ("dense", "tree:adaptive")}
    weight = np.random.default_rng(0).integers(-1, 2, (16384, 1024)).astype(np.float32)
    packed = np.tile(ternary.pack_ternary(weight), (1, 16))
    q = np.ones((1, 4 * packed.shape[1]), np.int8)
    optimizer = Optimizer(model.parameters, model.gradients)
    state, _ = model.prefill(np.array([1], np.int32))
    forward = flop_per_token(config) / 3
    own, mixer = state.weights, state.mixer_weights
    read = sum(a.nbytes for a in (own.gate_up_int8, own.down_int8, mixer.out_int8, mixer.conv))  # of all blocks
    work: dict[str, tuple[float, float, Callable[[], Any]]] = {
        **{f"{name} head, training": (head.flop, head.nbytes, head.run) for name, head in heads.items()},
        "ternary matvec, 16,384 squared": (
            2.0 * 16384 * 4 * packed.shape[1],
            float(packed.nbytes),
            lambda: ternary_gemv.ternary_gemv_int8(packed, q),
        ),
        "decoding, a token": (
            forward,
            float(config.n_passes * read),
            lambda: model.decode_step(state, 1),
        ),
        # parameter, gradient and two moments read, all but the gradient written; about 12 operations an element
        "AdamW, the embedding": (
            12.0 * model.parameters["embedding.weight"].size,
            7.0 * model.parameters["embedding.weight"].nbytes,
            lambda: optimizer._step_adamw(["embedding.weight"], 0.0, 1.0, 0.0),
        ),
    }
    seconds = timing.measure({name: run for name, (_, _, run) in work.items()}, repeats)
    for name, (flop, nbytes, _) in work.items():
        points[name] = {"flop": flop, "bytes": nbytes, "seconds": seconds[name]["median"]}
    return points


def _kept_bytes(model: Model) -> int:
    """Bytes that the forward pass saves for the backward pass."""
    (buffers,) = model._buffers.free
    return sum(a.nbytes for a in (*buffers.activations, *buffers.mixer_activations))


@click.command(help=__doc__)
@click.option("--repeats", type=click.IntRange(min=1), default=7, show_default=True, help="Timed turns of each.")
@click.option("--threads", type=click.IntRange(min=1), help="Default: every core.")
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Write the results to this file.")
@click.option("--plot", "plot_path", type=click.Path(path_type=Path), help="Draw the roofline to this .png or .svg.")
def main(repeats: int, threads: int | None, json_path: Path | None, plot_path: Path | None) -> None:
    """See the module's docstring."""
    if plot_path is not None and not charts.can_plot():
        raise click.ClickException("--plot needs matplotlib: pip install -e '.[dev]', or pip install matplotlib")
    if plot_path is not None and plot_path.suffix not in (".png", ".svg"):
        raise click.BadParameter(f"{plot_path} must end in .png or .svg.")
    for path in (json_path, plot_path):
        if path is not None:
            output.check_writable(path)
    try:
        threads = set_threads(threads)
        model = make_model(ModelConfig())
        error = check(model)
        check_rounded(model)
    except (UserError, ValueError) as mistake:
        raise click.ClickException(str(mistake)) from None
    except timing.WrongResultError as wrong:
        click.echo(f"Wrong result: {wrong}.", err=True)
        sys.exit(1)
    stamp = machine.stamp(threads)
    # before PyTorch's threads, which wait for work by spinning
    read = None if plot_path is None else bandwidth.read_bandwidth(threads, repeats=repeats)
    gemm = machine.gemm_rate(threads, repeats=repeats)
    click.echo(
        f"{stamp['machine']['cpu']}, {threads} threads; GEMM {gemm['best']:.0f} GFLOP/s; largest error {error:.2g}"
    )
    rates = measure(model, threads, repeats)
    flop = flop_per_token(model.config)
    for name, rate in rates.items():
        gflops = rate["median"] * flop * 1e-9
        click.echo(
            f"  {name:<24} {rate['median']:>8,.0f} tokens/s  ({rate['p20']:,.0f} to {rate['p80']:,.0f})  "
            f"{gflops:.0f} GFLOP/s, {gflops / gemm['best']:.0%} of the GEMM rate"
        )
    result: dict[str, Any] = {
        **stamp,
        "gemm_gflops": gemm["best"],
        "batch": [ROWS, LENGTH],
        "flop_per_token": flop,
        "tokens_per_s": rates,
        "largest_error": error,
    }
    if read is not None:
        run_ours(model, *make_batch(model.config, ROWS, LENGTH))
        points = roofline(model, rates["ours"]["median"], repeats)
        result |= {"read_gbytes_per_s": read["best"], "roofline": points}
        for name, point in points.items():
            click.echo(
                f"  {name:<32} {point['flop'] / point['bytes']:>7.1f} flop per byte  "
                f"{point['flop'] / point['seconds'] * 1e-9:>7.1f} GFLOP/s"
            )
    if json_path is not None:
        output.write_json(json_path, result)
    if plot_path is not None:
        charts.draw_roofline(result).savefig(plot_path, dpi=150)


if __name__ == "__main__":
    allocators.restart()
    main()
