"""Byte-level vocabularies: the 256 bytes and merges of them, stored in Hugging Face's tokenizer.json.

In that file every byte has a printable character as its name, so that the name of a token is a text. The characters are
those of GPT-2: a printable character of Latin-1 stands for its own byte, and the other bytes have the characters from
U+0100 in their order. The file's end of text is an entry of the vocabulary that no merge produces. It is not an "added
token", because the library would find an added token in ordinary text.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from flashlm_numba.data.documents import without_surrogates
from flashlm_numba.data.tokenizer import END_OF_TEXT, PIECE, Vocabulary, split_text
from flashlm_numba.system.errors import UserError
from flashlm_numba.system.files import parse_json

if TYPE_CHECKING:
    import tiktoken
    import tokenizers

# The pattern of a trained vocabulary: a byte of ASCII is white space, a digit, a letter or a sign, and every other
# character is a letter. Classes are written without the characters beyond ASCII, which engines write in different ways.
_SPACE, _LETTER, _SIGN = r"[\t-\r ]", r"[^\x00-@\[-`{-\x7f]", r"[\x00-\x08\x0e-\x1f!-/:-@\[-`{-\x7f]"
ASCII_PATTERN = rf"'(?:[sdmt]|ll|ve|re)| ?{_LETTER}+| ?[0-9]+| ?{_SIGN}+|{_SPACE}+(?![^\t-\r ])|{_SPACE}+"
# The same matches in tiktoken's engine, without backtracking over long runs.
_POSSESSIVE = rf"'(?:[sdmt]|ll|ve|re)| ?{_LETTER}++| ?[0-9]++| ?{_SIGN}++|{_SPACE}++$|{_SPACE}+(?![^\t-\r ])|{_SPACE}"

LONG_PIECE = 10 * PIECE  # characters per piece for a vocabulary whose tokens may cross the places where texts are cut
# names of an end of text, in the order in which they are looked for
_ENDS = (END_OF_TEXT, "<|end_of_text|>", "</s>", "<eos>", "<|eos|>", "<EOS>", "[EOS]", "<|im_end|>")


def _characters() -> list[str]:
    """The name of each byte."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) if byte in printable else chr(0x100 + others.index(byte)) for byte in range(256)]


BYTE_NAMES = _characters()  # by byte
BYTES = {ord(name): byte for byte, name in enumerate(BYTE_NAMES)}  # for str.translate


def name_of(token: bytes) -> str:
    """The name of a token in tokenizer.json.

    >>> name_of(b" a\\n")
    'ĠaĊ'
    """
    return "".join(map(BYTE_NAMES.__getitem__, token))


def is_byte_name(name: str) -> bool:
    """Whether every character of a token's name stands for a byte."""
    return all(ord(character) in BYTES for character in name)


def bytes_of(name: str) -> bytes:
    """The bytes of a token by its name. A name of other characters, as an end of text may have, stands for itself."""
    return bytes(BYTES[ord(character)] for character in name) if is_byte_name(name) else name.encode()


def merge_of(token: bytes, ranks: dict[bytes, int]) -> tuple[bytes, bytes] | None:
    """The last two parts that byte-pair encoding merges to this token, or None if it never makes this token.

    ranks : number of each token in the order in which they are merged; the bytes may have any
    """
    limit = ranks[token]
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 2:
        found = [ranks.get(left + right, limit) for left, right in itertools.pairwise(parts)]
        best = min(found)
        if best >= limit:
            return None
        at = found.index(best)
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return (parts[0], parts[1]) if len(parts) == 2 else None


# --- tokenizer.json ---


def pre_tokenizer(*, use_regex: bool) -> dict[str, Any]:
    """The part of tokenizer.json that turns text into the names of its bytes, after GPT-2's pattern if use_regex."""
    return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": use_regex}


ASCII_PRE_TOKENIZER: dict[str, Any] = {
    "type": "Sequence",
    "pretokenizers": [
        {"type": "Split", "pattern": {"Regex": ASCII_PATTERN}, "behavior": "Isolated", "invert": False},
        pre_tokenizer(use_regex=False),
    ],
}


def json_text(
    tokens: Sequence[str],
    merges: Iterable[tuple[str, str]],
    pre_tokenizer: dict[str, Any],
    *,
    ignore_merges: bool = False,
) -> str:
    """The text of tokenizer.json. The same vocabulary gives the same text, whose SHA-256 identifies it.

    tokens : names by id, the end of text among them;  merges : names of the two parts, in the order of merging
    ignore_merges : whether a match of the pattern that is a token becomes this token, whatever the merges
    """
    content: dict[str, Any] = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": pre_tokenizer,
        "post_processor": None,
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": ignore_merges,
            "vocab": {name: i for i, name in enumerate(tokens)},
            "merges": [f"{left} {right}" for left, right in merges],
        },
    }
    return json.dumps(content, ensure_ascii=False, separators=(",", ":")) + "\n"


def hash_of(text: str) -> str:
    """SHA-256 (hex) of a tokenizer.json."""
    return hashlib.sha256(text.encode()).hexdigest()


def end_of_text(names: Sequence[str], merges: Iterable[tuple[str, str]]) -> int | None:
    """The id of the end of text among tokens by id, or None: it has a known name, and no merge produces it."""
    ids = {name: i for i, name in enumerate(names)}
    made = {left + right for left, right in merges}
    return next((ids[name] for name in _ENDS if name in ids and name not in made), None)


