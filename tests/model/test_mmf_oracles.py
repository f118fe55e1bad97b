"""The two oracles of the MatMul-free LM, a NumPy twin and a torch module, against one another."""

import numpy as np
import pytest
from helpers import import_torch, numeric_gradient
from mmf_twin import Twin, authors_names, random_parameters, ternary

torch = import_torch()

from torch_mmf import MatMulFreeLM  # noqa: E402  needs torch

SHAPES = {
    "square": {"vocab": 40, "dim": 16, "width": 16, "ffn_dim": 24, "n_blocks": 3},
    "odd": {"vocab": 23, "dim": 10, "width": 14, "ffn_dim": 7, "n_blocks": 2},
    "one block": {"vocab": 9, "dim": 6, "width": 6, "ffn_dim": 5, "n_blocks": 1},
}


def oracles(shape, dtype, seed=0, *, inputs=True, weights=True):
    """The twin and the torch module with the same parameters."""
    parameters = random_parameters(seed, **SHAPES[shape])
    module = MatMulFreeLM(**SHAPES[shape]).to(torch.from_numpy(np.zeros(1, dtype)).dtype)
    module.load({there: parameters[here] for here, there in authors_names(SHAPES[shape]["n_blocks"])})
    module.round(inputs, weights)
    twin = Twin({n: v.astype(dtype) for n, v in parameters.items()}, rounded=inputs, ternary=weights)
    return twin, module


def ids_of(shape, seed=1, batch=2, time=9):
    return np.random.default_rng(seed).integers(0, SHAPES[shape]["vocab"], (batch, time))


@pytest.mark.parametrize("inputs", [False, True])
@pytest.mark.parametrize("weights", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_twin_and_torch_module_agree(shape, inputs, weights):
    twin, module = oracles(shape, np.float64, inputs=inputs, weights=weights)
    ids = ids_of(shape)
    found = module(torch.from_numpy(ids)).detach().numpy()
    np.testing.assert_allclose(found, twin.logits(ids), rtol=0, atol=1e-10)
    assert twin.closest > 1e-9


def test_float32_agrees_where_no_input_is_near_a_half():
    for seed in range(50):
        wide, _ = oracles("odd", np.float64, seed)
        ids = ids_of("odd", seed, 1, 4)
        truth = wide.logits(ids)
        if wide.closest > 1e-3:
            break
    twin, module = oracles("odd", np.float32, seed)
    np.testing.assert_allclose(twin.logits(ids), truth, rtol=0, atol=2e-5)
    np.testing.assert_allclose(module(torch.from_numpy(ids)).detach().numpy(), truth, rtol=0, atol=2e-5)


def autograd(module, ids, targets):
    """The gradients of the mean NLL by the published names, and the loss."""
    logits = module(torch.from_numpy(ids))
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), torch.from_numpy(targets).flatten())
    loss.backward()
    zero = torch.zeros(())  # of the bounds of a single block, which enter nothing
    gradients = {name: (zero if p.grad is None else p.grad).numpy() for name, p in module.named_parameters()}
    return gradients, float(loss.detach())


def assert_derivatives(gradients, twin, ids, targets):
    for here, there in authors_names(twin.n_blocks):
        numeric = numeric_gradient(lambda: twin.nll(ids, targets), twin.parameters[here])
        np.testing.assert_allclose(
            np.broadcast_to(gradients[there], numeric.shape), numeric, rtol=1e-5, atol=1e-8, err_msg=here
        )


@pytest.mark.parametrize("shape", ["odd", "one block"])
def test_autograd_gives_the_derivative_of_the_twin(shape):
    twin, module = oracles(shape, np.float64, inputs=False, weights=False)
    ids, targets = ids_of(shape, time=5), ids_of(shape, 2, time=5)
    gradients, loss = autograd(module, ids, targets)
    np.testing.assert_allclose(loss, twin.nll(ids, targets), rtol=1e-12)
    assert_derivatives(gradients, twin, ids, targets)


def test_gradients_pass_straight_through_the_ternary_weights():
    """They are the derivatives at the ternary weights, with respect to these."""
    _, module = oracles("odd", np.float64, inputs=False)
    ids, targets = ids_of("odd", time=5), ids_of("odd", 2, time=5)
    gradients, _ = autograd(module, ids, targets)
    at, _ = oracles("odd", np.float64, inputs=False, weights=False)
    for name, value in at.parameters.items():
        if value.ndim == 2 and name not in ("embedding.weight", "lower_bounds"):
            codes, size = ternary(value)
            value[...] = codes * size
    assert_derivatives(gradients, at, ids, targets)


def test_no_later_token_changes_an_earlier_logit():
    twin, _ = oracles("square", np.float64)
    ids = ids_of("square")
    other = ids.copy()
    other[:, 5:] = (other[:, 5:] + 1) % SHAPES["square"]["vocab"]
    np.testing.assert_array_equal(twin.logits(ids)[:, :5], twin.logits(other)[:, :5])
