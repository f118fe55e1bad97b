"""Generate text with a trained model, token by token."""

from __future__ import annotations

import codecs
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from flashlm_numba.heads.sampling import check_settings
from flashlm_numba.inference.healing import Healing, sample_allowed, split_prompt
from flashlm_numba.system.errors import UserError

if TYPE_CHECKING:
    from flashlm_numba.data.tokenizer import Vocabulary


REMEMBERED = 16  # last tokens of a text that a memory may look at


class Generator(Protocol):
    """What generation needs of a model: Model has it, and PackedModel."""

    @property
    def head(self) -> Any:
        """Its head, or what samples in its place."""

    @property
    def remembered(self) -> int:
        """See Model."""

    def head_after(self, ids: np.ndarray) -> Any:
        """See Model."""

    def sync_weights(self) -> None:
        """See Model."""

    def prefill(self, ids: np.ndarray) -> tuple[Any, np.ndarray]:
        """See Model."""

    def decode_step(self, state: Any, token: int) -> np.ndarray:
        """See Model."""


def generate_ids(
    model: Generator,
    context: list[int],
    *,
    rng: np.random.Generator,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    allowed: Callable[[], np.ndarray | None] = lambda: None,
) -> Iterator[int]:
    """Sample an endless sequence of token ids, each from the ids before it.

    context : the ids to start from, at least one; the end of text starts a new document
    temperature, top_k, top_p : applied to the distribution in this order; temperature 0 takes the likeliest token
    allowed : called before each token; the only tokens to sample from (V,) bool, or None for all
    One pass reads the context. After that, the cost per token does not depend on the length of the text.
    Raises ValueError if the context is empty or a setting is out of range, and UserError if no token can be sampled.
    """
    if not context:
        raise ValueError("generate_ids: context must hold at least one id")
    check_settings(temperature, top_k, top_p, model.head.vocab_size)
    model.sync_weights()
    state, h = model.prefill(np.array(context, np.int32))
    most = max(REMEMBERED, model.remembered)
    recent = np.array(context[-most:], np.int32)
    while True:
        only = allowed()
        head = model.head_after(recent)
        try:
            if only is None:
                token = int(head.sample(h, rng, temperature=temperature, top_k=top_k, top_p=top_p)[0])
            else:
                token = sample_allowed(head, h, only, rng, temperature=temperature, top_k=top_k, top_p=top_p)
        except ValueError as error:
            raise UserError(f"{error}: the model's weights are too large; use an earlier checkpoint.") from None
        yield token
        h = model.decode_step(state, token)
        recent = np.append(recent, np.int32(token))[-most:]


class Utf8Stream:
    """Decodes UTF-8 bytes that arrive in pieces. It holds back an incomplete character until the rest arrives.

    >>> stream = Utf8Stream()
    >>> stream.feed("é".encode()[:1]), stream.feed("é".encode()[1:]), stream.end()
    ('', 'é', '')
    """

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def feed(self, data: bytes) -> str:
        """The text that these bytes complete. Bytes that cannot be UTF-8 become U+FFFD."""
        return self._decoder.decode(data)

    def end(self) -> str:
        """U+FFFD if an incomplete character remains, else an empty text."""
        return self._decoder.decode(b"", final=True)


def generate_text(
    model: Generator,
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
    """Continue a prompt. Yields pieces of text without the prompt, as soon as their characters are complete.

    prompt : any text; an empty one starts a new document. The text continues exactly its characters, also a space at
        its end, which is a part of the next token (see healing.py)
    on_token : called after each sampled token
    The text ends after max_tokens tokens or at the end of text. The other arguments are those of generate_ids.
    """
    text, pending = split_prompt(prompt)
    healing = Healing(vocabulary, pending)
    if pending and not healing.allowed().any():  # a vocabulary that has no such tokens
        text, healing.pending = prompt, b""
    context = [vocabulary.start, *vocabulary.encode(text)]
    stream = Utf8Stream()
    tokens = generate_ids(
        model,
        context,
        rng=np.random.default_rng(seed),
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        allowed=lambda: healing.allowed() if healing.pending else None,
    )
    for _, token in zip(range(max_tokens), tokens, strict=False):
        on_token()
        if token == vocabulary.eot:
            break
        piece = stream.feed(healing.take(vocabulary.decode_bytes([token])))
        if piece:
            yield piece
    last = stream.end()
    if last:
        yield last
