"""The vocabulary of an imported model: any tokenizer.json of Hugging Face's format, as it is, or none at all.

A vocabulary of this program keeps every text, and its ids fill [0, V). The tokenizer of a model from elsewhere need
not. It is stored unchanged inside a JSON object that adds what the file does not say: the model's number of tokens, and
the ids that begin and end a text. The library `tokenizers` encodes; a token's bytes follow from the file's decoder.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flashlm_numba.data.byte_level import BYTE_NAMES, LONG_PIECE, bytes_of, hash_of, library_tokenizer
from flashlm_numba.data.documents import without_surrogates
from flashlm_numba.data.tokenizer import TOKENIZER, Vocabulary, split_text
from flashlm_numba.data.tokenizer_file import MOST_BYTES, PROBES
from flashlm_numba.system.errors import UserError
from flashlm_numba.system.files import parse_json

if TYPE_CHECKING:
    import tokenizers

_MARK = "flashlm_numba"  # the first key of the object
_BYTE = re.compile("<0x([0-9A-Fa-f]{2})>")
_FORMAT = "is not in the format of Hugging Face's tokenizers"


def is_imported(text: str) -> bool:
    """Whether this is the text of an imported vocabulary."""
    return text.startswith('{"' + _MARK + '":')


def imported_text(tokenizer: Any, size: int, start: int, end: int) -> str:
    """The text of an imported vocabulary.

    tokenizer : the value of the tokenizer.json, or None;  size : V of the model;  start, end : ids around a text
    """
    content = {_MARK: {"size": size, "start": start, "end": end}, "tokenizer": tokenizer}
    return json.dumps(content, ensure_ascii=False, separators=(",", ":")) + "\n"


def read_tokenizer(path: Path, size: int) -> Any:
    """The value of a tokenizer.json for a model with this many tokens. Raises UserError if the file is not usable."""
    try:
        if path.stat().st_size > MOST_BYTES:
            raise UserError(f"{path} has {path.stat().st_size:,} bytes, too many for a tokenizer.json; remove it.")
        content = parse_json(path.read_text(encoding="utf-8-sig"))
        found = ImportedVocabulary(imported_text(content, size, 0, 0))
        _check_unknown(content)
        _ = found._library
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}.") from None
    except ValueError as error:
        raise UserError(f"{path} cannot be used ({error}); restore it, or remove it to import by ids only.") from None
    return content


class ImportedVocabulary(Vocabulary):
    """The vocabulary of imported_text. Its name is imported, its size and its hash.

    `start` begins a text and `eot` ends it. An id without a token has no bytes, and neither has a special token.
    Raises ValueError if the text is another one, or if the tokenizer does not fit the model.
    """

    def __init__(self, text: str) -> None:
        self._text = text
        self.hash = hash_of(text)
        try:
            content = parse_json(text)
            own, self._content = content[_MARK], content["tokenizer"]
            self.size, self._start, self.eot = (own[name] for name in ("size", "start", "end"))
            if not all(type(n) is int for n in (self.size, self._start, self.eot)):
                raise TypeError("a number is missing")
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"it is no imported vocabulary ({error})") from None
        if self.size < 1 or not (0 <= self._start < self.size and 0 <= self.eot < self.size):
            raise ValueError(f"its ids {self._start} and {self.eot} are not both in [0, {self.size})")
        self.name = f"imported-{self.size}-{self.hash[:8]}"
        if self._content is not None:
            self._names = self._read_names()

    def _read_names(self) -> dict[int, tuple[str, str]]:
        """Name and kind of each token, by id; the kind is "model", "added" or "special"."""
        try:
            vocab = self._content["model"]["vocab"]
            pairs = vocab.items() if isinstance(vocab, dict) else ((entry[0], i) for i, entry in enumerate(vocab))
            names = {int(i): (str(name), "model") for name, i in pairs}
            for token in self._content.get("added_tokens") or ():
                names[int(token["id"])] = str(token["content"]), "special" if token.get("special") else "added"
        except (KeyError, TypeError, AttributeError, IndexError, ValueError, OverflowError):  # infinity is no int
            raise ValueError(f"it {_FORMAT}") from None
        for i in (min(names, default=0), max(names, default=0)):
            if not 0 <= i < self.size:
                raise ValueError(f"it has the id {i:,}, but the model has {self.size:,} tokens")
        return names

    @property
    def start(self) -> int:
        """The id that begins a text."""
        return self._start

    def load(self) -> None:
        """Build the encoder, if there is a tokenizer. Raises UserError if the library refuses it."""
        try:
            if self._content is not None:
                _ = self._library
        except ValueError as error:
            raise UserError(f"`tokenizers` cannot read the vocabulary {self.name}: {error}.") from None

    def to_json(self) -> str:
        """The text of imported_text, from which this vocabulary can be made again."""
        return self._text

    @functools.cached_property
    def _library(self) -> tokenizers.Tokenizer:
        content = self._content
        if content["model"].get("dropout"):  # a chance for other tokens at every call, meant for training
            content = content | {"model": content["model"] | {"dropout": None}}
        found = library_tokenizer(json.dumps(content, ensure_ascii=False))
        found.no_truncation()
        found.no_padding()
        found.encode_special_tokens = True  # text that spells one stays text
        return found

    def _needed(self) -> None:
        if self._content is None:
            raise UserError(
                "This model was imported without a tokenizer, so it takes token ids and no text; import it again from "
                f"a folder with its {TOKENIZER}."
            )

    def pieces(self, text: str) -> Iterator[str]:
        """One piece, except of a very long text: a tokenizer may treat the beginning of a text in its own way."""
        return split_text(text, LONG_PIECE)

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """Token ids of each text, without those that the tokenizer would put around it."""
        self._needed()
        self.load()
        plain = [without_surrogates(text) for text in texts]
        try:
            return [found.ids for found in self._library.encode_batch_fast(plain, add_special_tokens=False)]
        except Exception as error:  # the library raises Exception itself, for text that it has no token for
            raise UserError(f"The tokenizer {self.name} cannot encode this text: {error}.") from None

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The bytes of the tokens. Raises ValueError for an id outside the vocabulary."""
        self._needed()
        numbers = [int(i) for i in ids]
        if wrong := [i for i in numbers if not 0 <= i < self.size]:
            raise ValueError(f"Vocabulary.decode: ids must be in [0, {self.size}), got {wrong[0]}")
        return b"".join([self.token_bytes[i] for i in numbers])

    @functools.cached_property
    def token_bytes(self) -> list[bytes]:
        """The bytes of each token (V,), by id; b"" for an id without a token, and without a tokenizer."""
        found = [b""] * self.size
        if self._content is not None:
            parts = [*_parts(self._content.get("decoder"), "decoders")]
            for i, (name, kind) in self._names.items():
                if kind != "special":
                    found[i] = name.encode() if kind == "added" else _bytes(name, parts)
        return found

    def lost(self) -> tuple[str, str] | None:
        """A text that does not come back from its ids, and what comes back; None if there is none of many."""
        if self._content is None:
            return None
        for probe in (*PROBES, *map(chr, range(128))):
            back = self.decode(self.encode(probe))
            if back not in (probe, f" {probe}"):  # a space that the tokenizer puts before a text
                return probe, back
        return None


