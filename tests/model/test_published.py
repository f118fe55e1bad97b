"""Folders of published MatMul-free LMs: settings, names and shapes, and files that are refused."""

import json
import shutil

import numpy as np
import pytest
from mmf_folder import bfloat16, config_of, write_folder
from mmf_twin import authors_names, random_parameters
from safetensors.numpy import save_file

from flashlm_numba.model.published import located, read_published, tensor_names
from flashlm_numba.model.safetensors_files import stored_tensors
from flashlm_numba.system.errors import UserError

SHAPE = {"vocab": 30, "dim": 8, "width": 8, "ffn_dim": 12, "n_blocks": 2}
PARAMETERS = random_parameters(0, **SHAPE)


@pytest.fixture
def folder(tmp_path):
    return write_folder(tmp_path / "model", PARAMETERS, SHAPE)


def read(folder):
    """The tensors by this program's names."""
    model = read_published(folder)
    return {name: place.read() for name, place in located(folder, model, stored_tensors(folder)).items()}


def refused(folder):
    with pytest.raises(UserError) as error:
        read(folder)
    sentence = str(error.value)
    assert sentence.count(". ") == 0
    assert sentence.endswith(".")
    return sentence


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("shards", [0, 3])
def test_every_tensor_is_read_and_widened(tmp_path, dtype, shards):
    found = read(write_folder(tmp_path, PARAMETERS, SHAPE, dtype=dtype, shards=shards))
    assert found.keys() == PARAMETERS.keys()
    for name, value in PARAMETERS.items():
        want = bfloat16(value) if dtype == "bfloat16" else value.astype(dtype).astype(np.float32)
        np.testing.assert_array_equal(found[name], want, err_msg=name)
        assert found[name].dtype == np.float32


def test_names_and_shapes_are_those_of_the_twin(folder):
    model = read_published(folder)
    names = {own: (other, shape) for own, other, shape in tensor_names(model)}
    assert {own: other for own, (other, _) in names.items()} == dict(authors_names(2))
    assert {own: shape for own, (_, shape) in names.items()} == {n: v.shape for n, v in PARAMETERS.items()}


def test_published_settings(tmp_path):
    """The values of the published model of 370M parameters."""
    content = config_of(SHAPE, vocab_size=32_000, hidden_size=1024, num_hidden_layers=24, num_heads=1)
    content |= {"intermediate_size": None, "rms_norm_eps": 1e-5, "eos_token_id": [2, 5], "use_cache": True}
    (tmp_path / "config.json").write_text(json.dumps(content))
    model = read_published(tmp_path)
    assert (model.vocab_size, model.dim, model.ffn_dim, model.n_blocks) == (32_000, 1024, 2816, 24)
    assert (model.norm_eps, model.has_bounds, model.is_tied, model.start, model.end) == (1e-5, True, False, 1, 2)
    (tmp_path / "config.json").write_text('{"model_type": "hgrn_bit"}')
    model = read_published(tmp_path)  # the defaults of the authors' code
    assert (model.vocab_size, model.dim, model.ffn_dim, model.n_blocks) == (32_000, 2048, 5632, 24)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"model_type": "llama"}, "has model_type 'llama', but only hgrn_bit, the MatMul-free LM, can be imported."),
        ({"use_short_conv": True}, "has use_short_conv True, but this program has no short convolutions for"),
        ({"hidden_act": "gelu"}, "has hidden_act 'gelu', but only swish (silu) can be imported."),
        ({"expand_ratio": 2}, "has expand_ratio 2, but only 1 can be imported."),
        ({"num_heads": 3}, "has num_heads 3, which does not divide hidden_size 8."),
        ({"num_hidden_layers": 0}, "has num_hidden_layers 0, but it must be a whole number from 1 to 64."),
        ({"hidden_size": "8"}, "has hidden_size '8', but it must be a whole number from 1 to"),
        ({"hidden_size": True}, "has hidden_size True, but it must be"),
        ({"rms_norm_eps": 0}, "has rms_norm_eps 0, but it must be a number from 1e-12 to 1."),
        ({"rms_norm_eps": float("nan")}, "has rms_norm_eps nan, but it must be"),
        ({"bos_token_id": 30}, "has bos_token_id 30, which is no id of its 30 tokens."),
        ({"use_lower_bound": 1}, "has use_lower_bound 1, but it must be true or false."),
        ({"quantization_config": {"bits": 4}}, "but only unquantised weights can be imported."),
    ],
)
def test_fields_that_cannot_be_honoured_are_named(folder, changes, sentence):
    (folder / "config.json").write_text(json.dumps(config_of(SHAPE, **changes)))
    assert sentence in refused(folder)


