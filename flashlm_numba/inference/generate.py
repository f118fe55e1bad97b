"""Generate text with a trained model, token by token."""

from __future__ import annotations

import codecs
import itertools
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from flashlm_numba.heads.sampling import check_settings
from flashlm_numba.inference.healing import Healing, sample_allowed, split_prompt
from flashlm_numba.system.errors import UserError

if TYPE_CHECKING:
    from flashlm_numba.data.tokenizer import Vocabulary


REMEMBERED = 16  # last tokens of a text that a memory may look at
MOST = 32  # tokens that are sampled at a time
BLOCK_SECONDS = 0.002  # that these take, about, so that a text arrives smoothly
_TOO_LARGE = "the model's weights are too large; use an earlier checkpoint."


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

    @property
    def prompt_part(self) -> int | None:
        """See Model."""

    def sync_weights(self) -> None:
        """See Model."""

    def prefill(self, ids: np.ndarray) -> tuple[Any, np.ndarray]:
        """See Model."""

    def read(self, state: Any, ids: np.ndarray) -> np.ndarray:
        """See Model."""

    def announce(self, state: Any, token: int) -> None:
        """See Model."""

    def decode_step(self, state: Any, token: int) -> np.ndarray:
        """See Model."""

    def writer(
        self, state: Any, *, temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None
    ) -> Any:
        """See Model."""


def generate_ids(model: Generator, context: list[int], **options: Any) -> Iterator[int]:
    """Sample an endless sequence of token ids, each from the ids before it: those of generate_blocks, with its
    arguments.
    """
    return itertools.chain.from_iterable(generate_blocks(model, context, **options))


def generate_blocks(
    model: Generator,
    context: list[int],
    *,
    rng: np.random.Generator,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    allowed: Callable[[], np.ndarray | None] = lambda: None,
    on_sample: Callable[[Any, np.ndarray, int], object] | None = None,
) -> Iterator[list[int]]:
    """Sample an endless sequence of token ids, each from the ids before it, in blocks.

    context : the ids to start from, at least one; the end of text starts a new document
    temperature, top_k, top_p : applied to the distribution in this order; temperature 0 takes the likeliest token
    allowed : called before each token until it returns None; the only tokens to sample from (V,) bool, or None for all
        from now on
    on_sample : called with the head, or what samples in its place, the hidden state (1, C), and the token sampled so
    One pass reads the context. After that, the cost per token does not depend on the length of the text. Where compiled
    code does everything, a block takes about BLOCK_SECONDS; else it is one token. Blocks without a token come first,
    between the parts of a long context, for a model that has to read all of it.
    Raises ValueError if the context is empty or a setting is out of range, and UserError if no token can be sampled.
    """
    if not context:
        raise ValueError("generate_ids: context must hold at least one id")
    check_settings(temperature, top_k, top_p, model.head.vocab_size)
    settings: dict[str, Any] = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
    model.sync_weights()
    ids, part = np.array(context, np.int32), model.prompt_part or len(context)
    state, h = model.prefill(ids[:part])
    for at in range(part, len(ids), part):
        yield []
        h = model.read(state, ids[at : at + part])[-1:]
    writer = None if on_sample else model.writer(state, **settings)
    recent = Recent(context, max(REMEMBERED, model.remembered))
    only = allowed()
    while only is not None or writer is None:
        head = model.head_after(recent.ids)
        try:
            if only is None:
                token = int(head.sample(h, rng, **settings)[0])
            else:
                token = sample_allowed(head, h, only, rng, **settings)
        except ValueError as error:
            raise UserError(f"{error}: {_TOO_LARGE}") from None
        if on_sample:
            on_sample(head, h, token)
        model.announce(state, token)  # whoever runs several texts gets the step of each from one pass
        yield [token]
        h = model.decode_step(state, token)
        recent.add(token)
        only = None if only is None else allowed()
    count = 1
    while True:
        start = time.perf_counter()
        tokens = writer.write(rng.random((count, writer.uniforms)))
        seconds = time.perf_counter() - start
        if len(tokens):
            yield tokens.tolist()
        if len(tokens) < count:
            raise UserError(f"the probabilities of the next token are not finite: {_TOO_LARGE}")
        count = min(2 * count, MOST, max(1, int(BLOCK_SECONDS / seconds * count)))


