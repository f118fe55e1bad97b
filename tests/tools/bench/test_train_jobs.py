"""Jobs of tools/bench_train.py: their commands, and which rows are theirs."""

import numpy as np
import pytest

from flashlm_numba.model.recipes import RECIPES, from_recipe
from tools.bench import train_candidates, train_jobs


def test_a_baseline_gets_the_default_recipe_in_its_own_words():
    job = train_jobs.Job("torch:adaptive", ("adamw_lr=1e-3",), 3, 300_000, None, 2)
    words = job.command
    assert words[words.index("--adamw-lr") + 1] == "1e-3"
    assert words[words.index("--steps") + 1] == "147"  # of 2,048 tokens
    assert words[words.index("--decay") + 1] == "59"  # 40 %
    assert words[words.index("--div-value") + 1] == "1"


def test_the_baselines_are_given_what_the_default_recipe_does():
    run = from_recipe("default")
    (phase,) = run.training.phases
    assert train_candidates.TORCH["batch"] == f"{phase.batch_size}x{phase.seq_len}"
    for name, option in train_candidates.TORCH_OPTION.items():
        if name != "phases":
            section = run.model if hasattr(run.model, name) else run.optimizer
            value = train_candidates.TORCH.get(option, "0.02")  # NorMuon's rate is the baseline's own default
            assert [float(part) for part in value.split(",")] == np.ravel(getattr(section, name)).tolist(), name
    assert train_candidates.TORCH.keys() <= train_candidates.TORCH_V3.keys()  # the published recipe takes nothing over


def test_no_setting_of_the_default_recipe_is_forgotten_for_the_baselines():
    ours = {
        "activations",
        "sparse_adamw",
        "rowwise_exp_avg_sq",
        "normuon_iterations",  # how it is computed
        "ngram_copy_output",  # the baseline adds the rows, and has no shares
    }
    changed = {name.partition(".") for name in train_jobs.differences(from_recipe("default"))}
    settings = {name for section, _, name in changed if section in ("model", "optimizer")}
    assert settings
    assert settings - ours <= train_candidates.TORCH_OPTION.keys()


def test_a_row_is_known_by_its_recipe_however_it_was_asked_for():
    def job(name="tree", *settings):
        return train_jobs.Job(name, settings, 1, 300_000, None, 2)

    row = {**job().key, "recipe": job().recipe}
    assert job().made(row)
    assert job("tree", "leaky_decay=0.98").made(row)  # as it is
    assert not job("tree", "leaky_decay=0.9").made(row)
    assert not job("tree:adaptive").made(row)
    assert not job("dense").made({**row, "name": "dense"})
    assert not job().made(job().key)  # who knows by which recipe
    baseline = job("torch:adaptive@random", "adamw_lr=4e-3")
    assert baseline.made({**baseline.key, "recipe": baseline.recipe})
    assert not job("torch:adaptive@random").made({**baseline.key, "recipe": baseline.recipe})


def test_a_row_must_have_the_marks_that_are_asked_for():
    def job(*marks):
        return train_jobs.Job("tree", (), 1, None, 7.0, 2, marks)

    row = {**job().key, "recipe": job().recipe}
    assert job().made(row)
    assert not job(1.0).made(row)
    assert job(1.0).made({**row, "marks": [{"minutes": 1.0}, {"minutes": 5.0}]})
    assert not job(1.0, 6.5).made({**row, "marks": [{"minutes": 1.0}]})
    assert job(1.0, 6.5).made({**row, "marks": [{"minutes": 1.0}], "marks_asked": [1.0, 6.5]})  # it ended before 6.5


def test_the_file_names_of_two_recipes_differ():
    slugs = {train_jobs.Job("tree", (), 1, None, 7.0, 2).slug}
    with pytest.MonkeyPatch.context() as patch:
        recipe = from_recipe("default", ["leaky_decay=0.5"])
        patch.setitem(RECIPES, "default", recipe)
        slugs.add(train_jobs.Job("tree", (), 1, None, 7.0, 2).slug)
    slugs.add(train_jobs.Job("tree", (), 1, None, 7.0, 2, (1.0,)).slug)
    slugs.add(train_jobs.Job("tree", tuple(f"adamw_lr={n}e-3" for n in range(90)), 1, None, 7.0, 2).slug)
    assert len(slugs) == 4
    assert all(slug.startswith("tree-7min-seed1-") and len(slug) < 40 for slug in slugs)


def test_a_baselines_budget_is_in_tokens_of_its_own_batches():
    words = train_jobs.Job("torch:adaptive", ("phases=8x512",), 3, 300_000, None, 2).command
    assert words[words.index("--steps") + 1] == "74"  # of 4,096 tokens


def test_a_list_in_brackets_is_one_setting():
    assert train_jobs.expand(["dilations=[1,4,16],[1,4,64]", "clip=1"]) == [
        ("dilations=[1,4,16]", "clip=1"),
        ("dilations=[1,4,64]", "clip=1"),
    ]


def test_the_published_baseline_keeps_its_schedule():
    words = train_jobs.Job("torch:v3", (), 1, None, 72.0, 2, (10.0,)).command
    for name, value in (
        ("total", "10000"),
        ("decay", "1000"),
        ("positions", "0.25"),
        ("minutes", "72"),
        ("mark", "10"),
        ("mixer-residual-scale", "1"),
        ("ffn-residual-scale", "1"),
        ("nonembedding-lr-scale", "1"),
        ("adamw-beta1", "0.9"),
        ("adamw-beta2", "0.95"),
    ):
        assert words[words.index(f"--{name}") + 1] == value
    assert "--steps" not in words
