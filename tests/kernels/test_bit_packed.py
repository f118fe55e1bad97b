"""The packed MatMul-free trunk and its output layer against training's, bit for bit."""

import numba
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flashlm_numba.kernels import bit_packed
from flashlm_numba.kernels._bit_packed_regions import LINE, share
from flashlm_numba.kernels._ternary_dots import available
from flashlm_numba.kernels.bit_packed import MOST_ROWS, PackedTrunk, packed_outputs
from flashlm_numba.kernels.bit_trunk import LAYERS
from flashlm_numba.kernels.bitlinear import bitlinear_forward
from flashlm_numba.kernels.ternary import pack_ternary
from flashlm_numba.model.config import ModelConfig
from flashlm_numba.model.parameters import initial_parameters
from flashlm_numba.model.trunks import BitTrunk


def trunk_and_rows(seed, dim, inner, blocks, passes, tokens):
    """A trunk with random weights and norms, the packed one, the embedded text (T, C), and its hidden states."""
    config = ModelConfig(
        40, dim=dim, ffn_dim=inner, mixer="mlgru", linear="bitlinear", n_blocks=blocks, n_passes=passes
    )
    parameters, rng = initial_parameters(config, seed, embedding_std=1.0), np.random.default_rng(seed)
    for name, value in parameters.items():
        if value.ndim == 1 or name == "lower_bounds":
            value += np.float32(0.3) * rng.standard_normal(value.shape, np.float32)
    trunk, embedding = BitTrunk(config), parameters["embedding.weight"]
    trunk.set_weights(parameters)
    ids = rng.integers(0, config.vocab_size, tokens).astype(np.int32)
    h = trunk.forward(trunk.new_buffers(1, tokens), embedding, ids).copy()
    return trunk.weights, embedding[ids], h


def read_in_parts(packed, x, counts):
    """Hidden states and the last state, of a text that is read by so many tokens at once."""
    state, found, start = packed.new_state(), [], 0
    for count in counts:
        found.append(packed.read(state, x[start : start + count]))
        start += count
    return np.concatenate(found), state


@given(
    seed=st.integers(0, 2**32 - 1),
    dim=st.integers(1, 90),
    inner=st.integers(1, 300),
    blocks=st.integers(1, 3),
    passes=st.integers(1, 2),
    counts=st.lists(st.sampled_from([0, 1, 2, 3, 5, 63, 64, 65]), min_size=1, max_size=5).filter(sum),
)
def test_it_has_the_bits_of_training_however_a_text_is_divided(seed, dim, inner, blocks, passes, counts):
    weights, x, h = trunk_and_rows(seed, dim, inner, blocks, passes, sum(counts))
    packed = PackedTrunk.from_trunk(weights)
    found, state = read_in_parts(packed, x, counts)
    np.testing.assert_array_equal(found, h)
    whole, same = read_in_parts(packed, x, [sum(counts)])
    np.testing.assert_array_equal(whole, h)
    np.testing.assert_array_equal(state, same)


@given(
    seed=st.integers(0, 2**32 - 1),
    dim=st.integers(1, 90),
    texts=st.sampled_from([0, 1, 2, 3, 63, 64, 65]),
    threads=st.integers(1, 4),
)
def test_several_texts_advance_together_with_the_bits_of_each_alone(seed, dim, texts, threads):
    weights, x, _ = trunk_and_rows(seed, dim, 33, 2, 1, 3 * texts + 1)
    packed, rows = PackedTrunk.from_trunk(weights), x[: 3 * texts].reshape(3, texts, dim)
    together, alone = ([packed.new_state() for _ in range(texts)] for _ in range(2))
    before = numba.get_num_threads()
    numba.set_num_threads(min(threads, before))
    try:
        for step in rows:
            found = packed.read_each(together, step)
            want = [packed.read(state, row[None])[0] for state, row in zip(alone, step, strict=True)]
            np.testing.assert_array_equal(found, np.reshape(want, (texts, dim)))
    finally:
        numba.set_num_threads(before)
    for state, other in zip(together, alone, strict=True):
        np.testing.assert_array_equal(state, other)


@pytest.mark.parametrize("variant", available())
def test_every_variant_and_number_of_threads_gives_the_same_bits(variant, monkeypatch):
    weights, x, h = trunk_and_rows(3, 70, 260, 2, 1, 140)
    counts = [1, 64, 2, 1, 63, 1, 8]
    packed = PackedTrunk.from_trunk(weights, variant=variant)
    for threads in range(1, 9):  # threads beyond those of Numba take turns
        monkeypatch.setattr(bit_packed.numba, "get_num_threads", lambda threads=threads: threads)
        np.testing.assert_array_equal(read_in_parts(packed, x, counts)[0], h, err_msg=f"{threads} threads")


