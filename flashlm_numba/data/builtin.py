"""The built-in text, prepared when it is first asked for and kept in the cache folder."""

from __future__ import annotations

import hashlib
from pathlib import Path

from flashlm_numba.data import sources
from flashlm_numba.data.manifest import FORMAT
from flashlm_numba.data.prepare import discard_if_damaged, prepare
from flashlm_numba.data.shards import TokenData, open_tokens
from flashlm_numba.data.tokenizer import DEFAULT_VOCABULARY, vocabulary_named
from flashlm_numba.data.writer import SHARD_TOKENS
from flashlm_numba.system.cache import from_cache, writable_cache
from flashlm_numba.system.errors import UserError


def open_run_tokens(folder: Path | str) -> TokenData:
    """open_tokens of the folder that a run was trained on; where it was the built-in text's and is gone, as when the
    cache has been emptied, that is prepared again. Raises UserError as open_tokens does.
    """
    if not Path(folder).is_dir() and Path(folder).name == _corpus_name():
        folder = default_corpus()
    return open_tokens(folder)


def default_corpus(progress: bool = True) -> Path:
    """Folder of the built-in text's token shards in the cache (see cache.py), prepared when it is first asked for.

    The folder is named by a hash of the text and the vocabulary. Takes a few seconds once, then milliseconds.
    """
    name = _corpus_name()
    out = from_cache(name, _if_sound)
    if out is None:
        out = writable_cache(name)
        discard_if_damaged(out)
        prepare(None, out, progress=progress, wait=True)
    return out


def cached_corpus() -> Path | None:
    """The folder of default_corpus where it is there and sound: then default_corpus prepares nothing."""
    return from_cache(_corpus_name(), _if_sound)


def _corpus_name() -> str:
    source = sources.built_in()
    tokens = vocabulary_named(DEFAULT_VOCABULARY).hash
    key = hashlib.sha256(f"{FORMAT} {source.content_hash} {tokens} {SHARD_TOKENS}".encode()).hexdigest()
    return f"corpus-{key[:16]}"


def _if_sound(folder: Path) -> Path | None:
    """The folder, if it can be opened and its tokens are as they were made."""
    try:
        data = open_tokens(folder)
        data.verify()
    except UserError:
        return None
    return folder
