"""The built-in text, which is prepared on first use and stored in the cache folder."""

from __future__ import annotations

import hashlib
from pathlib import Path

from flashlm_numba.data import sources
from flashlm_numba.data.manifest import FORMAT
from flashlm_numba.data.prepare import discard_if_damaged, prepare
from flashlm_numba.data.shards import TokenData, open_tokens
from flashlm_numba.data.vocabularies import DEFAULT_VOCABULARY, vocabulary_named
from flashlm_numba.data.writer import SHARD_TOKENS
from flashlm_numba.system.cache import from_cache, writable_cache
from flashlm_numba.system.errors import UserError


def open_run_tokens(folder: Path | str, run: Path, expected: str) -> TokenData:
    """Open the tokens in folder that a run was trained on. Raises UserError if they are not those.

    run : name of the run for messages;  expected : hash of the tokens
    If they were those of the built-in text and the folder is gone, for example with an emptied cache, this prepares
    the built-in text again.
    """
    if not str(folder) or not Path(folder).is_dir():
        if Path(folder).name != _corpus_name():
            raise UserError(
                f"The tokens that {run} was trained on are not in {folder or 'a known place'}: name their folder with "
                "--data DIR, or prepare the same data there."
            )
        folder = default_corpus()
    tokens = open_tokens(folder)
    if tokens.hash != expected:
        raise UserError(
            f"The tokens in {folder} are not the ones that {run} was trained on: name their folder with --data DIR, "
            "or prepare the same data there."
        )
    return tokens


def default_corpus(progress: bool = True) -> Path:
    """Folder of the built-in text's token shards in the cache (see cache.py). It is prepared on first use.

    The folder's name contains a hash of the text and the vocabulary. The first call takes a few seconds, later calls
    take milliseconds.
    """
    name = _corpus_name()
    out = from_cache(name, _if_sound)
    if out is None:
        out = writable_cache(name)
        discard_if_damaged(out)
        prepare(None, out, progress=progress, wait=True)
    return out


def cached_corpus() -> Path | None:
    """The folder of default_corpus if it exists and is intact, so that default_corpus prepares nothing; else None."""
    return from_cache(_corpus_name(), _if_sound)


def _corpus_name() -> str:
    source = sources.built_in()
    tokens = vocabulary_named(DEFAULT_VOCABULARY).hash
    key = hashlib.sha256(f"{FORMAT} {source.content_hash} {tokens} {SHARD_TOKENS}".encode()).hexdigest()
    return f"corpus-{key[:16]}"


def _if_sound(folder: Path) -> Path | None:
    """The folder if it can be opened and its tokens are intact, else None."""
    try:
        data = open_tokens(folder)
        data.verify()
    except UserError:
        return None
    return folder
