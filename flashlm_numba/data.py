"""Token shards: made once from documents by prepare(), memory-mapped for training and evaluation.

A prepared corpus is a folder: `train-00000.bin`, `validation-00000.bin`, ... are flat little-endian uint16
token ids, every document closed by <|endoftext|> (EOT); `manifest.json` describes them and is written last.
While `progress.json` is there the corpus is unfinished, and the same command continues it.
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
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Literal

import numpy as np

from flashlm_numba import sources
from flashlm_numba.errors import UserError
from flashlm_numba.sources import ALL, Source
from flashlm_numba.tokenizer import EOT, Tokenizer, split_text

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from rich.console import Console

FORMAT = 1
MANIFEST = "manifest.json"
JOURNAL = "progress.json"
LOCK = "prepare.lock"
SPLITS = ("train", "validation", "test")
SHARD_TOKENS = 50_000_000  # ids in a shard: 100 MB
VALIDATION_SHARE = 0.05  # of the documents, where the source sets none apart
SMALL = 1_000  # documents up to which exactly the share is taken; larger sources take it by chance
JOURNAL_SECONDS = 5.0  # at most this much work is lost when a run is killed
BATCH_CHARACTERS = 1 << 18  # of text in one piece of work for a thread
_SHARD_NAME = re.compile(rf"({'|'.join(SPLITS)})-\d{{5,}}\.bin")

SplitChoice = Literal["auto", "train", "validation"]


# ---------- manifest


@dataclass(frozen=True)
class Shard:
    """One file of token ids."""

    name: str
    tokens: int  # ids in the file, closing EOTs included
    sha256: str


@dataclass(frozen=True)
class SplitManifest:
    """One split: what it holds and the files that it is in."""

    documents: int
    tokens: int  # ids, closing EOTs included: text_tokens + documents
    text_tokens: int  # GPT-2 tokens of the documents alone
    text_bytes: int  # UTF-8 bytes of the documents
    shards: tuple[Shard, ...]


@dataclass(frozen=True)
class Manifest:
    """Content of manifest.json: where the tokens come from, how they were made, how many, in which files."""

    tokenizer: str
    tokenizer_hash: str  # SHA-256 over the vocabulary's two files' SHA-256
    vocab_size: int
    licence: str | None  # of the source, where known
    source: dict[str, Any]  # Source.fingerprint()
    validation_source: dict[str, Any] | None  # the same of --validation
    settings: dict[str, Any]
    split_rule: str  # how the validation documents were chosen, in words
    skipped_empty: int  # documents without text
    skipped_held_out: int  # training documents left out because a validation or test document is identical
    splits: dict[str, SplitManifest]
    format: int = FORMAT

    @property
    def hash(self) -> str:
        """SHA-256 (hex) over the splits' names and their shards' SHA-256: the identity of the tokens."""
        digest = hashlib.sha256()
        for name, split in self.splits.items():
            for shard in split.shards:
                digest.update(f"{name} {shard.tokens} {shard.sha256}\n".encode())
        return digest.hexdigest()

    def to_json(self) -> str:
        """The text of manifest.json."""
        return json.dumps(asdict(self), indent=1, ensure_ascii=False) + "\n"

    @staticmethod
    def read(path: Path) -> Manifest:
        """Read and check a manifest.json; UserError if it is missing or not sane."""
        try:
            raw = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise UserError(
                f"{path.parent} holds no prepared corpus: make one with `flashlm-numba prepare`."
            ) from error
        except (OSError, ValueError) as error:
            raise UserError(f"Cannot read {path} ({error}): prepare the corpus again.") from error
        try:
            if raw["format"] != FORMAT:
                raise UserError(
                    f"{path} has format {raw['format']}, and this version reads {FORMAT}: prepare the corpus again."
                )
            splits = {}
            for name, split in raw.pop("splits").items():
                shards = tuple(Shard(**shard) for shard in split.pop("shards"))
                splits[name] = SplitManifest(shards=shards, **split)
            manifest = Manifest(splits=splits, **raw)
            manifest._check()
        except UserError:
            raise
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise UserError(f"{path} is damaged ({error}): prepare the corpus again.") from error
        return manifest

    def _check(self) -> None:
        if not 0 < self.vocab_size <= 1 << 16:
            raise ValueError(f"vocab_size {self.vocab_size} does not fit 16 bits")
        if not {"train", "validation"} <= set(self.splits) <= set(SPLITS):
            raise ValueError(f"splits are {', '.join(self.splits)}")
        for name, split in self.splits.items():
            for shard in split.shards:
                if not _SHARD_NAME.fullmatch(shard.name) or not shard.name.startswith(name + "-"):
                    raise ValueError(f"{shard.name!r} is no name of a shard of {name}")
                if type(shard.tokens) is not int or shard.tokens < 1 or not re.fullmatch("[0-9a-f]{64}", shard.sha256):
                    raise ValueError(f"the entry of {shard.name} is wrong")
            if sum(shard.tokens for shard in split.shards) != split.tokens:
                raise ValueError(f"the shards of {name} do not add up to {split.tokens} tokens")
            if min(split.documents, split.text_tokens, split.text_bytes) < 0 or (
                split.text_tokens + split.documents != split.tokens
            ):
                raise ValueError(f"the counts of {name} contradict each other")


# ---------- reading prepared


class Split:
    """The tokens of one split as one sequence over all its shards, memory-mapped.

    n_tokens : ids in all, the EOT after every document included;  n_text_tokens : without them
    n_documents;  n_bytes : UTF-8 bytes of the documents
    """

    def __init__(self, folder: Path, name: str, manifest: SplitManifest, vocab_size: int) -> None:
        self.name = name
        self.n_tokens = manifest.tokens
        self.n_text_tokens = manifest.text_tokens
        self.n_documents = manifest.documents
        self.n_bytes = manifest.text_bytes
        self._folder = folder
        self._vocab_size = vocab_size
        self._shards = manifest.shards
        self._maps: list[NDArray[np.uint16] | None] = [None] * len(manifest.shards)
        self._ends = np.cumsum([shard.tokens for shard in manifest.shards], dtype=np.int64)

    def _map(self, index: int) -> NDArray[np.uint16]:
        mapped = self._maps[index]
        if mapped is None:
            shard = self._shards[index]
            mapped = np.memmap(self._folder / shard.name, dtype="<u2", mode="r", shape=(shard.tokens,))
            self._maps[index] = mapped
        return mapped

    def _fill(self, out: NDArray[np.int32], start: int) -> None:
        """Write ids start, start + 1, ... into out (length,)."""
        index = int(np.searchsorted(self._ends, start, side="right"))
        done = 0
        while done < len(out):
            shard = self._map(index)
            offset = start + done - (int(self._ends[index]) - len(shard))
            part = shard[offset : offset + len(out) - done]
            out[done : done + len(part)] = part
            done += len(part)
            index += 1

    def _checked(self, ids: NDArray[np.int32]) -> NDArray[np.int32]:
        if ids.size and int(ids.max()) >= self._vocab_size:
            raise UserError(
                f"The {self.name} tokens in {self._folder} are damaged (id {int(ids.max())}, vocabulary "
                f"{self._vocab_size}): delete the folder and prepare the corpus again."
            )
        return ids

    def windows(self, starts: NDArray[np.integer[Any]], length: int) -> NDArray[np.int32]:
        """Gather ids[start : start + length] for each of starts (B,); returns (B, length) int32.

        starts must be in [0, n_tokens - length], else ValueError; ids outside the vocabulary: UserError.
        """
        starts = np.asarray(starts, dtype=np.int64)
        if length < 0 or starts.ndim != 1:
            raise ValueError(f"Split.windows: starts must be (B,) and length >= 0, got {starts.shape}, {length}")
        if starts.size and not 0 <= starts.min() <= starts.max() <= self.n_tokens - length:
            raise ValueError(
                f"Split.windows: starts must be in [0, {self.n_tokens - length}], got {starts.min()} to {starts.max()}"
            )
        out = np.empty((len(starts), length), dtype=np.int32)
        for row, start in zip(out, starts, strict=True):
            self._fill(row, int(start))
        return self._checked(out)

    def chunks(self, size: int = 1 << 20) -> Iterator[NDArray[np.int32]]:
        """All ids in order, in int32 arrays of at most size ids."""
        for start in range(0, self.n_tokens, size):
            out = np.empty(min(size, self.n_tokens - start), dtype=np.int32)
            self._fill(out, start)
            yield self._checked(out)

    def documents(self, max_tokens: int | None = None) -> Iterator[NDArray[np.int32]]:
        """The documents in order, each an int32 array without its closing EOT.

        max_tokens : stop after this many tokens in all; the last document is cut to fit.
        """
        left = self.n_text_tokens if max_tokens is None else max_tokens
        pending: list[NDArray[np.int32]] = []
        for chunk in self.chunks():
            begin = 0
            for end in np.flatnonzero(chunk == EOT):
                pending.append(chunk[begin:end])
                document = np.concatenate(pending) if len(pending) > 1 else pending[0]
                pending = []
                begin = int(end) + 1
                if left <= 0:
                    return
                yield document[:left]
                left -= len(document)
            if begin < len(chunk):
                pending.append(chunk[begin:])

    def counts(self, vocab_size: int) -> NDArray[np.int64]:
        """How often each id occurs, EOT included: (vocab_size,) int64.

        Counted once and kept beside the shards as counts-<split>.npy (about 2 s for a billion tokens).
        """
        if vocab_size < self._vocab_size:
            raise ValueError(f"Split.counts: vocab_size must be at least {self._vocab_size}, got {vocab_size}")
        path = self._folder / f"counts-{self.name}.npy"
        counts = np.zeros(vocab_size, dtype=np.int64)
        with contextlib.suppress(OSError, ValueError):
            kept = np.load(path, allow_pickle=False)
            if kept.shape == (self._vocab_size,) and kept.dtype == np.int64 and kept.sum() == self.n_tokens:
                counts[: len(kept)] = kept
                return counts
        for chunk in self.chunks():
            counts += np.bincount(chunk, minlength=vocab_size)
        with contextlib.suppress(OSError):  # a read-only corpus is counted anew each time
            _write_atomically(path, lambda f: np.save(f, counts[: self._vocab_size], allow_pickle=False))
        return counts


class TokenData:
    """A prepared corpus: .folder, .manifest, .train, .validation, .test (None where it has none), .hash."""

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self.folder = folder
        self.manifest = manifest
        self.hash = manifest.hash
        self.splits = {name: Split(folder, name, split, manifest.vocab_size) for name, split in manifest.splits.items()}
        self.train = self.splits["train"]
        self.validation = self.splits["validation"]
        self.test = self.splits.get("test")

    def verify(self) -> None:
        """Compare the SHA-256 of every shard with the manifest's; UserError naming the first damaged one."""
        for split in self.manifest.splits.values():
            for shard in split.shards:
                if _sha256(self.folder / shard.name).hexdigest() != shard.sha256:
                    raise UserError(
                        f"{self.folder / shard.name} is damaged: its SHA-256 is not the manifest's; "
                        "delete the folder and prepare the corpus again."
                    )


