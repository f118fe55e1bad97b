"""gzip, xz and zstd at their highest settings, and the texts that they compress."""

from __future__ import annotations

import gzip
import lzma
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import zstandard

WINDOW_LOG = 27  # zstd --ultra --long=27: the window covers every file here
BETWEEN = b"\n\n"  # between documents

Codec = tuple[Callable[[bytes], bytes], Callable[[bytes], bytes]]


def zstd() -> Codec:
    """zstd --ultra -22 with a long window."""
    parameters = zstandard.ZstdCompressionParameters.from_level(22, window_log=WINDOW_LOG, enable_ldm=True)
    there = zstandard.ZstdCompressor(compression_params=parameters)
    back = zstandard.ZstdDecompressor(max_window_size=1 << WINDOW_LOG)
    return there.compress, back.decompress


def codecs() -> dict[str, Codec]:
    """The compressors by name."""
    return {
        "gzip -9": (lambda data: gzip.compress(data, 9), gzip.decompress),
        "xz -9e": (lambda data: lzma.compress(data, preset=9 | lzma.PRESET_EXTREME), lzma.decompress),
        "zstd --ultra -22": zstd(),
    }


def read_documents(path: Path) -> list[bytes]:
    """The documents of a file: the texts in the column `text` of a Parquet file, or the file itself."""
    if path.suffix != ".parquet":
        return [path.read_bytes()]
    import pyarrow.parquet

    column = pyarrow.parquet.read_table(path, columns=["text"])["text"]
    return [text.encode() for text in column.to_pylist() if text]


def measure(name: str, codec: Codec, data: bytes) -> dict[str, Any]:
    """Size, bits per byte, and kilobytes per second in both directions. Ends the program if the data changes."""
    there, back = codec
    began = time.perf_counter()
    packed = there(data)
    between = time.perf_counter()
    if back(packed) != data:
        raise click.ClickException(f"{name} does not give the file back.")
    ended = time.perf_counter()
    return {
        "bytes": len(packed),
        "bits_per_byte": 8 * len(packed) / len(data),
        "compress_kb_per_s": len(data) / (between - began) / 1e3,
        "decompress_kb_per_s": len(data) / (ended - between) / 1e3,
    }