def library_tokenizer(text: str) -> tokenizers.Tokenizer:
    """The tokenizer of the library `tokenizers` for a tokenizer.json. Raises ValueError if the library refuses it."""
    # `prepare` has threads of its own; the library's threads would ignore --workers, and they warn after a fork
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    import tokenizers

    try:
        return tokenizers.Tokenizer.from_str(text)
    except Exception as error:  # the library raises Exception itself
        raise ValueError(str(error).splitlines()[0]) from None


# --- vocabularies ---


def encode_pieces(encoding: tiktoken.Encoding, texts: list[str]) -> list[list[int]]:
    """Token ids of each text by tiktoken, which gets long texts in pieces."""
    encode = encoding.encode_ordinary
    encoded = []
    for text in texts:
        first, *rest = split_text(text)
        ids = encode(first)
        for piece in rest:
            ids += encode(piece)
        encoded.append(ids)
    return encoded


class ByteVocabulary(Vocabulary):
    """The 256 bytes, with their values as ids, and the end of text."""

    name = "bytes"
    size = 257
    hash = "906a0ef12b71e4cbb91e8459c34d4f2f739558ed431f806c8ff91943c5f7dfaf"
    eot = 256

    def to_json(self) -> str:
        """The text of tokenizer.json, in Hugging Face's format."""
        return json_text([*BYTE_NAMES, END_OF_TEXT], [], pre_tokenizer(use_regex=False))

    def pieces(self, text: str) -> Iterator[str]:
        """Divide a text of more than PIECE characters."""
        return split_text(text)

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """The UTF-8 bytes of each text, which are the ids."""
        return [list(without_surrogates(text).encode()) for text in texts]

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The bytes of the tokens. Raises ValueError for an id outside the vocabulary."""
        return _joined(self, ids)

    @functools.cached_property
    def token_bytes(self) -> list[bytes]:
        """The bytes of each token, by id."""
        return [*(bytes([byte]) for byte in range(256)), END_OF_TEXT.encode()]


class ByteLevelVocabulary(Vocabulary):
    """The vocabulary of a tokenizer.json that bpe.py or tokenizer_file.py made. Its name is bpe, its size and its hash.

    Raises ValueError if the text is another one.
    """

    def __init__(self, text: str) -> None:
        self._text = text
        self.hash = hash_of(text)
        try:
            content = parse_json(text)
            model = content["model"]
            self._names = sorted(model["vocab"], key=model["vocab"].__getitem__)
            self._merges: list[tuple[str, str]] = [tuple(merge.split(" ")) for merge in model["merges"]]
            eot = end_of_text(self._names, self._merges)
            self._is_ascii = content["pre_tokenizer"] == ASCII_PRE_TOKENIZER and not model["ignore_merges"]
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(f"it is no vocabulary of this program ({error})") from None
        if eot is None or [*model["vocab"].values()] != [*range(len(self._names))]:
            raise ValueError("it is no vocabulary of this program")
        self.eot = eot
        self.size = len(self._names)
        self.name = f"bpe-{self.size}-{self.hash[:8]}"

    def load(self) -> None:
        """Build the encoder. Raises UserError if the library refuses the file."""
        if self._fast is None:
            _ = self._library

    def to_json(self) -> str:
        """The text of tokenizer.json, in Hugging Face's format."""
        return self._text

    @functools.cached_property
    def token_bytes(self) -> list[bytes]:
        """The bytes of each token (V,), by id."""
        return [bytes_of(name) for name in self._names]

    @functools.cached_property
    def _library(self) -> tokenizers.Tokenizer:
        try:
            return library_tokenizer(self._text)
        except ValueError as error:
            raise UserError(f"`tokenizers` cannot read the vocabulary {self.name}: {error}.") from None

    @functools.cached_property
    def _fast(self) -> tiktoken.Encoding | None:
        """tiktoken's encoder, several times as fast as the library's, if it gives the same ids; else None.

        tiktoken merges any two parts that form a token, the library only those in its list. Both do the same if each
        token, encoded alone, comes from the two parts in the list.
        """
        if not self._is_ascii:
            return None
        ids = {name: i for i, name in enumerate(self._names)}
        ranks = {bytes([byte]): ids[name] for byte, name in enumerate(BYTE_NAMES)}
        last = -1
        for left, right in self._merges:
            token, pair = bytes_of(left + right), (bytes_of(left), bytes_of(right))
            rank = ids[left + right]
            ranks[token] = rank
            if rank <= last or merge_of(token, ranks) != pair:
                return None
            last = rank
        import tiktoken

        return tiktoken.Encoding(self.name, pat_str=_POSSESSIVE, mergeable_ranks=ranks, special_tokens={})

    def pieces(self, text: str) -> Iterator[str]:
        """Divide a long text. A trained vocabulary has no token across the cuts; others get longer pieces."""
        return split_text(text, PIECE if self._is_ascii else LONG_PIECE)

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """Token ids of each text. Both encoders release Python's lock."""
        texts = [without_surrogates(text) for text in texts]
        if self._fast is not None:
            return encode_pieces(self._fast, texts)
        return [found.ids for found in self._library.encode_batch_fast(texts, add_special_tokens=False)]

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The bytes of the tokens. Raises ValueError for an id outside the vocabulary."""
        return _joined(self, ids)


def _joined(vocabulary: Vocabulary, ids: Iterable[int]) -> bytes:
    numbers = [int(i) for i in ids]
    tokens = vocabulary.token_bytes
    for i in numbers:
        if not 0 <= i < len(tokens):
            raise ValueError(f"Vocabulary.decode: ids must be in [0, {len(tokens)}), got {i}")
    return b"".join([tokens[i] for i in numbers])
