"""Token shards made from documents: the `prepare` command.

What is written is described in data/shards.py, which reads it. The manifest comes last; while `progress.json` is there
the corpus is unfinished, and the same command continues it.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import time
from collections import deque
from collections.abc import Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from flashlm_numba.data import sources
from flashlm_numba.data.shards import (
    FORMAT,
    JOURNAL,
    MANIFEST,
    SHARD_NAME,
    SHARD_TOKENS,
    SPLITS,
    Manifest,
    Shard,
    SplitManifest,
    open_tokens,
)
from flashlm_numba.data.sources import ALL
from flashlm_numba.data.splits import VALIDATION_SHARE, Document, Place, Plan, SplitChoice, Tally
from flashlm_numba.data.tokenizer import EOT, Tokenizer, split_text
from flashlm_numba.system import files
from flashlm_numba.system.display import plural
from flashlm_numba.system.errors import UserError
from flashlm_numba.system.threads import available_cores

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from rich.console import Console

LOCK = "prepare.lock"
JOURNAL_SECONDS = 5.0  # at most this much work is lost when a run is killed
BATCH_CHARACTERS = 1 << 18  # of text in one piece of work for a thread


# ---------- shards


class _ShardWriter:
    """Appends ids of one split to its shards; its state at a document's end can be stored and restored."""

    def __init__(self, folder: Path, name: str, shard_tokens: int, state: dict[str, Any] | None) -> None:
        self.folder = folder
        self.name = name
        self.shard_tokens = shard_tokens
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
            self._digest = files.sha256(path, 2 * self._filled)
            if self._digest.hexdigest() != state["sha256"]:
                raise ValueError(f"{path.name} has changed")
            self._file = path.open("r+b")
            self._file.truncate(2 * self._filled)  # what was written after the state was stored
            self._file.seek(2 * self._filled)

    def append(self, ids: NDArray[np.uint16]) -> None:
        """Write ids (n,), starting new shards where one is full."""
        while len(ids):
            if self._file is None:
                self._file = self._path().open("wb")
            part = ids[: self.shard_tokens - self._filled]
            content = part.astype("<u2", copy=False).tobytes()
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
        """Bring everything written so far to the disk."""
        if self._file is not None:
            self._file.flush()
            os.fsync(self._file.fileno())

    def state(self) -> dict[str, Any]:
        """For _restore; valid after sync()."""
        return {
            "documents": self.documents,
            "text_tokens": self.text_tokens,
            "text_bytes": self.text_bytes,
            "shards": [asdict(shard) for shard in self.finished],
            "filled": self._filled,
            "sha256": self._digest.hexdigest(),
        }

    def close(self) -> None:
        """Close without finishing; a full disk was reported before."""
        if self._file is not None:
            with contextlib.suppress(OSError):
                self._file.close()
            self._file = None

    def finish(self) -> SplitManifest:
        """Complete the last shard."""
        if self._filled:
            self._finish_shard()
        return SplitManifest(self.documents, self.tokens, self.text_tokens, self.text_bytes, tuple(self.finished))


# ---------- encoding


@dataclass(frozen=True)
class _Piece:
    """Part of a document, small enough to be encoded at once."""

    text: str
    document: Document
    last: bool  # of its document


def _batches(documents: Iterator[Document]) -> Iterator[list[_Piece]]:
    batch: list[_Piece] = []
    size = 0
    for document in documents:
        done = 0
        for text in split_text(document.text):
            done += len(text)
            batch.append(_Piece(text, document, done == len(document.text)))
            size += len(text)
            if size >= BATCH_CHARACTERS:
                yield batch
                batch, size = [], 0
    if batch:
        yield batch


def _encode(tokenizer: Tokenizer, batch: list[_Piece]) -> list[tuple[NDArray[np.uint16], int]]:
    """Ids and UTF-8 bytes of every piece."""
    encoded = tokenizer.encode_batch([piece.text for piece in batch])
    return [
        (np.array(ids, dtype=np.uint16), len(piece.text.encode("utf-8", "replace")))
        for ids, piece in zip(encoded, batch, strict=True)
    ]


