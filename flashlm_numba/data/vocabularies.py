"""Finding a vocabulary: by its name, by the value of --vocab, or in a tokenizer.json.

>>> vocabulary_named("bytes").encode("Hi")
[72, 105]
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from flashlm_numba.data import tokenizer_file
from flashlm_numba.data.byte_level import ByteLevelVocabulary, ByteVocabulary, hash_of
from flashlm_numba.data.gpt2 import GPT2Vocabulary
from flashlm_numba.data.imported import ImportedVocabulary, is_imported
from flashlm_numba.data.tokenizer import TOKENIZER, Vocabulary
from flashlm_numba.system import files
from flashlm_numba.system.errors import UserError
from flashlm_numba.system.paths import expanded

# Constructors by name, of the vocabularies that need neither training nor a file; constructing one reads no file.
VOCABULARIES: dict[str, Callable[[], Vocabulary]] = {"gpt2": GPT2Vocabulary, "bytes": ByteVocabulary}
DEFAULT_VOCABULARY = "gpt2"
LEAST, MOST = 257, 65_536  # tokens of a trained vocabulary: the bytes and the end of text; what 2 bytes can count


def vocabulary_named(name: str) -> Vocabulary:
    """The vocabulary with this name in VOCABULARIES. Raises UserError if there is none."""
    if name not in VOCABULARIES:
        raise UserError(f"There is no vocabulary '{name}'; the vocabularies are {', '.join(VOCABULARIES)}.")
    return VOCABULARIES[name]()


@dataclass(frozen=True)
class Request:
    """What --vocab asks for: a vocabulary, or the number of tokens of one to train (then vocabulary is None)."""

    vocabulary: Vocabulary | None
    size: int | None = None
    path: Path | None = None  # of a tokenizer.json

    @property
    def name(self) -> str:
        """What identifies the request in a manifest: the name of the vocabulary, or its size."""
        return str(self.size) if self.vocabulary is None else self.vocabulary.name


def requested(vocab: str | int | Path) -> Request:
    """The vocabulary that `--vocab` asks for: a name in VOCABULARIES, a number of tokens, or a tokenizer.json.

    Raises UserError if there is none, or if the file is not usable; see tokenizer_file.py.
    """
    text = str(vocab)
    if text in VOCABULARIES:
        return Request(vocabulary_named(text))
    if re.fullmatch(r"[+-]?[0-9][0-9_,]*", text):
        size = int(text.replace(",", "").replace("_", ""))
        if not LEAST <= size <= MOST:
            raise UserError(f"A trained vocabulary has {LEAST} to {MOST:,} tokens, got {size:,}.")
        return Request(None, size)
    path = expanded(text)
    if not path.exists():
        raise UserError(
            f"There is no vocabulary and no file '{text}': choose {', '.join(VOCABULARIES)}, a number of tokens from "
            f"{LEAST} to {MOST:,}, or a tokenizer.json."
        )
    return Request(_vocabulary(tokenizer_file.read(path), path), path=path)


def _vocabulary(text: str, where: Path | str) -> Vocabulary:
    """The vocabulary of the text of a tokenizer.json that this program wrote."""
    found = hash_of(text)
    if is_imported(text):
        try:
            return ImportedVocabulary(text)
        except ValueError as error:
            raise UserError(f"The vocabulary in {where} cannot be used: {error}.") from None
    for make in VOCABULARIES.values():
        if (vocabulary := make()).hash == found:
            return vocabulary
    try:
        return ByteLevelVocabulary(text)
    except ValueError as error:
        raise UserError(f"The vocabulary in {where} cannot be used: {error}.") from None


def vocabulary_of(text: str, expected: str, where: Path | str) -> Vocabulary:
    """The vocabulary of the text of a tokenizer.json, whose SHA-256 must be `expected`. where : its place, for messages

    Raises UserError if it is another one.
    """
    if hash_of(text) != expected:
        raise UserError(
            f"The vocabulary in {where} is not the one that its tokens and its model were made with; restore the file."
        )
    return _vocabulary(text, where)


def read_vocabulary(folder: Path, expected: str) -> Vocabulary:
    """The vocabulary in tokenizer.json in a folder of tokens or a run; see vocabulary_of.

    If the file is missing, and `expected` is the hash of a vocabulary in VOCABULARIES, it is that one.
    """
    path = folder / TOKENIZER
    try:
        text = path.read_bytes().decode()
    except FileNotFoundError:
        for make in VOCABULARIES.values():
            if (vocabulary := make()).hash == expected:
                return vocabulary
        raise UserError(f"There is no {path}, so the tokens have no meaning; restore the file.") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}); restore the file.") from None
    return vocabulary_of(text, expected, path)


def check_free(folder: Path, vocabulary: Vocabulary) -> None:
    """Raise UserError if the folder has another vocabulary, which write_vocabulary would overwrite."""
    path = folder / TOKENIZER
    if path.exists() and path.read_bytes() != vocabulary.to_json().encode():
        raise UserError(f"{path} is another vocabulary, which is not overwritten: choose another folder.")


def write_vocabulary(folder: Path, vocabulary: Vocabulary) -> None:
    """Write tokenizer.json into a folder."""
    files.write_atomically(folder / TOKENIZER, lambda file: file.write(vocabulary.to_json().encode()))
