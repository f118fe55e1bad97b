"""Text from a trained model, a token at a time."""

from __future__ import annotations

import codecs
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import numpy as np

from flashlm_numba.heads.sampling import check_settings
from flashlm_numba.system.errors import UserError

if TYPE_CHECKING:
    from flashlm_numba.data.tokenizer import Vocabulary
    from flashlm_numba.model.model import Model


def generate_ids(
    model: Model,
    context: list[int],
    *,
    rng: np.random.Generator,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
) -> Iterator[int]:
    """Sample token ids without end, each from the ids before it.

    context : the ids to start from, at least one (the end of text starts a document);
    temperature, top_k, top_p : applied to the distribution in this order; temperature 0 takes the top token.
    The context is read in one pass, each token then costs the same whatever is before it.
    Raises ValueError if the context is empty or a setting out of range, UserError if nothing can be drawn.
    """
    if not context:
        raise ValueError("generate_ids: context must hold at least one id")
    check_settings(temperature, top_k, top_p, model.head.vocab_size)
    model.sync_weights()
    state, h = model.prefill(np.array(context, np.int32))
    while True:
        try:
            token = int(model.head.sample(h, rng, temperature=temperature, top_k=top_k, top_p=top_p)[0])
        except ValueError as error:
            raise UserError(f"{error}: the model's weights are too large; use an earlier checkpoint.") from None
        yield token
        h = model.decode_step(state, token)


class Utf8Stream:
    """Turns bytes that arrive in pieces into text, holding an incomplete character back until it is whole.

    >>> stream = Utf8Stream()
    >>> stream.feed("é".encode()[:1]), stream.feed("é".encode()[1:]), stream.end()
    ('', 'é', '')
    """

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def feed(self, data: bytes) -> str:
        """The text that is complete after these bytes; bytes that can never be UTF-8 become U+FFFD."""
        return self._decoder.decode(data)

    def end(self) -> str:
        """What an unfinished character leaves: U+FFFD or nothing."""
        return self._decoder.decode(b"", final=True)


def generate_text(
    model: Model,
    vocabulary: Vocabulary,
    prompt: str,
    *,
    max_tokens: int,
    seed: int = 0,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    on_token: Callable[[], object] = lambda: None,
) -> Iterator[str]:
    """Continue a prompt; yields pieces of text, without the prompt, as soon as they are whole characters.

    prompt : any text; empty starts a new document. Ends after max_tokens tokens or at the end of text.
    on_token : called when a token has been drawn.
    """
    context = [vocabulary.eot, *vocabulary.encode(prompt)]
    rng = np.random.default_rng(seed)
    stream = Utf8Stream()
    tokens = generate_ids(model, context, rng=rng, temperature=temperature, top_k=top_k, top_p=top_p)
    for _, token in zip(range(max_tokens), tokens, strict=False):
        on_token()
        if token == vocabulary.eot:
            break
        piece = stream.feed(vocabulary.decode_bytes([token]))
        if piece:
            yield piece
    last = stream.end()
    if last:
        yield last