def test_weights_written_later_are_used():
    weights, x, h = trunk_and_rows(4, 20, 30, 1, 1, 5)
    packed = PackedTrunk(weights.config)
    assert not np.array_equal(packed.read(packed.new_state(), x), h)
    full = PackedTrunk.from_trunk(weights)
    for name, value in full.weights._asdict().items():
        if isinstance(value, np.ndarray):
            getattr(packed.weights, name)[...] = value
    np.testing.assert_array_equal(packed.read(packed.new_state(), x), h)


def test_matrices_are_views_of_one_array_that_do_not_overlap():
    packed = PackedTrunk(PackedTrunk(trunk_and_rows(0, 7, 270, 2, 1, 1)[0].config).config)
    for number, (block, name) in enumerate((block, name) for block in range(2) for name in LAYERS):
        packed.matrix(block, name)[...] = number + 1
    for number, (block, name) in enumerate((block, name) for block in range(2) for name in LAYERS):
        matrix = packed.matrix(block, name)
        assert matrix.shape[0] == packed.shapes[name][0]
        assert (matrix == number + 1).all()


@given(count=st.integers(0, 300), threads=st.integers(1, 9))
def test_shares_are_whole_lines_and_cover_every_output_once(count, threads):
    ends = [share(count, thread, threads) for thread in range(threads)]
    assert [n for first, last in ends for n in range(first, last)] == list(range(count))
    assert all(first % LINE == 0 or first == count for first, _ in ends)


@given(
    seed=st.integers(0, 2**32 - 1),
    rows=st.integers(0, MOST_ROWS + 3),
    columns=st.integers(1, 600),
    outputs=st.integers(0, 40),
    threads=st.integers(1, 4),
)
def test_outputs_have_the_bits_of_training(seed, rows, columns, outputs, threads):
    rng = np.random.default_rng(seed)
    x, norm = rng.standard_normal((rows, columns), np.float32), rng.standard_normal(columns).astype(np.float32)
    values = rng.integers(-1, 2, (outputs, columns)).astype(np.float32)
    before = numba.get_num_threads()
    numba.set_num_threads(min(threads, before))
    try:
        found = packed_outputs(x, norm, pack_ternary(values), 0.5)
        np.testing.assert_array_equal(found, bitlinear_forward(x, norm, values * np.float32(0.5))[0])
        for variant in available():
            np.testing.assert_array_equal(packed_outputs(x, norm, pack_ternary(values), 0.5, variant=variant), found)
        for n in range(rows):  # a row alone has the same bits
            np.testing.assert_array_equal(packed_outputs(x[n : n + 1], norm, pack_ternary(values), 0.5)[0], found[n])
    finally:
        numba.set_num_threads(before)


def test_a_row_that_is_not_finite_spoils_no_other():
    rng = np.random.default_rng(0)
    x, packed = rng.standard_normal((3, 20), np.float32), pack_ternary(rng.integers(-1, 2, (9, 20)).astype(np.float32))
    clean = packed_outputs(x, np.ones(20, np.float32), packed, 1.0)
    x[1, 4] = np.inf
    found = packed_outputs(x, np.ones(20, np.float32), packed, 1.0)
    assert np.isnan(found[1]).all()
    np.testing.assert_array_equal(found[[0, 2]], clean[[0, 2]])


def test_wrong_shapes_are_refused():
    packed = PackedTrunk(trunk_and_rows(0, 8, 9, 1, 1, 1)[0].config)
    with pytest.raises(ValueError, match=r"PackedTrunk.read: x must"):
        packed.read(packed.new_state(), np.zeros((3, 9), np.float32))
    with pytest.raises(ValueError, match=r"PackedTrunk.read: state must"):
        packed.read(np.zeros((1, 9), np.float32), np.zeros((3, 8), np.float32))
    with pytest.raises(ValueError, match=r"PackedTrunk.read_each: x must"):
        packed.read_each([packed.new_state()], np.zeros((2, 8), np.float32))
    with pytest.raises(ValueError, match=r"packed_outputs: packed must"):
        packed_outputs(np.zeros((1, 300), np.float32), np.ones(300, np.float32), np.zeros((4, 64), np.uint8), 1.0)
    with pytest.raises(ValueError, match="variant must be one of"):
        PackedTrunk(packed.config, variant="abacus")
