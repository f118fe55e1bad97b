"""The named recipes."""

import math

import pytest

from flashlm_numba.model.parameters import parameter_shapes
from flashlm_numba.model.recipes import RECIPES, from_recipe
from flashlm_numba.system.errors import UserError


def test_v3_recipe_is_the_published_one():
    v3 = from_recipe("v3")
    shape = [(p.last_step, p.batch_size, p.seq_len, p.grad_accum, p.frozen) for p in v3.training.phases]
    assert shape == [
        (1_000, 4, 64, 4, True),
        (4_000, 4, 128, 4, False),
        (7_000, 4, 256, 8, False),
        (10_000, 4, 512, 8, False),
    ]
    assert (v3.head.name, v3.head.loss_fraction, v3.head.label_smoothing, v3.head.z_loss) == (
        "dense",
        0.25,
        0.1,
        1e-4,
    )
    assert (v3.optimizer.normuon, v3.optimizer.normuon_lr, v3.optimizer.adamw_lr) == ("v3", 0.02, 3e-4)
    assert (v3.optimizer.weight_decay, v3.optimizer.clip, v3.optimizer.warmup_steps) == (0.1, 1.0, 200)
    assert v3.training.ema == 0.999
    assert v3.fixed_schedule == 10_000
    assert v3.fixed_schedule * v3.optimizer.warmdown_ratio == 1_000
    assert v3.tokens_until(2_000) == 1_000 * 4 * 64 * 4 + 1_000 * 4 * 128 * 4


def test_a_recipe_that_there_is_not():
    with pytest.raises(UserError, match="There is no recipe 'v9'; the recipes are default, v3, mmf"):
        from_recipe("v9")


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_names_itself(name):
    assert from_recipe(name).recipe == name


def test_mmf_recipe_has_the_size_of_v3():
    mmf = from_recipe("mmf")
    assert (mmf.model.mixer, mmf.model.linear, mmf.head.name, mmf.model.n_passes) == (
        "mlgru",
        "bitlinear",
        "bitlinear",
        1,
    )
    assert (mmf.optimizer.matrices, mmf.optimizer.schedule) == ("adamw", "halved-cosine")
    trunk = sum(math.prod(shape) for shape in parameter_shapes(mmf.model).values())
    head = mmf.model.vocab_size * mmf.model.dim + mmf.model.dim
    assert trunk + head == pytest.approx(13_555_969, rel=0.01)


def test_a_recipe_of_the_matmul_free_lm_takes_no_other_kind_of_model():
    with pytest.raises(UserError, match="'nano' is no MatMul-free LM, which mmf trains; these are mmf, paper"):
        from_recipe("mmf", shape="nano")
    assert from_recipe("mmf", shape="paper-370m").model.dim == 1024
    assert from_recipe("default", shape="mmf").model.linear == "bitlinear"
