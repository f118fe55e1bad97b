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

MOST_COUNTED, ALONE = 127, 128
UNKNOWN = 2.0**40  # stands for a sum that is not known, but large
OFTEN, WIDE = 12, 4  # divisions of a context's class


class NgramTables(NamedTuple):
    """The tables of NgramModel. A context's number is its token, or V plus the n-gram's place among the G."""

    unigram: np.ndarray  # (V,) float32: p_1
    tokens: np.ndarray  # (G,) uint16, or uint32 where V is above 65,536: the last token of each n-gram
    counts: np.ndarray  # (G,) uint8: c of each n-gram, at most MOST_COUNTED; plus ALONE if one document has them all
    alpha: np.ndarray  # (G,) float32
    gamma: np.ndarray  # (K,) float32
    starts: np.ndarray  # (K + 1,) int64: of the followers of each context, in tokens
    discounts: np.ndarray  # (N - 1, 4) float64: D_n for counts of 0, 1, 2 and more, n = 2..N


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
def _count(place, tables):
    """c of an n-gram, at most MOST_COUNTED."""
    return np.int64(tables.counts[place]) & MOST_COUNTED


@helper
def _alone(place, tables):
    """Whether one document has all of an n-gram's occurrences."""
    return tables.counts[place] >= ALONE


@helper
def _kept(place, k, tables):
    """c - D_n(c) of an n-gram of k + 2 tokens."""
    count = _count(place, tables)
    return count - tables.discounts[k, min(count, 3)]


@helper
def _total(context, k, tables):
    """The sum of c over a context's followers; 0 if none is in the tables, and UNKNOWN if all c are too large."""
    total = np.float64(0)
    for place in range(tables.starts[context], tables.starts[context + 1]):
        if _count(place, tables) == MOST_COUNTED:
            total += UNKNOWN
        elif tables.alpha[place] > 0:  # (c - D) / total
            return np.float64(round(_kept(place, k, tables) / np.float64(tables.alpha[place])))
        else:
            total += _count(place, tables)
    return min(total, UNKNOWN)


@helper
def _class(length, total, gamma):
    """The class of a context of `length` tokens; see NgramModel."""
    if length == 0:
        return np.int64(0)
    often, wide = np.int64(0), min(np.int64(gamma * WIDE), WIDE - 1)
    while often < OFTEN - 1 and total >= 2 << often:
        often += 1
    return ((length - 1) * OFTEN + often) * WIDE + wide + 1


@helper
def _places(places, contexts, token, tables):
    """The n-grams that end with this token, or -1. Returns the k of the longest, or -1."""
    longest = -1
    for k in range(contexts.shape[0]):
        places[k] = -1
        if contexts[k] >= 0:
            places[k] = _follower(tables.tokens, tables.starts, contexts[k], token)
            if places[k] >= 0:
                longest = k
    return longest


@helper
def _shares(place, context, k, tables, taken):
    """alpha of the n-gram and gamma of its context, with the context's total; with c smaller by `taken`.

    place may be -1: the n-gram is not in the tables. Returns alpha, gamma, total.
    """
    alpha = np.float64(tables.alpha[place]) if place >= 0 else np.float64(0)
    gamma, total = np.float64(tables.gamma[context]), _total(context, k, tables)
    if taken == 0 or total == 0:
        return alpha, gamma, total
    if total <= taken:
        return np.float64(0), np.float64(1), np.float64(0)
    given, left = (1 - gamma) * total, total - taken
    alpha = np.float64(0)
    if place >= 0:
        count = _count(place, tables) - taken
        alpha = count - tables.discounts[k, min(count, 3)]
        given += alpha - _kept(place, k, tables)
    return alpha / left, min(max(1 - given / left, 0.0), 1.0), left


@helper
def _taken(places, k, longest, tables):
    """What c of the n-gram at k loses without the document; see NgramModel.without_document."""
    if places[k] < 0:
        return np.int64(1)
    count = _count(places[k], tables)
    if count == MOST_COUNTED:
        return np.int64(0)
    if _alone(places[k], tables):
        return count
    return np.int64(k >= longest or _alone(places[k + 1], tables))