def _check_unknown(content: dict[str, Any]) -> None:
    """Raise ValueError if some text would need the token for unknown text, and there is none.

    Without one the library drops what a BPE has no token for, which `lost` finds. The other models, and a BPE whose
    token is missing, encode no text with an unknown part.
    """
    model = content["model"]
    kind, vocab = model.get("type", "BPE"), model["vocab"]
    names = set(vocab) if isinstance(vocab, dict) else {str(entry[0]) for entry in vocab}
    if kind in ("BPE", "Unigram"):
        pre = [part.get("type") for part in _parts(content.get("pre_tokenizer"), "pretokenizers")]
        fallback = kind == "BPE" and model.get("byte_fallback")  # a Unigram needs the token in spite of these
        bytes_ = {f"<0x{byte:02X}>" for byte in range(256)} if fallback else set(BYTE_NAMES)
        if bytes_ <= names and (fallback or "ByteLevel" in pre):
            return  # no text is unknown
    key = "unk_id" if kind == "Unigram" else "unk_token"
    unknown = model.get(key)
    if unknown is None:
        if kind == "BPE":
            return
        raise ValueError(f"its {kind} model has no {key}, so it cannot encode unknown text")
    known = unknown in range(len(names)) if kind == "Unigram" else isinstance(unknown, str) and unknown in names
    if not known:
        raise ValueError(f"its {key} {unknown!r} is not in its vocabulary, so it cannot encode unknown text")


def _parts(part: Any, key: str) -> Iterator[dict[str, Any]]:
    """The parts of a decoder, in order."""
    if isinstance(part, dict) and isinstance(part.get(key), list):
        for inner in part[key]:
            yield from _parts(inner, key)
    elif isinstance(part, dict):
        yield part


def _bytes(name: str, decoder: list[dict[str, Any]]) -> bytes:
    """The bytes of a token by its name, which the parts of the decoder change one after another."""
    for part in decoder:
        kind = part.get("type")
        if kind == "ByteLevel":
            return bytes_of(name)
        if kind == "ByteFallback" and (match := _BYTE.fullmatch(name)):
            return bytes([int(match[1], 16)])
        if kind == "Replace" and isinstance(part.get("pattern"), dict) and "String" in part["pattern"]:
            name = name.replace(part["pattern"]["String"], str(part.get("content", "")))
        elif kind == "Metaspace":
            name = name.replace(str(part.get("replacement", "\u2581")), " ")
        elif kind == "WordPiece":
            prefix = str(part.get("prefix", "##"))
            name = name.removeprefix(prefix) if name.startswith(prefix) else f" {name}"
        elif kind == "BPEDecoder":
            name = name.replace(str(part.get("suffix", "</w>")), " ")
    return name.encode()
