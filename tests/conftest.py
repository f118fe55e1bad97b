"""A small prepared corpus and a small model's settings, for the tests of training and of what comes after."""

import json

import numba
import numpy as np
import pytest
from helpers import TINY, command

from flashlm_numba.data.prepare import prepare
from flashlm_numba.model.recipes import from_recipe
from flashlm_numba.system.compiled import ALL, ensure_compiled
from flashlm_numba.system.display import TERMINAL


@pytest.fixture(scope="session", autouse=True)
def compiled():
    """As in a training process, the kernels come from the cache: see flashlm_numba/training/precompile.py."""
    ensure_compiled([ALL], TERMINAL)


@pytest.fixture
def threads():
    """Sets the number of threads; the old one comes back at the end."""
    before = numba.get_num_threads()
    yield numba.set_num_threads
    numba.set_num_threads(before)


@pytest.fixture(scope="session")
def corpus_files(tmp_path_factory):
    """Folder with train.jsonl and validation.jsonl, a few thousand words."""
    folder = tmp_path_factory.mktemp("text")
    rng = np.random.default_rng(0)
    words = ["the", "people", "of", "this", "nation", "have", "seen", "peace", "and", "war,", "ünïcode", "🙂"]
    for name, count in (("train", 30), ("validation", 5)):
        texts = [" ".join(rng.choice(words, rng.integers(5, 120))) for _ in range(count)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return folder


@pytest.fixture(scope="session")
def corpus(corpus_files, tmp_path_factory):
    """The same, prepared."""
    out = tmp_path_factory.mktemp("tokens")
    prepare(str(corpus_files), out, progress=False)
    return out


@pytest.fixture
def tiny_run():
    """Settings of a run that takes milliseconds a step."""
    return from_recipe("default", TINY)


@pytest.fixture(scope="module")
def run(corpus, tmp_path_factory):
    """A trained run with the default head, the tree: its folder."""
    folder = tmp_path_factory.mktemp("runs") / "tree"
    settings = [part for setting in (*TINY, "checkpoint_every=1", "ema=0.5") for part in ("--set", setting)]
    done = command("train", corpus, "--out", folder, "--steps", 3, "--threads", 1, *settings)
    assert done.exit_code == 0, done.output
    return folder
