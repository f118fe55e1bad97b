"""A model whose weights stay packed: the bits of the same model unpacked, and files that are damaged."""

from dataclasses import replace

import numpy as np
import pytest
from helpers import command
from hypothesis import given
from hypothesis import strategies as st
from mmf_folder import write_folder
from mmf_tokenizer import tokenizer_json
from mmf_twin import random_parameters
from safetensors.numpy import save_file

from flashlm_numba.heads import DenseHead
from flashlm_numba.heads.config import HeadConfig
from flashlm_numba.inference.generate import generate_ids
from flashlm_numba.kernels import bit_packed
from flashlm_numba.kernels.bitlinear import absmean_ternary, bitlinear_forward
from flashlm_numba.kernels.ternary import pack_ternary, unpack_ternary
from flashlm_numba.model import packed, packed_reading
from flashlm_numba.model.config import ModelConfig, RunConfig
from flashlm_numba.model.model import Model
from flashlm_numba.model.packed_model import PackedModel, RoundedRows, random_packed_model
from flashlm_numba.model.packed_reading import read_packed_model, serves, two_bits
from flashlm_numba.model.parameters import initial_parameters, ternary_names
from flashlm_numba.system.errors import UserError

CONFIG = ModelConfig(50, dim=70, ffn_dim=260, mixer="mlgru", linear="bitlinear", n_blocks=2, n_passes=1)


RUN = RunConfig(model=CONFIG, head=HeadConfig(name="bitlinear"))


def export(path, rows, seed=0):
    """Write a random model as an export does. Returns its parameters, as reading widens them."""
    parameters, rng = initial_parameters(CONFIG, seed, embedding_std=1.0), np.random.default_rng(seed)
    parameters |= {
        "head.weight": rng.standard_normal((50, 70), np.float32),
        "head.norm.weight": np.ones(70, np.float32),
    }
    for name, value in parameters.items():
        if value.ndim == 1 or name == "lower_bounds":
            value += np.float32(0.3) * rng.standard_normal(value.shape, np.float32)
    tensors, scales, ternary = dict(parameters), {}, [*ternary_names(CONFIG), "head.weight"]
    for name in ternary:
        tensors[name], scales[name] = absmean_ternary(tensors[name])
    packed.write(path, tensors, ternary, RUN.to_json(), {"step": 7}, "a tokenizer", rows, scales)
    return packed.read(path)[1]


@pytest.mark.parametrize("rows", ["float", "int8", "int4"])
def test_a_packed_model_has_the_bits_of_the_same_model_unpacked(tmp_path, rows):
    path = tmp_path / "model.safetensors"
    tensors = export(path, rows)
    found, state, tokenizer = read_packed_model(path)
    assert (state["step"], tokenizer) == (7, "a tokenizer")
    plain = Model(CONFIG, {name: tensors[name] for name in initial_parameters(CONFIG, 0)}, DenseHead)
    ids = np.random.default_rng(1).integers(0, 50, 150).astype(np.int32)
    h = plain.forward(ids[None])
    packed_state, last = found.prefill(ids[:130])
    np.testing.assert_array_equal(last[0], h[129])
    for t in range(130, 150):
        last = found.decode_step(packed_state, int(ids[t]))
        np.testing.assert_array_equal(last[0], h[t])
    want, _ = bitlinear_forward(last, tensors["head.norm.weight"], tensors["head.weight"])
    np.testing.assert_array_equal(found.head.logits(last), want)


def test_the_matrices_stay_in_one_packed_array(tmp_path, monkeypatch):
    made = []

    def zeros(shape, dtype, aligned_zeros=bit_packed.aligned_zeros):
        made.append(aligned_zeros(shape, dtype))
        return made[-1]

    export(tmp_path / "model.safetensors", "int8")
    monkeypatch.setattr(bit_packed, "aligned_zeros", zeros)
    model, _, _ = read_packed_model(tmp_path / "model.safetensors")
    assert [array.dtype for array in made] == [np.uint8]
    assert model.trunk.weights.codes is made[0]
    assert model.trunk.weights.codes.nbytes == 2 * (4 * 70 * 64 + 520 * 64 + 70 * 128)


@pytest.mark.parametrize("options", [{}, {"top_k": 3}, {"top_p": 0.5}, {"temperature": 0}, {"temperature": 0.5}])
def test_generation_uses_it_like_a_model(options):
    model = random_packed_model(CONFIG, 0, std=1.0)
    ids = generate_ids(model, [3, 4], rng=np.random.default_rng(0), **options)
    found = [next(ids) for _ in range(20)]
    assert all(0 <= token < 50 for token in found)
    again = generate_ids(random_packed_model(CONFIG, 0, std=1.0), [3, 4], rng=np.random.default_rng(0), **options)
    assert [next(again) for _ in range(20)] == found


def test_sampled_tokens_have_the_probabilities_of_the_logits():
    model, rng = random_packed_model(CONFIG, 0, std=1.0), np.random.default_rng(0)
    _, h = model.prefill(np.array([1], np.int32))
    shares = model.head.distribution(h)[0]
    logits = model.head.logits(h)[0].astype(np.float64)
    np.testing.assert_allclose(shares, np.exp(logits) / np.exp(logits).sum(), rtol=1e-5)
    counts = np.bincount(model.head.sample(np.repeat(h, 4000, 0), rng), minlength=50)
    assert np.abs(counts / 4000 - shares).max() < 0.03
    assert model.head.sample(h, rng, temperature=0) == logits.argmax()