@helper
def _advance(contexts, places, token, tables, leave_out):
    """p(token | contexts) and the class of the longest of them; then contexts (N - 1,) with this token added.

    contexts[k] is the last k + 1 tokens, or -1;  places (N - 1,): scratch
    leave_out : as NgramModel.without_document
    """
    longest = _places(places, contexts, token, tables)
    vocab = tables.unigram.shape[0]
    value, before = np.float64(tables.unigram[token]), np.int64(token)  # the n-gram that ends here, one token shorter
    known = np.int64(0)
    for k in range(contexts.shape[0]):
        context = contexts[k]
        contexts[k] = before
        if context >= 0 and not (leave_out and context >= vocab and _alone(context - vocab, tables)):
            taken = _taken(places, k, longest, tables) if leave_out else np.int64(0)
            alpha, gamma, total = _shares(places[k], context, k, tables, taken)
            if total > 0:  # otherwise no follower is left, and gamma is 1
                value = gamma * value + alpha
                known = _class(k + 1, total, gamma)
        before = places[k] + vocab if places[k] >= 0 else np.int64(-1)
    return np.float32(value), known


@helper
def _forget(contexts, last):
    """Set contexts to those behind the token `last` alone; -1 for nothing."""
    for k in range(contexts.shape[0]):
        contexts[k] = -1
    if contexts.shape[0]:
        contexts[0] = last


@helper
def _enter(contexts, places, text, first, end_of_text, tables):
    """Set contexts to those before position `first` of text (T,). A document knows nothing of the one before it."""
    _forget(contexts, -1)
    for t in range(max(0, first - contexts.shape[0]), first):
        if text[t] == end_of_text:
            _forget(contexts, end_of_text)
        else:
            _advance(contexts, places, np.int64(text[t]), tables, False)


@helper
def _score_part(out, classes, scratch, text, end_of_text, tables, first, last):
    """scratch (2, N - 1)"""
    contexts, places = scratch[0], scratch[1]
    _enter(contexts, places, text, first, end_of_text, tables)
    for t in range(first, last):
        out[t], classes[t] = _advance(contexts, places, np.int64(text[t]), tables, False)
        if text[t] == end_of_text:
            _forget(contexts, end_of_text)


@kernel
def _score(out, classes, scratch, text, end_of_text, tables, threads):
    for index in prange(threads):
        thread, size = np.int64(index), text.shape[0]
        first, last = thread * size // threads, (thread + 1) * size // threads
        _score_part(out, classes, scratch[thread], text, end_of_text, tables, first, last)


@helper
def _score_sequence(out, classes, scratch, first, targets, end_of_text, tables):
    """As _score_part, of targets (T,) behind the token `first`, each without its document."""
    contexts, places = scratch[0], scratch[1]
    _forget(contexts, first)
    for t in range(targets.shape[0]):
        out[t], classes[t] = _advance(contexts, places, np.int64(targets[t]), tables, True)
        if targets[t] == end_of_text:
            _forget(contexts, end_of_text)


@kernel
def _score_sequences(out, classes, scratch, first, targets, end_of_text, tables):
    for index in prange(targets.shape[0]):
        b = np.int64(index)
        _score_sequence(out[b], classes[b], scratch[b], np.int64(first[b]), targets[b], end_of_text, tables)


@helper
def _known(contexts, tables):
    """The class of the longest context that has followers."""
    known = np.int64(0)
    for k in range(contexts.shape[0]):
        total = _total(contexts[k], k, tables) if contexts[k] >= 0 else np.float64(0)
        if total > 0:
            known = _class(k + 1, total, np.float64(tables.gamma[contexts[k]]))
    return known


@serial_kernel
def _class_after(scratch, text, end_of_text, tables):
    """The class of the context after text."""
    _enter(scratch[0], scratch[1], text, text.shape[0], end_of_text, tables)
    return _known(scratch[0], tables)


@serial_kernel
def _draw(u, scratch, text, end_of_text, tables):
    """The token after text where the cumulated probabilities exceed u: followers of long contexts come first."""
    contexts = scratch[0]
    _enter(contexts, scratch[1], text, text.shape[0], end_of_text, tables)
    for k in range(contexts.shape[0] - 1, -1, -1):
        below = np.float64(0)
        if contexts[k] >= 0:
            for place in range(tables.starts[contexts[k]], tables.starts[contexts[k] + 1]):
                below += np.float64(tables.alpha[place])
                if u < below:
                    return np.int64(tables.tokens[place])
            u = min((u - below) / max(1 - below, 1e-12), 1.0)  # what is left, of gamma
    below = np.float64(0)
    for v in range(tables.unigram.shape[0]):
        below += np.float64(tables.unigram[v])
        if u < below:
            return np.int64(v)
    return np.int64(tables.unigram.shape[0] - 1)  # rounding


