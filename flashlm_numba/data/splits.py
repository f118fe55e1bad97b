"""Assign documents to splits, as a deterministic stream that is the same in every run (docs/data.md)."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Literal

from flashlm_numba.data.documents import ALL, Source
from flashlm_numba.data.tokenizer import Vocabulary
from flashlm_numba.system.errors import UserError

VALIDATION_SHARE = 0.05  # share of validation documents, if the source has no validation split
SMALL = 1_000  # up to this many documents the share is exact; in larger sources it is random

SplitChoice = Literal["auto", "train", "validation"]


@dataclass
class Tally:
    """Numbers of documents left out up to some point of the source."""

    empty: int = 0
    held_out: int = 0


@dataclass(frozen=True)
class Place:
    """Where a file of a Hugging Face dataset begins. A continued run starts there, not at the first file."""

    part: int = 0
    documents: int = 0  # documents of the plan's stream before it
    empty: int = 0  # documents without text before it


@dataclass(frozen=True)
class Document:
    """A document with text, and its split."""

    split: str
    text: str
    limited: bool  # whether it counts towards --max-tokens
    tally: Tally  # the tally after this document
    place: Place = Place()  # a place at or before this document


@dataclass
class Plan:
    """The assignment of documents to splits, as a deterministic stream that is the same in every run."""

    source: Source
    validation: Source | None
    split: SplitChoice
    max_docs: int | None
    max_tokens: int | None
    vocabulary: Vocabulary
    rule: str = ""  # how the validation documents are chosen; set when the first document is read
    tally: Tally = field(default_factory=Tally)
    start: Place = Place()  # documents() begins here
    note: Callable[[str], None] = lambda sentence: None  # receives sentences about broken connections

    def documents(self) -> Iterator[Document]:
        """The documents, held-out ones first, so that equal documents can be left out of training."""
        held_out: set[bytes] = set()  # 8 bytes per document; nothing else here grows with the corpus
        if self.split != "auto":
            self.rule = f"all documents are {self.split}"
            taken = 0
            for part in (self.split,) if self.split in self.source.roles else self.source.roles:
                for document in self._stage(self.source, part, self.split, limited=True, taken=taken):
                    yield document
                    taken += 1
            return
        if self.validation is not None:
            self.rule = f"validation documents from {self.validation.name}"
            for role in ("validation",) if "validation" in self.validation.roles else self.validation.roles:
                yield from self._stage(self.validation, role, "validation", keep=held_out)
            if "test" in self.source.roles:
                yield from self._stage(self.source, "test", "test", keep=held_out)
            role = ALL if ALL in self.source.roles else "train"
        elif ALL in self.source.roles:
            yield from self._split_off()
            return
        else:
            self.rule = "splits by the names of the source's files"
            for role in ("validation", "test"):
                if role in self.source.roles:
                    yield from self._stage(self.source, role, role, keep=held_out)
            role = "train"
        if role in self.source.roles:
            yield from self._stage(self.source, role, "train", leave_out=held_out, limited=True)

    def _texts(
        self,
        source: Source,
        role: str,
        limit: int | None,
        first_part: int = 0,
        started: Callable[[int], None] = lambda part: None,
    ) -> Iterator[tuple[str, Tally]]:
        """At most `limit` documents with text, and the tally after each."""
        taken = 0
        if limit is not None and limit <= 0:
            return
        for text in source.documents(role, first_part, started, self.note):
            if not text or text.isspace():
                self.tally.empty += 1
                continue
            yield text, self.tally
            taken += 1
            if taken == limit:
                return

    def _stage(
        self,
        source: Source,
        role: str,
        split: str,
        *,
        keep: set[bytes] | None = None,
        leave_out: set[bytes] | None = None,
        limited: bool = False,
        taken: int = 0,  # documents of max_docs that an earlier stage took
    ) -> Iterator[Document]:
        limit = self.max_docs - taken if limited and self.max_docs is not None else None
        for text, tally in self._texts(source, role, limit):
            if keep is not None:
                keep.add(_digest(text))
            if leave_out and _digest(text) in leave_out:
                tally.held_out += 1
                continue
            yield Document(split, text, limited, Tally(tally.empty, tally.held_out))

    def _split_off(self) -> Iterator[Document]:
        """Choose 5 % of the documents for validation by a hash of the text, so that equal documents share a split.

        Up to SMALL documents, exactly this share with the smallest hashes is chosen, at least one document. In larger
        sources a bound on the hash decides. A source of one document is cut: its last 5 % are for validation.
        """
        digests: list[bytes] = []
        tokens = 0
        for text, _ in self._texts(self.source, ALL, min(self.max_docs or SMALL + 1, SMALL + 1)):
            digests.append(_digest(text))
            if self.max_tokens is not None:  # choose only among documents within the limit
                tokens += len(self.vocabulary.encode(text)) + 1
                if tokens >= self.max_tokens:
                    break
        text = ""  # avoids two copies of a long document in memory
        if len(digests) == 1:
            seen, self.tally = self.tally, Tally()
            self.rule = f"the last {VALIDATION_SHARE:.0%} of the one document"
            for text, tally in self._texts(self.source, ALL, 1):
                if self.max_tokens is not None and tokens > self.max_tokens:
                    text = self.vocabulary.decode(self.vocabulary.encode(text)[: self.max_tokens]).rstrip("\ufffd")
                cut = _cut(text)
                yield Document("validation", text[cut:], True, Tally(tally.empty))
                yield Document("train", text[:cut], True, Tally(tally.empty))
            self.tally = seen
            return
        self.rule = f"about {VALIDATION_SHARE:.0%} of the documents, by BLAKE2b of the text, copies on one side"
        small = len(digests) <= SMALL
        different = sorted(set(digests))
        chosen = set(different[: max(1, round(VALIDATION_SHARE * len(different)))]) if small else set()
        bound = int(VALIDATION_SHARE * 2**64).to_bytes(8, "big")
        place = self.start
        number = place.documents
        self.tally = Tally(place.empty)

        def started(part: int) -> None:
            nonlocal place
            place = Place(part, number, self.tally.empty)

        limit = None if self.max_docs is None else self.max_docs - number
        for text, tally in self._texts(self.source, ALL, limit, place.part, started):
            digest = _digest(text)
            is_validation = digest in chosen if small else digest < bound
            name = "validation" if is_validation else "train"
            yield Document(name, text, True, Tally(tally.empty), place)
            number += 1


def _digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()


def _cut(text: str) -> int:
    """Where to cut off the last 5 % of a text: at a line break, else before a word, else anywhere."""
    target = round(len(text) * (1 - VALIDATION_SHARE))
    nearest = int(len(text) * (1 - 2 * VALIDATION_SHARE))
    cut = text.rfind("\n", nearest, target) + 1 or text.rfind(" ", nearest, target)
    if cut <= 0:
        cut = target
    if text[:cut].isspace() or text[cut:].isspace() or not 0 < cut < len(text):
        raise UserError(
            "The source is one document, too short to cut off a validation part: use more text, "
            "or name validation documents with --validation."
        )
    return cut
