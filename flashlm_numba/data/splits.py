"""Assign documents to splits, as a deterministic stream that is the same in every run (docs/data.md)."""

from __future__ import annotations

import contextlib
import hashlib
import math
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from flashlm_numba.data.documents import ALL, Document, Place, Source, Tally
from flashlm_numba.data.encoding import encoded
from flashlm_numba.data.tokenizer import Vocabulary
from flashlm_numba.system.errors import UserError
from flashlm_numba.system.threads import available_cores

VALIDATION_SHARE = 0.05  # share of the text that becomes validation, if the source has no validation split
LEAST_SHARE, MOST_SHARE = 0.025, 0.1  # what counts as about this share
SMALL = 1_000  # up to this many documents the share is computed; in larger sources it is random
LONG = 50  # documents so many times as long as the first ones on average are never for validation in larger sources
PARTS = 32  # parts of a source elsewhere that a vocabulary's sample is read from
_RULE = "whole documents, by BLAKE2b of the text, copies on one side"

SplitChoice = Literal["auto", "train", "validation"]


@dataclass(frozen=True)
class Sized:
    """A document without its text."""

    digest: bytes
    size: float  # bytes; under --max-tokens, tokens with the end of text, as far as the limit allows
    characters: int
    cut: bool = False  # whether --max-tokens cuts it


@dataclass(frozen=True)
class Stage:
    """A role of a source whose documents all go into one split."""

    source: Source
    role: str
    split: str
    held_out: bool = False  # whether documents equal to one of these are left out of the other stages
    limited: bool = False  # whether --max-docs and --max-tokens apply


@dataclass
class _Reached:
    """How far Plan.documents() is."""

    place: Place  # the last one to continue at
    documents: int
    taken: int  # documents that count towards --max-docs