@pytest.mark.parametrize("options", [(), ("--temperature", 0), ("--top-k", 5, "--activations", "int8")])
def test_the_command_keeps_an_imported_model_packed_and_writes_the_same(tmp_path, monkeypatch, options):
    shape = {"vocab": 300, "dim": 50, "width": 50, "ffn_dim": 134, "n_blocks": 2}
    write_folder(tmp_path / "folder", random_parameters(7, **shape), shape, tokenizer=tokenizer_json())
    path, made = tmp_path / "model.safetensors", []
    done = command("import", tmp_path / "folder", path)
    assert done.exit_code == 0, done.output

    def read(path, read=packed_reading.read_packed_model):
        made.append(read(path))
        return made[-1]

    monkeypatch.setattr(packed_reading, "read_packed_model", read)
    arguments = ("generate", path, "--prompt", "the", "--seed", 3, "--max-tokens", 30, *options)
    found = command(*arguments)
    assert found.exit_code == 0, found.output
    assert len(made) == 1
    monkeypatch.setattr(packed_reading, "serves", lambda run: False)
    unpacked = command(*arguments)
    assert unpacked.exit_code == 0, unpacked.output
    assert len(made) == 1
    assert found.stdout == unpacked.stdout  # not the notes of a first compilation


@given(
    seed=st.integers(0, 2**32 - 1),
    rows=st.sampled_from([0, 1, 5, 513]),
    columns=st.integers(1, 600),
)
def test_five_in_a_byte_become_four(seed, rows, columns):
    weight = np.random.default_rng(seed).integers(-1, 2, (rows, columns)).astype(np.float32)
    out = np.full(pack_ternary(weight).shape, 255, np.uint8)
    two_bits(out, packed.pack_base3(weight), columns)
    np.testing.assert_array_equal(out, pack_ternary(weight))


def test_five_in_a_byte_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="11 columns take 3 bytes per row, got uint8"):
        two_bits(np.empty((2, 64), np.uint8), np.zeros((2, 4), np.uint8), 11)
    with pytest.raises(ValueError, match="no byte can be above 242, got 243"):
        two_bits(np.empty((1, 64), np.uint8), np.full((1, 3), 243, np.uint8), 11)


def test_random_weights_have_equal_shares_and_padding_of_zero():
    model = random_packed_model(CONFIG, 0)
    for matrix, columns in ((model.trunk.matrix(1, "down"), 260), (model.head.packed, 70)):
        values = unpack_ternary(matrix, 4 * matrix.shape[1])
        assert not values[:, columns:].any()
        shares = [(values[:, :columns] == value).mean() for value in (-1, 0, 1)]
        np.testing.assert_allclose(shares, 1 / 3, atol=0.02)
    np.testing.assert_allclose(model.embedding.rows(np.arange(50), 70).std(), 0.02, rtol=0.1)


def change(path, edit):
    """Write the file again after edit(tensors, metadata), without a new hash."""
    from safetensors import safe_open

    with safe_open(path, framework="numpy") as file:
        metadata, tensors = file.metadata(), {name: file.get_tensor(name).copy() for name in file.keys()}  # noqa: SIM118
    edit(tensors, metadata)
    save_file(tensors, path, metadata=metadata)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda t, m: t["blocks.0.mixer.out.weight.base3"].__setitem__((3, 3), 1), "SHA-256"),
        (lambda t, m: t["blocks.0.mixer.out.weight.base3"].__setitem__((3, 3), 250), "no byte can be above 242"),
        (lambda t, m: t.pop("final_norm.weight"), "final_norm.weight is missing"),
        (lambda t, m: t.update({"final_norm.weight": np.ones(3, np.float32)}), "final_norm.weight must be float32"),
        (lambda t, m: m.update(format="other"), "not a file from"),
        (lambda t, m: m.update(sha256="0"), "SHA-256"),
    ],
)
def test_damaged_files_are_refused(tmp_path, edit, message):
    path = tmp_path / "model.safetensors"
    export(path, "int8")
    change(path, edit)
    with pytest.raises(UserError, match=message):
        read_packed_model(path)


def test_a_cut_file_and_a_missing_one_are_refused(tmp_path):
    path = tmp_path / "model.safetensors"
    export(path, "int8")
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(UserError, match="is damaged"):
        read_packed_model(path)
    with pytest.raises(UserError, match="cannot be read"):
        read_packed_model(tmp_path / "none")


def test_other_models_are_not_served(tmp_path):
    copying = replace(CONFIG, ngram_copy_orders=(1,))
    assert serves(RUN)
    for other in (
        replace(RUN, head=HeadConfig(name="tree")),
        replace(RUN, head=HeadConfig(name="bitlinear", log_prior=True)),
        replace(RUN, head=HeadConfig(name="bitlinear", soft_cap=3.0)),
        replace(RUN, model=ModelConfig()),
        replace(RUN, model=copying),
    ):
        assert not serves(other)
    model = random_packed_model(CONFIG, 0)
    with pytest.raises(ValueError, match="without ngram_copy_orders"):
        PackedModel(copying, model.trunk, model.embedding, model.head)


def test_wrong_tokens_are_refused():
    model = random_packed_model(CONFIG, 0)
    with pytest.raises(ValueError, match=r"ids must be in \[0, 50\)"):
        model.prefill(np.array([50], np.int32))
    with pytest.raises(ValueError, match="at least one token"):
        model.prefill(np.array([], np.int32))


def test_rounded_rows_without_scales_are_float32():
    rows = RoundedRows(np.eye(3, dtype=np.float32), None, "float")
    np.testing.assert_array_equal(rows.rows(np.array([2, 0]), 3), np.eye(3)[[2, 0]])
    assert rows.nbytes == 36
