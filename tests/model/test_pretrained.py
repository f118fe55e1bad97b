"""Start of E from a GPT-2 checkpoint."""

from __future__ import annotations

import json

import numpy as np
import pytest
from safetensors.numpy import save_file

from flashlm_numba.model.pretrained import from_gpt2
from flashlm_numba.system.errors import UserError


def wte(v, d, seed=0):
    """A matrix (v, d) whose singular values fall off."""
    rng = np.random.default_rng(seed)
    return (rng.standard_normal((v, d)) * 0.8 ** np.arange(d)).astype(np.float32)


def bfloat16_file(path, name, array):
    """A .safetensors file by its specification: header length, JSON header, raw bytes."""
    raw = (array.view(np.uint32) >> 16).astype("<u2").tobytes()
    before = np.arange(3, dtype="<f4").tobytes()  # so that the tensor does not start the data
    header = {
        "first": {"dtype": "F32", "shape": [3], "data_offsets": [0, len(before)]},
        name: {"dtype": "BF16", "shape": list(array.shape), "data_offsets": [len(before), len(before + raw)]},
    }
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + before + raw)


def test_from_gpt2_keeps_the_leading_singular_directions(tmp_path):
    weight = wte(500, 32)
    save_file({"wte.weight": weight, "wpe.weight": wte(20, 32)}, tmp_path / "model.safetensors")
    rows, kept = from_gpt2(tmp_path / "model.safetensors", 8, vocab_size=500)
    u, s, _ = np.linalg.svd(weight.astype(np.float64), full_matrices=False)
    assert kept == pytest.approx((s[:8] ** 2).sum() / (s**2).sum(), rel=1e-5)
    assert 0.5 < kept < 1
    np.testing.assert_allclose(np.linalg.norm(rows, axis=0), s[:8], rtol=1e-4)  # U S
    np.testing.assert_allclose(rows @ rows.T, u[:, :8] * s[:8] ** 2 @ u[:, :8].T, atol=1e-3 * s[0] ** 2)
    everything, share = from_gpt2(tmp_path / "model.safetensors", 32, vocab_size=500)
    assert share == pytest.approx(1)
    np.testing.assert_allclose(everything @ everything.T, weight @ weight.T, atol=1e-4 * s[0] ** 2)


@pytest.mark.parametrize("kind", ["float16", "bfloat16"])
def test_from_gpt2_reads_half_precision_and_both_names(tmp_path, kind):
    path = tmp_path / "model.safetensors"
    weight = wte(128, 16)  # a padded vocabulary: 100 tokens
    if kind == "float16":
        weight = weight.astype(np.float16).astype(np.float32)
        save_file({"transformer.wte.weight": weight.astype(np.float16)}, path)
    else:
        weight = (weight.view(np.uint32) & 0xFFFF0000).view(np.float32)
        bfloat16_file(path, "transformer.wte.weight", weight)
    rows, kept = from_gpt2(str(path), 16, vocab_size=100)
    assert kept == pytest.approx(1)
    np.testing.assert_allclose(rows @ rows.T, weight[:100] @ weight[:100].T, atol=1e-3)


@pytest.mark.parametrize(
    ("name", "rows"),
    [
        ("transformer.wte.weight", 643),
        ("transformer.wte.weight", 1_523),
        ("_orig_mod.transformer.wte.weight", 547),
        ("module._orig_mod.wte.weight", 500),
        ("lm_head.weight", 500),
        ("_orig_mod.lm_head.weight", 675),
    ],
)
def test_from_gpt2_takes_padded_wrapped_and_tied_embeddings(tmp_path, name, rows):
    weight = wte(500, 16)
    padded = np.concatenate([weight, np.full((rows - 500, 16), np.nan, np.float32)])  # never looked at
    save_file({name: padded, "h.0.lm_head.bias": wte(1, 1)}, tmp_path / "model.safetensors")
    found, _ = from_gpt2(tmp_path / "model.safetensors", 16, vocab_size=500)
    np.testing.assert_allclose(found @ found.T, weight @ weight.T, atol=1e-3)
    if "wte" in name:  # an output layer of its own is not the embedding
        save_file({name: padded, "lm_head.weight": wte(500, 16, seed=1)}, tmp_path / "model.safetensors")
        np.testing.assert_array_equal(from_gpt2(tmp_path / "model.safetensors", 16, vocab_size=500)[0], found)


def test_from_gpt2_refuses_what_is_no_gpt2_checkpoint(tmp_path):
    path = tmp_path / "model.safetensors"

    def refused(sentence, source=path):
        with pytest.raises(UserError, match=sentence):
            from_gpt2(source, 8, vocab_size=500)

    refused("There is no file")
    path.write_bytes(b"no safetensors at all, only text that is long enough")
    refused("is not a readable .safetensors file")
    save_file({"embed.weight": wte(500, 16)}, path)
    refused("has no tensor wte.weight")
    save_file({"wte.weight": wte(400, 16)}, path)
    refused("has 400 rows, but the vocabulary has 500 tokens")
    save_file({"wte.weight": wte(1_524, 16)}, path)
    refused("has 1,524 rows, but the vocabulary has 500 tokens")
    save_file({"wte.weight": wte(500, 16), "ema.wte.weight": wte(500, 16)}, path)
    refused(r"has 2 token embeddings \(.*\); use a checkpoint of one model")
    save_file({"other_wte.weight": wte(500, 16)}, path)
    refused("has no tensor wte.weight")
    save_file({"wte.weight": wte(500, 4)}, path)
    refused("has 4 columns, fewer than the model's 8")
    save_file({"wte.weight": np.zeros((500, 16), np.int8)}, path)
    refused("is I8 of shape")
    save_file({"wte.weight": np.zeros(500, np.float32)}, path)
    refused("is F32 of shape")
    save_file({"wte.weight": wte(500, 16) * np.float32(np.nan)}, path)
    refused("not finite")
    save_file({"wte.weight": np.zeros((500, 16), np.float32)}, path)
    refused("only zeros")


def test_from_gpt2_takes_a_hub_name_and_says_when_it_cannot_be_had(tmp_path, monkeypatch):
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    path = tmp_path / "model.safetensors"
    save_file({"wte.weight": wte(500, 16)}, path)
    asked, cached, online = [], False, True

    def download(*name, local_files_only=False):
        asked.append((*name, "cache" if local_files_only else "hub"))
        if local_files_only and not cached:
            raise LocalEntryNotFoundError("not there")
        return str(path)

    def model_info(self, name, timeout):
        asked.append(("info", name))
        assert timeout <= 10
        if not online:
            raise ConnectionError("no network\nand much more")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", model_info)
    gpt2, file = "openai-community/gpt2", "model.safetensors"
    assert from_gpt2(f"hf:{gpt2}", 8, vocab_size=500)[0].shape == (500, 8)
    assert asked == [(gpt2, file, "cache"), ("info", gpt2), (gpt2, file, "hub")]

    asked, online = [], False  # the request that tells so comes before the download, which would try for long
    with pytest.raises(UserError, match=r"openai-community/gpt2 from the Hugging Face hub \(no network\); check"):
        from_gpt2(f"hf:{gpt2}", 8, vocab_size=500)
    assert asked == [(gpt2, file, "cache"), ("info", gpt2)]

    asked, cached = [], True
    assert from_gpt2(f"hf:{gpt2}", 8, vocab_size=500)[0].shape == (500, 8)
    assert asked == [(gpt2, file, "cache")]
