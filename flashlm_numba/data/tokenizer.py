"""The interface of a vocabulary: it converts text to token ids and back, and knows its size, dtype and end of text.

vocabularies.py lists the vocabularies and finds the one of a tokenizer.json. gpt2.py has GPT-2's, byte_level.py all
others, and bpe.py trains one.
"""

from __future__ import annotations

import functools
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator

TOKENIZER = "tokenizer.json"  # name of the file with a vocabulary, in a folder of tokens and in a run
END_OF_TEXT = "<|endoftext|>"  # name of the end of text; in a document these characters are text


class Vocabulary(ABC):
    """The tokens of a language model, used by a corpus, a run and a generated text.

    name : name in messages and in the manifest of a corpus; for those in VOCABULARIES, the name there
    size : V; ids are in [0, V)
    hash : SHA-256 (hex) of to_json(), which identifies the vocabulary
    eot : id of the end of text, which closes every document and starts every context; no text encodes to it
    `load`, or the first use of a method that needs them, reads files and builds tables.
    """

    name: str
    size: int
    hash: str
    eot: int

    @property
    def dtype(self) -> str:
        """NumPy's name of the dtype of ids in a shard: little-endian, 2 bytes if every id fits, else 4."""
        return "<u2" if self.size <= 1 << 16 else "<u4"

    @property
    def start(self) -> int:
        """The id that begins a text: the end of text, except in an imported vocabulary."""
        return self.eot

    def load(self) -> None:  # noqa: B027 (a vocabulary may have nothing to read)
        """Read the files that encoding and decoding need. Raises UserError if they are damaged or unavailable."""

    @abstractmethod
    def to_json(self) -> str:
        """The text of tokenizer.json, in Hugging Face's format. The library `tokenizers` gives the same ids with it."""

    @abstractmethod
    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """Token ids of each text. `prepare` calls it from several threads at once. Surrogates become U+FFFD."""

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

    def lost(self) -> tuple[str, str] | None:
        """A text that does not come back from its ids, and what comes back. None, except in an imported vocabulary."""
        return None


PIECE = 100_000  # characters per piece of a long text
_SEAM = re.compile(r"\S(?=[ \n])")


def split_text(text: str, limit: int = PIECE) -> Iterator[str]:
    """Divide text into pieces of about `limit` characters.

    The cut is before the first space or newline after `limit` characters that follows another character. If the next
    `limit` characters have none, the cut is anywhere, because tiktoken's regex engine fails on runs of a million
    spaces. The tokens of the pieces, joined, are those of the text if no token crosses such a place.

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
