"""The n-grams of a text, counted and smoothed: the tables of ngrams.py, which has the formulas.

The positions of the text are sorted by the n-gram that ends there, for n = 2, 3, ... in turn. The positions with the
same n-gram are adjacent, so those after them are the occurrences of its followers, and sorting each group by token
gives the n-grams one token longer. Most groups are small. Threads own whole groups, and every number of threads gives
the same tables.
Letters: T tokens of a text, V vocabulary, N order, U n-grams of one length, Q n-grams one token shorter, the contexts;
P threads.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numba
import numpy as np
from numba import prange

from flashlm_numba.kernels import _check
from flashlm_numba.kernels._jit import helper, kernel, serial_kernel
from flashlm_numba.kernels.ngrams import ALONE, MOST_COUNTED, NgramModel, NgramTables

MOST_TOKENS = 2**31 - 2  # positions are int32
LEAST_DISCOUNT = 0.1
_FEW = 48  # up to so many numbers, insertion is the faster sort


class _Places(NamedTuple):
    """The positions of a text, sorted by the n-gram that ends there and then by position."""

    places: np.ndarray  # (any,) int32
    first: np.ndarray  # (U + 1,) int64: of each n-gram


class _Groups(NamedTuple):
    """The positions after each context, sorted by token, where the context's places are."""

    keys: np.ndarray  # (any,) int64: token and position
    sizes: np.ndarray  # (Q,) int64: positions
    different: np.ndarray  # (Q,) int64: tokens


class _Counted(NamedTuple):
    """The n-grams of one length, sorted by context and token."""

    starts: np.ndarray  # (Q + 1,) int64: the first of each context
    tokens: np.ndarray  # (U,) uint16 or uint32
    counts: np.ndarray  # (U,) int32: occurrences
    last: np.ndarray  # (U,) int32: the position where the first of them ends
    alone: np.ndarray  # (U,) uint8: 1 if all occurrences are in one document
    ends: np.ndarray  # (T,) int32: the n-gram that ends at each position, or -1


# --- counting ---


@serial_kernel
def _sort_by_token(places, next_place, text):
    """places (T,), for next_place (V,), the number of smaller tokens, which changes."""
    for t in range(text.shape[0]):
        places[next_place[text[t]]] = t
        next_place[text[t]] += 1


@helper
def _sort(keys, spare, low, high, bits, digits):
    """Sort keys[low:high] by their tokens of so many bits; keys come sorted by position. digits (256,): scratch"""
    if high - low <= _FEW:
        for i in range(low + 1, high):
            key, j = keys[i], i
            while j > low and keys[j - 1] > key:
                keys[j] = keys[j - 1]
                j -= 1
            keys[j] = key
        return
    for shift in range(32, 32 + bits, 8):
        for d in range(256):
            digits[d] = 0
        for i in range(low, high):
            digits[(keys[i] >> shift) & 255] += 1
        total = low
        for d in range(256):
            count = digits[d]
            digits[d] = total
            total += count
        for i in range(low, high):
            d = (keys[i] >> shift) & 255
            spare[digits[d]] = keys[i]
            digits[d] += 1
        for i in range(low, high):
            keys[i] = spare[i]


@helper
def _group_some(groups, spare, digits, before, text, barrier, bits, begin, end):
    """Of the contexts begin..end. barrier: a token that ends no context; -1 if all may"""
    for context in range(begin, end):
        low, high, last = before.first[context], before.first[context + 1], before.first[context]
        if low < high and text[before.places[low]] != barrier:
            for i in range(low, high):
                position = np.int64(before.places[i]) + 1
                if position < text.shape[0]:
                    groups.keys[last] = np.int64(text[position]) << 32 | position
                    last += 1
        _sort(groups.keys, spare, low, last, bits, digits)
        different = 0
        for i in range(low, last):
            if i == low or groups.keys[i] >> 32 != groups.keys[i - 1] >> 32:
                different += 1
        groups.sizes[context], groups.different[context] = last - low, different


@kernel
def _group(groups, spare, digits, before, text, barrier, bits, bounds):
    for index in prange(bounds.shape[0] - 1):
        thread = np.int64(index)
        begin, end = bounds[thread], bounds[thread + 1]
        _group_some(groups, spare, digits[thread], before, text, barrier, bits, begin, end)


@helper
def _list_some(counted, after, groups, before, offsets, documents, begin, end):
    for context in range(begin, end):
        low, gram, place = before.first[context], counted.starts[context] - 1, offsets[context]
        for i in range(low, low + groups.sizes[context]):
            token, position = groups.keys[i] >> 32, groups.keys[i] & 0xFFFFFFFF
            if i == low or token != groups.keys[i - 1] >> 32:
                gram += 1
                counted.tokens[gram], counted.counts[gram], counted.last[gram] = token, 0, position
                counted.alone[gram], after.first[gram] = 1, place
            elif documents[position] != documents[counted.last[gram]]:
                counted.alone[gram] = 0
            counted.counts[gram] += 1
            counted.ends[position] = gram
            after.places[place] = position
            place += 1


