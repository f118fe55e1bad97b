"""Lossless compression: arithmetic coding of a file's tokens with a model's probabilities.

A token of probability p takes -log2 p bits, so the compressed size of a text is its NLL. Encoder and decoder compute
the same probabilities bit by bit, each from the tokens before, with the kernels that generate text. The coder is the
range coder of the library constriction (Bamler 2022, arXiv:2201.01741).

A compressed file, with numbers as varint (7 bits per byte, the lowest first):

    MAGIC, method (1 byte): STORED or MODEL
    size of the original file (varint), its BLAKE2b (16 bytes)
    STORED: the original file
    MODEL:  the model's fingerprint (8 bytes), activations (1 byte: index in ACTIVATIONS)
            what computed it (its length as varint, then UTF-8)
            number of tokens (varint), number of sections (varint), length of every section in bytes (varint)
            BLAKE2b of everything so far (4 bytes)
            the range coder's words, uint32, little-endian

The sections are text and other bytes in turn, text first. The tokens of all texts follow one another in the model's
context. Other bytes, which are not UTF-8 or which the vocabulary cannot represent, take 8 bits each.
"""

from __future__ import annotations

import hashlib
import itertools
import re
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from flashlm_numba import __version__
from flashlm_numba.inference.generate import REMEMBERED, Recent
from flashlm_numba.model.config import ACTIVATIONS
from flashlm_numba.system.display import TERMINAL, Progress
from flashlm_numba.system.errors import UserError

if TYPE_CHECKING:
    from flashlm_numba.data.tokenizer import Vocabulary
    from flashlm_numba.model.model import Model
    from flashlm_numba.model.packed_model import PackedModel

MAGIC = b"FLNZ\x01"
STORED, MODEL = 0, 1
_DIGEST, _CHECK = 16, 4  # bytes
_FEW = 8  # characters of text that are not worth a section of their own between other bytes
_ESCAPED = re.compile("[\udc80-\udcff]+")  # bytes that are not UTF-8, as errors="surrogateescape" decodes them
_ADVANCE = 256  # tokens between two steps of the progress bar


class Compressed(NamedTuple):
    """A compressed file and how it came about."""

    data: bytes
    tokens: int  # that the model coded; 0 if the file is stored
    ideal_bits: float  # sum of -log2 p over the tokens and other bytes


class Header(NamedTuple):
    """What is at the beginning of a file that a model compressed."""

    size: int
    digest: bytes
    fingerprint: str
    activations: str
    computed_by: str
    tokens: int
    sections: list[int]


def computed_by() -> str:
    """What may change the bits of a probability: the program and its kernels, the libraries and the processor."""
    import llvmlite.binding
    import numba

    from flashlm_numba.kernels import _jit

    kernels = f"{_jit.folder_name().removeprefix('kernels-')}-{_jit.COMPLETE.removeprefix('complete-')}"
    name = numba.config.CPU_NAME or llvmlite.binding.get_host_cpu_name()
    return (
        f"flashlm-numba {__version__}, {name}, Numba {numba.__version__}, NumPy {np.__version__}, "
        f"kernels {hashlib.sha256(kernels.encode()).hexdigest()[:8]}"
    )


# --- bytes as tokens ---


def sections_of(data: bytes, vocabulary: Vocabulary) -> list[tuple[bytes, list[int] | None]]:
    """Divide a file into texts with their token ids and other bytes (None), in turn, a text first.

    A text may be empty only at the start.
    """
    found: list[tuple[bytes, list[int] | None]] = [(b"", [])]
    text = data.decode("utf-8", "surrogateescape")
    end, spans = 0, list[tuple[int, int]]()  # of bytes that are not UTF-8
    for match in _ESCAPED.finditer(text):
        if spans and match.start() - end < _FEW:
            spans[-1] = spans[-1][0], match.end()
        else:
            spans.append((match.start(), match.end()))
        end = match.end()
    cuts = [0, *itertools.chain(*spans), len(text)]
    for n, (start, stop) in enumerate(itertools.pairwise(cuts)):
        part = text[start:stop].encode("utf-8", "surrogateescape")
        ids = _ids_of(text[start:stop], part, vocabulary) if n % 2 == 0 and part else None
        if part and (ids is None) == (found[-1][1] is None):  # text that the vocabulary loses, beside other bytes
            found[-1] = found[-1][0] + part, None if ids is None else [*(found[-1][1] or []), *ids]
        elif part:
            found.append((part, ids))
    return found


