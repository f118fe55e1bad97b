"""Files that are damaged, or made up with every hash right: a UserError, or a model; no other exception, no crash.

Hypothesis changes bytes and values; what does not depend on the reader being told of damage has its hashes renewed.
"""

import copy
import hashlib
import json
import shutil

import numpy as np
import pytest
from helpers import command
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from programs import INJECTED
from safetensors.numpy import load_file, save_file

from flashlm_numba.api import Run
from flashlm_numba.data.prepare import prepare
from flashlm_numba.data.shards import open_tokens
from flashlm_numba.heads.label_tree import Tree
from flashlm_numba.heads.tree_shapes import build_tree
from flashlm_numba.model import build as assemble
from flashlm_numba.model import checkpoint, packed
from flashlm_numba.model.export import export_run
from flashlm_numba.system.errors import UserError
from flashlm_numba.training.optimizer import Optimizer

SLOW = settings(deadline=None, suppress_health_check=list(HealthCheck))


@st.composite
def changes(draw):
    """A function that changes bytes: a few replaced, cut off, put in or left out, near the front or anywhere."""
    kind = draw(st.sampled_from(["replace", "cut", "insert", "remove", "empty"]))
    near, at, many = draw(st.booleans()), draw(st.floats(0, 1)), draw(st.integers(1, 16))
    junk = draw(st.binary(min_size=many, max_size=many))

    def change(data):
        place = int(at * (min(len(data), 600) if near else len(data)))
        after = data[place + many :]
        return {
            "replace": data[:place] + junk + after,
            "cut": data[:place],
            "insert": data[:place] + junk + data[place:],
            "remove": data[:place] + after,
            "empty": b"",
        }[kind]

    return change


ODD = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.sampled_from([0, 1, -1, 2**31, 2**63, 10**12]),
    st.floats(),
    st.text(max_size=8),
    st.sampled_from(["../../etc/passwd", "/dev/zero", "nan"]),
    st.lists(st.integers(), max_size=3),
    st.dictionaries(st.text(max_size=3), st.integers(), max_size=2),
)


def paths(value, here=()):
    """The place of every value in a JSON text."""
    yield here
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield from paths(item, (*here, key))


def put(value, path, new):
    """The same JSON value with another one at this place; without it, where new is KeyError."""
    if not path:
        return None if new is KeyError else new
    changed = copy.deepcopy(value)
    inside = changed
    for key in path[:-1]:
        inside = inside[key]
    if new is KeyError:
        del inside[path[-1]]
    else:
        inside[path[-1]] = new
    return changed


@st.composite
def json_changes(draw):
    """A function that replaces a value somewhere in a JSON text, or leaves it out."""
    where, new = draw(st.floats(0, 1, exclude_max=True)), draw(st.one_of(st.just(KeyError), ODD))

    def change(text):
        value = json.loads(text)
        places = list(paths(value))
        return json.dumps(put(value, places[int(where * len(places))], new))

    return change


def load(path):
    """A model out of path, or None where that is refused in words."""
    try:
        return assemble.load_model(path).model
    except UserError as error:
        sentence = str(error)
    assert len(sentence) > 20
    return None


@pytest.fixture(scope="module")
def fresh(run, tmp_path_factory):
    """fresh(): a folder with a copy of the trained run in it."""
    parent, count = tmp_path_factory.mktemp("fresh"), iter(range(10**6))

    def make():
        folder = parent / str(next(count))
        shutil.copytree(run, folder, ignore=shutil.ignore_patterns("step-1", "step-2"))
        return folder

    return make


def rehash(path):
    """Make state.json agree with the files beside it, as whoever made them up would."""
    state = json.loads((path / "state.json").read_text())
    state.pop("sha256", None)
    state["files"] = {name: hashlib.sha256((path / name).read_bytes()).hexdigest() for name in state["files"]}
    state["sha256"] = checkpoint._hash(state)
    (path / "state.json").write_text(json.dumps(state))


@SLOW
@given(change=changes(), name=st.sampled_from(["model", "optimizer", "ema"]))
def test_changed_tensors_with_their_hash_renewed(fresh, change, name):
    INJECTED["files made up or damaged"] += 1
    folder = fresh()
    path = folder / "checkpoints" / "step-3"
    file = path / f"{name}.safetensors"
    file.write_bytes(change(file.read_bytes()))
    assert checkpoint.damage(path) is not None or load_file(file)  # the hash alone tells
    rehash(path)
    model = load(folder)
    if model is not None:
        optimizer = Optimizer(model.parameters, model.gradients)
        for other in ("optimizer", "ema"):
            try:
                tensors = checkpoint.load(path, other)
                if other == "optimizer":
                    optimizer.load_state_dict(tensors)
            except UserError:
                pass
    shutil.rmtree(folder)