def is_prepared(folder: Path | str) -> bool:
    """Whether prepare() has worked in this folder, to the end or not: open_tokens is then the one to ask."""
    return any((Path(folder) / name).exists() for name in (MANIFEST, JOURNAL))


def open_tokens(folder: Path | str) -> TokenData:
    """Open a prepared corpus after cheap checks: the manifest is sane, every shard is there in its full size.

    Raises UserError, one sentence, otherwise; TokenData.verify() reads everything and compares the SHA-256.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"There is no folder {folder}: make a corpus with `flashlm-numba prepare --out {folder}`.")
    if not (folder / MANIFEST).exists() and (folder / JOURNAL).exists():
        raise UserError(
            f"{folder} is not finished: run the `flashlm-numba prepare` command that began it once more, "
            "and it continues."
        )
    manifest = Manifest.read(folder / MANIFEST)
    for split in manifest.splits.values():
        for shard in split.shards:
            try:
                size = (folder / shard.name).stat().st_size
            except OSError as error:
                raise UserError(f"{folder / shard.name} is missing: prepare the corpus again.") from error
            if size != 2 * shard.tokens:
                raise UserError(
                    f"{folder / shard.name} has {size} bytes, and the manifest says {2 * shard.tokens}: "
                    "delete the folder and prepare the corpus again."
                )
    return TokenData(folder, manifest)


def sample_batch(
    split: Split, seed: int, step: int, micro: int, rows: int, length: int
) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Random windows of a split: ids (rows, length) int32, and targets (rows, length) int32, the next tokens.

    A pure function of its arguments, so that a resumed run needs no position in the data: the starts come
    from np.random.default_rng((seed, step, micro)), uniform over all windows; windows cross document borders.
    """
    if split.n_tokens < length + 1:
        raise UserError(
            f"The {split.name} split has {split.n_tokens} tokens, and a sequence of {length} needs "
            f"{length + 1}: use more text or shorter sequences."
        )
    rng = np.random.default_rng((seed, step, micro))
    starts = rng.integers(0, split.n_tokens - length, size=rows)
    windows = split.windows(starts, length + 1)
    return np.ascontiguousarray(windows[:, :-1]), np.ascontiguousarray(windows[:, 1:])