def _encoded(
    tokenizer: Tokenizer, documents: Iterator[Document], workers: int
) -> Generator[tuple[_Piece, NDArray[np.uint16], int], None, None]:
    """Pieces with their ids and bytes, in order, encoded by worker threads a few batches ahead.

    Threads, not processes: tiktoken leaves Python's lock while it encodes, which is nearly all of the work,
    and threads start at once, copy nothing and get on with Numba's.
    """
    pending: deque[tuple[list[_Piece], Future[list[tuple[NDArray[np.uint16], int]]]]] = deque()
    with ThreadPoolExecutor(workers, thread_name_prefix="tokenize") as pool:
        try:
            for batch in _batches(documents):
                pending.append((batch, pool.submit(_encode, tokenizer, batch)))
                if len(pending) > 2 * workers:
                    done, future = pending.popleft()
                    for piece, (ids, size) in zip(done, future.result(), strict=True):
                        yield piece, ids, size
            while pending:
                done, future = pending.popleft()
                for piece, (ids, size) in zip(done, future.result(), strict=True):
                    yield piece, ids, size
        finally:
            for _, future in pending:
                future.cancel()


# ---------- prepare


class _Report:
    """What the user sees on stderr: a live line on a terminal, else a line now and then; nothing if off."""

    SILENCE = 30.0  # seconds between lines where there is no terminal

    def __init__(self, on: bool, max_tokens: int | None) -> None:
        self._console: Console | None = None
        self._live: Any = None
        self._started = self._said = time.monotonic()
        self._tokens_before = 0
        self._max_tokens = max_tokens
        if on:
            from rich.console import Console

            self._console = Console(stderr=True, soft_wrap=True, highlight=False, markup=False)

    def say(self, text: str) -> None:
        if self._console is not None:
            self._console.print(text)

    def start(self, tokens: int) -> None:
        self._started = self._said = time.monotonic()
        self._tokens_before = tokens
        if self._console is None or not self._console.is_terminal:
            return
        from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

        self._live = Progress(
            SpinnerColumn(),
            *([BarColumn()] if self._max_tokens else []),
            TextColumn("{task.fields[status]}"),
            TimeElapsedColumn(),
            console=self._console,
            transient=True,
        )
        self._task = self._live.add_task("", total=self._max_tokens, status="reading")
        self._live.start()

    def status(self, documents: int, tokens: int) -> str:
        rate = (tokens - self._tokens_before) / max(time.monotonic() - self._started, 1e-9)
        return f"{plural(documents, 'document')}, {tokens:,} tokens, {rate:,.0f} tokens/s"

    def update(self, documents: int, tokens: int) -> None:
        silence = 0.1 if self._live is not None else self.SILENCE
        if time.monotonic() - self._said < silence:
            return
        self._said = time.monotonic()
        if self._live is not None:
            self._live.update(self._task, completed=tokens, status=self.status(documents, tokens))
        else:
            self.say(self.status(documents, tokens))

    def stop(self) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None