@dataclass
class Plan:
    """The assignment of documents to splits, as a deterministic stream that is the same in every run.

    measure : vocabulary that counts the tokens of --max-tokens for choosing validation documents. Without a limit, the
        splits are the same for every vocabulary.
    """

    source: Source
    validation: Source | None
    split: SplitChoice
    max_docs: int | None
    max_tokens: int | None
    measure: Vocabulary
    rule: str = ""  # how the validation documents are chosen; set when the first document is read
    tally: Tally = field(default_factory=Tally)
    start: Place = field(default_factory=Place)  # documents() begins here
    note: Callable[[str], None] = lambda sentence: None  # receives sentences about files and broken connections

    def documents(self) -> Iterator[Document]:
        """The documents, held-out ones first, so that equal documents can be left out of training."""
        if self.splits_off:
            yield from self._split_off()
            return
        held_out: set[bytes] = set()  # 8 bytes per document; nothing else here grows with the corpus
        reached = _Reached(self.start, self.start.documents, self.start.taken)
        for index, stage in enumerate(self.stages()):
            if index >= self.start.stage:
                yield from self._stage(index, stage, held_out, reached)
            elif stage.held_out:  # finished; its documents are read again only to be left out of training
                held_out.update(_digest(text) for text, _ in self._texts(stage.source, stage.role, None))

    def _stage(self, index: int, stage: Stage, held_out: set[bytes], reached: _Reached) -> Iterator[Document]:
        """The documents of a stage; adds to held_out, or leaves out what is in it."""

        def started(part: int) -> None:
            if not stage.held_out:
                tally = self.tally
                reached.place = Place(part, reached.documents, tally.empty, index, reached.taken, tally.held_out)

        first_part = 0
        if index == self.start.stage:
            first_part = self.start.part
            self.tally = Tally(self.start.empty, self.start.held_out)
        limit = self.max_docs - reached.taken if stage.limited and self.max_docs is not None else None
        for text, tally in self._texts(stage.source, stage.role, limit, first_part, started):
            reached.taken += stage.limited
            if stage.held_out:
                held_out.add(_digest(text))
            elif held_out and _digest(text) in held_out:
                tally.held_out += 1
                continue
            yield Document(stage.split, text, stage.limited, Tally(tally.empty, tally.held_out), reached.place)
            reached.documents += 1

    @property
    def splits_off(self) -> bool:
        """Whether validation documents are chosen from the source, which names none."""
        return self.split == "auto" and self.validation is None and ALL in self.source.roles

    def stages(self) -> list[Stage]:
        """What is read, in order, if no validation documents are split off. Sets the rule."""
        source, held_out = self.source, []
        if self.split != "auto":
            self.rule = f"all documents are {self.split}"
            roles = (self.split,) if self.split in source.roles else source.roles
            return [Stage(source, role, self.split, limited=True) for role in roles]
        if self.validation is not None:
            self.rule = f"validation documents from {self.validation.name}"
            roles = ("validation",) if "validation" in self.validation.roles else self.validation.roles
            held_out = [Stage(self.validation, role, "validation", held_out=True) for role in roles]
        else:
            self.rule = "splits by the names of the source's files"
            if "validation" in source.roles:
                held_out = [Stage(source, "validation", "validation", held_out=True)]
        if "test" in source.roles:
            held_out.append(Stage(source, "test", "test", held_out=True))
        train = [role for role in (ALL, "train") if role in source.roles]
        return [*held_out, *(Stage(source, role, "train", limited=True) for role in train)]

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

    def _first_documents(self) -> tuple[list[Sized], bool]:
        """The sizes of up to SMALL + 1 documents, and whether these are all within the limits.

        Of the last document only the tokens within --max-tokens count; without any it is left out.
        """
        limit = min(self.max_docs or SMALL + 1, SMALL + 1)
        texts = (text for text, _ in self._texts(self.source, ALL, limit))
        found = [Sized(_digest(text), len(text.encode("utf-8", "replace")), len(text)) for text in texts]
        small = len(found) <= SMALL
        if self.max_tokens is None:
            return found, small
        left = self.max_tokens
        tally, self.tally = self.tally, Tally()
        with contextlib.closing(self._sizes(len(found))) as sizes:
            for index, (size, seen) in enumerate(sizes):
                if left <= 1 and index:
                    tally, small = seen, True
                    del found[index:]
                    break
                found[index] = replace(found[index], size=min(size, left), cut=size > left)
                left -= size
        self.tally = tally
        return found, small

    def _sizes(self, count: int) -> Generator[tuple[int, Tally], None, None]:
        """Tokens of the first documents, counted by several threads, and the tally before each."""
        texts = self._texts(self.source, ALL, count)
        stream = encoded(
            self.measure, (Document("", text, True, Tally(tally.empty)) for text, tally in texts), available_cores()
        )
        size = 1  # the end of text
        with contextlib.closing(stream):
            for piece, ids, _ in stream:
                size += len(ids)
                if piece.last:
                    yield size, piece.document.tally
                    size = 1

    def _split_off(self) -> Iterator[Document]:
        """Choose documents with 5 % of the text for validation, by a hash of the text; see docs/data.md."""
        first, small = self._first_documents()
        seen, self.tally = self.tally, Tally()
        if len(first) == 2 and first[1].cut and first[1].size < LEAST_SHARE * (first[0].size + first[1].size):
            del first[1]  # too little for either split
        if len(first) == 1:
            yield from self._cut_one(first[0])
            self.tally = seen
            return
        is_validation = self._chooser(first, small)
        place = self.start
        number = place.documents
        self.tally = Tally(place.empty)

        def started(part: int) -> None:
            nonlocal place
            place = Place(part, number, self.tally.empty)

        limit = None if self.max_docs is None else self.max_docs - number
        for text, tally in self._texts(self.source, ALL, limit, place.part, started):
            name = "validation" if is_validation(text) else "train"
            yield Document(name, text, True, Tally(tally.empty), place)
            number += 1

    def _chooser(self, first: list[Sized], small: bool) -> Callable[[str], bool]:
        """Whether a document is for validation, by its text. Sets the rule."""
        if first and small:
            chosen, share = choose_validation(first)
            self.rule = f"{share:.1%} of the text for validation: {_RULE}"
            return lambda text: _digest(text) in chosen
        self.rule = f"about {VALIDATION_SHARE:.0%} of the text for validation: {_RULE}"
        bound = int(VALIDATION_SHARE * 2**64).to_bytes(8, "big")
        longest = LONG * sum(document.characters for document in first) / max(1, len(first))
        return lambda text: _digest(text) < bound and len(text) <= longest

    # --- a sample of the training documents

    def training_texts(self, most: int) -> Iterator[str]:
        """Texts of training documents, to train a vocabulary on: all of a local source.

        most : bytes that are read of a source elsewhere, spread over its parts, or from the beginning under a limit
        Under --max-tokens these are the first documents with as many bytes, since a token has at least one.
        """
        remote = not self.source.paths
        if remote and self.max_docs is None and self.max_tokens is None:
            roles = [ALL]
            if not self.splits_off:
                roles = [stage.role for stage in self.stages() if stage.split == "train" and not stage.held_out]
            places = [(role, part) for role in roles for part in range(self.source.parts(role))]
            if len(places) > 1:
                count = min(PARTS, len(places))
                chosen = [places[i * len(places) // count] for i in range(count)]
                yield from self._beginnings(chosen, most / count)
                return
        left = math.inf if self.max_tokens is None else self.max_tokens
        read = 0
        for document in self.documents():
            content = document.text.encode("utf-8", "replace")
            if document.limited:
                content = content[: int(min(left, len(content)))]
                left -= len(content) + 1
            if document.split == "train":
                yield content.decode("utf-8", "ignore")
            read += len(content)
            if left <= 0 or (remote and read >= most):
                return

    def _beginnings(self, places: list[tuple[str, int]], most: float) -> Iterator[str]:
        """Texts of training documents from the beginnings of parts (role, number), about `most` bytes of each."""
        if self.splits_off:
            is_held_out = self._chooser(*self._first_documents())
        else:
            stages = [stage for stage in self.stages() if stage.held_out]
            digests = {_digest(text) for stage in stages for text, _ in self._texts(stage.source, stage.role, None)}

            def is_held_out(text: str) -> bool:
                return _digest(text) in digests

        for role, part in places:
            read = 0
            for text in self._part(role, part):
                if not is_held_out(text):
                    yield text
                read += len(text.encode("utf-8", "replace"))
                if read >= most:
                    break

    def _part(self, role: str, part: int) -> Iterator[str]:
        """The documents with text of one part of the source."""
        reached = part

        def started(number: int) -> None:
            nonlocal reached
            reached = number

        for text, _ in self._texts(self.source, role, None, part, started):
            if reached > part:
                return
            yield text

    def _cut_one(self, document: Sized) -> Iterator[Document]:
        """The only document of the source, cut into two."""
        self.rule = f"the last {VALIDATION_SHARE:.0%} of the one document"
        for text, tally in self._texts(self.source, ALL, 1):
            if document.cut:
                text = self.measure.decode(self.measure.encode(text)[: self.max_tokens]).rstrip("\ufffd")
            cut = _cut(text)
            if cut is None:
                raise UserError(
                    "The first document within --max-tokens is too short to cut off a validation part: raise "
                    "--max-tokens, or name validation documents with --validation."
                    if document.cut
                    else "The source is one document, too short to cut off a validation part: use more text, "
                    "or name validation documents with --validation."
                )
            yield Document("validation", text[cut:], True, Tally(tally.empty))
            yield Document("train", text[:cut], True, Tally(tally.empty))


def choose_validation(documents: Sequence[Sized]) -> tuple[set[bytes], float]:
    """Hashes of the validation documents among all documents of a small source, and their share of the text.

    In the order of the hashes, 5 % of the documents are taken. If these do not hold about 5 % of the text, documents
    are taken one by one until they do, and those that are too long for it are passed over. If all are, the shortest one
    is taken. A document that --max-tokens cuts is taken only if there is no choice.
    """
    sizes: dict[bytes, float] = {}
    for document in documents:
        sizes[document.digest] = sizes.get(document.digest, 0) + document.size
    total = sum(sizes.values())
    order = sorted({document.digest for document in documents if not document.cut})
    if len(order) < 2:
        order = sorted(sizes)
    chosen = order[: max(1, round(VALIDATION_SHARE * len(sizes)))]
    taken = sum(sizes[digest] for digest in chosen)
    if not LEAST_SHARE * total <= taken <= MOST_SHARE * total:
        chosen, taken = [], 0
        for digest in order:
            if taken < VALIDATION_SHARE * total and taken + sizes[digest] <= MOST_SHARE * total:
                chosen.append(digest)
                taken += sizes[digest]
    if not chosen:
        chosen = [min(order, key=lambda digest: (sizes[digest], digest))]
        taken = sizes[chosen[0]]
    return set(chosen), taken / total


def _digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()


def _cut(text: str) -> int | None:
    """Where to cut off the last 5 % of a text: at a line break, else before a word, else anywhere.

    None if one of the parts would hold no text.
    """
    target = round(len(text) * (1 - VALIDATION_SHARE))
    nearest = int(len(text) * (1 - 2 * VALIDATION_SHARE))
    cut = text.rfind("\n", nearest, target) + 1 or text.rfind(" ", nearest, target)
    if cut <= 0:
        cut = target
    if text[:cut].isspace() or text[cut:].isspace() or not 0 < cut < len(text):
        return None
    return cut
