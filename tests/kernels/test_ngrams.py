"""n-gram probabilities: the definition by dictionaries, sums over the vocabulary, threads, documents."""

import numba
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flashlm_numba.kernels import ngram_counts
from flashlm_numba.kernels.ngram_counts import count_ngrams
from flashlm_numba.kernels.ngrams import OFTEN, WIDE, NgramModel, NgramTables, class_count
from flashlm_numba.kernels.reference_ngrams import kneser_ney


@st.composite
def texts(draw):
    """A vocabulary's size, and a text of few different tokens, so that n-grams occur again; the last token ends it."""
    vocab = draw(st.integers(1, 7))
    size = draw(st.integers(0, 120))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    text = np.minimum(rng.geometric(draw(st.sampled_from([0.2, 0.5])), size) - 1, vocab - 1)
    return vocab, text.astype(draw(st.sampled_from([np.uint16, np.int32, np.int64])))


@given(texts(), st.integers(2, 5), st.integers(1, 2))
def test_tokens_are_drawn_with_their_probabilities(counted, order, least):
    vocab, text = counted
    model = count_ngrams(text, vocab, vocab - 1, order=order, least=least)
    ids = text[: len(text) // 2].astype(np.int32)
    points = 400
    drawn = [model.draw(ids, (i + 0.5) / points) for i in range(points)]
    # each probability is a sum of at most `order` intervals, whose ends miss a point each
    np.testing.assert_allclose(
        np.bincount(drawn, minlength=vocab) / points, model.distribution(ids), atol=2 * order / points
    )
    assert 0 <= model.draw(ids, np.nextafter(1.0, 0.0)) < vocab


def length_of(known):
    """Tokens of the longest context known, from its class."""
    return (known - 1) // (OFTEN * WIDE) + 1


@given(texts(), st.integers(2, 6), st.integers(1, 3), texts())
def test_probabilities_are_those_of_the_definition(counted, order, least, scored):
    vocab, text = counted
    end = vocab - 1
    model = count_ngrams(text, vocab, end, order=order, least=least)
    truth = kneser_ney(text.tolist(), vocab, end, order, least)
    ids = np.minimum(scored[1], end).astype(np.int32)
    found, classes = model.probability(ids)
    context = [end]
    for t, token in enumerate(ids.tolist()):
        np.testing.assert_allclose(found[t], truth(context, token), rtol=2e-5, atol=1e-7)
        assert length_of(classes[t]) <= min(order - 1, len(context))
        context = [end] if token == end else [*context, token]


@given(texts(), st.integers(2, 6), st.integers(1, 3))
def test_the_probabilities_of_all_tokens_sum_to_one_after_any_context(counted, order, least):
    vocab, text = counted
    model = count_ngrams(text, vocab, vocab - 1, order=order, least=least)
    ids = text[:20].astype(np.int32)
    for t in range(len(ids) + 1):
        all_of_them, known = model.distribution(ids[:t]), model.context_class(ids[:t])
        assert (all_of_them >= 0).all()
        assert all_of_them.sum(dtype=np.float64) == pytest.approx(1, abs=1e-5)
        if t < len(ids):
            value, classes = model.probability(ids[: t + 1])
            assert value[t] == pytest.approx(all_of_them[ids[t]], rel=1e-6, abs=1e-9)
            assert classes[t] == known < class_count(order)


@given(texts(), st.integers(2, 5), st.data())
def test_without_its_document_a_token_is_predicted_by_the_others(counted, order, data):
    vocab, text = counted
    end = vocab - 1
    model = count_ngrams(text, vocab, end, order=order)
    ids = np.concatenate([[end], text]).astype(np.int32)
    if len(ids) < 2:
        return
    found, classes = model.without_document(ids[None, :-1].copy(), ids[None, 1:].copy())
    assert ((classes >= 0) & (classes < class_count(order))).all()
    for t in data.draw(st.lists(st.integers(0, len(text) - 1), max_size=6)):
        without = kneser_ney(text.tolist(), vocab, end, order, without=t)
        begin = max((i for i in range(t) if text[i] == end), default=-1) + 1
        context = [end, *text[begin:t].tolist()]
        np.testing.assert_allclose(found[0, t], without(context, int(text[t])), rtol=2e-4, atol=1e-6)
        longest = length_of(classes[0, t])
        if longest > 1:
            assert _documents_with(text, end, context[-longest:]) > 1


def _documents_with(text, end, tokens):
    """The number of documents that hold these tokens."""
    documents = np.split(text, np.flatnonzero(text == end) + 1)
    n, tokens = len(tokens), [int(token) for token in tokens]
    padded = [[end, *document.tolist()] for document in documents]
    return sum(any(one[i : i + n] == tokens for i in range(len(one) - n + 1)) for one in padded)


def test_a_text_of_one_document_knows_only_what_is_common_without_it():
    text = np.tile(np.arange(5, dtype=np.int32), 6)
    model = count_ngrams(text, 6, 5)
    found, classes = model.without_document(text[None, :-1].copy(), text[None, 1:].copy())
    np.testing.assert_allclose(found[0, 1:], model.tables.unigram[text[2:]], rtol=1e-6)
    assert (length_of(classes) <= 1).all()


@given(texts(), st.integers(2, 5))
def test_a_sequence_knows_nothing_before_it(counted, order):
    """From the N - 1st token on, what comes before the sequence does not matter."""
    vocab, text = counted
    model = count_ngrams(text, vocab, vocab - 1, order=order)
    if len(text) < 12:
        return
    ids, targets = text[:-1].astype(np.int32), text[1:].astype(np.int32)
    whole = model.without_document(ids[None], targets[None])
    parts = model.without_document(np.stack([ids[2:7], ids[4:9]]), np.stack([targets[2:7], targets[4:9]]))
    for some, all_of_them in zip(parts, whole, strict=True):
        np.testing.assert_array_equal(some[0, order - 2 :], all_of_them[0, order:7])
        np.testing.assert_array_equal(some[1, order - 2 :], all_of_them[0, order + 2 : 9])
    assert model.without_document(np.zeros((0, 3), np.int32), np.zeros((0, 3), np.int32))[0].shape == (0, 3)


def test_counts_beyond_a_byte_stay_as_they_are():
    text = np.tile(np.append(np.tile([0, 1], 10), 2), 60).astype(np.int32)  # 60 documents
    model = count_ngrams(text, 3, 2)
    assert (model.tables.counts & 127).max() == 127
    ids, targets = text[None, 420:440].copy(), text[None, 421:441].copy()
    found = model.without_document(ids, targets)[0][0]
    np.testing.assert_allclose(found[5:], model.probability(text)[0][426:441], rtol=2e-2)


def test_a_text_that_contains_itself_leaves_something_for_every_token():
    """Chen and Goodman's estimates of two discounts are negative here."""
    vocab, rng = 20, np.random.default_rng(0)
    parts = [np.append(rng.integers(0, vocab - 1, size), vocab - 1) for size in (300, 9, 15, 150)]
    text = np.concatenate([part for part, times in zip(parts, (4, 3, 2, 1), strict=True) for _ in range(times)])
    model = count_ngrams(text, vocab, vocab - 1)
    truth = kneser_ney(text.tolist(), vocab, vocab - 1, 5)
    for t in range(12):
        found = model.distribution(parts[0][:t].astype(np.int32))
        assert found.min() > 0
        context = [vocab - 1, *parts[0][:t].tolist()]
        np.testing.assert_allclose(found, [truth(context, token) for token in range(vocab)], rtol=2e-5, atol=1e-7)


def test_a_least_count_beyond_any_leaves_the_pairs():
    text = np.tile(np.arange(5, dtype=np.int32), 6)
    found = [count_ngrams(text, 5, 4, least=least).tables for least in (100, 2**70)]
    for some, other in zip(*found, strict=True):
        np.testing.assert_array_equal(some, other)


def large(vocab=50_257, size=200_000):
    if numba.config.DISABLE_JIT:
        size = 2_000
    rng = np.random.default_rng(0)
    ids = (rng.zipf(1.2, size) - 1) % vocab
    ids[rng.integers(0, size, size // 500)] = vocab - 1
    return ids.astype(np.int32)


def test_a_large_vocabulary_sums_to_one_and_knows_its_contexts():
    text = large()
    model = count_ngrams(text, 50_257, 50_256)
    for t in (0, 1, 7, 1_000, len(text) - 1):
        assert model.distribution(text[:t]).sum(dtype=np.float64) == pytest.approx(1, abs=1e-4)
    assert model.tables.tokens.dtype == np.uint16
    longest = length_of(model.probability(text)[1])
    inside = (text != 50_256) & (np.roll(text, 1) != 50_256)
    assert longest.max() == 4
    assert (longest[4:][inside[4:]] > 1).all()  # every context of two tokens was counted


def test_a_vocabulary_beyond_16_bits():
    text = np.array([70_000, 69_999, 70_000, 69_999, 70_001], np.int32)
    model = count_ngrams(text, 70_002, 70_001, order=3)
    assert model.tables.tokens.dtype == np.uint32
    value, classes = model.probability(text[:4])
    assert value[1] > 0.4
    assert length_of(classes).tolist() == [1, 2, 2, 2]


@pytest.mark.skipif(numba.config.DISABLE_JIT, reason="one thread is as good as another")
def test_threads_compute_the_same_bits(threads, monkeypatch):
    text = large(size=70_000)
    threads(1)
    one = count_ngrams(text, 50_257, 50_256)
    want = one.probability(text)
    monkeypatch.setattr(ngram_counts.numba, "get_num_threads", lambda: 5)
    five = count_ngrams(text, 50_257, 50_256)
    for a, b in zip(one.tables, five.tables, strict=True):
        np.testing.assert_array_equal(a, b)
    for a, b in zip(want, five.probability(text), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_document_knows_nothing_of_the_one_before():
    end, text = 9, np.array([1, 2, 3, 9, 4, 5, 9, 1, 2, 4, 9], np.int32)
    model = count_ngrams(text, 10, end, order=4)
    alone = model.probability(np.array([4, 5, 9], np.int32))[0]
    behind = model.probability(np.array([1, 2, 3, 9, 4, 5, 9], np.int32))[0][4:]
    np.testing.assert_array_equal(alone, behind)


@pytest.mark.skipif(numba.config.DISABLE_JIT, reason="needs a text that is too long for plain Python")
def test_rare_ngrams_are_left_out():
    text = large(size=50_000)
    whole, pruned = (count_ngrams(text, 50_257, 50_256, least=least) for least in (1, 2))
    assert pruned.nbytes < 0.7 * whole.nbytes
    assert pruned.distribution(text[:100]).sum(dtype=np.float64) == pytest.approx(1, abs=1e-4)
    assert np.log(pruned.probability(text)[0]).mean() < np.log(whole.probability(text)[0]).mean()


def test_wrong_arguments_are_refused():
    with pytest.raises(ValueError, match=r"order must be at least 2, got 1"):
        count_ngrams(np.zeros(3, np.int32), 2, 1, order=1)
    with pytest.raises(ValueError, match=r"text must be in \[0, 2\), got 5 at index 1"):
        count_ngrams(np.array([0, 5]), 2, 1)
    with pytest.raises(ValueError, match=r"end_of_text must be in \[0, 2\), got 2"):
        count_ngrams(np.array([0]), 2, 2)
    model = count_ngrams(np.array([0, 1]), 2, 1)
    with pytest.raises(ValueError, match=r"ids must be in \[0, 2\), got 2"):
        model.probability(np.array([2], np.int32))
    one, two = np.zeros((1, 1), np.int32), np.full((1, 1), 2, np.int32)
    for ids, targets in ((one, two), (two, one)):
        with pytest.raises(ValueError, match=r"must be in \[0, 2\), got 2"):
            model.without_document(ids, targets)


def test_tables_may_be_read_only():
    text = large(size=5_000)
    model = count_ngrams(text, 50_257, 50_256)
    frozen = NgramTables(*(table.copy() for table in model.tables))
    for table in frozen:
        table.flags.writeable = False
    again = NgramModel(model.order, model.end_of_text, frozen)
    np.testing.assert_array_equal(again.probability(text)[0], model.probability(text)[0])
