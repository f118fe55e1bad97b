"""The responses, in the form of OpenAI's interface.

The scores of tokens come as JSON (steps.py), and are only joined here. An answer may have megabytes of them, and while
one call writes these, no other thread runs.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from flashlm_numba.serving.encoding import json_text
from flashlm_numba.serving.request import CompletionRequest
from flashlm_numba.serving.served import Served
from flashlm_numba.serving.steps import Delta, TokenScore

DONE = b"data: [DONE]\n\n"


def event(text: str) -> bytes:
    """An event of an event stream. text : its JSON"""
    return f"data: {text}\n\n".encode()


def merged(deltas: Iterable[Delta]) -> Delta:
    """Several deltas of one text, in order, as one."""
    every = list(deltas)
    if len(every) == 1:
        return every[0]
    return Delta(
        text="".join(delta.text for delta in every),
        scores=tuple(score for delta in every for score in delta.scores),
        sampled=sum(delta.sampled for delta in every),
        finish_reason=next((delta.finish_reason for delta in every if delta.finish_reason), None),
    )


def log_probs_json(scores: Sequence[TokenScore]) -> str:
    """The lists of log-probabilities."""
    lists = {
        "tokens": [score.name for score in scores],
        "token_logprobs": [score.log_prob for score in scores],
        "top_logprobs": [score.likeliest for score in scores],
        "text_offset": [str(score.offset) for score in scores],
    }
    return "{" + ",".join(f'"{name}":[{",".join(values)}]' for name, values in lists.items()) + "}"


@dataclass(frozen=True)
class Completion:
    """What the objects of one request have in common. The methods give JSON."""

    id: str
    created: int  # seconds since 1970
    model: str
    request: CompletionRequest

    def _object(self, choices: Iterable[str], usage: dict[str, int] | None, *, has_usage: bool) -> str:
        common = {"id": self.id, "object": "text_completion", "created": self.created, "model": self.model}
        end = f',"usage":{json_text(usage)}' if has_usage else ""
        return f'{json_text(common)[:-1]},"choices":[{",".join(choices)}]{end}}}'

    def _choice(self, index: int, delta: Delta) -> str:
        scores = "null" if self.request.logprobs is None else log_probs_json(delta.scores)
        text, reason = json_text(delta.text), json_text(delta.finish_reason)
        return f'{{"text":{text},"index":{index},"logprobs":{scores},"finish_reason":{reason}}}'

    def usage(self, sampled: int) -> dict[str, int]:
        """Numbers of tokens. sampled : of all texts"""
        prompt = self.request.prompt_tokens
        return {"prompt_tokens": prompt, "completion_tokens": sampled, "total_tokens": prompt + sampled}

    def whole(self, texts: Sequence[Delta]) -> str:
        """The response with all texts."""
        choices = (self._choice(index, text) for index, text in enumerate(texts))
        return self._object(choices, self.usage(sum(text.sampled for text in texts)), has_usage=True)

    def chunk(self, index: int, delta: Delta) -> str:
        """An object of the stream."""
        return self._object([self._choice(index, delta)], None, has_usage=self.request.include_usage)

    def last_chunk(self, sampled: int) -> str:
        """The object that ends a stream with include_usage."""
        return self._object([], self.usage(sampled), has_usage=True)


def model_object(served: Served) -> dict[str, Any]:
    """The description of the model."""
    return {"id": served.name, "object": "model", "created": served.created, "owned_by": "flashlm-numba"}
