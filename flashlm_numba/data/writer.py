"""Write shards so that an interruption loses almost nothing: the files of a split, and the journal of finished work.

The journal, `progress.json`, is replaced atomically every few seconds, after the shards have been synced to disk. When
an interrupted `prepare` continues, it truncates the shards to the state in the journal.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, TypeAlias

import numpy as np

from flashlm_numba.data.documents import Place
from flashlm_numba.data.manifest import JOURNAL, MANIFEST, SHARD_NAME, SPLITS, Shard, SplitManifest
from flashlm_numba.data.tokenizer import TOKENIZER, Vocabulary
from flashlm_numba.system import files, locks
from flashlm_numba.system.errors import UserError
from flashlm_numba.system.files import parse_json

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Ids: TypeAlias = NDArray[np.unsignedinteger[Any]]

LOCK = "prepare.lock"
SHARD_TOKENS = 50_000_000  # ids per shard: 100 MB at 2 bytes each


class ShardWriter:
    """Appends ids of one split to its shards. Its state at the end of a document can be stored and restored.

    shard_tokens : ids per shard;  dtype : dtype of an id in the file, Vocabulary.dtype
    state : state of an earlier writer to continue, or None
    Raises ValueError, KeyError or OSError if the files do not fit the state.
    """

    def __init__(self, folder: Path, name: str, shard_tokens: int, dtype: str, state: dict[str, Any] | None) -> None:
        self.folder = folder
        self.name = name
        self.shard_tokens = shard_tokens
        self.dtype = np.dtype(dtype)
        self.documents = 0
        self.text_tokens = 0
        self.text_bytes = 0
        self.finished: list[Shard] = []
        self._file: BinaryIO | None = None
        self._digest = hashlib.sha256()
        self._filled = 0  # ids in the open shard
        if state is not None:
            self._restore(state)

    def _path(self) -> Path:
        return self.folder / f"{self.name}-{len(self.finished):05d}.bin"

    @property
    def tokens(self) -> int:
        return self.text_tokens + self.documents

    def _restore(self, state: dict[str, Any]) -> None:
        self.documents, self.text_tokens, self.text_bytes = (
            int(state[key]) for key in ("documents", "text_tokens", "text_bytes")
        )
        for entry in state["shards"]:
            shard = Shard(**entry)
            if files.sha256(self.folder / shard.name).hexdigest() != shard.sha256:
                raise ValueError(f"{shard.name} has changed")
            self.finished.append(shard)
        self._filled = int(state["filled"])
        if self._filled:
            path = self._path()
            size = self.dtype.itemsize * self._filled
            self._digest = files.sha256(path, size)
            if self._digest.hexdigest() != state["sha256"]:
                raise ValueError(f"{path.name} has changed")
            self._file = path.open("r+b")
            self._file.truncate(size)  # removes ids written after the state was stored
            self._file.seek(size)

    def append(self, ids: Ids) -> None:
        """Write ids (n,), and start a new shard whenever one is full."""
        while len(ids):
            if self._file is None:
                self._file = self._path().open("wb")
            part = ids[: self.shard_tokens - self._filled]
            content = part.astype(self.dtype, copy=False).tobytes()
            self._file.write(content)
            self._digest.update(content)
            self._filled += len(part)
            ids = ids[len(part) :]
            if self._filled == self.shard_tokens:
                self._finish_shard()

    def _finish_shard(self) -> None:
        self.sync()
        assert self._file is not None
        self._file.close()
        self.finished.append(Shard(self._path().name, self._filled, self._digest.hexdigest()))
        self._file, self._digest, self._filled = None, hashlib.sha256(), 0

    def sync(self) -> None:
        """Sync everything written so far to disk."""
        if self._file is not None:
            files.sync_file(self._file)

    def state(self) -> dict[str, Any]:
        """The state for _restore; valid after sync()."""
        return {
            "documents": self.documents,
            "text_tokens": self.text_tokens,
            "text_bytes": self.text_bytes,
            "shards": [asdict(shard) for shard in self.finished],
            "filled": self._filled,
            "sha256": self._digest.hexdigest(),
        }

    def close(self) -> None:
        """Close the open shard without finishing it. Ignores errors, since a full disk has been reported before."""
        if self._file is not None:
            with contextlib.suppress(OSError):
                self._file.close()
            self._file = None

    def finish(self) -> SplitManifest:
        """Complete the last shard and return the split's manifest."""
        if self._filled:
            self._finish_shard()
        return SplitManifest(self.documents, self.tokens, self.text_tokens, self.text_bytes, tuple(self.finished))


def write_journal(
    out: Path,
    identity: dict[str, Any],
    writers: dict[str, ShardWriter],
    *,
    vocabulary: Vocabulary,
    documents: int,
    limited_tokens: int,
    place: Place,
) -> None:
    """Sync the shards to disk, then replace the journal.

    identity : identity of source and settings, which a later run compares
    vocabulary : the vocabulary of the shards, which a later run finds in the folder
    documents : finished documents of the plan's stream;  limited_tokens : tokens used of --max-tokens
    place : where a continued run starts reading
    """
    for writer in writers.values():
        writer.sync()
    entry = {
        "identity": identity,
        "tokenizer_hash": vocabulary.hash,
        "documents": documents,
        "limited_tokens": limited_tokens,
        "place": asdict(place),
        "splits": {name: writer.state() for name, writer in writers.items()},
    }
    files.write_atomically(out / JOURNAL, lambda f: f.write(json.dumps(entry, indent=1).encode()))


def read_journal(out: Path, identity: dict[str, Any]) -> dict[str, Any] | None:
    """The state of an unfinished corpus with the same source and settings, or None for a new corpus."""
    path = out / JOURNAL
    if path.exists():
        try:
            state = parse_json(path.read_text(encoding="utf-8"))
            same, nothing_done = state["identity"] == identity, state["documents"] == 0
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path} is damaged: delete the folder {out} and prepare it again.") from error
        if not same and nothing_done:  # for example after correcting an error in the source
            discard(out)
            return None
        if not same:
            raise UserError(
                f"{out} holds an unfinished corpus from another source (or its files have changed) or with other "
                "settings: choose another --out, or delete that folder first."
            )
        return state
    if any(SHARD_NAME.fullmatch(entry.name) for entry in out.iterdir()):
        raise UserError(f"{out} holds shards without a manifest: choose another --out, or delete that folder first.")
    return None


def discard(out: Path) -> None:
    """Delete the files that prepare() writes in out, and nothing else."""
    for entry in list(out.iterdir()):
        counts = re.fullmatch(rf"counts-({'|'.join(SPLITS)})\.np[yz]", entry.name)
        if counts or SHARD_NAME.fullmatch(entry.name) or entry.name in (MANIFEST, JOURNAL, TOKENIZER):
            entry.unlink()


@contextlib.contextmanager
def locked(out: Path, wait: bool) -> Iterator[None]:
    """Lock the folder for this process. Raises UserError if another one prepares it, or waits for that one."""
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(locks.locked(out / LOCK, wait=wait))
        except locks.LockedError as error:
            advice = f" {error.advice}" if error.advice else ""
            raise UserError(
                f"Another process is preparing {out}: wait for it, or choose another --out.{advice}"
            ) from None
        yield
