"""The MatMul-free trunk and its gradients against autograd in PyTorch (tests/torch_mmf.py), from shared weights.

Torch in float64 is the truth, and torch in float32 shows how far plain float32 is from it.
"""

import itertools

import numpy as np
import pytest
from helpers import assert_as_accurate, import_torch
from mmf_twin import Twin, authors_names

from flashlm_numba.heads import DenseHead
from flashlm_numba.model.config import ModelConfig
from flashlm_numba.model.model import Model
from flashlm_numba.model.parameters import initial_parameters

torch = import_torch()

from torch_mmf import MatMulFreeLM  # noqa: E402  needs torch


def a_problem(config, shape, seed):
    parameters, rng = initial_parameters(config, seed, embedding_std=1.0), np.random.default_rng(seed + 1)
    for name, value in parameters.items():
        if value.ndim == 1 or name == "lower_bounds":
            value += np.float32(0.3) * rng.standard_normal(value.shape, np.float32)
        elif name != "embedding.weight":
            half = np.abs(value).mean() / 2
            value[np.abs(np.abs(value) - half) < 0.05 * half] *= np.float32(0.8)
    return parameters, rng.integers(0, config.vocab_size, shape).astype(np.int32)


def torch_gradients(config, parameters, ids, dout, dtype):
    """Hidden states (N, C), and the gradients of sum(dout * hidden states) by this project's names."""
    names = {ours: theirs for ours, theirs in authors_names(config.n_blocks) if not ours.startswith("head.")}
    model = MatMulFreeLM(config.vocab_size, config.dim, config.dim, config.ffn_dim, config.n_blocks, config.norm_eps)
    model = model.to(dtype)
    own = dict(model.named_parameters())
    with torch.no_grad():
        for ours, theirs in names.items():
            own[theirs].copy_(torch.from_numpy(parameters[ours]))
    h = model.model(torch.as_tensor(ids, dtype=torch.int64)).flatten(0, 1)
    (h * torch.as_tensor(dout).to(dtype)).sum().backward()
    found = {ours: own[theirs].grad for ours, theirs in names.items()}  # of one block, lower_bounds has none
    return h.detach().numpy(), {
        name: np.zeros_like(parameters[name]) if g is None else g.numpy() for name, g in found.items()
    }


@pytest.mark.parametrize(
    ("dim", "ffn_dim", "n_blocks", "shape"), [(50, 134, 1, (1, 6)), (16, 9, 4, (2, 7)), (33, 40, 2, (3, 1))]
)
def test_hidden_states_and_every_gradient_agree_with_autograd(dim, ffn_dim, n_blocks, shape):
    config = ModelConfig(40, dim=dim, ffn_dim=ffn_dim, mixer="mlgru", linear="bitlinear", n_blocks=n_blocks, n_passes=1)
    for seed in itertools.count():  # the first for which every precision rounds all inputs alike
        parameters, ids = a_problem(config, shape, seed)
        twin = Twin({name: value.astype(np.float64) for name, value in parameters.items()})
        twin.hidden(ids)
        if twin.closest > 2e-4:
            break
    model = Model(config, {name: value.copy() for name, value in parameters.items()}, DenseHead)
    h = model.forward(ids)
    dout = np.random.default_rng(5).standard_normal(h.shape, np.float32)
    model.backward(dout)
    h32, grads32 = torch_gradients(config, parameters, ids, dout, torch.float32)
    h64, grads64 = torch_gradients(config, parameters, ids, dout, torch.float64)
    assert_as_accurate(h, h32, h64, 16, "hidden states")
    assert grads64.keys() == model.parameters.keys()
    for name, truth in grads64.items():
        if n_blocks > 1 or name != "lower_bounds":  # of one block the softmax is a constant
            assert np.abs(truth).max() > 0 or shape[1] == 1, name  # one token has no state before it
        assert_as_accurate(model.gradients[name], grads32[name], truth, 32, name)
