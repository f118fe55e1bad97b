"""The built-in text in the cache: made once, found again, made anew where it is damaged."""

from __future__ import annotations

import tempfile

import platformdirs
import pytest
from texts import content, make_texts, texts_of

from flashlm_numba.data import builtin, sources
from flashlm_numba.data.builtin import default_corpus, open_run_tokens
from flashlm_numba.data.shards import open_tokens
from flashlm_numba.system.errors import UserError


def test_default_corpus_is_the_whole_built_in_text_and_made_once(tmp_path, monkeypatch):
    monkeypatch.setattr(platformdirs, "user_cache_dir", lambda *args, **kwargs: str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))  # where a cache that cannot be written goes
    folder = default_corpus(progress=False)
    assert folder.parent == tmp_path
    tokens = open_tokens(folder)
    assert tokens.train.n_text_tokens + tokens.validation.n_text_tokens == 2_388_908
    assert (tokens.train.n_documents, tokens.validation.n_documents) == (237, 12)
    assert not set(texts_of(tokens.train)) & set(texts_of(tokens.validation))
    with monkeypatch.context() as patch:
        patch.setattr(builtin, "prepare", None)
        assert default_corpus(progress=False) == folder
    assert sources.built_in().content_hash == tokens.manifest.source["sha256"]


def test_a_run_finds_the_built_in_text_again_after_the_cache_was_emptied(corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(builtin, "_corpus_name", lambda: "corpus-0")
    monkeypatch.setattr(builtin, "default_corpus", lambda: corpus)
    digest = open_tokens(corpus).hash
    assert open_run_tokens(tmp_path / "gone" / "corpus-0", tmp_path, digest).hash == digest
    with pytest.raises(UserError, match="name their folder with --data DIR"):
        open_run_tokens(tmp_path / "gone" / "tokens", tmp_path, digest)


def test_default_corpus_is_made_anew_where_it_is_damaged(tmp_path, monkeypatch):
    (tmp_path / "speeches").mkdir()
    for i, text in enumerate(make_texts(30)):
        (tmp_path / "speeches" / f"{i:02}.txt").write_text(text, encoding="utf-8")
    monkeypatch.setattr(sources, "built_in_folder", lambda: tmp_path / "speeches")
    monkeypatch.setattr(platformdirs, "user_cache_dir", lambda *args, **kwargs: str(tmp_path / "cache"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))  # where a cache that cannot be written goes
    folder = default_corpus(progress=False)
    before = content(folder)
    (folder / "train-00000.bin").unlink()
    assert default_corpus(progress=False) == folder
    assert content(folder) == before
    (tmp_path / "speeches" / "30.txt").write_text("one more")
    assert default_corpus(progress=False) != folder