def prepare(
    source: str | None,
    out: Path | str,
    *,
    validation: str | None = None,
    subset: str | None = None,
    split: SplitChoice = "auto",
    max_tokens: int | None = None,
    max_docs: int | None = None,
    lines: bool = False,
    column: str = "text",
    workers: int | None = None,
    progress: bool = True,
    shard_tokens: int = SHARD_TOKENS,
    wait: bool = False,
) -> Manifest:
    """Make token shards of a source's documents in the folder out; continue where an earlier run was stopped.

    source : None for the built-in text, a Hugging Face dataset name, a file, a folder or a glob
    validation : source of the validation documents; training documents identical to one are left out
    split : "auto" uses the roles in the file names, else sets 5 % apart; "train" or "validation" puts all
        documents (of that role, where the source has roles) into the one split
    max_tokens, max_docs : stop after so many tokens (EOTs counted; the last document is cut) or documents
        that hold text; documents set apart by --validation or by their file's name do not count
    lines, column, subset : see sources.resolve;  workers : threads that tokenise, all cores by default
    shard_tokens : ids in a shard file;  wait : for another process that prepares out, instead of refusing
    The result depends on the source and these settings only, not on workers, nor on stops in between.
    Memory does not grow with the corpus: some 350 MB, plus up to 14 times the longest document.
    Raises UserError: bad source, out holds something else, full disk, Ctrl-C (what is done stays).
    """
    for option, value in (("max_tokens", max_tokens), ("max_docs", max_docs), ("shard_tokens", shard_tokens)):
        if value is not None and value < 1:
            raise UserError(f"{option} must be at least 1, got {value}.")
    if split not in ("auto", "train", "validation"):
        raise ValueError(f"prepare: split must be auto, train or validation, got {split!r}")
    out = Path(out)
    if (out / "config.json").exists() or (out / "checkpoints").exists():
        raise UserError(f"{out} holds a run; choose another folder for the tokens.")
    if validation is not None and split != "auto":
        raise UserError(f"validation documents have no place where everything is {split}; leave out one of the two.")
    resolved = sources.resolve(source, subset=subset, column=column, lines=lines)
    held_out = None if validation is None else sources.resolve(validation, column=column, lines=lines)
    for documents in (resolved, held_out):
        if documents is not None and documents.kind == "files":
            inside = [f.path for files in documents.files.values() for f in files if f.path.parent == out.absolute()]
            if inside:
                raise UserError(f"{out} holds the documents themselves ({inside[0].name}); choose another folder.")
    tokenizer = Tokenizer()
    plan = Plan(resolved, held_out, split, max_docs, max_tokens, tokenizer)
    identity = {
        "format": FORMAT,
        "tokenizer_hash": tokenizer.hash,
        "source": resolved.fingerprint(),
        "validation_source": None if held_out is None else held_out.fingerprint(),
        "settings": {
            "split": split,
            "max_tokens": max_tokens,
            "max_docs": max_docs,
            "shard_tokens": shard_tokens,
            "validation_share": VALIDATION_SHARE,
        },
    }
    report = _Report(progress, max_tokens)
    plan.note = report.say
    try:
        out.mkdir(parents=True, exist_ok=True)
        with _locked(out, wait):
            return _prepare(plan, out, identity, shard_tokens, workers or available_cores(), report)
    except KeyboardInterrupt:
        raise UserError(f"Stopped; what is done is kept in {out}: run the same command again to continue.") from None
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(
                f"The disk of {out} is full: free some space and run the same command again to continue."
            ) from error
        where = f" ({error.filename})" if error.filename else ""
        raise UserError(f"Cannot prepare {out}: {error.strerror or error}{where}.") from error
    finally:
        report.stop()