def _ids_of(text: str, data: bytes, vocabulary: Vocabulary) -> list[int] | None:
    """The ids of a text; None if they do not give its bytes again, as in a vocabulary that is not lossless."""
    ids = [token for piece in vocabulary.pieces(text) for token in vocabulary.encode(piece)]
    return ids if b"".join(map(vocabulary.token_bytes.__getitem__, ids)) == data else None


# --- the model's side, the same for both directions ---


class _Reader:
    """A model that reads a text token by token and says what it expects."""

    def __init__(self, model: Model | PackedModel, start: int) -> None:
        model.sync_weights()
        self._model: Any = model
        self._state: Any
        self._state, self._h = self._model.prefill(np.array([start], np.int32))
        self._recent = Recent([start], max(REMEMBERED, model.remembered))

    def decisions(self) -> Any:
        """The Decisions on the next token."""
        return self._model.head_after(self._recent.ids).decisions(self._h[0])

    def read(self, token: int) -> None:
        """Feed the next token."""
        self._h = self._model.decode_step(self._state, token)
        self._recent.add(token)


def _categorical(p: np.ndarray) -> Any:
    """The coder's model of a decision. It gives every outcome a probability above zero."""
    import constriction

    if not np.isfinite(p).all():
        raise UserError("The model's probabilities are not finite: its weights are too large; use another checkpoint.")
    return constriction.stream.model.Categorical(p if p.sum() > 0 else np.ones(len(p)), perfect=False)


def compress(
    model: Model | PackedModel,
    vocabulary: Vocabulary,
    data: bytes,
    *,
    activations: str,
    progress: Progress = TERMINAL,
) -> Compressed:
    """Compress a file, data, with a model.

    activations : the arithmetic that the model has been told to use, which is noted in the result
    The result is at most some 30 bytes longer than data. Raises UserError if the library constriction is missing, or
    the model's weights are not finite.
    """
    constriction = _constriction()
    head = bytes([*_varint(len(data)), *_digest(data)])
    stored = Compressed(MAGIC + bytes([STORED]) + head + data, 0, 8.0 * len(data))
    if not data:
        return stored
    sections = sections_of(data, vocabulary)
    tokens = sum(len(ids or ()) for _, ids in sections)
    encoder, bits, done = constriction.stream.queue.RangeEncoder(), 0.0, 0
    uniform = constriction.stream.model.Uniform(256)
    reader = _Reader(model, vocabulary.start)
    with progress.tokens("compressing", tokens) as bar:
        for part, ids in sections:
            if ids is None:
                encoder.encode(np.frombuffer(part, np.uint8).astype(np.int32), uniform)
                bits += 8.0 * len(part)
                continue
            for token in ids:
                bits += _encode(encoder, reader.decisions(), token)
                reader.read(token)
                done += 1
                if done % _ADVANCE == 0:
                    bar.advance(_ADVANCE)
        bar.advance(done % _ADVANCE)
    made_by = computed_by().encode()
    parts = [MAGIC, bytes([MODEL]), head, bytes.fromhex(model.fingerprint()), bytes([ACTIVATIONS.index(activations)])]
    parts += [_varint(len(made_by)), made_by, _varint(tokens), _varint(len(sections))]
    before = b"".join([*parts, *(_varint(len(part)) for part, _ in sections)])
    coded = before + _digest(before, _CHECK) + encoder.get_compressed().astype("<u4").tobytes()
    return Compressed(coded, tokens, bits) if len(coded) < len(stored.data) else stored


def _encode(encoder: Any, decisions: Any, token: int) -> float:
    """Code a token; returns -log2 of its probability."""
    bits = 0.0
    while True:
        p, outcome = decisions.probabilities(), decisions.outcome_of(token)
        if len(p) > 1:
            encoder.encode(outcome, _categorical(p))
            bits -= float(np.log2(max(p[outcome], 1e-300) / max(p.sum(), 1e-300)))
        if decisions.take(outcome) is not None:
            return bits


def _decode(decoder: Any, decisions: Any) -> int:
    while True:
        p = decisions.probabilities()
        outcome = int(decoder.decode(_categorical(p))) if len(p) > 1 else 0
        token: int | None = decisions.take(outcome)
        if token is not None:
            return token


def read_header(data: bytes) -> Header | None:
    """The header of a file that a model compressed; None if the original is stored without a model.

    Raises UserError if it is no compressed file, or is damaged.
    """
    return _parsed(data)[0]


