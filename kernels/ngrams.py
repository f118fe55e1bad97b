"""n-gram probabilities of a text: interpolated modified Kneser-Ney smoothing, on tables that are looked up exactly.

    p_n(w | h) = alpha(h w) + gamma(h) p_{n-1}(w | h'),   h' is h without its first token
    alpha(h w) = (c(h w) - D_n(c(h w))) / sum_v c(h v),   gamma(h) = the sum of the D_n(c(h v)) / sum_v c(h v)
    p_1(w) = (c(w) - D_1(c(w))) / sum_v c(v) + (the sum of the D_1) / (V sum_v c(v))

c counts occurrences for the longest n-grams and for those that begin a document, and otherwise the different tokens
that precede the n-gram. D_n has three values, for counts of 1, 2 and more. For a context h that was never seen,
p_n(w | h) = p_{n-1}(w | h'). So the probabilities of all tokens sum to one in every context.

ngram_counts.py makes the tables. They form a tree: an n-gram is its first n - 1 tokens, a number, and its last token. A
context's followers are adjacent and sorted by token, so a step down is a binary search among them. Nothing is hashed,
and no two n-grams are taken for one another.
Letters: T tokens of a text, V vocabulary, N the order (length of the longest n-grams), G n-grams of two or more tokens,
K contexts: the tokens, and all n-grams shorter than N.
Source: Chen and Goodman 1999, "An empirical study of smoothing techniques for language modeling", sections 2.7 and 3;
the layout is that of a trie in Heafield 2011, "KenLM: Faster and Smaller Language Model Queries".
"""

from __future__ import annotations

from typing import NamedTuple

import numba
import numpy as np
from numba import prange

from flashlm_numba.kernels import _check
from flashlm_numba.kernels._jit import helper, kernel, serial_kernel


class NgramTables(NamedTuple):
    """The tables of NgramModel. A context's number is its token, or V plus the n-gram's place among the G."""

    unigram: np.ndarray  # (V,) float32: p_1
    tokens: np.ndarray  # (G,) uint16, or uint32 where V is above 65,536: the last token of each n-gram
    alpha: np.ndarray  # (G,) float32
    gamma: np.ndarray  # (K,) float32
    starts: np.ndarray  # (K + 1,) int64: of the followers of each context, in tokens


# --- looking up ---


@helper
def _follower(tokens, starts, context, token):
    """The place of the n-gram (context, token), or -1."""
    low, high = starts[context], starts[context + 1]
    while low < high:
        middle = (low + high) // 2
        if np.int64(tokens[middle]) < token:
            low = middle + 1
        else:
            high = middle
    return low if low < starts[context + 1] and np.int64(tokens[low]) == token else np.int64(-1)


@helper
def _advance(contexts, token, tables):
    """p(token | contexts), and contexts (N - 1,) with this token added; contexts[k] is the last k + 1 tokens, or -1.

    Returns the probability.
    """
    vocab, orders = tables.unigram.shape[0], contexts.shape[0]
    value, before = tables.unigram[token], token  # `before`: the number of the n-gram that ends here, one token shorter
    for k in range(orders):
        context = contexts[k]
        contexts[k] = before
        place = np.int64(-1)
        if context >= 0:
            place = _follower(tables.tokens, tables.starts, context, token)
            value = tables.gamma[context] * value + (tables.alpha[place] if place >= 0 else np.float32(0))
        before = place + vocab if place >= 0 else np.int64(-1)
    return value


@helper
def _enter(contexts, text, first, end_of_text, tables):
    """Set contexts to those before position `first` of text (T,). A document knows nothing of the one before it."""
    for k in range(contexts.shape[0]):
        contexts[k] = -1
    begin = max(0, first - contexts.shape[0])
    for t in range(begin, first):
        if text[t] == end_of_text:
            for k in range(contexts.shape[0]):
                contexts[k] = -1
        _advance(contexts, np.int64(text[t]), tables)


@helper
def _score_part(out, orders, contexts, text, end_of_text, tables, first, last):
    _enter(contexts, text, first, end_of_text, tables)
    for t in range(first, last):
        longest = 0
        for k in range(contexts.shape[0]):
            if contexts[k] >= 0:
                longest = k + 1
        orders[t] = longest
        out[t] = _advance(contexts, np.int64(text[t]), tables)
        if text[t] == end_of_text:
            for k in range(contexts.shape[0]):
                contexts[k] = -1
            if contexts.shape[0]:
                contexts[0] = end_of_text


@kernel
def _score(out, orders, contexts, text, end_of_text, tables, threads):
    for index in prange(threads):
        thread, size = np.int64(index), text.shape[0]
        first, last = thread * size // threads, (thread + 1) * size // threads
        _score_part(out, orders, contexts[thread], text, end_of_text, tables, first, last)


@serial_kernel
def _distribution(out, contexts, text, end_of_text, tables):
    """out (V,): probabilities of the token after text, for contexts (N - 1,), scratch."""
    _enter(contexts, text, text.shape[0], end_of_text, tables)
    for v in range(out.shape[0]):
        out[v] = tables.unigram[v]
    for k in range(contexts.shape[0]):
        context = contexts[k]
        if context >= 0:
            for v in range(out.shape[0]):
                out[v] *= tables.gamma[context]
            for place in range(tables.starts[context], tables.starts[context + 1]):
                out[tables.tokens[place]] += tables.alpha[place]


class NgramModel:
    """Probabilities of tokens after their contexts of up to N - 1 tokens.

    order : N
    tables : the arrays, which may be read-only and memory-mapped
    end_of_text : the token that ends a document and stands before each; contexts do not reach beyond it
    Calls may be made from any number of threads at the same time.
    """

    def __init__(self, order: int, end_of_text: int, tables: NgramTables) -> None:
        self.order, self.end_of_text, self.tables = order, end_of_text, tables

    @property
    def vocab_size(self) -> int:
        """V."""
        return len(self.tables.unigram)

    @property
    def nbytes(self) -> int:
        """Bytes of the tables."""
        return sum(table.nbytes for table in self.tables)

    def probability(self, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Each token's probability after those before it, and the length of the longest context known there.

        ids : (T,) int32, a text from the beginning of a document, which need not begin with end_of_text; documents end
            with it
        Returns (T,) float32 and (T,) int32. Any number of threads gives the same bits. Raises ValueError if ids are not
        of the vocabulary.
        """
        _check.array("NgramModel.probability", "ids", ids, (None,), np.int32)
        _check.indices("NgramModel.probability", "ids", ids, self.vocab_size)
        threads = numba.get_num_threads()
        text = np.concatenate([np.array([self.end_of_text], np.int32), ids])
        out, longest = np.empty(len(text), np.float32), np.empty(len(text), np.int32)
        contexts = np.empty((threads, self.order - 1), np.int64)
        _score(out, longest, contexts, text, self.end_of_text, self.tables, threads)
        return out[1:], longest[1:]

    def distribution(self, ids: np.ndarray) -> np.ndarray:
        """Probabilities of all tokens after a text, (V,) float32. ids and errors as in probability."""
        _check.array("NgramModel.distribution", "ids", ids, (None,), np.int32)
        _check.indices("NgramModel.distribution", "ids", ids, self.vocab_size)
        text = np.concatenate([np.array([self.end_of_text], np.int32), ids])[-self.order + 1 :]
        out = np.empty(self.vocab_size, np.float32)
        _distribution(out, np.empty(self.order - 1, np.int64), text, self.end_of_text, self.tables)
        return out
