"""The division of the trunk's work among threads.

A pass through the trunk is a list of steps. It is done in one of two orders:

    deep    A thread does all steps for its own sequences, tile by tile. Its data stay in cache, and no thread waits.
    wide    The steps are done one after another, each by all threads. Consecutive steps with the same division are one
            parallel region, in which a thread does them for a part that fits the cache.

The deep order is used if the sequences divide well among the threads. In the wide order a step divides either by rows,
or by sequences and by shares of something else: channel groups, channels, or the outputs of a weight's gradient. The
sequences are then taken in a few chunks of equal size, and the gradients of the weights need one copy per chunk.
Letters: B batch, T time, N = B*T rows, P threads, Q chunks.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

TILE_ROWS = 256  # rows whose scratch stays in cache
ROW_STEP = 4  # the rows of a thread begin at multiples of this
CHUNKS = 8  # at most
DEEP_SEQUENCE = 1_024  # tokens; a longer sequence does not stay in cache
WIDE_ROWS = 256  # a smaller batch is not worth waiting for one another
UNEVEN = 1.2  # of the deep order: the most that a thread may have, as a multiple of the mean

TILES, ROWS, SEQUENCES = range(3)  # kinds of division; TILES: complete sequences, in the deep order
ANY = 0  # a number of shares: as many as serve


class Stage(NamedTuple):
    """How a step divides in the wide order: by ROWS, or by SEQUENCES and this many shares."""

    kind: int
    shares: int = 1


class Copies(NamedTuple):
    """Numbers of copies of the gradients of weights."""

    rows: int  # of the gradients that are added to in steps which divide by rows
    sequences: int  # of the others


class Part(NamedTuple):
    """A thread's part of some steps. The fields are the columns of Plan.parts."""

    low: int  # first row
    high: int  # last row + 1
    copy: int  # of the gradients
    place: int  # of the scratch that is kept between steps,
    origin: int  # and the row of the batch that is row 0 there
    share: int  # first share
    share_end: int  # last share + 1
    shares: int  # number of shares


class Plan(NamedTuple):
    """The parts of every thread, in arrays."""

    regions: np.ndarray  # (regions, 3) int64: first step, last step + 1, and a row of starts
    starts: np.ndarray  # (any, P + 1) int64: where the parts of each thread begin in parts
    parts: np.ndarray  # (any, 8) int64: see Part


class Division(NamedTuple):
    """The division of a batch of B sequences of T tokens among P threads; see divide."""

    batch: int
    time: int
    threads: int  # in the deep order no more than sequences
    wide: bool
    chunks: int  # Q
    tile: int  # rows of a tile: complete sequences, and what a weight's gradient quantises at a time
    block: int  # rows that a thread processes at a time

    @property
    def copies(self) -> Copies:
        """In the deep order every thread has its own of all gradients."""
        return Copies(self.threads, self.chunks if self.wide else self.threads)

    @property
    def places(self) -> tuple[int, int]:
        """Of the scratch that is kept between steps: places, and rows of each."""
        return (1, self.batch * self.time) if self.wide else (self.threads, self.tile)

    def parts(self, stage: Stage, thread: int) -> Iterator[Part]:
        """A thread's parts of a step in the wide order."""
        if stage.kind == ROWS:
            rows, step = self.batch * self.time, ROW_STEP
            first, last = (min(rows, step * share_of(-(-rows // step), thread + i, self.threads)) for i in range(2))
            for low in range(first, last, self.block):
                yield Part(low, min(low + self.block, last), thread, 0, 0, 0, 1, 1)
            return
        shares = self.shares(stage)
        first, last = (share_of(self.chunks * shares, thread + i, self.threads) for i in range(2))
        for chunk in range(first // shares, -(-last // shares)):
            low, high = (self.time * share_of(self.batch, chunk + i, self.chunks) for i in range(2))
            share, end = max(first - chunk * shares, 0), min(last - chunk * shares, shares)
            yield Part(low, high, chunk, 0, 0, share, end, shares)

    def shares(self, stage: Stage) -> int:
        """The number of shares of each chunk; for ANY, the least with which every thread gets the same."""
        return stage.shares or self.threads // math.gcd(self.threads, self.chunks)

    def tiles(self, thread: int) -> Iterator[Part]:
        """A thread's parts in the deep order."""
        first, last = (self.time * share_of(self.batch, thread + i, self.threads) for i in range(2))
        for low in range(first, last, self.tile):
            yield Part(low, min(low + self.tile, last), thread, thread, low, 0, 1, 1)

    def plan(self, stages: Sequence[Stage]) -> Plan:
        """The regions and parts of a pass, of whose steps these are the stages."""
        threads = range(self.threads)
        if not self.wide:
            return _plan([[0, len(stages), 0]], [[list(self.tiles(thread)) for thread in threads]])
        kinds = list(dict.fromkeys(stages))
        regions: list[list[int]] = []
        for step, stage in enumerate(stages):
            if step and stage == stages[step - 1]:
                regions[-1][1] += 1
            else:
                regions.append([step, step + 1, kinds.index(stage)])
        return _plan(regions, [[list(self.parts(stage, thread)) for thread in threads] for stage in kinds])


def share_of(count: int, share: int, shares: int) -> int:
    """Where a share of `count` things begins."""
    return share * count // shares


def divide(batch: int, time: int, threads: int) -> Division:
    """The division for a batch of these sequences and tokens.

    >>> divide(8, 256, 4).wide, divide(8, 256, 16).wide, divide(8, 256, 16).copies
    (False, True, Copies(rows=16, sequences=8))
    """
    tile = max(1, TILE_ROWS // max(time, 1)) * max(time, 1)
    uneven = -(-batch // threads) * threads / max(batch, 1)
    if batch * time < max(WIDE_ROWS, 1) or (time <= DEEP_SEQUENCE and uneven <= UNEVEN):
        working = min(threads, max(batch, 1))
        return Division(batch, time, working, False, working, tile, tile)
    chunks = max(n for n in range(1, min(CHUNKS, threads, batch) + 1) if batch % n == 0)
    rows = -(-batch * time // threads)
    block = min(TILE_ROWS, -(-rows // ROW_STEP) * ROW_STEP)
    return Division(batch, time, threads, True, chunks, tile, block)


def _plan(regions: list[list[int]], tables: list[list[list[Part]]]) -> Plan:
    starts: list[list[int]] = []
    parts: list[Part] = []
    for table in tables:
        row = [len(parts)]
        for own in table:
            parts += own
            row.append(len(parts))
        starts.append(row)
    return Plan(
        np.array(regions, np.int64).reshape(-1, 3),
        np.array(starts, np.int64),
        np.array(parts, np.int64).reshape(-1, len(Part._fields)),
    )
