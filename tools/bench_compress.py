"""Size and speed of compression with a model, beside gzip, xz and zstd, and beside the NLL of `eval`.

\b
    python tools/bench_compress.py RUN FILE                   the whole file
    python tools/bench_compress.py RUN FILE --bytes 300000    its first bytes, cut at a line
    python tools/bench_compress.py RUN FILE --json out.json   write what was measured

FILE is a text, or a Parquet file whose column `text` is joined with empty lines. Every compressed file is decompressed
and compared before its size counts; a difference ends the program with status 1. The ideal is the summed NLL that
`fl.load(RUN).score` gives for the same text, in bits. RUN may also be an exported file. Use a quiet machine.
"""

from __future__ import annotations

import math
import sys
from pathlib import Path

import click

if __package__ in (None, ""):  # run as a file, the checkout is not on the path
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import flashlm_numba as fl
from flashlm_numba.inference.compress import compress, decompress
from flashlm_numba.model.packed_reading import load_for_generation
from flashlm_numba.system.threads import set_threads
from tools.bench import machine, output
from tools.bench.codecs import BETWEEN, codecs, measure, read_documents


def read_text(path: Path, limit: int | None) -> bytes:
    """The bytes to compress: at most `limit` of them, cut after a line."""
    data = BETWEEN.join(read_documents(path))
    if limit is None or len(data) <= limit:
        return data
    end = data.rfind(b"\n", 0, limit) + 1
    return data[: end or limit]


@click.command(help=__doc__)
@click.argument("run", type=click.Path(exists=True, path_type=Path))
@click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--bytes", "limit", type=click.IntRange(min=1), help="Compress only so many bytes. Default: all.")
@click.option("--threads", type=click.IntRange(min=1), help="Number of threads. Default: all.")
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Write the result here.")
def main(run: Path, file: Path, limit: int | None, threads: int | None, json_path: Path | None) -> None:
    if json_path is not None:
        output.check_writable(json_path)
    threads = set_threads(threads)
    data = read_text(file, limit)
    if not data:
        raise click.ClickException(f"{file} is empty.")
    model, vocabulary = load_for_generation(run, uses=["generate", "coding"])
    kind = model.config.activations
    tokens = 0

    def there(data: bytes) -> bytes:
        nonlocal tokens
        found = compress(model, vocabulary, data, activations=kind)
        tokens = found.tokens
        return found.data

    rows = {
        "flashlm-numba": measure("flashlm-numba", (there, lambda packed: decompress(packed, model, vocabulary)), data)
    }
    rows["flashlm-numba"]["tokens_per_s"] = tokens / len(data) * rows["flashlm-numba"]["compress_kb_per_s"] * 1e3
    rows |= {name: measure(name, codec, data) for name, codec in codecs().items()}
    nll = float(fl.load(run, progress=fl.TERMINAL).score(data.decode()).token_nll.sum())
    ideal = nll / math.log(2) / len(data)
    click.echo(f"{len(data):,} bytes, {tokens:,} tokens; ideal {ideal:.4f} bits per byte")
    click.echo(f"{'':<18}{'bytes':>12}{'bits/byte':>11}{'ratio':>8}{'kB/s':>10}{'kB/s back':>11}")
    for name, row in rows.items():
        click.echo(
            f"{name:<18}{row['bytes']:>12,}{row['bits_per_byte']:>11.4f}{len(data) / row['bytes']:>8.2f}"
            f"{row['compress_kb_per_s']:>10,.1f}{row['decompress_kb_per_s']:>11,.1f}"
        )
    if json_path is not None:
        found = {"original_bytes": len(data), "tokens": tokens, "ideal_bits_per_byte": ideal, "codecs": rows}
        output.write_json(json_path, machine.stamp(threads) | {"file": file.name} | found)


if __name__ == "__main__":
    main()
