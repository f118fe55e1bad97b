"""Folders of published models that are damaged or made up: an import, or one sentence and no file; no other error."""

import json
import math

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mmf_folder import config_of, write_folder
from mmf_tokenizer import tokenizer_json
from mmf_twin import random_parameters
from test_hostile_files import ODD, changes, paths

import flashlm_numba as fl
from flashlm_numba.model.importing import import_folder
from flashlm_numba.system.display import Progress
from flashlm_numba.system.errors import UserError

SLOW = settings(deadline=None, suppress_health_check=list(HealthCheck))
SHAPE = {"vocab": 300, "dim": 8, "width": 8, "ffn_dim": 5, "n_blocks": 1}
PARAMETERS = random_parameters(0, **SHAPE)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A whole folder, and one with shards."""
    parent = tmp_path_factory.mktemp("published")
    text = tokenizer_json()
    return {
        shards: write_folder(parent / str(shards), PARAMETERS, SHAPE, shards=shards, tokenizer=text)
        for shards in (0, 2)
    }


def sentence_of(call):
    """The sentence with which a call is refused, or None if it is not."""
    try:
        call()
    except UserError as error:
        return str(error)
    return None


def attempt(folder, out):
    """Import; a refusal is a sentence and leaves nothing, and what was imported can be loaded, or is refused."""
    out.unlink(missing_ok=True)
    sentence = sentence_of(lambda: import_folder(folder, out, progress=Progress()))
    assert out.exists() == (sentence is None)
    if sentence is None:
        sentence = sentence_of(lambda: fl.load(out).logits([[1, 2]]))
    assert sentence is None or sentence.endswith(".")


@SLOW
@given(changes(), st.sampled_from([0, 2]), st.integers(0, 9))
def test_changed_bytes(folders, tmp_path_factory, change, shards, number):
    files = sorted(path for path in folders[shards].iterdir())
    path, out = files[number % len(files)], tmp_path_factory.getbasetemp() / "out.safetensors"
    data = path.read_bytes()
    try:
        path.write_bytes(change(data))
        attempt(folders[shards], out)
    finally:
        path.write_bytes(data)


@SLOW
@given(st.data(), st.sampled_from(["config.json", "tokenizer.json", "model.safetensors.index.json"]), ODD)
def test_changed_values(folders, tmp_path_factory, data, name, value):
    path, out = folders[2] / name, tmp_path_factory.getbasetemp() / "out.safetensors"
    text = path.read_text()
    content = json.loads(text)
    if name == "tokenizer.json":  # the parts, not every token
        content["model"]["merges"] = content["model"]["merges"][:2]
    place = data.draw(st.sampled_from([place for place in paths(content) if place and "vocab" not in place[1:2]]))
    inner = content
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = value
    try:
        path.write_text(json.dumps(content))
        attempt(folders[2], out)
    finally:
        path.write_text(text)


@pytest.mark.parametrize("size", [2**31, 2**24, 10**30, -1, 0, math.inf])
@pytest.mark.parametrize("name", ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"])
def test_sizes_that_cannot_be(folders, tmp_path, name, size):
    path = folders[0] / "config.json"
    text = path.read_text()
    try:
        path.write_text(json.dumps(config_of(SHAPE, **{name: size})))
        with pytest.raises(UserError):
            import_folder(folders[0], tmp_path / "out", progress=Progress())
    finally:
        path.write_text(text)
    assert not list(tmp_path.iterdir())
