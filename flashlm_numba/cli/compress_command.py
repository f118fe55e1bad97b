"""The commands `compress` and `decompress`."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import TYPE_CHECKING

import click

from flashlm_numba.cli import options
from flashlm_numba.cli.options import PathOrSource, echo, use_threads
from flashlm_numba.system.errors import UserError

if TYPE_CHECKING:
    from flashlm_numba.data.tokenizer import Vocabulary
    from flashlm_numba.model.model import Model
    from flashlm_numba.model.packed_model import PackedModel

_file = click.argument("file", type=PathOrSource(path_type=Path))
_out = click.argument("out", type=PathOrSource(path_type=Path))
_force = click.option("--force", is_flag=True, help="Replace OUT if it exists.")


@click.command()
@options.run
@_file
@_out
@_force
@options.activations
@options.ema
@options.checkpoint
@options.threads
def compress(
    run: Path,
    file: Path,
    out: Path,
    force: bool,
    activations: str | None,
    ema: bool,
    checkpoint: str | None,
    threads: int | None,
) -> None:
    """Compress FILE to OUT with the model in RUN, without loss.

    A text takes as many bits as the model's NLL says. Any file comes back bit by bit by `decompress` with the same
    model, on the same processor with the same version of this program; OUT names them. RUN may also be a file written
    by `export`. The command needs the package of `pip install 'flashlm-numba[compress]'`.
    """
    from flashlm_numba.inference.compress import compress as compress_bytes

    data = _read(file)
    _check_out(out, force)
    use_threads(threads)
    model, vocabulary = _load(run, checkpoint, ema, activations)
    kind = activations or model.config.activations
    model.use_activations(kind)
    began = time.perf_counter()
    result = compress_bytes(model, vocabulary, data, activations=kind)
    _write(out, result.data)
    size, seconds = len(data), time.perf_counter() - began
    line = f"{file}: {size:,} bytes, {out}: {len(result.data):,}"
    if size:
        line += f", {8 * len(result.data) / size:.4f} bits per byte"
    if result.tokens:
        line += f" (ideal {result.ideal_bits / size:.4f}), {result.tokens / seconds:,.0f} tokens/s"
    echo(line if result.tokens or not size else f"{line}; stored as it is, which is smaller")


@click.command()
@options.run
@_file
@_out
@_force
@options.ema
@options.checkpoint
@options.threads
def decompress(
    run: Path, file: Path, out: Path, force: bool, ema: bool, checkpoint: str | None, threads: int | None
) -> None:
    """Restore to OUT the file that `compress` wrote as FILE, with the same model in RUN.

    OUT is written only if it is the original bit by bit.
    """
    from flashlm_numba.inference.compress import decompress as decompress_bytes
    from flashlm_numba.inference.compress import read_header

    data = _read(file)
    _check_out(out, force)
    model, vocabulary = None, None
    if header := read_header(data):
        use_threads(threads)
        model, vocabulary = _load(run, checkpoint, ema, header.activations)
    restored = decompress_bytes(data, model, vocabulary)
    _write(out, restored)
    echo(f"{out}: {len(restored):,} bytes")


def _load(
    run: Path, checkpoint: str | None, ema: bool, activations: str | None
) -> tuple[Model | PackedModel, Vocabulary]:
    from flashlm_numba.model.packed_reading import load_for_generation

    uses = ["generate", "coding", *filter(None, [activations])]
    model, vocabulary = load_for_generation(run, checkpoint, ema=ema, uses=uses)
    vocabulary.load()
    return model, vocabulary


def _read(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror or error}.") from None


def _check_out(out: Path, force: bool) -> None:
    """Raise UserError unless OUT can be written, before minutes of work."""
    if os.path.lexists(out) and not force:
        raise UserError(f"{out} exists; give another name, or --force to replace it.")
    if out.is_dir():
        raise UserError(f"{out} is a folder; give the name of a file.")
    if not out.absolute().parent.is_dir():
        raise UserError(f"There is no folder {out.absolute().parent}; make it, or give another name.")


def _write(out: Path, data: bytes) -> None:
    from flashlm_numba.system.files import write_atomically, writing_to

    with writing_to(out.absolute().parent, "choose another OUT"):
        write_atomically(out, lambda file: file.write(data))
