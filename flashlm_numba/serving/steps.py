"""One text of a request, step by step: its prompt scored and repeated, its tokens sampled, its end found.

A step is one token, or the score of a part of a prompt, so that whoever runs the steps can stop between any two.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from flashlm_numba.inference.evaluate import WINDOW, read_document
from flashlm_numba.inference.generate import REMEMBERED, Continuation, Utf8Stream, context_of
from flashlm_numba.serving.encoding import json_text
from flashlm_numba.serving.request import CompletionRequest, Prompt
from flashlm_numba.serving.served import Served, written

ROWS = 16  # of logits (rows, V) in a step


@dataclass(frozen=True, slots=True)
class TokenScore:
    """A token in the lists of log-probabilities: its place, and JSON, since a long prompt has many of them."""

    offset: int  # of its first character in the prompt and the text after it
    name: str
    log_prob: str  # null for a token that begins a text, which no token predicts
    likeliest: str  # log-probabilities by name, the token's own included


@dataclass(frozen=True)
class Delta:
    """What a step adds to a text."""

    text: str = ""
    scores: tuple[TokenScore, ...] = ()
    sampled: int = 0  # tokens
    finish_reason: str | None = None  # "stop" or "length" in the last one


class StopTexts:
    """Passes a text on until one of the stop texts occurs in it, and holds back what may be the beginning of one.

    The stop text that is complete first counts, of several the longest. The division of the text makes no difference.

    >>> stops = StopTexts(("END",))
    >>> stops.feed("the E"), stops.feed("N"), stops.feed("D of it"), stops.found
    ('the ', '', '', True)
    """

    def __init__(self, stops: tuple[str, ...]) -> None:
        self._stops = stops
        self._longest = max(map(len, stops), default=0)
        self._held = ""
        self.found = False

    def feed(self, text: str) -> str:
        """What may be passed on after this text. After a stop text has been found, do not call it again."""
        self._held += text
        ends = [(at + len(stop), at) for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if ends:
            self.found = True
            passed, self._held = self._held[: min(ends)[1]], ""
            return passed
        held = min(len(self._held), self._longest - 1) if self._stops else 0
        while held and not any(stop.startswith(self._held[-held:]) for stop in self._stops):
            held -= 1
        cut = len(self._held) - held
        passed, self._held = self._held[:cut], self._held[cut:]
        return passed

    def end(self) -> str:
        """What was held back, at the end of the text."""
        passed, self._held = self._held, ""
        return passed


def steps(served: Served, request: CompletionRequest, prompt: Prompt, seed: int | list[int]) -> Iterator[Delta | None]:
    """The steps of one text. A step that adds nothing is None. seed : of its random numbers

    Raises UserError if the model's weights cannot be used.
    """
    found: list[tuple[float, dict[str, float]]] = []  # of the token that is being sampled

    def score(head: Any, h: np.ndarray, token: int) -> None:  # it must not hold the continuation that holds it
        if token != served.vocabulary.eot:
            log_prob = written(head.log_prob_of(h[0], np.array([token], np.int32)))  # serial, as sampling is
            found.append((float(log_prob[0]), served.likeliest(head, h, request.logprobs or 0)[0]))

    continuation = Continuation(
        served.model,
        served.vocabulary,
        prompt.ids if prompt.text is None else prompt.text,
        rng=np.random.default_rng(seed),
        temperature=request.temperature,
        top_k=request.top_k,
        top_p=request.top_p,
        on_sample=None if request.logprobs is None else score,
    )
    stream = Utf8Stream()
    shown = prompt.text
    if shown is None:
        shown = stream.feed(b"".join(served.vocabulary.token_bytes[i] for i in prompt.ids))
    if request.echo:
        ids = continuation.ids if request.max_tokens else prompt.ids  # else the sampled tokens cover the prompt's end
        scores: list[TokenScore] = []
        if request.logprobs is not None:
            for part in _prompt_scores(served, ids, request.logprobs):
                scores += part
                yield None
        yield Delta(shown, tuple(scores))
    if request.max_tokens == 0:
        yield Delta(stream.end(), finish_reason="length")
        return

    stops, waiting = StopTexts(request.stop), deque[TokenScore]()
    block, count = "", 0  # text and tokens that have not been passed on
    position = passed = len(shown)  # characters of the prompt and of the text so far; of what was passed on
    reason, left = "length", request.max_tokens
    while not continuation.begin():
        yield None  # after a part of a long prompt the other texts have their turns
    healing = bool(continuation.pending)
    for sampled in itertools.islice(continuation, request.max_tokens):
        for (
            log_prob,
            likeliest,
        ) in found:  # at most one; it begins with the prompt's last character while that is healed
            waiting.append(_token_score(served, sampled.token, position - healing, log_prob, likeliest))
        found.clear()
        healing = bool(continuation.pending)
        position += len(sampled.text)
        count += 1
        if sampled.token == served.vocabulary.eot:
            reason = "stop"
            break
        text = stops.feed(sampled.text)
        passed, block = passed + len(text), block + text
        if stops.found:
            reason = "stop"
            break
        left -= 1
        if left and not continuation.drawn:  # tokens that were drawn together are a step; the last goes with the end
            # a token goes with the text that holds its first character
            yield Delta(block, tuple(_until(waiting, passed)), sampled=count)
            block, count = "", 0
    text = "" if stops.found else stops.feed(continuation.end())
    del continuation  # its last token was announced, and needs no step
    if stops.found:
        reason = "stop"
    else:
        text += stops.end()
    passed += len(text)
    rest = _until(waiting, passed) if stops.found else waiting
    yield Delta(block + text, tuple(rest), sampled=count, finish_reason=reason)


def _until(waiting: deque[TokenScore], position: int) -> Iterator[TokenScore]:
    """Take the tokens that begin before a position."""
    while waiting and waiting[0].offset < position:
        yield waiting.popleft()


def _token_score(served: Served, token: int, offset: int, log_prob: float, likeliest: dict[str, float]) -> TokenScore:
    name = served.token_name(token)
    return TokenScore(offset, json_text(name), json_text(log_prob), json_text({**likeliest, name: log_prob}))


def _prompt_scores(served: Served, ids: list[int], count: int) -> Iterator[list[TokenScore]]:
    """The scores of a prompt's tokens, part by part. A token that begins a text is not predicted."""
    stream, offsets, position = Utf8Stream(), list[int](), 0
    for i in ids:
        offsets.append(position)
        position += len(stream.feed(served.vocabulary.token_bytes[i]))
    done = 0
    if ids[:1] == [served.vocabulary.start]:
        yield [TokenScore(0, json_text(served.token_name(ids[0])), "null", "null")]
        done = 1
    document = np.array(ids[done:], np.int32)
    context = np.array(context_of(served.vocabulary, ids), np.int32)  # of position t of the document: the first t + 1
    t = 0
    window = served.model.prompt_part or WINDOW
    for h, tokens, log_prob in read_document(served.model, document, eot=served.vocabulary.start, window=window):
        for start in range(0, len(tokens), ROWS):
            part = slice(start, start + ROWS)
            scores = []
            for token, value, others in zip(
                tokens[part].tolist(),
                written(log_prob[part]).tolist(),
                _likeliest_in(served, context, t, h[part], count),
                strict=True,
            ):
                scores.append(_token_score(served, token, offsets[done + t], value, others))
                t += 1
            yield scores


def _likeliest_in(served: Served, context: np.ndarray, t: int, h: np.ndarray, count: int) -> list[dict[str, float]]:
    """The likeliest tokens after the first t + 1 tokens of a context, after t + 2 and so on; h (N, C) predict them."""
    if count == 0 or served.model.head_after(context[:1]) is served.model.head:  # nothing but h matters
        return served.likeliest(served.model.head, h, count)
    found, most = [], max(REMEMBERED, served.model.remembered)
    for n in range(len(h)):
        head = served.model.head_after(context[max(0, t + n + 1 - most) : t + n + 1])
        found += served.likeliest(head, h[n : n + 1], count)
    return found