def _prepare(
    plan: Plan, out: Path, identity: dict[str, Any], shard_tokens: int, workers: int, report: _Report
) -> Manifest:
    finished = _finished(out, identity)
    if finished is not None:
        report.say(f"{out} is already prepared: {_summary(finished)}.")
        return finished

    names = [name for name in SPLITS if name != "test" or (plan.split == "auto" and "test" in plan.source.roles)]
    state = _journal(out, identity)
    writers: dict[str, _ShardWriter] = {}
    try:
        try:
            plan.start = Place(**state["place"]) if state else Place()
            for name in names:
                writers[name] = _ShardWriter(out, name, shard_tokens, state["splits"][name] if state else None)
        except (OSError, ValueError, KeyError, TypeError) as error:
            report.say(f"The unfinished corpus in {out} is damaged ({error}): starting over.")
            for writer in writers.values():
                writer.close()
            _discard(out)
            state, plan.start = None, Place()
            writers = {name: _ShardWriter(out, name, shard_tokens, None) for name in names}
        done = _write(plan, out, identity, state, writers, workers, report)
        splits = {name: writer.finish() for name, writer in writers.items()}
    finally:
        for writer in writers.values():
            writer.close()
    try:
        _check_splits(plan, splits)
    except UserError:
        _discard(out)  # nothing here can be continued
        raise
    manifest = Manifest(
        tokenizer=plan.tokenizer.name,
        tokenizer_hash=plan.tokenizer.hash,
        vocab_size=plan.tokenizer.vocab_size,
        licence=plan.source.licence,
        source=identity["source"],
        validation_source=identity["validation_source"],
        settings=identity["settings"],
        split_rule=plan.rule,
        skipped_empty=done.empty,
        skipped_held_out=done.held_out,
        splits=splits,
    )
    files.write_atomically(out / MANIFEST, lambda f: f.write(manifest.to_json().encode()))
    (out / JOURNAL).unlink(missing_ok=True)
    report.stop()
    report.say(f"Prepared {out}: {_summary(manifest)}.")
    if manifest.skipped_empty:
        report.say(f"Left out {plural(manifest.skipped_empty, 'document')} without text.")
    if manifest.skipped_held_out:
        report.say(f"Left out {plural(manifest.skipped_held_out, 'training document')} also held out.")
    if plan.split == "auto" and not splits["validation"].documents:
        report.say("There are no validation documents: name some with --validation to be able to evaluate.")
    return manifest


def _write(
    plan: Plan,
    out: Path,
    identity: dict[str, Any],
    state: dict[str, Any] | None,
    writers: dict[str, _ShardWriter],
    workers: int,
    report: _Report,
) -> Tally:
    """Encode and write all documents that the journal does not count as done; returns what was left out."""
    max_tokens = plan.max_tokens
    done = int(state["documents"]) if state else 0  # of the plan's stream
    used = int(state["limited_tokens"]) if state else 0  # of max_tokens
    tally, place = Tally(), plan.start
    documents = sum(writer.documents for writer in writers.values())
    tokens = sum(writer.text_tokens for writer in writers.values())
    if state:
        report.say(f"Continuing {out} after {plural(documents, 'document')}.")
    else:
        report.say(f"Preparing {plan.source.name} in {out}.")
    report.start(tokens)

    def store() -> None:
        for writer in writers.values():
            writer.sync()
        entry = {
            "identity": identity,
            "documents": done,
            "limited_tokens": used,
            "place": asdict(place),
            "splits": {name: writer.state() for name, writer in writers.items()},
        }
        files.write_atomically(out / JOURNAL, lambda f: f.write(json.dumps(entry, indent=1).encode()))

    def remaining() -> Iterator[Document]:
        nonlocal tally, place
        for index, document in enumerate(plan.documents(), plan.start.documents):
            if index >= done_before:
                yield document
            else:
                tally, place = document.tally, document.place

    done_before = done
    store()  # marks the folder as ours before the first shard appears
    stored = time.monotonic()
    end_of_document = np.array([EOT], dtype=np.uint16)
    begun = False  # whether a part of the current document has been written
    stream = _encoded(plan.tokenizer, remaining(), workers)
    try:
        for piece, ids, size in stream:
            writer = writers[piece.document.split]
            limited = piece.document.limited and max_tokens is not None
            left = max_tokens - used - 1 if limited and max_tokens is not None else len(ids)  # 1 for the EOT
            cut = len(ids) > left
            if cut:
                ids = ids[: max(left, 0)]
                size = len(plan.tokenizer.decode_bytes(ids))
                if not len(ids) and not begun:
                    return tally
            writer.append(ids)
            writer.text_tokens += len(ids)
            writer.text_bytes += size
            used += len(ids) if limited else 0
            tokens += len(ids)
            begun = True
            if not (piece.last or cut):
                continue
            writer.append(end_of_document)
            writer.documents += 1
            used += 1 if limited else 0
            begun = False
            done += 1
            documents += 1
            tally, place = piece.document.tally, piece.document.place
            if cut:
                return tally
            report.update(documents, tokens)
            if time.monotonic() - stored > JOURNAL_SECONDS:
                store()
                stored = time.monotonic()
    finally:
        stream.close()
    return plan.tally


