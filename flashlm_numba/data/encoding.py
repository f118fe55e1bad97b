"""Tokenise documents with several threads, in order and a few batches ahead of the writer."""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from flashlm_numba.data.documents import Document
from flashlm_numba.data.tokenizer import Vocabulary

if TYPE_CHECKING:
    from flashlm_numba.data.writer import Ids

BATCH_CHARACTERS = 1 << 18  # characters per batch, the unit of work of a thread


@dataclass(frozen=True)
class Piece:
    """Part of a document, small enough to be encoded at once."""

    text: str
    document: Document
    last: bool  # whether it is the last piece of its document


def _batches(vocabulary: Vocabulary, documents: Iterator[Document]) -> Iterator[list[Piece]]:
    batch: list[Piece] = []
    size = 0
    for document in documents:
        done = 0
        for text in vocabulary.pieces(document.text):
            done += len(text)
            batch.append(Piece(text, document, done == len(document.text)))
            size += len(text)
            if size >= BATCH_CHARACTERS:
                yield batch
                batch, size = [], 0
    if batch:
        yield batch


def _encode(vocabulary: Vocabulary, batch: list[Piece]) -> list[tuple[Ids, int]]:
    """Ids and number of UTF-8 bytes of every piece."""
    encoded = vocabulary.encode_batch([piece.text for piece in batch])
    return [
        (np.array(ids, dtype=vocabulary.dtype), len(piece.text.encode("utf-8", "replace")))
        for ids, piece in zip(encoded, batch, strict=True)
    ]


def encoded(
    vocabulary: Vocabulary, documents: Iterator[Document], workers: int
) -> Generator[tuple[Piece, Ids, int], None, None]:
    """Pieces with their ids and numbers of bytes, in order, encoded by worker threads a few batches ahead.

    Threads suffice, because tiktoken does nearly all of the work and releases Python's lock. Unlike processes, threads
    start at once, copy nothing, and coexist with Numba's threads.
    """
    pending: deque[tuple[list[Piece], Future[list[tuple[Ids, int]]]]] = deque()
    with ThreadPoolExecutor(workers, thread_name_prefix="tokenize") as pool:
        try:
            for batch in _batches(vocabulary, documents):
                pending.append((batch, pool.submit(_encode, vocabulary, batch)))
                if len(pending) > 2 * workers:
                    done, future = pending.popleft()
                    for piece, (ids, size) in zip(done, future.result(), strict=True):
                        yield piece, ids, size
            while pending:
                done, future = pending.popleft()
                for piece, (ids, size) in zip(done, future.result(), strict=True):
                    yield piece, ids, size
        finally:
            for _, future in pending:
                future.cancel()
