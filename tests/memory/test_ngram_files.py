"""Tables of n-grams as they are stored: the same again, and refused if a look-up could leave them."""

import numpy as np
import pytest

from flashlm_numba.kernels.ngram_counts import count_ngrams
from flashlm_numba.memory.files import PREFIX, from_tensors, map_ngrams, to_tensors, write_ngrams

V = 11


def tensors(order=4, least=1):
    text = np.append(np.random.default_rng(0).integers(0, 5, 200), V - 1).astype(np.int32)
    return to_tensors(count_ngrams(text, V, V - 1, order=order, least=least))


@pytest.mark.parametrize(("order", "least"), [(2, 1), (4, 1), (5, 3), (5, 1000)])
def test_they_come_back_from_a_file(tmp_path, order, least):
    want = tensors(order, least)
    found = from_tensors(map_ngrams(tmp_path, write_ngrams(tmp_path, from_tensors(want))))
    assert found.order == order
    for name, table in found.tables._asdict().items():
        np.testing.assert_array_equal(table, want[PREFIX + name])
    assert [path.name for path in tmp_path.iterdir()] == ["ngrams.safetensors"]
    ids = np.array([1, 2, 3, 4, 0, 1], np.int32)
    np.testing.assert_array_equal(found.probability(ids)[0], from_tensors(want).probability(ids)[0])


def test_no_ngrams():
    assert from_tensors({"embedding.weight": np.zeros((3, 3), np.float32)}) is None


def changed(name, change):
    found = {key: value.copy() for key, value in tensors().items()}
    found[PREFIX + name] = change(found[PREFIX + name])
    return found


def put(index, value):
    def change(array):
        array[index] = value
        return array

    return change


FORGED = {
    "a token that is none": ("tokens", put(3, V)),
    "tokens of another type": ("tokens", lambda array: array.astype(np.int64)),
    "one token less": ("tokens", lambda array: array[:-1]),
    "a start beyond the end": ("starts", put(4, 10**9)),
    "a negative start": ("starts", put(0, -5)),
    "a last start that is too small": ("starts", put(-1, 3)),
    "fewer contexts": ("gamma", lambda array: array[:-1]),
    "one length more": ("discounts", lambda array: np.concatenate([array, array[:1]])),
    "one length less": ("discounts", lambda array: array[:-1]),
    "no length": ("discounts", lambda array: array[:0]),
    "a share that is no number": ("gamma", put(2, np.nan)),
    "a share above one": ("gamma", put(2, 1.5)),
    "a negative share": ("alpha", put(2, -1)),
    "an infinite probability": ("unigram", put(1, np.inf)),
    "a matrix of probabilities": ("unigram", lambda array: array[None]),
    "no tokens": ("unigram", lambda array: array[:0]),
    "a document that never ends": ("end_of_text", put(0, V)),
}


@pytest.mark.parametrize("what", FORGED)
def test_forged_tables_are_refused(what):
    with pytest.raises(ValueError, match="n-grams"):
        from_tensors(changed(*FORGED[what]))


@pytest.mark.parametrize("name", sorted(tensors()))
def test_a_missing_table_is_refused(name):
    found = tensors()
    del found[name]
    if name.endswith(".unigram"):
        assert from_tensors(found) is None
        return
    with pytest.raises(ValueError, match="its n-grams lack"):
        from_tensors(found)
