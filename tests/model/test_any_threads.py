"""A pass through the trunk on any number of threads: the same hidden states bit for bit, gradients to rounding.

The regions loop over as many parts as there are threads, however many Numba really has, so the tests claim up to 64.
"""

import dataclasses

import numba
import numpy as np
import pytest

from flashlm_numba.heads import DenseHead
from flashlm_numba.kernels import _division, trunk
from flashlm_numba.model.config import ModelConfig
from flashlm_numba.model.model import Model
from flashlm_numba.model.parameters import initial_parameters

CONFIG = ModelConfig(vocab_size=97, dim=40, ffn_dim=50, groups=4, dilations=(1, 3), n_passes=2, leaky_decay=0.8)
CONFIG = dataclasses.replace(CONFIG, ternary_threshold=0.5, ngram_copy_orders=(1, 2, 1), ngram_copy_reach=15)
BARE = dataclasses.replace(CONFIG, leaky_decay=0.0, ngram_copy_orders=(), n_blocks=2, n_passes=1)
INT8 = dataclasses.replace(CONFIG, activations="int8")
MMF = dataclasses.replace(CONFIG, mixer="mlgru", linear="bitlinear", n_blocks=2)
THREADS = (2, 3, 5, 16, 64)
SHAPES = [(8, 16), (3, 70), (1, 300), (16, 128), (1, 1_100), (2, 1)]
if numba.config.DISABLE_JIT:
    THREADS, SHAPES = (3, 16), [(2, 7), (1, 13)]


def passes(config, shape, threads, monkeypatch):
    """Hidden states and gradients, divided among so many threads."""
    parameters = initial_parameters(config, 0, embedding_std=0.5)
    rng = np.random.default_rng(1)
    for name, value in parameters.items():
        if ".leaky." in name or name.startswith("ngram_copy."):
            value[:] = 0.3 * rng.standard_normal(value.shape)
    model = Model(config, parameters, DenseHead)
    monkeypatch.setattr(trunk.numba, "get_num_threads", lambda: threads)
    monkeypatch.setattr(_division, "WIDE_ROWS", 1)
    try:
        ids = rng.integers(0, 40, shape).astype(np.int32)
        h = model.forward(ids)
        division = model._buffers.free[0].division
        model.backward(rng.standard_normal(h.shape, np.float32))
    finally:
        monkeypatch.undo()
    return h, model.gradients, division


@pytest.mark.parametrize("config", [CONFIG, BARE, INT8, MMF], ids=["float", "two bare blocks", "int8", "mmf"])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: f"{shape[0]}x{shape[1]}")
def test_any_number_of_threads_computes_the_same(config, shape, monkeypatch):
    want, gradients, _ = passes(config, shape, 1, monkeypatch)
    orders = set()
    for threads in THREADS:
        found, others, division = passes(config, shape, threads, monkeypatch)
        assert division.threads == (threads if division.wide else min(threads, shape[0]))
        orders.add(division.wide)
        if numba.config.DISABLE_JIT:  # products by BLAS, which rounds by the number of rows; int8 by whole steps
            np.testing.assert_allclose(found, want, rtol=0, atol=1e-2 if config in (INT8, MMF) else 1e-5)
        else:
            np.testing.assert_array_equal(found.view(np.uint32), want.view(np.uint32))
        for name, value in gradients.items():
            if config is INT8 and shape[1] < 256:  # tiles begin elsewhere, and gradients are quantised per tile
                assert np.linalg.norm(others[name] - value) <= 0.025 * np.linalg.norm(value), name
            else:
                np.testing.assert_allclose(others[name], value, rtol=0, atol=2e-5 * np.abs(value).max(), err_msg=name)
    assert True in orders


def test_gradients_take_no_more_memory_with_many_threads(monkeypatch):
    """Of the large gradients there are at most eight copies, and never more than sequences."""
    sizes = {}
    for threads in (1, 8, 64):
        monkeypatch.setattr(trunk.numba, "get_num_threads", lambda threads=threads: threads)
        model = Model(CONFIG, initial_parameters(CONFIG, 0), DenseHead)
        model.forward(np.zeros((8, 32), np.int32))
        gradients = model._buffers.free[0].gradients
        sizes[threads] = gradients.gate_up.nbytes + gradients.down.nbytes
        monkeypatch.undo()
    assert sizes[8] == sizes[64] == 8 * sizes[1]
