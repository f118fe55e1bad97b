"""A setting is refused as useless exactly if changing it changes nothing: every field, with several models."""

import dataclasses
import hashlib
from dataclasses import replace

import numpy as np
import pytest
from helpers import TINY, command
from run_helpers import make_session

from flashlm_numba.data.prepare import prepare
from flashlm_numba.heads import head_class
from flashlm_numba.model import build
from flashlm_numba.model.config import SECTIONS, Phase
from flashlm_numba.model.idle import idle_settings
from flashlm_numba.model.recipes import from_recipe
from flashlm_numba.model.settings import with_settings
from flashlm_numba.system.errors import UserError
from flashlm_numba.training.schedule import lr_scale
from flashlm_numba.training.step import train_step

STEPS, OF = 3, 9  # steps that are trained, of a schedule of so many
SMALL = ("dim=16", "ffn_dim=24", "phases=2x16x2", "warmup_steps=2", "validation_tokens=60")
MOMENTS = "rowwise_exp_avg_sq=false", "adamw_beta1=0.9"
CASES = {
    "tree": ("default", (*SMALL, "groups=4", "dilations=1,2", "tree=adaptive")),
    "bitlinear": ("mmf", (*SMALL, "embedding_init=corpus")),
    "sampled": ("default", (*TINY, "head.name=sampled", "num_sampled=100", "ngram_copy_orders=", *MOMENTS)),
    "huffman": ("v3", (*TINY, "head.name=tree", "tree=huffman", "memory=ngrams", "schedule=halved-cosine")),
    "random": ("default", TINY),
}
# another value of each field
OTHER = {
    "model": {
        "dim": 20,
        "embedding_dim": 8,
        "ffn_dim": 20,
        "groups": 2,
        "kernel_size": 2,
        "dilations": (1, 3),
        "mixer": ("mlgru", "conv"),
        "n_blocks": 2,
        "n_passes": 3,
        "mixer_residual_scale": 0.5,
        "ffn_residual_scale": 0.5,
        "ngram_copy_orders": (2,),
        "ngram_copy_reach": 1,
        "ngram_copy_output": ("add", "mixture"),
        "leaky_decay": 0.5,
        "ternary_threshold": 0.9,
        "activations": ("float", "int8"),
        "linear": ("bitlinear", "ternary"),
        "norm_eps": 0.5,
    },
    "head": {
        "name": ("dense", "tree"),
        "num_sampled": 50,
        "full_softmax_ratio": 1.0,
        "tree": "two-level",
        "tree_clustering": "frequency",
        "tree_root_tokens": 9,
        "tree_clusters": 3,
        "tree_classes": 4,
        "tree_arity": 5,
        "tree_rank": 2,
        "loss_fraction": 0.5,
        "label_smoothing": 0.2,
        "z_loss": 0.1,
        "soft_cap": 0.5,
        "log_prior": True,
    },
    "optimizer": {
        "matrices": ("adamw", "normuon"),
        "normuon": ("v3", "published"),
        "normuon_lr": 0.5,
        "normuon_iterations": 1,
        "adamw_lr": 0.1,
        "nonembedding_lr_scale": 2.0,
        "adamw_beta1": 0.5,
        "adamw_beta2": 0.5,
        "sparse_adamw": (False, True),
        "rowwise_exp_avg_sq": (False, True),
        "weight_decay": 0.5,
        "clip": 1e-3,
        "warmup_steps": 9,
        "warmdown_ratio": 1.0,
        "schedule": ("halved-cosine", "linear"),
    },
    "training": {
        "phases": (Phase(None, 2, 8, 1),),
        "embedding_init": ("random", "corpus"),
        "hidden_dropout": 0.5,
        "embedding_dropout": 0.5,
        "ema": (0.0, 0.5),
        "validation_tokens": 20,
    },
    "memory": {"memory": ("ngrams", "none"), "memory_least": 2},
}
# the data's, and what the loop reads; a run's weights do not depend on these
ELSEWHERE = {
    *("vocab_size", "early_warmdown"),
    *("log_every", "validate_every", "checkpoint_every", "sample_tokens", "checkpoint_minutes"),
}


@pytest.fixture(scope="module")
def small_corpus(corpus_files, tmp_path_factory):
    """The corpus in a vocabulary of 300 tokens."""
    out = tmp_path_factory.mktemp("small")
    prepare(str(corpus_files), out, vocab=300, progress=False)
    return out


@pytest.fixture
def rows(monkeypatch):
    """An initial embedding "from the corpus" that takes no time."""

    def start(run, data, note):
        shape = run.model.vocab_size, run.model.embedding_dim or run.model.dim
        given = run.training.embedding_init == "corpus"
        return (np.random.default_rng(0).standard_normal(shape, np.float32) / 50 if given else None), 0.0

    monkeypatch.setattr(build, "_embedding_start", start)