@SLOW
@given(change=json_changes(), name=st.sampled_from(["config.json", "checkpoints/step-3/state.json"]))
def test_changed_settings_and_state(fresh, change, name):
    INJECTED["files made up or damaged"] += 1
    folder = fresh()
    file = folder / name
    file.write_text(change(file.read_text()))
    if file.name == "state.json":
        try:
            state = json.loads(file.read_text())
            state.pop("sha256", None)
            state["sha256"] = checkpoint._hash(state)
            file.write_text(json.dumps(state))
        except (AttributeError, TypeError):  # no object any more
            pass
    load(folder)
    shutil.rmtree(folder)


DEEP = ["[" * 99_999, '{"a":' * 9_999 + "1" + "}" * 9_999, "9" * 9_999, "\0"]


@pytest.mark.parametrize("text", DEEP, ids=["list", "object", "integer", "nul"])
def test_json_that_the_parser_cannot_follow(fresh, corpus, corpus_files, tmp_path, text):
    """Python's parser has errors of its own for deep nesting and for long integers."""
    INJECTED["files made up or damaged"] += 1
    folder = fresh()
    with (folder / "metrics.jsonl").open("a") as log:
        log.write(text + "\n")
    assert [line["step"] for line in Run(folder).metrics if isinstance(line, dict)] == [1, 2, 3]
    for name in ("checkpoints/step-3/state.json", "config.json"):
        (folder / name).write_text(text)
        assert load(folder) is None
    shutil.copytree(corpus, tmp_path / "tokens")
    (tmp_path / "tokens" / "manifest.json").write_text(text)
    with pytest.raises(UserError, match=r"manifest\.json is damaged .*: delete the folder"):
        open_tokens(tmp_path / "tokens")
    (tmp_path / "tokens" / "manifest.json").rename(tmp_path / "tokens" / "progress.json")
    with pytest.raises(UserError, match=r"progress\.json is damaged: delete the folder"):
        prepare(str(corpus_files), tmp_path / "tokens", progress=False)


@pytest.fixture(scope="module")
def exported(run, tmp_path_factory):
    path = tmp_path_factory.mktemp("exported") / "model.safetensors"
    export_run(run, path)
    return path


@SLOW
@given(change=changes())
def test_a_changed_export_is_refused(exported, tmp_path_factory, change):
    INJECTED["files made up or damaged"] += 1
    path = tmp_path_factory.mktemp("changed") / "model.safetensors"
    path.write_bytes(change(exported.read_bytes()))
    if path.read_bytes() != exported.read_bytes():
        assert load(path) is None
    path.unlink()


@SLOW
@given(change=json_changes(), key=st.sampled_from(["config", "state"]))
def test_an_export_that_was_made_up(exported, tmp_path_factory, change, key):
    INJECTED["files made up or damaged"] += 1
    from safetensors import safe_open

    with safe_open(exported, framework="numpy") as file:
        metadata = file.metadata()
    tensors = load_file(exported)
    metadata[key] = change(metadata[key])
    metadata["sha256"] = packed._digest(tensors, *(metadata[name] for name in ("config", "state", "tokenizer")))
    path = tmp_path_factory.mktemp("changed") / "model.safetensors"
    save_file(tensors, path, metadata=metadata)
    load(path)
    path.unlink()


@pytest.mark.parametrize("length", [0, 7, 2**20, 2**40, 2**63, 2**64 - 1])
def test_a_header_that_claims_any_length_takes_no_memory(exported, tmp_path, length):
    INJECTED["files made up or damaged"] += 1
    path = tmp_path / "model.safetensors"
    path.write_bytes(length.to_bytes(8, "little") + exported.read_bytes()[8:])
    done = command("eval", path)
    assert done.exit_code == 1
    assert "export the run again" in done.stderr