@serial_kernel
def _distribution(out, scratch, text, end_of_text, tables):
    """out (V,): probabilities of the token after text."""
    contexts = scratch[0]
    _enter(contexts, scratch[1], text, text.shape[0], end_of_text, tables)
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

    A context's class tells how much it knows. It is 0 if nothing is known, and otherwise 1 more than
    (n * OFTEN + often) * WIDE + wide, for the longest context known, of n + 1 tokens; `often` is log2 of the sum of its
    followers' c, `wide` is gamma times WIDE, both rounded down and limited.
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

    def _text(self, where: str, ids: np.ndarray) -> np.ndarray:
        _check.array(where, "ids", ids, (None,), np.int32)
        _check.indices(where, "ids", ids, self.vocab_size)
        return np.concatenate([np.array([self.end_of_text], np.int32), ids])

    def _scratch(self, *sizes: int) -> np.ndarray:
        return np.empty((*sizes, 2, self.order - 1), np.int64)

    def probability(self, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Each token's probability after those before it, and the class of the context there.

        ids : (T,) int32, a text from the beginning of a document, which need not begin with end_of_text; documents end
            with it
        Returns (T,) float32 and (T,) int32. Any number of threads gives the same bits. Raises ValueError if ids are not
        of the vocabulary.
        """
        text, threads = self._text("NgramModel.probability", ids), numba.get_num_threads()
        out, classes = np.empty(len(text), np.float32), np.empty(len(text), np.int32)
        _score(out, classes, self._scratch(threads), text, self.end_of_text, self.tables, threads)
        return out[1:], classes[1:]

    def without_document(self, ids: np.ndarray, targets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """For the text that was counted: about each target's probability if its own document had not been counted.

        ids, targets : (B, T) int32, sequences from anywhere in the text, and the tokens that follow
        Of the n-grams that end with a target, and of their contexts, those that occur in its document only are not
        known. The others occur once less: the longest one, and each whose longer one is not known any more, as it has
        one different token less before it. What else the document holds stays, as do discounts and p_1. Contexts begin
        with the sequence. To leave out the one occurrence alone would not do: a document repeats its names and phrases,
        which would seem to be known from elsewhere.
        Returns (B, T) float32 and (B, T) int32, as probability. Raises ValueError if the tokens are not of the
        vocabulary.
        Source: after Kneser and Ney 1995, "Improved backing-off for m-gram language modeling", section 3, leaving one
        out.
        """
        where = "NgramModel.without_document"
        _check.array(where, "ids", ids, (None, None), np.int32)
        _check.array(where, "targets", targets, ids.shape, np.int32)
        for name, tokens in (("ids", ids), ("targets", targets)):
            _check.indices(where, name, tokens, self.vocab_size)
        out, classes = np.empty(ids.shape, np.float32), np.empty(ids.shape, np.int32)
        if ids.size:
            first = np.ascontiguousarray(ids[:, 0])
            _score_sequences(out, classes, self._scratch(len(ids)), first, targets, self.end_of_text, self.tables)
        return out, classes

    def _end(self, where: str, ids: np.ndarray) -> np.ndarray:
        """The last tokens of a text, which is all that matters for the next one."""
        return self._text(where, ids[max(0, len(ids) - self.order) :])[-self.order + 1 :]

    def context_class(self, ids: np.ndarray) -> int:
        """The class of the context after a text; ids and errors are those of probability."""
        text = self._end("NgramModel.context_class", ids)
        return int(_class_after(self._scratch(), text, self.end_of_text, self.tables))

    def distribution(self, ids: np.ndarray) -> np.ndarray:
        """Probabilities of all tokens after a text, (V,) float32; ids and errors are those of probability."""
        text, out = self._end("NgramModel.distribution", ids), np.empty(self.vocab_size, np.float32)
        _distribution(out, self._scratch(), text, self.end_of_text, self.tables)
        return out

    def draw(self, ids: np.ndarray, u: float) -> int:
        """A token after a text, drawn with its probability by u, which is uniform in [0, 1)."""
        text = self._end("NgramModel.draw", ids)
        return int(_draw(float(u), self._scratch(), text, self.end_of_text, self.tables))


def class_count(order: int) -> int:
    """The number of classes of contexts for n-grams of up to `order` tokens."""
    return (order - 1) * OFTEN * WIDE + 1
