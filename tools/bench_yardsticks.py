"""Bits per byte of a text without a neural network: by gzip, xz, zstd, and n-grams of the training text.

\b
    python tools/bench_yardsticks.py DATA                    the validation documents of prepared data
    python tools/bench_yardsticks.py FILE                    a text, or a Parquet file with the column `text`
    python tools/bench_yardsticks.py DATA --json out.json    write what was measured

The compressors get all documents as one file, with an empty line between two of them, and its decompressed form is
compared. Their bits are divided by the bytes of the documents alone, as those of `flashlm-numba eval` are. The n-grams
are of up to 5 tokens of DATA's vocabulary, with interpolated modified Kneser-Ney smoothing (docs/memory.md). They are
counted in DATA's training text, and score its validation documents by the rule of `eval`. A FILE has no n-grams.
"""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import click
import numpy as np

if __package__ in (None, ""):  # run as a file, the checkout is not on the path
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from flashlm_numba.data.shards import TokenData, open_tokens
from flashlm_numba.memory.counting import count_tokens
from flashlm_numba.memory.ngrams import ORDER
from flashlm_numba.system.compiled import ensure_compiled
from flashlm_numba.system.display import TERMINAL, plural
from flashlm_numba.system.errors import UserError
from flashlm_numba.system.threads import set_threads
from tools.bench import machine, output
from tools.bench.codecs import BETWEEN, codecs, measure, read_documents

NGRAMS = f"{ORDER}-gram Kneser-Ney"


def compressed(documents: list[bytes]) -> dict[str, dict[str, Any]]:
    """Bytes and bits per byte by each compressor."""
    data, size = BETWEEN.join(documents), sum(map(len, documents))
    rows = {}
    for name, codec in codecs().items():
        packed = measure(name, codec, data)["bytes"]
        rows[name] = {"bytes": packed, "bits_per_byte": 8 * packed / size}
    return rows


def by_ngrams(tokens: TokenData) -> dict[str, Any]:
    """NLL and bits per byte of the validation documents by the n-grams of the training text."""
    ensure_compiled(["ngrams"], TERMINAL)
    model, seconds = count_tokens(tokens, 1, TERMINAL)
    split = tokens.validation
    nll = sum(-float(np.log(model.probability(d)[0].astype(np.float64)).sum()) for d in split.documents())
    return {
        "nll": nll / split.n_text_tokens,
        "bits_per_byte": nll / (math.log(2) * split.n_bytes),
        "tokens": split.n_text_tokens,
        "vocabulary": tokens.vocabulary.name,
        "ngrams": len(model.tables.tokens),
        "table_bytes": model.nbytes,
        "counting_seconds": seconds,
    }


@click.command(help=__doc__)
@click.argument("text", metavar="DATA|FILE", type=click.Path(exists=True, path_type=Path))
@click.option("--threads", type=click.IntRange(min=1), help="Number of threads of the n-grams. Default: all.")
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Write the result here.")
def main(text: Path, threads: int | None, json_path: Path | None) -> None:
    if json_path is not None:
        output.check_writable(json_path)
    threads = set_threads(threads)
    try:
        tokens = open_tokens(text) if text.is_dir() else None
        documents = read_documents(text) if tokens is None else validation(tokens)
        size = sum(map(len, documents))
        if not size:
            raise UserError(f"{text} holds no text to score.")
        rows = compressed(documents)
        if tokens is not None:
            rows[NGRAMS] = by_ngrams(tokens)
    except UserError as error:
        raise click.UsageError(str(error)) from None
    click.echo(f"{plural(len(documents), 'document')}, {size:,} bytes\n\n| | bits per byte |\n| --- | ---: |")
    for name, row in sorted(rows.items(), key=lambda item: item[1]["bits_per_byte"]):
        click.echo(f"| {name} | {row['bits_per_byte']:.3f} |")
    if json_path is not None:
        found = {"text": text.name, "documents": len(documents), "bytes": size, "yardsticks": rows}
        output.write_json(json_path, machine.stamp(threads) | found)


def validation(tokens: TokenData) -> list[bytes]:
    """The bytes of the validation documents. Raises UserError if their shards are damaged."""
    tokens.verify("validation")
    return [tokens.vocabulary.decode_bytes(document.tolist()) for document in tokens.validation.documents()]


if __name__ == "__main__":
    main()
