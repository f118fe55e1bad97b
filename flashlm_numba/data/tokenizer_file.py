"""Reading a tokenizer.json of Hugging Face's format, and refusing one that this program cannot use without loss.

A usable file is byte-level BPE: its tokens are the 256 bytes and merges of them, so that every text has ids and comes
back from them. What does not change the ids of a text is left out: truncation, padding, tokens put around a text, and
dropout. A special token becomes an ordinary entry that no text yields, so text that spells it stays text. What is left
has one form, whose SHA-256 identifies the vocabulary.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from flashlm_numba.data import byte_level
from flashlm_numba.data.byte_level import BYTE_NAMES, bytes_of, is_byte_name, library_tokenizer
from flashlm_numba.data.tokenizer import END_OF_TEXT
from flashlm_numba.system.errors import UserError
from flashlm_numba.system.files import parse_json

MOST_BYTES = 1 << 28  # a larger file is no vocabulary
# what normalizers and patterns are known to change; every character of ASCII is tried too
PROBES = (
    *("Hello world", " a", "a ", "  a  b  ", "\ta\n\n b\r\n", "a\u00a0b", "e\u0301", "\u0301"),
    *("é", "ﬁ", "Ａ", "İ", "ß", "½", "\u00ad", "\u200b", "\u2028", "\ufeff", "\ufffd", "\ue000", "\U0010ffff"),
    *("中文，字", "مرحبا", "שָׁלוֹם", "हिन्दी", "각", "👩\u200d👧 🙂", "\x00\x7f"),
    *("don't stop", "DON'T", "1234567 8", "a_b-c.d", "<|x|>"),
)


class _Unusable(Exception):
    """Why a file cannot be used, to follow its name."""


def read(path: Path) -> str:
    """The text of a tokenizer.json in the form of byte_level.json_text. Raises UserError if it is not usable."""
    try:
        if path.is_dir():
            raise _Unusable("is a folder, not a tokenizer.json")
        if path.stat().st_size > MOST_BYTES:
            raise _Unusable(f"has {path.stat().st_size:,} bytes, too many for a tokenizer.json")
        try:
            content = parse_json(path.read_text(encoding="utf-8-sig"))
        except ValueError as error:
            raise _Unusable(f"is not JSON ({error})") from None
        try:
            return _canonical(content)
        except (ValueError, TypeError, AttributeError, KeyError, RecursionError) as error:
            raise _Unusable(f"is not in the format of Hugging Face's tokenizers ({error})") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}.") from None
    except _Unusable as error:
        raise UserError(f"{path} {error}: give a byte-level BPE tokenizer.json, or train one with --vocab N.") from None


def _canonical(content: Any) -> str:
    """The same vocabulary in the form of byte_level.json_text."""
    if not isinstance(content, dict) or not isinstance(content.get("model"), dict):
        raise _Unusable("is not in the format of Hugging Face's tokenizers")
    model, pre = content["model"], content.get("pre_tokenizer")
    kind = model.get("type", "BPE" if "merges" in model else "of an unknown type")
    if kind != "BPE" or not isinstance(pre, dict) or not _is_byte_level(pre):
        raise _Unusable(f"is not byte-level BPE (its model is {kind}, its pre-tokenizer {_type(pre)})")
    if model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"):
        raise _Unusable("marks the parts of words, so it is not byte-level BPE")
    vocab, merges, added = _vocab(model.get("vocab")), _merges(model.get("merges")), _added(content)
    names = _names(vocab, added)
    if missing := [byte for byte, name in enumerate(BYTE_NAMES) if name not in vocab]:
        raise _Unusable(f"has no token for {len(missing)} of the 256 bytes, such as 0x{missing[0]:02x}")
    for left, right in merges:
        if not all(name in vocab and is_byte_name(name) for name in (left, right, left + right)):
            raise _Unusable(f"merges {left!r} and {right!r}, which are not tokens of bytes")
    if byte_level.end_of_text(names, merges) is None:
        if END_OF_TEXT in names:
            raise _Unusable(f"makes {END_OF_TEXT} of ordinary text, so no token can end a text")
        names.append(END_OF_TEXT)
    normalizer, ignore_merges = content.get("normalizer"), bool(model.get("ignore_merges"))
    if normalizer == {"type": "Sequence", "normalizers": []}:
        normalizer = None
    text = byte_level.json_text(names, merges, _plain(pre), ignore_merges=ignore_merges)
    _check_lossless(text, normalizer, [normalizer, pre])
    return text


def _type(part: Any) -> str:
    return str(part.get("type")) if isinstance(part, dict) else "missing"


def _is_byte_level(pre: Any) -> bool:
    """Whether a pre-tokenizer ends in the names of bytes."""
    if _type(pre) == "Sequence" and isinstance(pre.get("pretokenizers"), list) and pre["pretokenizers"]:
        return _is_byte_level(pre["pretokenizers"][-1])
    return _type(pre) == "ByteLevel"


def _plain(pre: dict[str, Any]) -> dict[str, Any]:
    """A pre-tokenizer with the same keys whatever version wrote it, and without what concerns positions only."""
    if _type(pre) == "Sequence":
        parts = [_plain(part) for part in pre["pretokenizers"]]
        return parts[0] if len(parts) == 1 else {"type": "Sequence", "pretokenizers": parts}
    if _type(pre) == "ByteLevel":
        plain = byte_level.pre_tokenizer(use_regex=bool(pre.get("use_regex", True)))
        return plain | {"add_prefix_space": bool(pre.get("add_prefix_space"))}
    return pre


def _vocab(vocab: Any) -> dict[str, int]:
    if not isinstance(vocab, dict) or not all(type(i) is int for i in vocab.values()):
        raise _Unusable("has no vocabulary of names and ids")
    return vocab


def _merges(merges: Any) -> list[tuple[str, str]]:
    pairs = [merge.split(" ") if isinstance(merge, str) else merge for merge in merges or ()]
    if not all(
        isinstance(pair, list) and len(pair) == 2 and all(isinstance(name, str) for name in pair) for pair in pairs
    ):
        raise _Unusable("has a merge that is not a pair of tokens")
    return [(left, right) for left, right in pairs]


def _added(content: dict[str, Any]) -> dict[str, int]:
    """Names and ids of the added tokens. All must be special; this program does not look for these in text."""
    found = {}
    for token in content.get("added_tokens") or ():
        if not isinstance(token, dict) or type(token.get("id")) is not int or not isinstance(token.get("content"), str):
            raise _Unusable("has an added token without a name or an id")
        if not token.get("special"):
            raise _Unusable(f"has the added token {token['content']!r}, which swallows text that spells it")
        found[token["content"]] = token["id"]
    return found


def _names(vocab: dict[str, int], added: dict[str, int]) -> list[str]:
    """The names of all tokens by id."""
    by_id: dict[int, str] = {}
    for name, i in [*vocab.items(), *added.items()]:
        if by_id.setdefault(i, name) != name:
            raise _Unusable(f"gives the id {i} to both {by_id[i]!r} and {name!r}")
    for i in range(len(by_id)):
        if i not in by_id:
            raise _Unusable(f"has {len(by_id):,} tokens, but none with the id {i}")
    if len(set(by_id.values())) < len(by_id):
        raise _Unusable("gives two ids to one token")
    return [by_id[i] for i in range(len(by_id))]


def _check_lossless(text: str, normalizer: Any, parts: list[Any]) -> None:
    """Raise _Unusable with an example if some text does not come back from its ids."""
    own = json.loads(text)
    try:
        encoder = library_tokenizer(json.dumps(own | {"normalizer": normalizer}))
    except ValueError as error:
        raise _Unusable(f"is refused by `tokenizers` ({error})") from None
    vocab = own["model"]["vocab"]
    tokens = {i: bytes_of(name) for name, i in vocab.items()}
    names = list(vocab)
    eot = byte_level.end_of_text(names, [tuple(merge.split(" ")) for merge in own["model"]["merges"]])
    for probe in (*PROBES, *map(chr, range(128)), *_strings(parts), names[eot or 0]):
        ids = encoder.encode(probe, add_special_tokens=False).ids
        back = b"".join(tokens[i] for i in ids).decode(errors="replace")
        if back != probe:
            raise _Unusable(f"loses text, as {probe!r} comes back as {back!r}")
        if eot in ids:
            raise _Unusable(f"reads the text {names[eot or 0]!r} as the end of a text")
    if normalizer is not None:
        raise _Unusable(f"has the normalizer {_type(normalizer)}, which may lose text")


def _strings(part: Any) -> Iterator[str]:
    """The texts in a part of the file, such as what a normalizer replaces."""
    if isinstance(part, str):
        yield part
    elif isinstance(part, dict | list):
        for item in part.values() if isinstance(part, dict) else part:
            yield from _strings(item)
