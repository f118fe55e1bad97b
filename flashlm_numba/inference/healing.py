"""Token healing: continue a prompt that ends in whitespace as the training text would.

The tokens of GPT-2 and of trained vocabularies hold the space before a word, so in a text "Hello world" no token is a
single space. A prompt "Hello " would end in one, which the model has hardly seen before a word. Here the last
whitespace character leaves the prompt, and the first generated tokens must begin with its bytes. The prompt and the
generated text still join without a gap.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import numpy as np

from flashlm_numba.heads.sampling import sample_rows

if TYPE_CHECKING:
    from flashlm_numba.data.tokenizer import Vocabulary
    from flashlm_numba.heads.base import Head


def split_prompt(prompt: str) -> tuple[str, bytes]:
    """The prompt without its last character and the bytes of that character if it is whitespace; else b"".

    >>> split_prompt("one two "), split_prompt("one two")
    (('one two', b' '), ('one two', b''))
    """
    if not prompt[-1:].isspace():
        return prompt, b""
    return prompt[:-1], prompt[-1].encode("utf-8", "surrogatepass")


@functools.lru_cache(maxsize=32)  # whitespace has few characters, and a look at every token takes milliseconds
def agreeing_tokens(vocabulary: Vocabulary, want: bytes) -> np.ndarray:
    """Whether each token (V,) bool, read-only, begins with these bytes, or is itself a beginning of them.

    The end of text and tokens without bytes do not.
    """
    agrees = [bool(token) and (token.startswith(want) or want.startswith(token)) for token in vocabulary.token_bytes]
    agrees[vocabulary.eot] = False
    found = np.array(agrees)
    found.flags.writeable = False
    return found


class Healing:
    """The bytes that the next tokens must begin with, until they have been generated.

    pending : these bytes
    """

    def __init__(self, vocabulary: Vocabulary, pending: bytes) -> None:
        self._vocabulary = vocabulary
        self.pending = pending

    def allowed(self) -> np.ndarray:
        """The tokens (V,) bool that may follow; see agreeing_tokens."""
        return agreeing_tokens(self._vocabulary, self.pending)

    def take(self, data: bytes) -> bytes:
        """The part of a token's bytes that comes after the pending ones, which become fewer by the token."""
        new = data[len(self.pending) :]
        self.pending = self.pending[len(data) :]
        return new


def sample_allowed(
    head: Head,
    h: np.ndarray,
    allowed: np.ndarray,
    rng: np.random.Generator,
    *,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
) -> int:
    """Sample one of the allowed tokens (V,) bool after the hidden state h (1, C), from the head's whole distribution.

    The distribution is limited to these tokens first; then follow temperature, top-k and top-p.
    Raises ValueError if no token is allowed or the probabilities are not finite.
    """
    if not allowed.any():
        raise ValueError("sample_allowed: at least one token must be allowed")
    p = head.distribution(h).astype(np.float64)
    if not np.isfinite(p).all():
        raise ValueError("probabilities must be finite")
    p[:, ~allowed] = 0
    if not p.any():  # all of them are below the smallest float
        p[:, allowed] = 1
    return int(sample_rows(p, rng, temperature, top_k, top_p)[0])