def _check_splits(plan: Plan, splits: dict[str, SplitManifest]) -> None:
    if not any(split.documents for split in splits.values()):
        raise UserError(f"{plan.source.name} holds no document with text.")
    if plan.split != "auto":
        return
    if not splits["train"].documents:
        raise UserError(
            f"No training document is left of {plan.source.name}, all are held out: "
            "use more or longer text, or name other validation documents with --validation."
        )
    if not splits["validation"].documents and (plan.validation is not None or ALL in plan.source.roles):
        name = plan.source.name if plan.validation is None else plan.validation.name
        raise UserError(f"No validation document is in {name}: use more text, or name some with --validation.")


def _finished(out: Path, identity: dict[str, Any]) -> Manifest | None:
    """The manifest of a finished corpus of the same source and settings; UserError if it is another one's."""
    if not (out / MANIFEST).exists():
        return None
    manifest = Manifest.read(out / MANIFEST)
    if any(getattr(manifest, key) != value for key, value in identity.items()):
        raise UserError(
            f"{out} holds a corpus of another source (or its files have changed) or of other settings: "
            "choose another --out, or delete that folder first."
        )
    open_tokens(out)
    (out / JOURNAL).unlink(missing_ok=True)
    return manifest


def _journal(out: Path, identity: dict[str, Any]) -> dict[str, Any] | None:
    """The state of an unfinished corpus of the same source and settings, or None for a new one."""
    path = out / JOURNAL
    if path.exists():
        try:
            state = json.loads(path.read_text(encoding="utf-8"))
            same, nothing_done = state["identity"] == identity, state["documents"] == 0
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path} is damaged: delete the folder {out} and prepare it again.") from error
        if not same and nothing_done:  # such as after a mistake in the source that has been mended
            _discard(out)
            return None
        if not same:
            raise UserError(
                f"{out} holds an unfinished corpus of another source (or its files have changed) or of other "
                "settings: choose another --out, or delete that folder first."
            )
        return state
    if any(SHARD_NAME.fullmatch(entry.name) for entry in out.iterdir()):
        raise UserError(f"{out} holds shards without a manifest: choose another --out, or delete that folder first.")
    return None


def _discard(out: Path) -> None:
    """Delete what prepare() makes in out, and nothing else."""
    for entry in list(out.iterdir()):
        counts = re.fullmatch(rf"counts-({'|'.join(SPLITS)})\.npy", entry.name)
        if counts or SHARD_NAME.fullmatch(entry.name) or entry.name in (MANIFEST, JOURNAL):
            entry.unlink()


@contextlib.contextmanager
def _locked(out: Path, wait: bool) -> Iterator[None]:
    """Hold the folder's lock; the system releases it when a process dies."""
    import filelock

    lock = filelock.FileLock(out / LOCK)
    try:
        lock.acquire(timeout=-1 if wait else 0)
    except filelock.Timeout:
        raise UserError(f"Another process is preparing {out}: wait for it, or choose another --out.") from None
    try:
        yield
    finally:
        lock.release()


def _summary(manifest: Manifest) -> str:
    parts = [
        f"{split.text_tokens:,} tokens in {plural(split.documents, f'{name} document')}"
        for name, split in manifest.splits.items()
        if split.documents or name != "test"
    ]
    return f"{', '.join(parts)} ({manifest.split_rule})"


def discard_if_damaged(out: Path) -> None:
    """Delete a finished corpus that is not as it was made; an unfinished one is continued instead."""
    if not (out / MANIFEST).exists():
        return
    with _locked(out, wait=True):
        try:
            open_tokens(out).verify()
        except UserError:
            _discard(out)
