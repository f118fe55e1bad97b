"""manifest.json: what a prepared corpus holds, how it was made, and in which files it is.

It is written last, by data/prepare.py: while it is missing, the corpus is not finished.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from flashlm_numba.data.tokenizer import VOCABULARIES, Vocabulary, vocabulary_named
from flashlm_numba.system.errors import UserError

FORMAT = 1
MANIFEST = "manifest.json"
JOURNAL = "progress.json"  # there while the corpus is unfinished; see data/writer.py
SPLITS = ("train", "validation", "test")
SHARD_NAME = re.compile(rf"({'|'.join(SPLITS)})-\d{{5,}}\.bin")


@dataclass(frozen=True)
class Shard:
    """One file of token ids."""

    name: str
    tokens: int  # ids in the file, the closing ends of text included
    sha256: str


@dataclass(frozen=True)
class SplitManifest:
    """One split: what it holds and the files that it is in."""

    documents: int
    tokens: int  # ids, the closing ends of text included: text_tokens + documents
    text_tokens: int  # tokens of the documents alone
    text_bytes: int  # UTF-8 bytes of the documents
    shards: tuple[Shard, ...]


@dataclass(frozen=True)
class Manifest:
    """Content of manifest.json: where the tokens come from, how they were made, how many, in which files."""

    tokenizer: str  # name of the vocabulary in VOCABULARIES
    tokenizer_hash: str  # Vocabulary.hash
    vocab_size: int  # Vocabulary.size
    licence: str | None  # of the source, where known
    source: dict[str, Any]  # Source.fingerprint()
    validation_source: dict[str, Any] | None  # the same of --validation
    settings: dict[str, Any]
    split_rule: str  # how the validation documents were chosen, in words
    skipped_empty: int  # documents without text
    skipped_held_out: int  # training documents left out because a validation or test document is identical
    splits: dict[str, SplitManifest]
    format: int = FORMAT

    @property
    def vocabulary(self) -> Vocabulary:
        """The vocabulary that the tokens are of."""
        return vocabulary_named(self.tokenizer)

    @property
    def hash(self) -> str:
        """SHA-256 (hex) over the splits' names and their shards' SHA-256: the identity of the tokens."""
        digest = hashlib.sha256()
        for name, split in self.splits.items():
            for shard in split.shards:
                digest.update(f"{name} {shard.tokens} {shard.sha256}\n".encode())
        return digest.hexdigest()

    def to_json(self) -> str:
        """The text of manifest.json."""
        return json.dumps(asdict(self), indent=1, ensure_ascii=False) + "\n"

    @staticmethod
    def read(path: Path) -> Manifest:
        """Read and check a manifest.json; UserError if it is missing or not sane."""
        try:
            raw = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise UserError(
                f"{path.parent} holds no prepared corpus: make one with `flashlm-numba prepare`."
            ) from error
        except (OSError, ValueError) as error:
            raise UserError(f"Cannot read {path} ({error}): prepare the corpus again.") from error
        try:
            if raw["format"] != FORMAT:
                raise UserError(
                    f"{path} has format {raw['format']}, and this version reads {FORMAT}: prepare the corpus again."
                )
            splits = {}
            for name, split in raw.pop("splits").items():
                shards = tuple(Shard(**shard) for shard in split.pop("shards"))
                splits[name] = SplitManifest(shards=shards, **split)
            manifest = Manifest(splits=splits, **raw)
            manifest._check()
        except UserError:
            raise
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise UserError(f"{path} is damaged ({error}): prepare the corpus again.") from error
        return manifest

    def _check(self) -> None:
        if self.tokenizer not in VOCABULARIES:
            raise ValueError(f"there is no vocabulary {self.tokenizer!r}")
        if self.vocab_size != self.vocabulary.size:
            raise ValueError(f"vocab_size is {self.vocab_size}, and {self.tokenizer} has {self.vocabulary.size} tokens")
        if not {"train", "validation"} <= set(self.splits) <= set(SPLITS):
            raise ValueError(f"splits are {', '.join(self.splits)}")
        for name, split in self.splits.items():
            for shard in split.shards:
                if not SHARD_NAME.fullmatch(shard.name) or not shard.name.startswith(name + "-"):
                    raise ValueError(f"{shard.name!r} is no name of a shard of {name}")
                if type(shard.tokens) is not int or shard.tokens < 1 or not re.fullmatch("[0-9a-f]{64}", shard.sha256):
                    raise ValueError(f"the entry of {shard.name} is wrong")
            if sum(shard.tokens for shard in split.shards) != split.tokens:
                raise ValueError(f"the shards of {name} do not add up to {split.tokens} tokens")
            if min(split.documents, split.text_tokens, split.text_bytes) < 0 or (
                split.text_tokens + split.documents != split.tokens
            ):
                raise ValueError(f"the counts of {name} contradict each other")
