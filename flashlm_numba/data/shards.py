"""Read token shards for training and evaluation: memory-mapped files, described by a checked manifest.

A prepared corpus is a folder. `train-00000.bin`, `validation-00000.bin`, and so on are flat arrays of little-endian
token ids of Vocabulary.dtype, in which the vocabulary's end of text closes every document. `tokenizer.json` is the
vocabulary. `manifest.json` describes them and is written last. While `progress.json` exists, the corpus is unfinished.
data/prepare.py writes all of these files.
"""

from __future__ import annotations

import contextlib
import hashlib
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from flashlm_numba.data.manifest import JOURNAL, MANIFEST, Manifest, Shard, SplitManifest
from flashlm_numba.data.tokenizer import Vocabulary
from flashlm_numba.data.vocabularies import read_vocabulary
from flashlm_numba.system import files
from flashlm_numba.system.display import TERMINAL, Progress
from flashlm_numba.system.errors import UserError

if TYPE_CHECKING:
    from numpy.typing import NDArray

SHOWN_TOKENS = 200_000_000  # from this many tokens, a check takes about two seconds or more and shows a bar


class Split:
    """The tokens of one split as one sequence over all its memory-mapped shards.

    n_tokens : number of ids, including the end of text after every document;  n_text_tokens : number without them
    n_documents : number of documents;  n_bytes : UTF-8 bytes of the documents
    """

    def __init__(self, folder: Path, name: str, manifest: SplitManifest, vocabulary: Vocabulary) -> None:
        self.name = name
        self.n_tokens = manifest.tokens
        self.n_text_tokens = manifest.text_tokens
        self.n_documents = manifest.documents
        self.n_bytes = manifest.text_bytes
        self._folder = folder
        self._vocab_size = vocabulary.size
        self._eot = vocabulary.eot
        self._dtype = vocabulary.dtype
        self._shards = manifest.shards
        self._hash = hashlib.sha256("".join(shard.sha256 for shard in manifest.shards).encode()).hexdigest()
        self._maps: list[NDArray[np.unsignedinteger[Any]] | None] = [None] * len(manifest.shards)
        self._ends = np.cumsum([shard.tokens for shard in manifest.shards], dtype=np.int64)

    def _map(self, index: int) -> NDArray[np.unsignedinteger[Any]]:
        mapped = self._maps[index]
        if mapped is None:
            shard = self._shards[index]
            mapped = np.memmap(self._folder / shard.name, dtype=self._dtype, mode="r", shape=(shard.tokens,))
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
        largest = int(ids.view(np.uint32).max()) if ids.size else 0  # unsigned, for ids of 4 bytes
        if largest >= self._vocab_size:
            raise UserError(
                f"The {self.name} tokens in {self._folder} are damaged (id {largest}, vocabulary "
                f"{self._vocab_size}): delete the folder and prepare the corpus again."
            )
        return ids

    def windows(self, starts: NDArray[np.integer[Any]], length: int) -> NDArray[np.int32]:
        """Gather ids[start : start + length] for each of starts (B,). Returns (B, length) int32.

        Raises ValueError unless starts are in [0, n_tokens - length], and UserError for ids outside the vocabulary.
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

    def ids(self) -> NDArray[np.unsignedinteger[Any]]:
        """All ids in memory, (n_tokens,) of Vocabulary.dtype, with the end of text after every document."""
        out = np.empty(self.n_tokens, dtype=self._dtype)
        for index, end in enumerate(self._ends.tolist()):
            part = self._map(index)
            out[end - len(part) : end] = part
        return out

    def documents(self, max_tokens: int | None = None) -> Iterator[NDArray[np.int32]]:
        """The documents in order, each as an int32 array without the end of text that closes it.

        max_tokens : stop after this many tokens; the last document is cut to fit
        """
        left = self.n_text_tokens if max_tokens is None else max_tokens
        pending: list[NDArray[np.int32]] = []
        for chunk in self.chunks():
            begin = 0
            for end in np.flatnonzero(chunk == self._eot):
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
        """Count of each id, including the end of text, (vocab_size,) int64.

        The counts are computed once (about 2 s for a billion tokens) and stored next to the shards as
        counts-<split>.npz, with a hash of the shards, so that the counts of other tokens are never used.
        """
        if vocab_size < self._vocab_size:
            raise ValueError(f"Split.counts: vocab_size must be at least {self._vocab_size}, got {vocab_size}")
        path = self._folder / f"counts-{self.name}.npz"
        counts = np.zeros(vocab_size, dtype=np.int64)
        # EOFError: the file is empty; KeyError, BadZipFile: it is something else
        with contextlib.suppress(OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile), path.open("rb") as file:
            stored = np.load(file, allow_pickle=False)
            kept = stored["counts"]
            if kept.shape == (self._vocab_size,) and kept.dtype == np.int64 and str(stored["shards"]) == self._hash:
                counts[: len(kept)] = kept
                return counts
        for chunk in self.chunks():
            counts += np.bincount(chunk, minlength=vocab_size)
        with contextlib.suppress(OSError):  # the tokens of a read-only corpus are counted each time
            files.write_atomically(path, lambda f: np.savez(f, counts=counts[: self._vocab_size], shards=self._hash))
        return counts


class TokenData:
    """A prepared corpus: folder, manifest, hash, vocabulary, and the splits train, validation and test (or None)."""

    def __init__(self, folder: Path, manifest: Manifest, vocabulary: Vocabulary) -> None:
        self.folder = folder
        self.manifest = manifest
        self.hash = manifest.hash
        self.vocabulary = vocabulary
        self.splits = {name: Split(folder, name, split, self.vocabulary) for name, split in manifest.splits.items()}
        self.train = self.splits["train"]
        self.validation = self.splits["validation"]
        self.test = self.splits.get("test")

    def verify(self, *names: str, progress: Progress = TERMINAL) -> None:
        """Compare the SHA-256 of every shard of these splits (default: all) with the manifest.

        This reads every byte once and shows a bar if it takes seconds. It detects shards of the right size with wrong
        bytes, which training would use silently. Raises UserError naming the first damaged shard.
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
                        f"{self.folder / shard.name} is damaged: its SHA-256 differs from the manifest's; "
                        "delete the folder and prepare the corpus again."
                    )

    def _sha256(self, shard: Shard, bar: Progress | None) -> str:
        path, digest = self.folder / shard.name, hashlib.sha256()
        width = np.dtype(self.vocabulary.dtype).itemsize
        try:
            with path.open("rb") as file:
                while block := file.read(1 << 22):
                    digest.update(block)
                    if bar is not None:
                        bar.advance(len(block) // width)
        except OSError as error:
            raise UserError(
                f"Cannot read {path} ({error.strerror or error}): make it readable, or delete the folder and prepare "
                "the corpus again."
            ) from error
        return digest.hexdigest()


def is_prepared(folder: Path | str) -> bool:
    """Whether a folder holds a prepared corpus, finished or not; open_tokens then tells which."""
    return any((Path(folder) / name).exists() for name in (MANIFEST, JOURNAL))


def open_tokens(folder: Path | str) -> TokenData:
    """Open a prepared corpus after cheap checks: manifest and vocabulary are valid, and every shard has the right size.

    Raises UserError if a check fails. TokenData.verify() also reads every byte and compares the SHA-256.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(
            f"There is no folder {folder}: make a corpus with `flashlm-numba prepare SOURCE --out {folder}`."
        )
    if not (folder / MANIFEST).exists() and (folder / JOURNAL).exists():
        raise UserError(f"{folder} is not finished: run the same `flashlm-numba prepare` command again to continue it.")
    manifest = Manifest.read(folder / MANIFEST)
    vocabulary = read_vocabulary(folder, manifest.tokenizer_hash)
    if manifest.vocab_size != vocabulary.size:
        raise UserError(
            f"{folder / MANIFEST} says {manifest.vocab_size} tokens, but its vocabulary has {vocabulary.size}: "
            "delete the folder and prepare the corpus again."
        )
    width = np.dtype(vocabulary.dtype).itemsize
    for split in manifest.splits.values():
        for shard in split.shards:
            try:
                size = (folder / shard.name).stat().st_size
            except OSError as error:
                raise UserError(f"{folder / shard.name} is missing: prepare the corpus again.") from error
            if size != width * shard.tokens:
                raise UserError(
                    f"{folder / shard.name} has {size} bytes, but the manifest says {width * shard.tokens}: "
                    "delete the folder and prepare the corpus again."
                )
    return TokenData(folder, manifest, vocabulary)


def sample_batch(
    split: Split, seed: int, step: int, micro: int, rows: int, length: int
) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Random windows of a split. Returns ids (rows, length) int32 and targets (rows, length) int32, the next tokens.

    The windows are a pure function of the arguments, so that a resumed run needs no position in the data. Their starts
    come from np.random.default_rng((seed, step, micro)), uniform over all windows. Windows cross document borders.
    """
    if split.n_tokens < length + 1:
        raise UserError(
            f"The {split.name} split has {split.n_tokens} tokens, but a sequence of {length} needs "
            f"{length + 1}: use more text or shorter sequences."
        )
    rng = np.random.default_rng((seed, step, micro))
    starts = rng.integers(0, split.n_tokens - length, size=rows)
    windows = split.windows(starts, length + 1)
    return np.ascontiguousarray(windows[:, :-1]), np.ascontiguousarray(windows[:, 1:])