def outcome(run, corpus, folder):
    """A hash of all that three steps of training make."""
    session = make_session(run, corpus, folder)
    phase, digest = run.training.phases[0], hashlib.sha256()
    sampled = OF * (1 - head_class(run.head.name).full_ratio(run.head))
    for step in range(1, STEPS + 1):
        done = train_step(session, phase, step, lr=lr_scale(step - 1, OF, run.optimizer), full=step > sampled)
        digest.update(np.array([done.loss, done.nll]).tobytes())
    for arrays in (session.model.parameters, session.ema):
        for name, value in arrays.items():
            digest.update(f"{name} {value.shape}".encode() + value.tobytes())
    digest.update(repr([len(text) for text in session.subset]).encode())
    return digest.hexdigest()


def test_every_field_of_the_settings_has_another_value_here():
    run = from_recipe("default")
    for section in SECTIONS:
        fields = {field.name for field in dataclasses.fields(getattr(run, section))}
        assert OTHER[section].keys() == fields - ELSEWHERE


@pytest.mark.parametrize("case", CASES)
def test_a_setting_is_useless_exactly_if_it_changes_nothing(case, small_corpus, rows, tmp_path):
    recipe, settings = CASES[case]
    run = from_recipe(recipe, settings)
    run = replace(run, model=replace(run.model, vocab_size=300))
    before = outcome(run, small_corpus, tmp_path)
    for section, others in OTHER.items():
        useless = {name for idle in idle_settings(run, section) for name in idle.names}
        for name, values in others.items():
            part = getattr(run, section)
            value = next(v for v in (values if isinstance(values, tuple) else [values]) if v != getattr(part, name))
            if name in ("dilations", "ngram_copy_orders", "phases"):
                value = values
            try:
                changed = replace(run, **{section: replace(part, **{name: value})})
                head_class(changed.head.name).check(changed.head, has_rows=case != "random")
            except (ValueError, UserError):
                continue  # refused for another reason
            same = outcome(changed, small_corpus, tmp_path) == before
            assert same == (name in useless), f"{section}.{name}"


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ("--recipe mmf --set leaky_decay=0.9", "With the mlgru mixer, leaky_decay has no effect; leave it out, or "),
        ("--set mixer=mlgru --set linear=bitlinear --set groups=4", "groups has no effect; leave it out, or give "),
        ("--model mmf --set ternary_threshold=0.4", "With linear=bitlinear, ternary_threshold has no effect"),
        ("--recipe mmf --set model.activations=int8", "or give --set mixer=conv --set linear=ternary."),
        ("--set norm_eps=1e-5", "With linear=ternary, norm_eps has no effect"),
        ("--set ngram_copy_orders= --set ngram_copy_reach=9", "Without n-gram copies, ngram_copy_reach has no effect"),
        ("--recipe mmf --set normuon_lr=0.1 --set normuon=v3", "With matrices=adamw, normuon, normuon_lr have no"),
        ("--set schedule=halved-cosine --set warmdown_ratio=1", "With schedule=halved-cosine, warmdown_ratio has no"),
        (
            "--head dense --set tree_rank=3",
            "With the dense head, tree_rank has no effect; leave it out, or give",
        ),
        (
            "--tree huffman --set tree_clustering=frequency",
            "With the tree shape huffman, tree_clustering has no",
        ),
        ("--set embedding_init=random --set tree_clustering=frequency", "or give --set embedding_init=corpus."),
        ("--set phases=9:2x8:frozen,2x8", "Without --embeddings, phases:frozen has no effect; leave it out, or "),
        (
            "--set memory_least=1",
            "memory_least has no effect; leave it out, or give --memory ngrams.",
        ),
    ],
)
def test_a_useless_setting_is_refused_with_one_sentence(tmp_path, arguments, sentence):
    done = command("train", *arguments.split(), "--out", tmp_path / "run", "--steps", 1)
    assert done.exit_code == 1
    assert sentence in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "run").exists()


def test_what_a_recipe_or_a_shape_carries_along_is_no_mistake():
    assert from_recipe("mmf", ["adamw_lr=1e-3"]).model.leaky_decay == 0
    assert from_recipe("default", shape="mmf").optimizer.normuon_lr == 0.02
    v3 = from_recipe("v3", ["clip=2"])  # its first phase freezes what --embeddings gives
    assert v3.training.phases[0].frozen
    changed = with_settings(from_recipe("default"), ["mixer=mlgru", "linear=bitlinear", "norm_eps=1e-5"])
    assert changed.model.leaky_decay == 0.98
