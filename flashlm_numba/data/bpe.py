"""Training a byte-level BPE vocabulary on a sample of documents, with the library `tokenizers`.

The ids are the 256 bytes by value, the end of text (256), and the merges in their order, so a smaller vocabulary of the
same sample is the beginning of a larger one. Source: Sennrich, Haddow and Birch 2016, arXiv:1508.07909, section 3.2, on
bytes as in GPT-2.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator

from flashlm_numba.data import byte_level
from flashlm_numba.data.byte_level import ASCII_PRE_TOKENIZER, BYTE_NAMES, json_text, library_tokenizer
from flashlm_numba.data.tokenizer import END_OF_TEXT, split_text
from flashlm_numba.system.errors import UserError

SAMPLE_BYTES = 32 << 20  # of text; four times as much makes no better vocabulary of 8,192 (docs/vocabulary.md)
SAMPLE_PIECE = 4_000  # characters per piece, the unit that is taken or left out
LEAST_COUNT = 2  # occurrences of a pair that becomes a token
LONGEST = 32  # bytes of a token
# Chinese or Thai has no spaces, so a page is one word, and every merge in it goes through all of it; training cuts it
LONGEST_WORD = 16  # characters
_LONG_WORD = re.compile(rf"[^\x00-\x7f]{{{LONGEST_WORD}}}")
_GOLDEN = 0x9E3779B97F4A7C15  # 2**64 divided by the golden ratio


class Sample:
    """Evenly spread pieces of the texts that it is given, at most `most` bytes of them.

    It keeps the share 2**-k of all pieces; k grows by one whenever the sample is full. Piece i is kept if the fraction
    i / golden ratio is in the lowest 2**-k, so the kept ones have two or three distances, whose ratio is no simple one:
    text that alternates, such as a text and its translation, is sampled evenly too.
    """

    def __init__(self, most: int = SAMPLE_BYTES) -> None:
        self._most = most
        self._pieces: list[tuple[int, bytes]] = []  # place, from 0 to 2**64 - 1, and UTF-8
        self._below = 1 << 64  # places of kept pieces
        self._seen = 0  # pieces
        self.size = 0  # bytes

    def add(self, text: str) -> None:
        """Take pieces of a text."""
        for piece in split_text(text, SAMPLE_PIECE):
            place = self._seen * _GOLDEN % (1 << 64)
            self._seen += 1
            if place < self._below:
                content = piece.encode("utf-8", "replace")
                self._pieces.append((place, content))
                self.size += len(content)
        while self.size > self._most and len(self._pieces) > 1:
            self._below //= 2
            self._pieces = [(place, content) for place, content in self._pieces if place < self._below]
            self.size = sum(len(content) for _, content in self._pieces)

    def texts(self) -> Iterator[str]:
        """The kept pieces in order."""
        for _, content in self._pieces:
            yield content.decode()


def train(texts: Iterable[str], size: int, report: Callable[[str], None] = lambda status: None) -> str:
    """Train a vocabulary of `size` tokens. Returns the text of its tokenizer.json, the same for the same texts.

    report : called often with a sentence on what is going on
    Raises UserError if the texts are too short for so many tokens.
    """
    from tokenizers import trainers

    tokenizer = library_tokenizer(json_text([], [], ASCII_PRE_TOKENIZER))
    trainer = trainers.BpeTrainer(
        vocab_size=size - 1,  # without the end of text
        min_frequency=LEAST_COUNT,
        max_token_length=LONGEST,
        initial_alphabet=BYTE_NAMES,
        show_progress=False,
    )

    def reading() -> Iterator[str]:
        count = 0
        for text in texts:
            count += len(text)
            report(f"counting the words of {count:,} characters")
            yield _LONG_WORD.sub("\\g<0>\n", text)
        report("merging pairs")

    tokenizer.train_from_iterator(reading(), trainer)
    merges = [tuple(pair) for pair in json.loads(tokenizer.to_str())["model"]["merges"]]
    names = list(dict.fromkeys([*BYTE_NAMES, END_OF_TEXT, *(left + right for left, right in merges)]))
    if len(names) < size:
        raise UserError(
            f"The training text is too short for {size:,} tokens, as it gives {len(names):,}: "
            f"use more text, or --vocab {len(names)} or less."
        )
    return byte_level.json_text(names, merges, ASCII_PRE_TOKENIZER)