@pytest.mark.parametrize(
    "entry",
    [
        {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]},
        {"dtype": "F32", "shape": [4], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]},
        {"dtype": "F99", "shape": [1], "data_offsets": [0, 4]},
        {"dtype": "BF16", "shape": [2], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [1], "data_offsets": [4, 0]},
        {"dtype": "F32", "shape": [1]},
    ],
)
def test_entries_of_a_header_that_cannot_be(fresh, entry):
    INJECTED["files made up or damaged"] += 1
    folder = fresh()
    path = folder / "checkpoints" / "step-3"
    header = json.dumps({"embedding.weight": entry}).encode()
    (path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    rehash(path)
    done = command("info", folder)
    assert done.exit_code == 1, done.output
    assert done.stderr.startswith("Error: ")


def test_two_tensors_in_one_place(fresh):
    INJECTED["files made up or damaged"] += 1
    folder = fresh()
    path = folder / "checkpoints" / "step-3"
    entry = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
    header = json.dumps({"embedding.weight": entry, "blocks.0.norm1.weight": entry}).encode()
    (path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    rehash(path)
    assert command("info", folder).exit_code == 1


def test_a_state_does_not_reach_outside_its_folder(fresh):
    INJECTED["files made up or damaged"] += 1
    folder = fresh()
    path = folder / "checkpoints" / "step-3"
    secret = folder / "secret"
    secret.write_text("not a checkpoint's")
    state = json.loads((path / "state.json").read_text())
    state["files"]["../../secret"] = hashlib.sha256(secret.read_bytes()).hexdigest()
    state.pop("sha256")
    (path / "state.json").write_text(json.dumps({**state, "sha256": checkpoint._hash(state)}))
    assert checkpoint.damage(path) == "state.json names a file elsewhere"


@SLOW
@given(change=json_changes())
def test_a_changed_manifest(corpus, tmp_path_factory, change):
    INJECTED["files made up or damaged"] += 1
    folder = tmp_path_factory.mktemp("tokens") / "copy"
    shutil.copytree(corpus, folder)
    file = folder / "manifest.json"
    file.write_text(change(file.read_text(encoding="utf-8")), encoding="utf-8")
    try:
        data = open_tokens(folder)
        data.verify()
        for split in data.splits.values():
            assert sum(len(document) for document in split.documents()) <= split.n_tokens
    except UserError:
        pass
    shutil.rmtree(folder)


@SLOW
@given(change=changes(), which=st.sampled_from(["train-00000.bin", "validation-00000.bin"]))
def test_a_changed_shard_is_refused(corpus, tmp_path_factory, change, which):
    INJECTED["files made up or damaged"] += 1
    folder = tmp_path_factory.mktemp("tokens") / "copy"
    shutil.copytree(corpus, folder)
    file = folder / which
    before = file.read_bytes()
    file.write_bytes(change(before))
    if file.read_bytes() != before:
        with pytest.raises(UserError, match=which):
            open_tokens(folder).verify()
    shutil.rmtree(folder)


@SLOW
@given(
    shape=st.sampled_from(["adaptive", "huffman", "balanced"]),
    name=st.sampled_from(
        ["token_start", "token_end", "child_start", "child_end", "leaf_end", "parent", "token_of_row"]
    ),
    at=st.floats(0, 1, exclude_max=True),
    value=st.one_of(st.integers(-3, 60), st.integers(-(2**31), 2**31 - 1)),
)
def test_a_changed_tree_is_refused(shape, name, at, value):
    INJECTED["files made up or damaged"] += 1
    tensors = build_tree(shape, np.arange(50)).to_tensors()
    array = tensors[f"tree.{name}"]
    where = int(at * len(array))
    if array[where] != value:
        array[where] = value
        with pytest.raises(UserError, match="The label tree is damaged"):
            Tree.from_tensors(tensors)


def assert_prepared_or_refused(path):
    out, sentence = path.parent / "out", ""
    try:
        manifest = prepare(str(path), out, progress=False)
    except UserError as error:
        sentence = str(error)
    else:
        assert manifest.splits["train"].tokens > 0
    assert len(sentence) > 20 or (out / "manifest.json").exists()
    assert not sentence or not (out / "manifest.json").exists()


@SLOW
@given(st.one_of(st.binary(max_size=200), st.lists(st.one_of(ODD, st.fixed_dictionaries({"text": ODD})), max_size=4)))
def test_lines_of_json_that_are_none(tmp_path_factory, content):
    INJECTED["files made up or damaged"] += 1
    folder = tmp_path_factory.mktemp("lines")
    path = folder / "lines.jsonl"
    path.write_bytes(content if isinstance(content, bytes) else "\n".join(map(json.dumps, content)).encode())
    assert_prepared_or_refused(path)
    shutil.rmtree(folder)


@SLOW
@given(st.binary(max_size=300))
def test_text_of_any_bytes(tmp_path_factory, content):
    INJECTED["files made up or damaged"] += 1
    folder = tmp_path_factory.mktemp("text")
    (folder / "some.txt").write_bytes(content)
    assert_prepared_or_refused(folder / "some.txt")
    shutil.rmtree(folder)


@SLOW
@given(st.text(st.characters(exclude_characters="\r\x1b"), max_size=40))  # click's test runner changes these two
def test_a_prompt_of_any_characters(exported, prompt):
    INJECTED["files made up or damaged"] += 1
    done = command("generate", exported, f"--prompt={prompt}", "--max-tokens", 2, "--seed", 0)
    assert done.exit_code == 0, done.output
    assert done.stdout.startswith(prompt)
