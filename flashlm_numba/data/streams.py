"""The text of a local file as a stream: compressed or not, in UTF-8 or in UTF-16 or UTF-32 with a mark.

The locale changes nothing. Memory is bounded by a block, by the window of a zstd frame, and by the longest line.
"""

from __future__ import annotations

import codecs
import gzip
import io
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

BLOCK = 1 << 18  # bytes read at once
MAX_WINDOW = 1 << 31  # bytes of memory that a zstd frame may ask for: 2 GB, the most that `zstd --long=31` writes
MAX_DOCUMENT = 256 << 20  # limit for a document and for a line; memory holds several copies of one
GZIP = b"\x1f\x8b"
ZSTD = b"\x28\xb5\x2f\xfd"
SKIPPABLE = b"\x2a\x4d\x18"  # bytes 2 to 4 of a zstd frame without text, such as a table of contents
# marks at the beginning of a text; those of UTF-32 come first, because one begins like that of UTF-16
MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)


class LineTooLong(Exception):
    """A line is longer than MAX_DOCUMENT."""


class NulCharacter(Exception):
    """A text holds U+0000: it is damaged (a crash fills a file with zeros), binary, or UTF-16 without a mark."""


class Position:
    """How far a file has been read: the number of lines or rows, for messages."""

    def __init__(self, unit: str) -> None:
        self.unit = unit  # "line" or "row"
        self.number = 0


def is_zstd(head: bytes) -> bool:
    """Whether a file that begins with these bytes is compressed with zstd."""
    return head[:4] == ZSTD or (head[1:4] == SKIPPABLE and head[0] & 0xF0 == 0x50)


def encoding_of(head: bytes) -> tuple[str, int]:
    """The encoding of a text that begins with these bytes, and the length of its mark."""
    return next(((name, len(mark)) for mark, name in MARKS if head.startswith(mark)), ("utf-8", 0))


def blocks(path: Path) -> Iterator[bytes]:
    """The bytes of a file, decompressed if its name ends in .gz or .zst.

    Raises OSError or an error of the library. EOFError means that a compressed stream has no end.
    """
    name = path.name.lower()
    with path.open("rb") as file:
        if name.endswith(".zst"):
            yield from _zstd_blocks(file)
            return
        stream = gzip.GzipFile(fileobj=file) if name.endswith(".gz") else file
        while block := stream.read1(BLOCK):  # what comes before damage in a compressed stream is not lost
            yield block


def _zstd_blocks(file: BinaryIO) -> Iterator[bytes]:
    """The content of all frames. zstandard's own reader takes a frame without its end for a whole one."""
    import zstandard

    decompressor = zstandard.ZstdDecompressor(max_window_size=MAX_WINDOW)
    frame = None
    while block := file.read(4096):  # few bytes at once, which may become 128 MB of zeros
        while block:
            frame = frame or decompressor.decompressobj()
            if content := frame.decompress(block):
                yield content
            block = b""
            if frame.eof:
                block, frame = frame.unused_data, None
    if frame is not None:
        raise EOFError("the last frame has no end")


def text_blocks(path: Path) -> Iterator[str]:
    """The text of a file. Before a UnicodeDecodeError or NulCharacter comes the text before the wrong bytes."""
    stream = blocks(path)
    head = b""
    while len(head) < 4 and (block := next(stream, b"")):
        head += block
    encoding, mark = encoding_of(head)
    decoder = codecs.getincrementaldecoder(encoding)()
    block, final = head[mark:], not head
    while True:
        try:
            text = decoder.decode(block, final)
        except UnicodeDecodeError as error:
            yield bytes(error.object[: error.start]).decode(encoding)
            raise
        if (nul := text.find("\0")) >= 0:
            yield text[:nul]
            raise NulCharacter
        if text:
            yield text
        if final:
            return
        block = next(stream, b"")
        final = not block


def with_newlines(stream: Iterator[str]) -> Iterator[str]:
    r"""A text with \r\n and \r replaced by \n."""
    decoder = io.IncrementalNewlineDecoder(None, translate=True)
    for text in stream:
        yield decoder.decode(text)
    yield decoder.decode("", final=True)


def lines(stream: Iterator[str], position: Position) -> Iterator[str]:
    """The lines of a text without their ends. position.number is the number of the line just passed on."""
    parts: list[str] = []
    size = 0
    for text in stream:
        first, *others = text.split("\n")
        size += len(first)
        if size > MAX_DOCUMENT:
            raise LineTooLong
        parts.append(first)
        if not others:
            continue
        last = others.pop()
        for line in ("".join(parts), *others):
            position.number += 1
            yield line
        parts, size = [last], len(last)
    if size:
        position.number += 1
        yield "".join(parts)