# ---------- files


def _sha256(path: Path, size: int | None = None) -> Any:
    """hashlib object over the first size bytes of a file (all of them if None)."""
    digest = hashlib.sha256()
    with path.open("rb") as f:
        while size is None or size > 0:
            block = f.read(1 << 20 if size is None else min(size, 1 << 20))
            if not block:
                break
            digest.update(block)
            if size is not None:
                size -= len(block)
    return digest


def _sync_folder(folder: Path) -> None:
    if os.name == "posix":  # Windows cannot open a folder, and needs no such call
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _write_atomically(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Write a file under a temporary name, fsync it and rename it: readers see the old content or the new."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as f:
            write(f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
    _sync_folder(path.parent)


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
            if _sha256(self.folder / shard.name).hexdigest() != shard.sha256:
                raise ValueError(f"{shard.name} has changed")
            self.finished.append(shard)
        self._filled = int(state["filled"])
        if self._filled:
            path = self._path()
            self._digest = _sha256(path, 2 * self._filled)
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


# ---------- documents


@dataclass
class _Tally:
    """Documents that were left out up to some point of the source."""

    empty: int = 0
    held_out: int = 0


@dataclass(frozen=True)
class _Place:
    """Where a file of a Hugging Face dataset begins: a continued run starts there, not at the first file."""

    part: int = 0
    documents: int = 0  # of the plan's stream before it
    empty: int = 0  # documents without text before it


@dataclass(frozen=True)
class _Document:
    split: str
    text: str
    limited: bool  # counts towards --max-tokens
    tally: _Tally  # after this document
    place: _Place = _Place()  # at or before this document


@dataclass
class _Plan:
    """Which documents go where: a deterministic stream, the same in every run."""

    source: Source
    validation: Source | None
    split: SplitChoice
    max_docs: int | None
    max_tokens: int | None
    tokenizer: Tokenizer
    rule: str = ""  # how the validation documents are chosen, once the first document has come
    tally: _Tally = field(default_factory=_Tally)
    start: _Place = _Place()  # documents() begins here

    def documents(self) -> Iterator[_Document]:
        """Held-out documents first, so that their twins can be kept out of training."""
        held_out: set[bytes] = set()  # 8 bytes a document: the one thing here that grows with the corpus
        if self.split != "auto":
            self.rule = f"all documents are {self.split}"
            for part in (self.split,) if self.split in self.source.roles else self.source.roles:
                yield from self._stage(self.source, part, self.split, limited=True)
            return
        if self.validation is not None:
            self.rule = f"validation documents from {self.validation.name}"
            for role in ("validation",) if "validation" in self.validation.roles else self.validation.roles:
                yield from self._stage(self.validation, role, "validation", keep=held_out)
            if "test" in self.source.roles:
                yield from self._stage(self.source, "test", "test", keep=held_out)
            role = ALL if ALL in self.source.roles else "train"
        elif ALL in self.source.roles:
            yield from self._split_off()
            return
        else:
            self.rule = "splits by the names of the source's files"
            for role in ("validation", "test"):
                if role in self.source.roles:
                    yield from self._stage(self.source, role, role, keep=held_out)
            role = "train"
        if role in self.source.roles:
            yield from self._stage(self.source, role, "train", leave_out=held_out, limited=True)

    def _texts(
        self,
        source: Source,
        role: str,
        limit: int | None,
        first_part: int = 0,
        started: Callable[[int], None] = lambda part: None,
    ) -> Iterator[tuple[str, _Tally]]:
        """Documents that hold text, at most limit of them, with the tally after each."""
        taken = 0
        if limit is not None and limit <= 0:
            return
        for text in source.documents(role, first_part, started):
            if not text or text.isspace():
                self.tally.empty += 1
                continue
            yield text, self.tally
            taken += 1
            if taken == limit:
                return

    def _stage(
        self,
        source: Source,
        role: str,
        split: str,
        *,
        keep: set[bytes] | None = None,
        leave_out: set[bytes] | None = None,
        limited: bool = False,
    ) -> Iterator[_Document]:
        for text, tally in self._texts(source, role, self.max_docs if limited else None):
            if keep is not None:
                keep.add(_digest(text))
            if leave_out and _digest(text) in leave_out:
                tally.held_out += 1
                continue
            yield _Document(split, text, limited, _Tally(tally.empty, tally.held_out))

    def _split_off(self) -> Iterator[_Document]:
        """5 % of the documents, by a hash of the text: copies of a document fall on the same side.

        Up to SMALL documents exactly the share with the smallest hashes is taken, at least one; then the
        hash alone decides. A source of a single document is cut: its last 5 % are for validation.
        """
        digests: list[bytes] = []
        tokens = 0
        for text, _ in self._texts(self.source, ALL, min(self.max_docs or SMALL + 1, SMALL + 1)):
            digests.append(_digest(text))
            if self.max_tokens is not None:  # choose among the documents that will be taken
                tokens += len(self.tokenizer.encode(text)) + 1
                if tokens >= self.max_tokens:
                    break
        text = ""  # a long document need not be in memory twice
        if len(digests) == 1:
            seen, self.tally = self.tally, _Tally()
            self.rule = f"the last {VALIDATION_SHARE:.0%} of the one document"
            for text, tally in self._texts(self.source, ALL, 1):
                if self.max_tokens is not None and tokens > self.max_tokens:
                    text = self.tokenizer.decode(self.tokenizer.encode(text)[: self.max_tokens]).rstrip("\ufffd")
                cut = _cut(text)
                yield _Document("validation", text[cut:], True, _Tally(tally.empty))
                yield _Document("train", text[:cut], True, _Tally(tally.empty))
            self.tally = seen
            return
        self.rule = f"{VALIDATION_SHARE:.0%} of the documents by BLAKE2b of the text"
        small = len(digests) <= SMALL
        different = sorted(set(digests))
        chosen = set(different[: max(1, round(VALIDATION_SHARE * len(different)))]) if small else set()
        bound = int(VALIDATION_SHARE * 2**64).to_bytes(8, "big")
        place = self.start
        number = place.documents
        self.tally = _Tally(place.empty)

        def started(part: int) -> None:
            nonlocal place
            place = _Place(part, number, self.tally.empty)

        limit = None if self.max_docs is None else self.max_docs - number
        for text, tally in self._texts(self.source, ALL, limit, place.part, started):
            digest = _digest(text)
            is_validation = digest in chosen if small else digest < bound
            name = "validation" if is_validation else "train"
            yield _Document(name, text, True, _Tally(tally.empty), place)
            number += 1


def _digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()


def _cut(text: str) -> int:
    """Where the last 5 % of a text begin: at a line, else before a word, else anywhere."""
    target = round(len(text) * (1 - VALIDATION_SHARE))
    nearest = int(len(text) * (1 - 2 * VALIDATION_SHARE))
    cut = text.rfind("\n", nearest, target) + 1 or text.rfind(" ", nearest, target)
    if cut <= 0:
        cut = target
    if text[:cut].isspace() or text[cut:].isspace() or not 0 < cut < len(text):
        raise UserError(
            "The source is one document and too short to set a validation part apart: use more text, "
            "or name validation documents with --validation."
        )
    return cut


@dataclass(frozen=True)
class _Piece:
    """Part of a document, small enough to be encoded at once."""

    text: str
    document: _Document
    last: bool  # of its document


def _batches(documents: Iterator[_Document]) -> Iterator[list[_Piece]]:
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
    tokenizer: Tokenizer, documents: Iterator[_Document], workers: int
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

    def start(self, documents: int, tokens: int) -> None:
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
        return f"{documents:,} documents, {tokens:,} tokens, {rate:,.0f} tokens/s"

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
    resolved = sources.resolve(source, subset=subset, column=column, lines=lines)
    held_out = None if validation is None else sources.resolve(validation, column=column, lines=lines)
    tokenizer = Tokenizer()
    plan = _Plan(resolved, held_out, split, max_docs, max_tokens, tokenizer)
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
    try:
        out.mkdir(parents=True, exist_ok=True)
        with _locked(out, wait):
            return _prepare(plan, out, identity, shard_tokens, workers or _cores(), report)
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
    plan: _Plan, out: Path, identity: dict[str, Any], shard_tokens: int, workers: int, report: _Report
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
            plan.start = _Place(**state["place"]) if state else _Place()
            for name in names:
                writers[name] = _ShardWriter(out, name, shard_tokens, state["splits"][name] if state else None)
        except (OSError, ValueError, KeyError, TypeError) as error:
            report.say(f"The unfinished corpus in {out} is damaged ({error}): starting over.")
            for writer in writers.values():
                writer.close()
            _discard(out)
            state, plan.start = None, _Place()
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
    _write_atomically(out / MANIFEST, lambda f: f.write(manifest.to_json().encode()))
    (out / JOURNAL).unlink(missing_ok=True)
    report.stop()
    report.say(f"Prepared {out}: {_summary(manifest)}.")
    if manifest.skipped_empty:
        report.say(f"Left out {manifest.skipped_empty:,} documents without text.")
    if manifest.skipped_held_out:
        report.say(f"Left out {manifest.skipped_held_out:,} training documents that are also held out.")
    if plan.split == "auto" and not splits["validation"].documents:
        report.say("There are no validation documents: name some with --validation to be able to evaluate.")
    return manifest


def _write(
    plan: _Plan,
    out: Path,
    identity: dict[str, Any],
    state: dict[str, Any] | None,
    writers: dict[str, _ShardWriter],
    workers: int,
    report: _Report,
) -> _Tally:
    """Encode and write all documents that the journal does not count as done; returns what was left out."""
    max_tokens = plan.max_tokens
    done = int(state["documents"]) if state else 0  # of the plan's stream
    used = int(state["limited_tokens"]) if state else 0  # of max_tokens
    tally, place = _Tally(), plan.start
    documents = sum(writer.documents for writer in writers.values())
    tokens = sum(writer.text_tokens for writer in writers.values())
    if state:
        report.say(f"Continuing {out} after {documents:,} documents.")
    else:
        report.say(f"Preparing {plan.source.name} in {out}.")
    report.start(documents, tokens)

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
        _write_atomically(out / JOURNAL, lambda f: f.write(json.dumps(entry, indent=1).encode()))

    def remaining() -> Iterator[_Document]:
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


def _check_splits(plan: _Plan, splits: dict[str, SplitManifest]) -> None:
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
    if any(_SHARD_NAME.fullmatch(entry.name) for entry in out.iterdir()):
        raise UserError(f"{out} holds shards without a manifest: choose another --out, or delete that folder first.")
    return None


def _discard(out: Path) -> None:
    """Delete what prepare() makes in out, and nothing else."""
    for entry in list(out.iterdir()):
        counts = re.fullmatch(rf"counts-({'|'.join(SPLITS)})\.npy", entry.name)
        if counts or _SHARD_NAME.fullmatch(entry.name) or entry.name in (MANIFEST, JOURNAL):
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


def _cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _summary(manifest: Manifest) -> str:
    parts = [
        f"{split.text_tokens:,} tokens in {split.documents:,} {name} documents"
        for name, split in manifest.splits.items()
        if split.documents or name != "test"
    ]
    return f"{', '.join(parts)} ({manifest.split_rule})"


def default_corpus(progress: bool = True) -> Path:
    """Folder of the built-in text's token shards in the cache (see cache.py), prepared when it is first asked for.

    The folder is named by a hash of the text and the vocabulary. Takes a few seconds once, then milliseconds.
    """
    from flashlm_numba.cache import from_cache, writable_cache

    source = sources.resolve(None)
    key = hashlib.sha256(f"{FORMAT} {source.content_hash} {Tokenizer.hash} {SHARD_TOKENS}".encode()).hexdigest()
    name = f"corpus-{key[:16]}"
    out = from_cache(name, _if_open)
    if out is None:
        out = writable_cache(name)
        _discard_if_damaged(out)
        prepare(None, out, progress=progress, wait=True)
    return out


def _if_open(folder: Path) -> Path | None:
    """The folder, if it can be opened."""
    try:
        return open_tokens(folder).folder
    except UserError:
        return None


def _discard_if_damaged(out: Path) -> None:
    """Delete a finished corpus in the cache that cannot be opened; an unfinished one is continued instead."""
    if not (out / MANIFEST).exists():
        return
    with _locked(out, wait=True):
        try:
            open_tokens(out)
        except UserError:
            _discard(out)