def test_a_tensor_is_missing_misshapen_or_unknown(folder):
    names = dict(authors_names(2))
    tensors = {names[name]: value for name, value in PARAMETERS.items()}
    file, down = folder / "model.safetensors", "model.layers.1.mlp.down_proj.weight"
    save_file({name: value for name, value in tensors.items() if name != down}, file)
    assert f"has no tensor {down}, which its config.json asks for" in refused(folder)
    save_file(tensors | {down: tensors[down].T.copy()}, file)
    assert f"holds {down} with the shape [12, 8], but" in refused(folder)
    save_file(tensors | {"lm_head.bias": np.zeros(30, np.float32)}, file)
    assert "has the tensor lm_head.bias, which a MatMul-free LM with its config.json does not have." in refused(folder)
    save_file(tensors | {down: tensors[down].astype(np.int64)}, file)
    assert f"holds {down} as I64, which cannot be imported; convert it to F32, F16, BF16." in refused(folder)


def test_a_config_that_asks_for_more_allocates_nothing(folder):
    (folder / "config.json").write_text(json.dumps(config_of(SHAPE, vocab_size=1 << 24, hidden_size=1 << 22)))
    assert "with the shape [30, 8], but" in refused(folder)


def test_no_lower_bounds_and_tied_rows(tmp_path):
    parameters = {n: v for n, v in PARAMETERS.items() if n != "lower_bounds"}
    found = read(write_folder(tmp_path / "plain", parameters, SHAPE, use_lower_bound=False))
    assert found.keys() == parameters.keys()
    parameters = {n: v for n, v in PARAMETERS.items() if n != "head.weight"}
    found = read(write_folder(tmp_path / "tied", parameters, SHAPE, tie_word_embeddings=True))
    np.testing.assert_array_equal(found["head.weight"], PARAMETERS["embedding.weight"])
    found = read(write_folder(tmp_path / "both", PARAMETERS, SHAPE, tie_word_embeddings=True))
    np.testing.assert_array_equal(found["head.weight"], PARAMETERS["embedding.weight"])


# --- damaged files ---


def test_files_that_are_missing(folder, tmp_path):
    assert "There is no folder" in refused(tmp_path / "nothing")
    (folder / "model.safetensors").unlink()
    assert "has neither model.safetensors nor model.safetensors.index.json" in refused(folder)
    (folder / "config.json").unlink()
    assert "has no config.json; give the folder of a published MatMul-free LM." in refused(folder)


@pytest.mark.parametrize("text", ["", "{", "[]", '"x"', "\x00", "[" * 100_000])
def test_a_config_that_is_none(folder, text):
    (folder / "config.json").write_text(text)
    assert "config.json is no" in refused(folder)


@pytest.mark.parametrize("share", [0.0, 0.001, 0.2, 0.6, 0.999])
@pytest.mark.parametrize("shards", [0, 2])
def test_a_truncated_file_is_named(tmp_path, share, shards):
    folder = write_folder(tmp_path, PARAMETERS, SHAPE, shards=shards)
    path = sorted(folder.glob("*.safetensors"))[-1]
    data = path.read_bytes()
    path.write_bytes(data[: int(share * len(data))])
    sentence = refused(folder)
    assert str(path) in sentence
    assert "is truncated" in sentence or "is not a safetensors file" in sentence


def test_a_header_that_is_none(folder):
    path = folder / "model.safetensors"
    for text in (
        b"[]",
        b"{}x",
        b'{"a": 1}',
        b'{"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}',
        b'{"a": {"dtype": [], "shape": [1], "data_offsets": [0, 4]}}',
        b"\xff{",
    ):
        path.write_bytes(len(text).to_bytes(8, "little") + text)
        assert f"{path} is not a safetensors file" in refused(folder)
    path.write_bytes(b"\xff" * 64)
    assert f"{path} is not a safetensors file" in refused(folder)
    entry = b'{"a": {"dtype": "F32", "shape": [9], "data_offsets": [0, 4]}}'
    path.write_bytes(len(entry).to_bytes(8, "little") + entry + bytes(40))
    assert "gives a 4 bytes, which do not fit its shape [9]" in refused(folder)


def test_an_index_that_is_wrong(tmp_path):
    whole = write_folder(tmp_path / "whole", PARAMETERS, SHAPE, shards=2)

    def with_index(change):
        folder = tmp_path / "other"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(whole, folder)
        index = folder / "model.safetensors.index.json"
        content = json.loads(index.read_text())
        change(content["weight_map"], folder, content)
        index.write_text(json.dumps(content))
        return refused(folder)

    first, second = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
    sentence = with_index(lambda places, folder, content: (folder / second).unlink())
    assert f"names the file {second}, which is missing" in sentence
    sentence = with_index(lambda places, folder, content: places.update({"lm_head.weight": "../x.safetensors"}))
    assert "names the file '../x.safetensors', which is not in its folder" in sentence

    def swap(places, folder, content):
        places["lm_head.weight"] = second if places["lm_head.weight"] == first else first

    assert "says that lm_head.weight is in" in with_index(swap)
    assert "does not say in which files" in with_index(lambda places, folder, content: content.pop("weight_map"))
    assert "does not say in which files" in with_index(lambda places, folder, content: places.update({"a": 1}))
