"""An index of the last tokens of a text, in which decoding finds n-gram copies without searching for them.

A ring contains the last H tokens. For one order n, every place of the ring belongs to a chain: the places whose last n
tokens have the same hash, latest first. The copies of ngram_copy.py are read off the chain of the last n tokens, where
an entry counts only if its tokens are the same. A token costs O(n) on average, however far back the copy reaches.

No place is ever removed from a chain. When the ring returns to a place, links that lead there are stale: they lead to a
token that is nearer than the one before it in the chain, or out of reach, or to one whose last n tokens are others.
Letters: H tokens of the ring, S buckets.
"""

from __future__ import annotations

import numpy as np

from flashlm_numba.kernels._jit import helper


def buckets(history: int) -> int:
    """S, a power of two, for a ring of this many tokens.

    >>> buckets(1026)
    2048
    """
    return 1 << max(history - 1, 0).bit_length()


@helper
def _bucket(recent, order, count):
    """The bucket, below count, of the last `order` tokens of recent. No step exceeds 64 bits."""
    code = np.int64(0)
    for i in range(recent.shape[0] - order, recent.shape[0]):
        code = (code * 1_000_003 + np.int64(recent[i])) & 0x7FFFFFFF
    return (code * 40_503 >> 16) & (count - 1)


@helper
def add_to_index(newest, earlier, recent, place, order):
    """Put the last token of recent (H,), at this place of the ring, at the head of its chain.

    newest (S,) int32: the head of each chain, -1 if it is empty;  earlier (H,) int32: the next of the chain
    """
    bucket = _bucket(recent, order, newest.shape[0])
    earlier[place] = newest[bucket]
    newest[bucket] = place


@helper
def indexed_copy(newest, earlier, recent, place, order, skip, reach):
    """What ngram_copy.copied_row finds for the last token of recent (H,), before add_to_index; H >= reach + order."""
    length = recent.shape[0]
    last = length - 1
    at, before = np.int64(newest[_bucket(recent, order, newest.shape[0])]), 0
    while at >= 0:
        distance = place - at if at < place else place - at + length
        if distance <= before or distance > reach:
            break
        same = 0
        while same < order and recent[last - distance - same] == recent[last - same]:
            same += 1
        if same == order:
            if skip == 0:
                return recent[last - distance + 1]
            skip -= 1
        before, at = distance, np.int64(earlier[at])
    return np.int32(-1)
