"""Groups and the optimiser as a whole: against torch, frozen tensors, saved and loaded state."""

from __future__ import annotations

import dataclasses
import functools
import math
import threading

import numba
import numpy as np
import pytest
from helpers import at_once, import_torch
from safetensors.numpy import load, save

from flashlm_numba.kernels import reference_optim
from flashlm_numba.kernels.normuon import NorMuonRule
from flashlm_numba.model import config
from flashlm_numba.model.config import ModelConfig, OptimizerConfig
from flashlm_numba.system.errors import UserError
from flashlm_numba.training import optimizer as optimizer_module
from flashlm_numba.training.optimizer import (
    ADAMW_DECAY,
    ADAMW_PLAIN,
    NORMUON,
    Optimizer,
    describe_groups,
    parameter_groups,
)
from flashlm_numba.training.schedule import lr_scale

TINY = ModelConfig(vocab_size=40, dim=8, ffn_dim=13, groups=2, kernel_size=3, dilations=(1, 2))
E, BLOCK = "embedding.weight", "blocks.0."
NORM2, UP = f"{BLOCK}norm2.weight", f"{BLOCK}glu.up.weight"


def shapes_of(config: ModelConfig, node_rows: int = 0) -> dict[str, tuple[int, ...]]:
    """Shapes of every parameter of the model, in its order; with node_rows, of a tree head too."""
    c, i = config.dim, config.ffn_dim
    block: dict[str, tuple[int, ...]] = {"norm1.weight": (c,)}
    block |= {f"mixer.norms.{k}.weight": (c,) for k in range(len(config.dilations))}
    for part in ("gates", "values"):
        for k in range(len(config.dilations)):
            block[f"mixer.{part}.{k}.weight"] = (c, c // config.groups, config.kernel_size)
    block |= {"mixer.out.weight": (c, c), "norm2.weight": (c,)}
    block |= {"glu.gate.weight": (i, c), "glu.up.weight": (i, c), "glu.down.weight": (c, i)}
    shapes: dict[str, tuple[int, ...]] = {E: (config.vocab_size, c)}
    shapes |= {f"{BLOCK}{name}": shape for name, shape in block.items()}
    shapes |= {"router.weight": (1, c), "router.bias": (1,), "final_norm.weight": (c,)}
    return shapes | ({"head.nodes.weight": (node_rows, c)} if node_rows else {})


def tensors(shapes: dict[str, tuple[int, ...]], seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def gradients(shapes: dict[str, tuple[int, ...]], step: int) -> dict[str, np.ndarray]:
    """Gradients of a step; the router's are zero, as in the model."""
    grads = tensors(shapes, 1_000 + step)
    for name in grads:
        if name.startswith("router."):
            grads[name][:] = 0
    return grads


def train(optimizer: Optimizer, steps: range, frozen_until: int = 0) -> None:
    shapes = {name: value.shape for name, value in optimizer.params.items()}
    for step in steps:
        for name, value in gradients(shapes, step).items():
            optimizer.grads[name][:] = value
        optimizer.step(0.02, 3e-3, 1.0, frozen={E} if step < frozen_until else ())


def steps_of(optimizer: Optimizer, name: str) -> int:
    return int(optimizer.state_dict()[f"steps.{name}"][0])


def tiny(variant: str = "v3", node_rows: int = 5, seed: int = 0, **changes) -> Optimizer:
    params = tensors(shapes_of(TINY, node_rows), seed)
    settings = OptimizerConfig(**{"normuon": variant, "weight_decay": 0.1, **changes})
    return Optimizer(params, {name: np.zeros_like(value) for name, value in params.items()}, settings)


# --- groups ---


def test_parameter_groups_have_v3s_counts():
    # one shared zero stands for every element, so that 13.6M of them take no memory
    params = {name: np.broadcast_to(np.float32(0), shape) for name, shape in shapes_of(ModelConfig()).items()}
    groups = parameter_groups(params)
    counts = {group: sum(params[name].size for name in names) for group, names in groups.items()}
    assert counts == {NORMUON: 590_336, ADAMW_DECAY: 12_964_096, ADAMW_PLAIN: 1_537}
    assert sum(counts.values()) == 13_555_969
    matrices = [f"{BLOCK}{name}" for name in ("mixer.out", "glu.gate", "glu.up", "glu.down")]
    assert groups[NORMUON] == [f"{name}.weight" for name in (*matrices, "router")]
    assert sorted(name for names in groups.values() for name in names) == sorted(params)


def test_parameter_groups_give_the_rows_of_a_tree_to_adamw_with_decay():
    groups = parameter_groups(tensors(shapes_of(TINY, node_rows=5), 0))
    assert "head.nodes.weight" in groups[ADAMW_DECAY]
    assert E in groups[ADAMW_DECAY]


def test_parameter_groups_refuse_a_parameter_in_no_group_or_in_two():
    scalar = {"temperature": np.zeros((), np.float32)}
    with pytest.raises(ValueError, match=r"temperature \(\) is in no group, expected exactly one"):
        parameter_groups(scalar)
    rules = {"a": lambda name, value: True, "b": lambda name, value: value.ndim == 0}
    with pytest.raises(ValueError, match="is in a and b, expected exactly one"):
        parameter_groups(scalar, rules)


def test_describe_groups_counts_everything():
    text = describe_groups(tensors(shapes_of(TINY), 0))
    lines = text.splitlines()
    assert len(lines) == 4
    assert lines[0].startswith("normuon")
    assert "blocks.0.glu.gate.weight" in lines[0]
    total = sum(math.prod(shape) for shape in shapes_of(TINY).values())
    assert f"{total:,} parameters" in lines[-1]


# --- the step ---


def test_step_matches_torch_over_ten_steps_with_a_tensor_frozen_at_first(monkeypatch):
    """AdamW's tensors and the clip against torch; NorMuon's against the reference with torch's clip."""
    torch = import_torch()
    schedule = OptimizerConfig(warmup_steps=3, warmdown_ratio=0.4)
    for variant in ("v3", "published"):
        monkeypatch.setitem(config.NORMUON_VARIANTS, variant, config.NORMUON_VARIANTS[variant] | {"weight_decay": 0.05})
        settings = OptimizerConfig(normuon=variant, nonembedding_lr_scale=3.0, weight_decay=0.1)
        shapes = shapes_of(TINY, node_rows=5)
        params = tensors(shapes, 0)
        optimizer = Optimizer(params, {name: np.zeros_like(value) for name, value in params.items()}, settings)
        groups = optimizer.groups
        truth = {name: torch.nn.Parameter(torch.tensor(value, dtype=torch.float64)) for name, value in params.items()}
        adamw = torch.optim.AdamW(
            [
                {"params": [truth[name]], "weight_decay": decay, "factor": 1 if name in (E, "head.nodes.weight") else 3}
                for group, decay in ((ADAMW_DECAY, settings.weight_decay), (ADAMW_PLAIN, 0.0))
                for name in groups[group]
            ],
            betas=(settings.adamw_beta1, settings.adamw_beta2),
            eps=settings.adamw_eps,
        )
        matrices = [name for name in groups[NORMUON] if name != "router.weight"]
        exp_avgs = [np.zeros(shapes[name]) for name in matrices]
        exp_avg_sqs = [np.zeros(shapes[name][0]) for name in matrices]
        for step in range(10):
            scale = lr_scale(step, 10, schedule)
            lr_normuon, lr_adamw = 0.02 * scale, 0.01 * scale
            frozen = {E} if step < 4 else set()
            size = 10.0 if step % 2 else 1e-3  # clipped and not
            for name, value in gradients(shapes, step).items():
                optimizer.grads[name][:] = size * value
                without = name in frozen or name.startswith("router.")
                truth[name].grad = None if without else torch.tensor(optimizer.grads[name], dtype=torch.float64)
            found = optimizer.step(lr_normuon, lr_adamw, 1.0, frozen=frozen)
            norm = torch.nn.utils.clip_grad_norm_(truth.values(), 1.0)
            assert found["grad_norm"] == pytest.approx(norm.item(), rel=1e-6)
            assert (found["clip_scale"] < 1) == bool(step % 2)
            for group in adamw.param_groups:
                group["lr"] = group["factor"] * lr_adamw
            adamw.step()
            reference_optim.normuon_step(
                [truth[name].detach().numpy() for name in matrices],
                exp_avgs,
                exp_avg_sqs,
                [truth[name].grad.numpy() for name in matrices],
                NorMuonRule(**settings.normuon_variant),
                lr=lr_normuon,
            )
            for name, value in params.items():
                np.testing.assert_allclose(
                    value, truth[name].detach().numpy(), rtol=0, atol=2e-6, err_msg=f"{variant} {name} {step}"
                )


def test_step_clips_at_exactly_torchs_factor():
    optimizer = tiny()
    optimizer.grads[NORM2][:2] = 3, 4
    assert optimizer.step(0.02, 3e-4, 2.0)["clip_scale"] == pytest.approx(2 / (5 + 1e-6), rel=1e-12)
    assert optimizer.step(0.02, 3e-4, 5.1)["clip_scale"] == 1.0


def test_step_without_a_clip_takes_the_gradients_as_they_are():
    optimizer = tiny()
    for value in optimizer.grads.values():
        value[:] = 100
    assert optimizer.step(0.02, 3e-4, None)["clip_scale"] == 1.0


def test_frozen_tensor_keeps_its_values_and_starts_with_step_one():
    optimizer = tiny()
    start = optimizer.params[E].copy()
    train(optimizer, range(3), frozen_until=3)
    np.testing.assert_array_equal(optimizer.params[E], start)
    assert not [key for key in optimizer.state_dict() if E in key]
    # unfrozen: its first step is AdamW's first, of size lr in every element
    train(optimizer, range(3, 4))
    assert steps_of(optimizer, E) == 1
    assert steps_of(optimizer, f"{BLOCK}norm1.weight") == 4
    change = np.abs(optimizer.params[E] - start * np.float32(1 - 3e-3 * 0.1))
    np.testing.assert_allclose(change, 3e-3, rtol=1e-3)


def test_frozen_tensor_is_left_out_of_the_gradient_norm():
    optimizer = tiny()
    optimizer.grads[E][:] = np.inf
    optimizer.grads[NORM2][:2] = 3, 4
    assert optimizer.step(0.02, 3e-4, 1.0, frozen={E})["grad_norm"] == 5.0


@pytest.mark.parametrize("variant", ["v3", "published"])
def test_router_is_never_stepped(variant):
    optimizer = tiny(variant)
    router = {name: value.copy() for name, value in optimizer.params.items() if name.startswith("router.")}
    assert len(router) == 2
    train(optimizer, range(3))
    for name, value in router.items():
        np.testing.assert_array_equal(optimizer.params[name], value)
        assert f"steps.{name}" not in optimizer.state_dict()
    others = set(optimizer.params) - set(router)
    assert {name for name in optimizer.params if f"steps.{name}" in optimizer.state_dict()} == others


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_step_refuses_a_gradient_that_is_not_finite_and_changes_nothing(bad):
    optimizer = tiny()
    train(optimizer, range(1))
    before = {name: value.copy() for name, value in (optimizer.params | optimizer.state_dict()).items()}
    optimizer.grads[UP][1, 1] = bad
    with pytest.raises(UserError, match=r"gradient of blocks\.0\.glu\.up\.weight is not finite"):
        optimizer.step(0.02, 3e-4, 1.0)
    for name, value in (optimizer.params | optimizer.state_dict()).items():
        np.testing.assert_array_equal(value, before[name])


def test_step_and_optimizer_refuse_unknown_names():
    optimizer = tiny()
    with pytest.raises(ValueError, match=r"frozen names unknown parameters: embeding\.weight"):
        optimizer.step(0.02, 3e-4, 1.0, frozen={"embeding.weight"})
    with pytest.raises(ValueError, match=r"must have the same names, but only one of them has embedding\.weight"):
        Optimizer(optimizer.params, {k: v for k, v in optimizer.grads.items() if k != E})


def test_sparse_adamw_agrees_with_torchs_sparse_adam():
    """Tables of rows only: any other tensor without a gradient goes on by its momentum."""
    torch = import_torch()
    settings = OptimizerConfig(sparse_adamw=True)
    shapes = shapes_of(TINY, node_rows=5)
    params, rng = tensors(shapes, 0), np.random.default_rng(1)
    optimizer = Optimizer(params, {name: np.zeros_like(value) for name, value in params.items()}, settings)
    tables = {name: torch.nn.Parameter(torch.tensor(params[name])) for name in (E, "head.nodes.weight")}
    sparse = torch.optim.SparseAdam(tables.values(), lr=0.01, betas=(0.9, 0.95), eps=settings.adamw_eps)
    for step in range(6):
        for name, value in gradients(shapes, step).items():
            optimizer.grads[name][:] = value
        for name, parameter in tables.items():
            optimizer.grads[name][rng.random(len(params[name])) < 0.6] = 0
            parameter.grad = torch.tensor(optimizer.grads[name]).to_sparse(1)
        if step:
            optimizer.grads[NORM2][:] = 0
        before = params[NORM2].copy()
        optimizer.step(0.02, 0.01, None)
        sparse.step()
        assert (params[NORM2] != before).all()
        for name, parameter in tables.items():
            np.testing.assert_allclose(params[name], parameter.detach().numpy(), atol=2e-6, err_msg=f"{name} {step}")


def test_rows_with_an_exp_avg_sq_of_their_own_are_stepped_by_the_reference_and_the_rest_as_before():
    changes = {"sparse_adamw": True, "adamw_beta1": 0.0, "nonembedding_lr_scale": 3.0}
    ours, before = tiny("published", rowwise_exp_avg_sq=True, **changes), tiny("published", **changes)
    tables = (E, "head.nodes.weight")
    truth = {name: ours.params[name].astype(np.float64) for name in tables}
    seconds, steps = ({name: np.zeros(len(truth[name]), kind) for name in tables} for kind in (float, np.int64))
    rng = np.random.default_rng(1)
    for step in range(6):
        for name, value in gradients({name: value.shape for name, value in ours.params.items()}, step).items():
            if name in tables:
                value[rng.random(len(value)) < 0.6] = 0
            ours.grads[name][:] = before.grads[name][:] = value
        scale = ours.step(0.02, 0.01, 1.0)["clip_scale"]
        before.step(0.02, 0.01, 1.0)
        for name, value in truth.items():
            reference_optim.adamw_rowwise_step(
                value,
                None,
                seconds[name],
                steps[name],
                ours.grads[name].astype(np.float64),
                lr=0.01,
                beta1=0.0,
                beta2=0.95,
                eps=ours.config.adamw_eps,
                weight_decay=0.1,
                scale=scale,
            )
            np.testing.assert_allclose(ours.params[name], value, atol=2e-6, err_msg=f"{name} {step}")
    for name in ours.params.keys() - set(tables):
        np.testing.assert_array_equal(ours.params[name], before.params[name], err_msg=name)
    state = ours.state_dict()
    for name in tables:
        assert (ours.params[name] != before.params[name]).any()
        np.testing.assert_array_equal(state[f"row_steps.{name}"], steps[name])
        assert state[f"exp_avg_sq.{name}"].shape == steps[name].shape
    with pytest.raises(UserError, match=r"missing or unexpected: row_steps\.embedding\.weight"):
        before.load_state_dict(state)
    with pytest.raises(ValueError, match=r"optimizer\.rowwise_exp_avg_sq needs sparse_adamw"):
        OptimizerConfig(rowwise_exp_avg_sq=True)


@pytest.mark.skipif(bool(numba.config.DISABLE_JIT), reason="plain Python has one thread")
@pytest.mark.parametrize("rows", [False, True])
def test_step_is_the_same_for_any_thread_count(rows):
    large = dataclasses.replace(TINY, vocab_size=30_000, ffn_dim=150)  # E is large enough for the parallel kernels
    before, results = numba.get_num_threads(), []
    try:
        for threads in range(1, numba.config.NUMBA_NUM_THREADS + 1):
            numba.set_num_threads(threads)
            params = tensors(shapes_of(large), 0)
            settings = OptimizerConfig(normuon="v3", weight_decay=0.1, sparse_adamw=rows, rowwise_exp_avg_sq=rows)
            train(Optimizer(params, {name: np.zeros_like(value) for name, value in params.items()}, settings), range(2))
            results.append(params)
    finally:
        numba.set_num_threads(before)
    for other in results[1:]:
        for name, value in results[0].items():
            np.testing.assert_array_equal(other[name], value, err_msg=name)


# --- state ---


@pytest.mark.parametrize("variant", ["v3", "published", "rowwise"])
@pytest.mark.parametrize("stop", [0, 2, 5])  # before the first step, while E is frozen, after
def test_state_round_trip_continues_bit_for_bit(variant, stop):
    rows = variant == "rowwise"
    make = functools.partial(tiny, "v3" if rows else variant, sparse_adamw=rows, rowwise_exp_avg_sq=rows)
    whole = make()
    train(whole, range(8), frozen_until=4)
    first = make()
    train(first, range(stop), frozen_until=4)
    weights, state = save(first.params), save(first.state_dict())
    second = make(seed=1)
    for name, value in load(weights).items():
        second.params[name][:] = value
    train(second, range(2))  # what was there before must not matter
    for name, value in load(weights).items():
        second.params[name][:] = value
    second.load_state_dict(load(state))
    train(second, range(stop, 8), frozen_until=4)
    for name, value in whole.params.items():
        np.testing.assert_array_equal(second.params[name], value, err_msg=name)
    ours, theirs = second.state_dict(), whole.state_dict()
    assert ours.keys() == theirs.keys()
    for key, value in theirs.items():
        np.testing.assert_array_equal(ours[key], value, err_msg=key)


@pytest.mark.parametrize("sparse", [False, True])
def test_with_beta1_of_zero_adamw_keeps_no_first_moment(sparse):
    def make():
        return tiny("published", adamw_beta1=0.0, sparse_adamw=sparse)

    whole, stopped = make(), make()
    train(whole, range(8))
    train(stopped, range(5))
    weights, state = save(stopped.params), save(stopped.state_dict())
    kept = {key for key in load(state) if key.startswith("exp_avg.")}
    assert kept == {f"exp_avg.{name}" for name in stopped.groups[NORMUON] if not name.startswith("router.")}
    second = make()
    for name, value in load(weights).items():
        second.params[name][:] = value
    second.load_state_dict(load(state))
    train(second, range(5, 8))
    for name, value in whole.params.items():
        np.testing.assert_array_equal(second.params[name], value, err_msg=name)
    assert second.state_dict().keys() == whole.state_dict().keys()
    with pytest.raises(UserError, match="missing or unexpected: exp_avg"):
        tiny("published").load_state_dict(load(state))


def test_load_state_dict_refuses_a_state_of_another_model():
    optimizer = tiny()
    train(optimizer, range(1))
    state = optimizer.state_dict()
    lacking = {key: value for key, value in state.items() if key != f"exp_avg_sq.{E}"}
    with pytest.raises(UserError, match=r"missing or unexpected: exp_avg_sq\.embedding\.weight"):
        optimizer.load_state_dict(lacking)
    with pytest.raises(UserError, match=r"it has a parameter head\.nodes\.weight, which the model lacks"):
        tiny(node_rows=0).load_state_dict(state)
    with pytest.raises(UserError, match=r"exp_avg\.head\.nodes\.weight is float32 \(5, 8\), expected float32 \(6, 8\)"):
        tiny(node_rows=6).load_state_dict(state)
    with pytest.raises(UserError, match="is float64"):
        optimizer.load_state_dict(state | {f"exp_avg.{E}": state[f"exp_avg.{E}"].astype(np.float64)})


def test_a_step_beside_another_is_refused(monkeypatch):
    params = {"linear.weight": np.ones((3, 2), np.float32)}
    optimizer = Optimizer(params, {"linear.weight": np.ones((3, 2), np.float32)})
    inside, go_on = threading.Event(), threading.Event()
    original = optimizer_module.normuon_step

    def slow(*args, **options):
        inside.set()
        assert go_on.wait(60)
        return original(*args, **options)

    monkeypatch.setattr(optimizer_module, "normuon_step", slow)

    def second():
        assert inside.wait(60)
        try:
            with pytest.raises(RuntimeError, match="another thread is in step"):
                optimizer.step(0.1, 0.1, None)
        finally:
            go_on.set()

    at_once([lambda: optimizer.step(0.1, 0.1, None), second])
    optimizer.step(0.1, 0.1, None)


def test_read_only_parameters_are_refused():
    frozen = np.ones((3, 2), np.float32)
    frozen.flags.writeable = False
    with pytest.raises(ValueError, match=r"linear\.weight is read-only"):
        Optimizer({"linear.weight": frozen}, {"linear.weight": np.ones((3, 2), np.float32)})


def test_with_matrices_adamw_everything_is_adamws():
    parameters = {name: np.ones(shape, np.float32) for name, shape in shapes_of(TINY).items()}
    gradients = {name: np.full_like(value, 0.1) for name, value in parameters.items()}
    settings = OptimizerConfig(matrices="adamw", weight_decay=0.1)
    optimizer = Optimizer(parameters, gradients, settings)
    assert not optimizer.groups[NORMUON]
    assert UP in optimizer.groups[ADAMW_DECAY]
    assert NORM2 in optimizer.groups[ADAMW_PLAIN]
    optimizer.step(123.0, 0.01, None)
    assert optimizer.state_dict()[f"exp_avg_sq.{UP}"].shape == parameters[UP].shape
    np.testing.assert_allclose(parameters[UP], 1 - 0.01 - 0.01 * 0.1, rtol=1e-5)  # the first step is the sign
    np.testing.assert_allclose(parameters[NORM2], 1 - 0.01, rtol=1e-5)
    again = Optimizer(parameters, gradients, settings)
    again.load_state_dict(optimizer.state_dict())
    assert again.state.keys() == optimizer.state.keys()