def decompress(
    data: bytes, model: Model | PackedModel | None, vocabulary: Vocabulary | None, *, progress: Progress = TERMINAL
) -> bytes:
    """The original file of a compressed one, data. The model takes the arithmetic with which it was compressed.

    model, vocabulary : those of compress; None if read_header returns None
    Raises UserError if the file is damaged, was compressed with another model, or does not come back as it was, since
    another machine or version computes the probabilities.
    """
    header, rest = _parsed(data)
    if header is None:
        return rest
    if model is None or vocabulary is None:
        raise UserError("The file was compressed with a model; give the same model.")
    if model.fingerprint() != header.fingerprint:
        raise UserError(
            "The file was compressed with another model, or with another checkpoint of this one; give that one."
        )
    constriction = _constriction()
    if len(rest) % 4:
        raise UserError(_DAMAGED)
    here = computed_by()
    if here != header.computed_by:
        progress.note(f"The file was compressed by {header.computed_by}; this is {here}. The result is checked.")
    model.use_activations(header.activations)
    decoder = constriction.stream.queue.RangeDecoder(np.frombuffer(rest, "<u4").astype(np.uint32))
    uniform = constriction.stream.model.Uniform(256)
    reader, out, done = _Reader(model, vocabulary.start), bytearray(), 0
    with progress.tokens("decompressing", header.tokens) as bar:
        try:
            for n, size in enumerate(header.sections):
                end = len(out) + size
                if n % 2:
                    out += bytes(decoder.decode(uniform, size).astype(np.uint8))
                while len(out) < end:
                    token = _decode(decoder, reader.decisions())
                    found = vocabulary.token_bytes[token]
                    if not found or done == header.tokens or token == vocabulary.eot:
                        raise UserError(_wrong(header, here))
                    out += found
                    reader.read(token)
                    done += 1
                    if done % _ADVANCE == 0:
                        bar.advance(_ADVANCE)
        except (AssertionError, ValueError):  # words that the coder cannot have written
            raise UserError(_wrong(header, here)) from None
        bar.advance(done % _ADVANCE)
    if len(out) != header.size or _digest(out) != header.digest:
        raise UserError(_wrong(header, here))
    return bytes(out)


# --- the format ---

_DAMAGED = "The compressed file is damaged; compress the original again."


def _wrong(header: Header, here: str) -> str:
    """Why the original does not come back."""
    if here == header.computed_by:
        return _DAMAGED
    return (
        f"The file does not come back as it was. It was compressed by {header.computed_by}, and this is {here}; "
        "decompress it there."
    )


def _constriction() -> Any:
    try:
        import constriction
    except ImportError:
        raise UserError(
            "Compression needs constriction; install it with `pip install 'flashlm-numba[compress]'`."
        ) from None
    return constriction


def _digest(data: bytes | bytearray, size: int = _DIGEST) -> bytes:
    return hashlib.blake2b(data, digest_size=size).digest()


def _varint(value: int) -> bytes:
    """A number of at least 0.

    >>> _varint(5), _varint(300)
    (b'\\x05', b'\\xac\\x02')
    """
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


class _Bytes:
    """Reads the parts of a file one after another. Raises UserError where it ends too early."""

    def __init__(self, data: bytes, at: int) -> None:
        self._data, self._at = data, at

    def take(self, count: int) -> bytes:
        part = self._data[self._at : self._at + count]
        if len(part) < count:
            raise UserError(_DAMAGED)
        self._at += count
        return part

    def number(self) -> int:
        value, shift = 0, 0
        while True:
            (byte,) = self.take(1)
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                return value
            shift += 7
            if shift > 63:
                raise UserError(_DAMAGED)

    def before(self) -> bytes:
        return self._data[: self._at]

    def rest(self) -> bytes:
        return self._data[self._at :]


def _parsed(data: bytes) -> tuple[Header | None, bytes]:
    """The header and what follows it: the coder's words, or the original file."""
    if data[: len(MAGIC)] != MAGIC:
        raise UserError("This is not a file from `flashlm-numba compress`; give such a file.")
    source = _Bytes(data, len(MAGIC))
    (method,) = source.take(1)
    size, digest = source.number(), source.take(_DIGEST)
    if method == STORED:
        rest = source.rest()
        if len(rest) != size or _digest(rest) != digest:
            raise UserError(_DAMAGED)
        return None, rest
    if method != MODEL:
        raise UserError(_DAMAGED)
    fingerprint, (activations,) = source.take(8).hex(), source.take(1)
    name = source.take(source.number())
    tokens, count = source.number(), source.number()
    sections = [source.number() for _ in range(min(count, len(data)))]
    before = source.before()
    if source.take(_CHECK) != _digest(before, _CHECK):
        raise UserError(_DAMAGED)
    text = name.decode("utf-8", "replace")
    return Header(size, digest, fingerprint, ACTIVATIONS[activations], text, tokens, sections), source.rest()