@kernel
def _list(counted, after, groups, before, offsets, documents, bounds):
    """Write what the groups contain; offsets (Q,): in after.places; documents (T,) int32: of each position."""
    for index in prange(bounds.shape[0] - 1):
        thread = np.int64(index)
        _list_some(counted, after, groups, before, offsets, documents, bounds[thread], bounds[thread + 1])


def _starts(sizes: np.ndarray) -> np.ndarray:
    """Where each of so many things begins, and the end, (any + 1,) int64."""
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(sizes, dtype=np.int64)])


def _longer(
    text: np.ndarray, documents: np.ndarray, before: _Places, vocab_size: int, barrier: int
) -> tuple[_Counted, _Places]:
    """The n-grams one token longer than those of `before`."""
    size, contexts, threads = len(before.places), len(before.first) - 1, numba.get_num_threads()
    shares = [thread * size // threads for thread in range(1, threads)]
    bounds = np.array([0, *np.searchsorted(before.first[:-1], shares), contexts], np.int64)
    groups = _Groups(np.empty(size, np.int64), np.empty(contexts, np.int64), np.empty(contexts, np.int64))
    bits = max(vocab_size - 1, 1).bit_length()
    digits = np.empty((threads, 256), np.int64)
    _group(groups, np.empty(size, np.int64), digits, before, text, barrier, bits, bounds)
    starts, offsets = _starts(groups.different), _starts(groups.sizes)
    grams = int(starts[-1])
    counted = _Counted(
        starts,
        np.empty(grams, np.uint16 if vocab_size <= 2**16 else np.uint32),
        np.empty(grams, np.int32),
        np.empty(grams, np.int32),
        np.empty(grams, np.uint8),
        np.full(len(text), -1, np.int32),
    )
    after = _Places(np.empty(int(offsets[-1]), np.int32), np.full(grams + 1, offsets[-1], np.int64))
    _list(counted, after, groups, before, offsets, documents, bounds)
    return counted, after


# --- smoothing ---


def _discounts(counts: np.ndarray) -> np.ndarray:
    """D (4,) for counts of 0, 1, 2 and more: Chen and Goodman's estimate, kept between LEAST_DISCOUNT and the count.

    In a text that contains itself several times the estimate may be negative. Without a discount a context would leave
    nothing for the tokens that have not followed it.
    """
    n1, n2, n3, n4 = np.bincount(np.minimum(counts, 5), minlength=6)[1:5].tolist()
    if not n1 or not n2:
        return np.array([0, 0.5, 0.5, 0.5])
    share = n1 / (n1 + 2 * n2)
    second = 2 - 3 * share * n3 / n2
    third = 3 - 4 * share * n4 / n3 if n3 else second
    return np.array([0, *np.clip([1 - 2 * share * n2 / n1, second, third], LEAST_DISCOUNT, [1, 2, 3])])


@helper
def _smooth_context(alpha, kept, counts, occurrences, discounts, least, low, high):
    """alpha and kept of a context's followers low..high. Returns its gamma."""
    total, given = 0.0, np.float64(0)
    for i in range(low, high):
        total += counts[i]
    for i in range(low, high):
        share = np.float32((counts[i] - discounts[min(counts[i], 3)]) / total)
        alpha[i], kept[i] = share, occurrences[i] >= least
        if kept[i]:
            given += np.float64(share)  # as it is rounded, so that all sums to one
    return np.float32(max(1.0 - given, 0.0))


@helper
def _smooth_some(alpha, gamma, kept, starts, counts, occurrences, discounts, least, begin, end):
    for context in range(begin, end):
        low, high = starts[context], starts[context + 1]
        gamma[context] = _smooth_context(alpha, kept, counts, occurrences, discounts, least, low, high)


@kernel
def _smooth(alpha, gamma, kept, starts, counts, occurrences, discounts, least, threads):
    for index in prange(threads):
        thread, size = np.int64(index), gamma.shape[0]
        begin, end = thread * size // threads, (thread + 1) * size // threads
        _smooth_some(alpha, gamma, kept, starts, counts, occurrences, discounts, least, begin, end)


class _Smoothed(NamedTuple):
    """The tables of one length n, with all n-grams."""

    starts: np.ndarray  # (Q + 1,) int64
    tokens: np.ndarray  # (U,)
    counts: np.ndarray  # (U,) uint8
    alpha: np.ndarray  # (U,) float32
    gamma: np.ndarray  # (Q,) float32: of the contexts
    kept: np.ndarray  # (U,) bool
    discounts: np.ndarray  # (4,) float64


def _smoothed(counted: _Counted, counts: np.ndarray, least: int) -> _Smoothed:
    grams, contexts = len(counted.tokens), len(counted.starts) - 1
    counts, discounts = counts.astype(np.int32, copy=False), _discounts(counts)
    found = _Smoothed(
        counted.starts,
        counted.tokens,
        np.minimum(counts, MOST_COUNTED).astype(np.uint8) | counted.alone * np.uint8(ALONE),
        np.empty(grams, np.float32),
        np.empty(contexts, np.float32),
        np.empty(grams, np.bool_),
        discounts,
    )
    threads, occurrences = numba.get_num_threads(), counted.counts
    _smooth(
        found.alpha, found.gamma, found.kept, found.starts, counts, occurrences, discounts, np.int64(least), threads
    )
    return found


def _unigram(counts: np.ndarray) -> np.ndarray:
    """p_1 (V,) float32."""
    removed = _discounts(counts)[np.minimum(counts, 3)]
    total, left = max(counts.sum(), 1), removed.sum() if counts.any() else 1
    return ((counts - removed) / total + left / total / len(counts)).astype(np.float32)


def _joined(unigram: np.ndarray, lengths: list[_Smoothed]) -> NgramTables:
    """The tables of all lengths without what is not kept. A context that is left out has no followers that are kept."""
    starts, offset, gammas = [], 0, []
    contexts = np.ones(len(unigram), np.bool_)
    for found in lengths:
        if found.kept.all() and contexts.all():
            starts.append(offset + found.starts[:-1])
            gammas.append(found.gamma)
        else:
            places = _starts(found.kept)
            starts.append(offset + places[found.starts[:-1]][contexts])
            gammas.append(found.gamma[contexts])
        contexts = found.kept
        offset += int(np.count_nonzero(found.kept))
    return NgramTables(
        unigram,
        np.concatenate([found.tokens[found.kept] for found in lengths]),
        np.concatenate([found.counts[found.kept] for found in lengths]),
        np.concatenate([found.alpha[found.kept] for found in lengths]),
        np.concatenate(gammas),
        np.concatenate([*starts, np.array([offset])]),
        np.stack([found.discounts for found in lengths]),
    )


# --- public ---


def count_ngrams(
    text: np.ndarray,
    vocab_size: int,
    end_of_text: int,
    *,
    order: int = 5,
    least: int = 1,
    progress: Callable[[int], None] = lambda length: None,
) -> NgramModel:
    """The n-grams of a text, counted and smoothed.

    text : (T,) integers, documents that each end with end_of_text
    order : N, at least 2
    least : n-grams of three and more tokens that occur less often are left out; gamma takes over their share
    progress : called with each length once it is counted
    It uses as many threads as Numba, and about 36 bytes per token of the text and 26 per n-gram of memory. Raises
    ValueError if text is not of the vocabulary or has 2**31 - 2 tokens or more, or an option is out of range.
    """
    if order < 2:
        raise ValueError(f"count_ngrams: order must be at least 2, got {order}")
    if len(text) >= MOST_TOKENS:
        raise ValueError(f"count_ngrams: text must have fewer than {MOST_TOKENS:,} tokens, got {len(text):,}")
    if not 0 <= end_of_text < vocab_size:
        raise ValueError(f"count_ngrams: end_of_text must be in [0, {vocab_size}), got {end_of_text}")
    _check.indices("count_ngrams", "text", text, vocab_size)
    least = min(least, MOST_TOKENS)  # nothing occurs more often
    text = np.concatenate([np.array([end_of_text], np.int32), text], dtype=np.int32)
    documents = np.cumsum(text == end_of_text, dtype=np.int32)
    documents -= text == end_of_text  # the token that ends a document is its own
    first = _starts(np.bincount(text, minlength=vocab_size))
    before = _Places(np.empty(len(text), np.int32), first)
    _sort_by_token(before.places, first[:-1].copy(), text)
    lengths: list[_Smoothed] = []
    unigram, shorter = np.empty(0, np.float32), None
    for n in range(2, order + 1):
        # of a context only the first token may be end_of_text
        counted, before = _longer(text, documents, before, vocab_size, -1 if n == 2 else end_of_text)
        if shorter is None:
            unigram = _unigram(np.bincount(text[counted.last], minlength=vocab_size))
        else:
            counts = np.bincount(shorter.ends[counted.last], minlength=len(shorter.tokens))
            begins = text[shorter.last - (n - 2)] == end_of_text  # nothing precedes these
            lengths.append(_smoothed(shorter, np.where(begins, shorter.counts, counts), least if n > 3 else 1))
        shorter = counted
        progress(n)
    assert shorter is not None
    lengths.append(_smoothed(shorter, shorter.counts, least if order > 2 else 1))
    return NgramModel(order, end_of_text, _joined(unigram, lengths))