class Recent:
    """The last ids of a text, at most `most` of them, in a buffer that is moved once in a while.

    >>> recent = Recent([1, 2, 3], 2)
    >>> recent.add(4)
    >>> recent.ids.tolist()
    [3, 4]
    """

    def __init__(self, ids: list[int], most: int) -> None:
        last = ids[-most:]
        self._buffer, self._most, self._end = np.empty(4 * most, np.int32), most, len(last)
        self._buffer[: self._end] = last

    @property
    def ids(self) -> np.ndarray:
        """A view (n,) int32, valid until `add`."""
        return self._buffer[max(0, self._end - self._most) : self._end]

    def add(self, token: int) -> None:
        """Append an id."""
        if self._end == len(self._buffer):
            self._buffer[: self._most] = self.ids
            self._end = self._most
        self._buffer[self._end] = token
        self._end += 1


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


@dataclass(frozen=True)
class Sampled:
    """A token of a continuation."""

    token: int
    text: str  # the characters that it completes; none at the end of text


class Continuation:
    """The tokens that continue a prompt, and their text in whole characters.

    prompt : any text, or token ids; an empty one starts a new document. Generation continues exactly the characters of
        a text, also a space at its end, which is a part of the next token (see healing.py). Ids are taken as they are.
    ids : the prompt's tokens that the model reads, without the token that begins a text
    pending : bytes of the prompt that the next tokens begin with
    The other arguments are those of generate_ids. Iteration does not end; `end` gives the rest of the text.
    """

    def __init__(
        self,
        model: Generator,
        vocabulary: Vocabulary,
        prompt: str | list[int],
        *,
        rng: np.random.Generator,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        on_sample: Callable[[Any, np.ndarray, int], object] | None = None,
    ) -> None:
        self._vocabulary = vocabulary
        self._stream, self._drawn = Utf8Stream(), deque[int]()
        self._healing = healing = Healing(vocabulary, b"")
        if isinstance(prompt, str):
            text, healing.pending = split_prompt(prompt)
            if healing.pending and not healing.allowed().any():  # a vocabulary that has no such tokens
                text, healing.pending = prompt, b""
            self.ids = vocabulary.encode(text)
        else:
            self.ids = prompt
            self._stream.feed(vocabulary.decode_bytes(prompt))  # the last ids may hold the start of a character
        self._blocks = generate_blocks(
            model,
            context_of(vocabulary, self.ids),
            rng=rng,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            # not self, since a circle of references would keep the decoding state until a garbage collection
            allowed=lambda: healing.allowed() if healing.pending else None,
            on_sample=on_sample,
        )

    @property
    def pending(self) -> bytes:
        """See the class."""
        return self._healing.pending

    @property
    def drawn(self) -> int:
        """Tokens that have been drawn already, so that they come at once."""
        return len(self._drawn)

    def __iter__(self) -> Iterator[Sampled]:
        return self

    def begin(self) -> bool:
        """Read a part of the prompt, or draw the first token. Returns whether that has been drawn."""
        if not self._drawn:
            self._drawn.extend(next(self._blocks))
        return bool(self._drawn)

    def __next__(self) -> Sampled:
        while not self.begin():
            pass
        token = self._drawn.popleft()
        if token == self._vocabulary.eot:
            return Sampled(token, "")
        return Sampled(token, self._stream.feed(self._healing.take(self._vocabulary.decode_bytes([token]))))

    def end(self) -> str:
        """U+FFFD if the text ends within a character, else an empty text."""
        return self._stream.end()


def context_of(vocabulary: Vocabulary, ids: list[int]) -> list[int]:
    """What the model reads before it continues these ids: they follow the token that begins a text, if none does."""
    return ids if ids[:1] == [vocabulary.start] else [vocabulary.start, *ids]


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

    on_token : called after each sampled token
    The text ends after max_tokens tokens or at the end of text. The other arguments are those of Continuation.
    """
    continuation = Continuation(
        model,
        vocabulary,
        prompt,
        rng=np.random.default_rng(seed),
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
    )
    for sampled in itertools.islice(continuation, max_tokens):
        on_token()
        if sampled.token == vocabulary.eot:
            break
        if sampled.text:
            yield sampled.text
    last = continuation.end()
    if last:
        yield last
