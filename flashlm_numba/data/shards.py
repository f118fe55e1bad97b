"""Token shards as training and evaluation read them: memory-mapped, behind a manifest that is checked.

A prepared corpus is a folder: `train-00000.bin`, `validation-00000.bin`, ... are flat little-endian uint16
token ids, every document closed by <|endoftext|> (EOT); `manifest.json` describes them and is written last.
While `progress.json` is there the corpus is unfinished. flashlm_numba/data/prepare.py writes all of it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from flashlm_numba.data import sources
from flashlm_numba.data.tokenizer import EOT, Tokenizer
from flashlm_numba.system import files
from flashlm_numba.system.cache import from_cache, writable_cache
from flashlm_numba.system.display import TERMINAL, Progress
from flashlm_numba.system.errors import UserError

if TYPE_CHECKING:
    from numpy.typing import NDArray

FORMAT = 1
MANIFEST = "manifest.json"
JOURNAL = "progress.json"
SPLITS = ("train", "validation", "test")
SHARD_TOKENS = 50_000_000  # ids in a shard: 100 MB
SHOWN_TOKENS = 200_000_000  # a check of so many takes about two seconds or more, and shows a bar
SHARD_NAME = re.compile(rf"({'|'.join(SPLITS)})-\d{{5,}}\.bin")


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
                if not SHARD_NAME.fullmatch(shard.name) or not shard.name.startswith(name + "-"):
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
        with contextlib.suppress(OSError, ValueError, EOFError):  # EOFError: of an empty file
            kept = np.load(path, allow_pickle=False)
            if kept.shape == (self._vocab_size,) and kept.dtype == np.int64 and kept.sum() == self.n_tokens:
                counts[: len(kept)] = kept
                return counts
        for chunk in self.chunks():
            counts += np.bincount(chunk, minlength=vocab_size)
        with contextlib.suppress(OSError):  # a read-only corpus is counted anew each time
            files.write_atomically(path, lambda f: np.save(f, counts[: self._vocab_size], allow_pickle=False))
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

    def verify(self, *names: str, progress: Progress = TERMINAL) -> None:
        """Compare the SHA-256 of every shard of these splits (default: all) with the manifest's.

        Reads everything once, with a bar over the tokens where that takes seconds. Raises UserError naming the first
        damaged shard: one of the right size with other bytes in it trains without a word.
        """
        shards = [shard for name in names or self.splits for shard in self.manifest.splits[name].shards]
        total = sum(shard.tokens for shard in shards)
        with contextlib.ExitStack() as stack:
            bar = None
            if total >= SHOWN_TOKENS:
                bar = stack.enter_context(progress.tokens("checking", total))
            for shard in shards:
                if self._sha256(shard, bar) != shard.sha256:
                    raise UserError(
                        f"{self.folder / shard.name} is damaged: its SHA-256 is not the manifest's; "
                        "delete the folder and prepare the corpus again."
                    )

    def _sha256(self, shard: Shard, bar: Progress | None) -> str:
        path, digest = self.folder / shard.name, hashlib.sha256()
        try:
            with path.open("rb") as file:
                while block := file.read(1 << 22):
                    digest.update(block)
                    if bar is not None:
                        bar.advance(len(block) // 2)
        except OSError as error:
            raise UserError(f"Cannot read {path} ({error.strerror or error}): prepare the corpus again.") from error
        return digest.hexdigest()


def is_prepared(folder: Path | str) -> bool:
    """Whether prepare() has worked in this folder, to the end or not: open_tokens is then the one to ask."""
    return any((Path(folder) / name).exists() for name in (MANIFEST, JOURNAL))


def open_tokens(folder: Path | str) -> TokenData:
    """Open a prepared corpus after cheap checks: the manifest is sane, every shard is there in its full size.

    Raises UserError, one sentence, otherwise; TokenData.verify() reads everything and compares the SHA-256.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(
            f"There is no folder {folder}: make a corpus with `flashlm-numba prepare SOURCE --out {folder}`."
        )
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


# ---------- the built-in text


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
    from flashlm_numba.data.prepare import discard_if_damaged, prepare  # which imports this module

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
    source = sources.resolve(None)
    key = hashlib.sha256(f"{FORMAT} {source.content_hash} {Tokenizer.hash} {SHARD_TOKENS}".encode()).hexdigest()
    return f"corpus-{key[:16]}"


def _if_sound(folder: Path) -> Path | None:
    """The folder, if it can be opened and its tokens are as they were made."""
    try:
        data = open_tokens(folder)
        data.verify()
    except UserError:
        return None
    return folder
