"""Read-only arrays, as pandas, JAX and memory maps give them: taken as they are, and nothing is compiled anew."""

import sys

import numba
import numpy as np
import pytest

from flashlm_numba.heads import BitLinearHead, DenseHead, SampledHead, TreeHead
from flashlm_numba.heads.tree_shapes import build_tree
from flashlm_numba.model.config import ModelConfig
from flashlm_numba.model.model import Model
from flashlm_numba.model.parameters import initial_parameters
from flashlm_numba.system.arrays import for_reading

V, C, N = 300, 8, 20
COUNTS = np.arange(1, V + 1)


def compiled():
    """Number of compiled specialisations of every kernel."""
    found = {}
    for name, module in list(sys.modules.items()):
        if name.startswith("flashlm_numba.kernels"):
            for attribute, value in vars(module).items():
                if hasattr(value, "signatures"):
                    found[f"{value.__module__}.{attribute}"] = len(value.signatures)
    return found


def locked(array):
    """A read-only copy."""
    copy = array.copy()
    copy.flags.writeable = False
    return copy


def mapped(array, path):
    """A copy in a file that is mapped into memory: writing to it would end the process."""
    array.tofile(path)
    return np.memmap(path, array.dtype, "r", shape=array.shape)


def unaligned(array):
    """A copy that starts one byte beside a boundary, read-only as it is made of bytes."""
    return np.frombuffer(b"x" + array.tobytes(), array.dtype, offset=1).reshape(array.shape)


class Foreign:
    """An array of another library, such as JAX, that NumPy can read."""

    def __init__(self, array):
        self.array = array

    def __array__(self, dtype=None, copy=None):
        return self.array


KINDS = {
    "locked": lambda array, path: locked(array),
    "mapped": mapped,
    "unaligned": lambda array, path: unaligned(array),
    "foreign": lambda array, path: Foreign(locked(array)),
}


def head_of(name, weight, prior, nodes=None):
    if name == "dense":
        return DenseHead(weight, log_prior=prior)
    if name == "bitlinear":
        return BitLinearHead(weight, log_prior=prior)
    if name == "sampled":
        return SampledHead(weight, counts=COUNTS, candidates=50, log_prior=prior)
    return TreeHead(build_tree("two-level", COUNTS), weight, nodes=nodes, log_prior=prior)


def every_method(head, h, targets, weights):
    rng = np.random.default_rng(0)
    loss, nll, dh = head.forward_backward(h, targets, weights)
    x = h[0] if isinstance(h, np.ndarray) else h.array[0]
    return [
        loss,
        nll,
        dh,
        head.dweight.copy(),
        head.log_prob(h, targets),
        head.distribution(h),
        *head.top(x, 3),
        head.sample(h, rng),
        head.sample(h, rng, 0.8, top_k=10),
        head.sample(h, rng, 0),
        # other types of the same numbers
        head.sample(h, rng, 1),
        head.sample(h, rng, np.float32(0.5), top_k=np.int64(10), top_p=np.float32(0.9)),
        head.sample(h, rng, 2, top_k=5, top_p=1),
    ]


@pytest.mark.skipif(bool(numba.config.DISABLE_JIT), reason="nothing is compiled")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["dense", "sampled", "tree", "bitlinear"])
def test_heads_take_read_only_arrays_as_they_are(name, kind, tmp_path):
    rng = np.random.default_rng(0)
    weight, h = rng.standard_normal((V, C), np.float32), rng.standard_normal((N, C), np.float32)
    targets, weights = rng.integers(0, V, N).astype(np.int32), np.full(N, 1 / N, np.float32)
    prior = np.log(COUNTS / COUNTS.sum()).astype(np.float32)
    n_nodes = build_tree("two-level", COUNTS).n_nodes
    nodes = rng.standard_normal((n_nodes - 1, C), np.float32)
    plain = [weight, prior, nodes, h, targets, weights]
    expected = every_method(head_of(name, weight, prior, nodes), h, targets, weights)
    before = compiled()
    assert sum(before.values()) > 3
    given = [KINDS[kind](array, tmp_path / str(index)) for index, array in enumerate(plain)]
    weight, prior, nodes, h, targets, weights = given
    found = every_method(head_of(name, weight, prior, nodes), h, targets, weights)
    assert compiled() == before
    for a, b in zip(expected, found, strict=True):
        np.testing.assert_array_equal(a, b)
    for array, original in zip(given, plain, strict=True):
        np.testing.assert_array_equal(np.asarray(array), original)
        assert not np.asarray(array).flags.writeable


@pytest.mark.skipif(bool(numba.config.DISABLE_JIT), reason="nothing is compiled")
@pytest.mark.parametrize("kind", KINDS)
def test_the_model_takes_read_only_ids(kind, tmp_path):
    config = ModelConfig(vocab_size=97, dim=12, ffn_dim=16, groups=3, dilations=(1, 2), ngram_copy_orders=(1,))
    rng = np.random.default_rng(0)
    ids = rng.integers(0, 97, (2, 9)).astype(np.int32)
    weights = np.full(18, 1 / 18, np.float32)

    def every_call(model, ids, weights):
        h = model.forward(ids)
        model.backward(np.ones_like(h))
        loss, nll, _ = model.loss_and_grad(ids, ids, weights)
        one = np.asarray(ids)[0] if kind == "foreign" else ids[0]
        state, last = model.prefill(one)
        steps = [model.decode_step(state, token).copy() for token in (3, np.int32(4), one[1])]
        return [h, loss, nll, last, *steps, *model.gradients.values()]

    parameters = initial_parameters(config, 0, embedding_std=0.5)
    expected = every_call(Model(config, parameters, DenseHead), ids, weights)
    before = compiled()
    given = [KINDS[kind](array, tmp_path / str(index)) for index, array in enumerate([ids, weights])]
    frozen = Model(config, {name: locked(value) for name, value in parameters.items()}, DenseHead)
    found = every_call(frozen, *given)
    assert compiled() == before
    for a, b in zip(expected, found, strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_view_for_reading_is_the_same_memory_and_keeps_it_alive():
    array = locked(np.arange(6, dtype=np.float32).reshape(2, 3))
    view = for_reading(array)
    assert np.shares_memory(view, array)
    assert type(view) is np.ndarray
    assert view.flags.behaved
    assert not array.flags.writeable
    del array
    np.testing.assert_array_equal(view, [[0, 1, 2], [3, 4, 5]])
    for same in (np.ones(3), np.ones((2, 2))[:, 0], None, [1.0]):
        assert for_reading(same) is same


def test_the_old_rules_hold_for_other_inputs():
    head = head_of("dense", locked(np.ones((V, C), np.float32)), None)
    targets = locked(np.zeros(2, np.int32))
    with pytest.raises(ValueError, match="h must be float32, got float64"):
        head.log_prob(locked(np.ones((2, C))), targets)
    with pytest.raises(ValueError, match="h must be C-contiguous"):
        head.log_prob(locked(np.ones((2, 2 * C), np.float32))[:, ::2], targets)
    with pytest.raises(ValueError, match="h must be a NumPy array, got list"):
        head.log_prob([[1.0] * C], targets)
    with pytest.raises(ValueError, match="targets must be int32, got int64"):
        head.log_prob(np.ones((2, C), np.float32), np.zeros(2, np.int64))
    for make in (DenseHead, lambda w, d: TreeHead(build_tree("two-level", COUNTS), w, d)):
        with pytest.raises(ValueError, match="dweight must be writable"):
            make(np.ones((V, C), np.float32), locked(np.ones((V, C), np.float32)))
