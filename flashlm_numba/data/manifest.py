"""manifest.json: the content of a prepared corpus, its origin, and its files.

data/prepare.py writes it last. While it is missing, the corpus is not finished.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from flashlm_numba.system.errors import UserError
from flashlm_numba.system.files import parse_json

FORMAT = 2
MANIFEST = "manifest.json"
JOURNAL = "progress.json"  # exists while the corpus is unfinished; see data/writer.py
SPLITS = ("train", "validation", "test")
_AGAIN = "delete the folder and prepare the corpus again."
SHARD_NAME = re.compile(rf"({'|'.join(SPLITS)})-\d{{5,}}\.bin")


@dataclass(frozen=True)
class Shard:
    """One file of token ids."""

    name: str
    tokens: int  # ids in the file, including the closing ends of text
    sha256: str


@dataclass(frozen=True)
class SplitManifest:
    """One split: its content and its files."""

    documents: int
    tokens: int  # ids, including the closing ends of text: text_tokens + documents
    text_tokens: int  # tokens of the documents only
    text_bytes: int  # UTF-8 bytes of the documents
    shards: tuple[Shard, ...]


@dataclass(frozen=True)
class Manifest:
    """The content of manifest.json: source of the tokens, settings, counts, and files."""

    tokenizer: str  # Vocabulary.name
    tokenizer_hash: str  # Vocabulary.hash, the SHA-256 of tokenizer.json
    vocab_size: int  # Vocabulary.size
    licence: str | None  # licence of the source, if known
    source: dict[str, Any]  # Source.fingerprint()
    validation_source: dict[str, Any] | None  # Source.fingerprint() of --validation
    settings: dict[str, Any]
    split_rule: str  # a sentence on how the validation documents were chosen
    skipped_empty: int  # documents without text
    skipped_held_out: int  # training documents left out because they equal a validation or test document
    splits: dict[str, SplitManifest]
    format: int = FORMAT

    @property
    def hash(self) -> str:
        """SHA-256 (hex) over the names of the splits and the SHA-256 of their shards. It identifies the tokens."""
        digest = hashlib.sha256()
        for name, split in self.splits.items():
            for shard in split.shards:
                digest.update(f"{name} {shard.tokens} {shard.sha256}\n".encode())
        return digest.hexdigest()

    def to_json(self) -> str:
        """The text of manifest.json, in ASCII, which holds names of any bytes."""
        return json.dumps(asdict(self), indent=1) + "\n"

    @staticmethod
    def read(path: Path) -> Manifest:
        """Read and check a manifest.json. Raises UserError if it is missing or invalid."""
        try:
            raw = parse_json(path.read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise UserError(
                f"{path.parent} holds no prepared corpus: make one with `flashlm-numba prepare`."
            ) from error
        except OSError as error:
            raise UserError(f"Cannot read {path} ({error.strerror or error}): make it readable, or {_AGAIN}") from error
        except ValueError as error:
            raise UserError(f"{path} is damaged ({error}): {_AGAIN}") from error
        try:
            if raw["format"] != FORMAT:
                raise UserError(f"{path} has format {raw['format']}, but this version reads {FORMAT}: {_AGAIN}")
            splits = {}
            for name, split in raw.pop("splits").items():
                shards = tuple(Shard(**shard) for shard in split.pop("shards"))
                splits[name] = SplitManifest(shards=shards, **split)
            manifest = Manifest(splits=splits, **raw)
            manifest._check()
        except UserError:
            raise
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise UserError(f"{path} is damaged ({error}): {_AGAIN}") from error
        return manifest

    def _check(self) -> None:
        if not re.fullmatch("[0-9a-f]{64}", self.tokenizer_hash) or type(self.vocab_size) is not int:
            raise ValueError("its vocabulary has no hash or no size")
        if not {"train", "validation"} <= set(self.splits) <= set(SPLITS):
            raise ValueError(f"splits are {', '.join(self.splits)}")
        for name, split in self.splits.items():
            for shard in split.shards:
                if not SHARD_NAME.fullmatch(shard.name) or not shard.name.startswith(name + "-"):
                    raise ValueError(f"{shard.name!r} is not the name of a shard of {name}")
                if type(shard.tokens) is not int or shard.tokens < 1 or not re.fullmatch("[0-9a-f]{64}", shard.sha256):
                    raise ValueError(f"the entry of {shard.name} is wrong")
            if sum(shard.tokens for shard in split.shards) != split.tokens:
                raise ValueError(f"the shards of {name} do not add up to {split.tokens} tokens")
            if min(split.documents, split.text_tokens, split.text_bytes) < 0 or (
                split.text_tokens + split.documents != split.tokens
            ):
                raise ValueError(f"the counts of {name} contradict each other")
