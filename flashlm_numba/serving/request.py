"""The bodies of requests, parsed and checked. Every check of a parameter is in this file.

A parameter that this server does not support is refused, unless it has the value that changes nothing. null stands for
the default everywhere, as in OpenAI's interface.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any, NoReturn

from flashlm_numba.data.tokenizer import Vocabulary
from flashlm_numba.serving.api_error import ApiError, refused
from flashlm_numba.serving.limits import Limits
from flashlm_numba.system.errors import UserError

MAX_TOKENS = 16  # by default
MOST_LOGPROBS = 20
MOST_STOPS, STOP_LENGTH = 4, 1_000  # number and characters of stop texts
SHOWN = 40  # characters of a value that a message repeats
# parameters of OpenAI's interface that are not supported, with the values that change nothing
UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "suffix": ("",),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logit_bias": ({},),
}
SUPPORTED = (
    *("model", "prompt", "max_tokens", "temperature", "top_p", "top_k", "n", "best_of", "stop", "logprobs", "echo"),
    *("seed", "stream", "stream_options", "user"),
)


@dataclass(frozen=True)
class Prompt:
    """A prompt: its tokens, and its text if it was given as text."""

    ids: list[int]
    text: str | None = None


@dataclass(frozen=True)
class CompletionRequest:
    """What a client asks for."""

    prompts: tuple[Prompt, ...]
    max_tokens: int
    temperature: float
    top_p: float | None
    top_k: int | None
    n: int
    stop: tuple[str, ...]
    logprobs: int | None  # number of the likeliest tokens to list beside each token; None: no log-probabilities
    echo: bool
    seed: int | None
    stream: bool
    include_usage: bool

    @property
    def prompt_tokens(self) -> int:
        """Tokens of all prompts."""
        return sum(len(prompt.ids) for prompt in self.prompts)


def parse(body: bytes, *, model: str, vocabulary: Vocabulary, limits: Limits) -> CompletionRequest:
    """The request in a body. Raises ApiError for anything that is not a valid request.

    model : the name of the model that is served
    """
    values = _object(body)
    unknown = sorted(name for name in values if name not in SUPPORTED and name not in UNSUPPORTED)
    if unknown:
        name = _cut(unknown[0])
        raise refused(name, f"There is no parameter {name!r}; docs/serving.md lists those of this server.")
    for name, neutral in UNSUPPORTED.items():
        value = values.get(name)
        if value is not None and (isinstance(value, bool) or value not in neutral):
            raise refused(name, f"{name} is not supported by this server; leave it out.")
    _check_model(values.get("model"), model)
    _text(values, "user")

    echo, stream = _flag(values, "echo"), _flag(values, "stream")
    n = _whole(values, "n", 1, 1, limits.texts)
    if _whole(values, "best_of", n, 1) != n:
        raise refused("best_of", f"best_of must be n, which is {n}: this server returns every text that it generates.")
    max_tokens = _whole(values, "max_tokens", MAX_TOKENS, 0, limits.max_tokens)
    if max_tokens == 0 and not echo:
        raise refused("max_tokens", "max_tokens must be at least 1, or 0 with echo.")
    temperature = _number(values, "temperature", 1.0, 0.0, 2.0)
    top_p = _number(values, "top_p", 1.0, 0.0, 1.0)
    if top_p == 0:  # of the likeliest tokens, only the first
        temperature, top_p = 0.0, 1.0
    top_k = None if values.get("top_k") is None else _whole(values, "top_k", 1, 1)
    logprobs = None if values.get("logprobs") is None else _whole(values, "logprobs", 0, 0, MOST_LOGPROBS)
    seed = None if values.get("seed") is None else _whole(values, "seed", 0, -(2**63), 2**63 - 1)
    stop = _stop(values.get("stop"))
    include_usage = _include_usage(values.get("stream_options"), stream)
    prompts = _prompts(values.get("prompt"), n, vocabulary, limits)
    total = n * (sum(len(prompt.ids) for prompt in prompts) + len(prompts) * max_tokens)
    if total > limits.request_tokens:
        raise refused(
            "max_tokens",
            f"The texts of this request may have {total:,} tokens, prompts included; at most "
            f"{limits.request_tokens:,} are allowed.",
        )
    return CompletionRequest(
        prompts=prompts,
        max_tokens=max_tokens,
        temperature=temperature,
        top_p=None if top_p == 1 else top_p,
        top_k=None if top_k is None or top_k >= vocabulary.size else top_k,
        n=n,
        stop=stop,
        logprobs=logprobs,
        echo=echo,
        seed=seed,
        stream=stream,
        include_usage=include_usage,
    )


def parse_inspection(
    body: bytes, *, vocab_size: int, token_of_name: Callable[[str], int | None], limits: Limits
) -> list[int]:
    """The ids in a body of /inspect: a text's tokens, the last of which is asked about. Raises ApiError as `parse`.

    token_of_name : the id of a token as lists of log-probabilities name it, or None
    """
    values = _object(body)
    unknown = sorted(name for name in values if name != "tokens")
    if unknown:
        raise refused(_cut(unknown[0]), f"There is no parameter {_cut(unknown[0])!r}; /inspect has tokens.")
    tokens, kinds = values.get("tokens"), "tokens must be a list of token ids, or of names as in logprobs.tokens"
    if not isinstance(tokens, list) or not tokens:
        raise refused("tokens", f"{kinds}, got {'an empty list' if tokens == [] else _shown(tokens)}.")
    most = limits.prompt_tokens + limits.max_tokens
    if len(tokens) > most:
        raise refused(
            "tokens", f"tokens may have at most {most:,} of them, got {len(tokens):,}.", code="context_length_exceeded"
        )
    if all(isinstance(token, str) for token in tokens):
        ids = []
        for name in tokens:
            found = token_of_name(name)
            if found is None:
                raise refused("tokens", f"The model has no token {_shown(name)}.")
            ids.append(found)
        return ids
    if not all(type(token) is int for token in tokens):
        raise refused("tokens", f"{kinds}, not a mixture.")
    return _ids(tokens, vocab_size, "tokens")


# --- JSON ---


def _object(body: bytes) -> dict[str, Any]:
    """The JSON object in a body, without the numbers and the repeated names that JSON does not have."""

    def constant(name: str) -> NoReturn:
        raise ValueError(f"{name} is no number of JSON")

    def pairs(found: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(found)
        if len(result) != len(found):
            raise ValueError("a name occurs twice in an object")
        return result

    try:
        value = json.loads(body.decode("utf-8"), parse_constant=constant, object_pairs_hook=pairs)
    except RecursionError:
        raise refused(None, "The body is nested too deeply.") from None
    except ValueError as error:  # also of UTF-8, and of numbers with thousands of digits
        raise refused(None, f"The body is not JSON in UTF-8: {_cut(str(error), 200)}.") from None
    if not isinstance(value, dict):
        raise refused(None, "The body must be a JSON object.")
    return value


def _cut(text: str, limit: int = SHOWN) -> str:
    return text if len(text) <= limit else text[:limit] + "..."


def _shown(value: Any) -> str:
    """A value in a message."""
    if isinstance(value, str):
        return ascii(_cut(value))
    if isinstance(value, bool) or value is None:
        return json.dumps(value)
    if isinstance(value, int | float):
        return _cut(str(value))
    return "a list" if isinstance(value, list) else "an object"


# --- parameters of one kind ---


def _flag(values: dict[str, Any], name: str, where: str = "") -> bool:
    value = values.get(name)
    if value is None or isinstance(value, bool):
        return bool(value)
    raise refused(where + name, f"{where}{name} must be true or false, got {_shown(value)}.")


def _whole(values: dict[str, Any], name: str, default: int, low: int, high: int | None = None) -> int:
    value = values.get(name)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int):
        raise refused(name, f"{name} must be a whole number, got {_shown(value)}.")
    if value < low or (high is not None and value > high):
        limits = f"at least {low:,}" if high is None else f"between {low:,} and {high:,}"
        raise refused(name, f"{name} must be {limits}, got {_shown(value)}.")
    return value


def _number(values: dict[str, Any], name: str, default: float, low: float, high: float) -> float:
    value = values.get(name)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise refused(name, f"{name} must be a number, got {_shown(value)}.")
    if not low <= value <= high:  # infinity and whole numbers of any size are outside too
        raise refused(name, f"{name} must be between {low:g} and {high:g}, got {_shown(value)}.")
    return float(value)


def _check_unicode(name: str, text: str) -> str:
    """The text. Half a surrogate pair, which JSON can write, is no character."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise refused(name, f"{name} must be Unicode text, but it has half a surrogate pair.") from None
    return text


def _text(values: dict[str, Any], name: str) -> str | None:
    value = values.get(name)
    if value is None:
        return None
    if not isinstance(value, str):
        raise refused(name, f"{name} must be a text, got {_shown(value)}.")
    return _check_unicode(name, value)


# --- single parameters ---


def _check_model(value: Any, model: str) -> None:
    """One model is served, so a request need not name it."""
    if value is None or value == model:
        return
    if not isinstance(value, str):
        raise refused("model", f"model must be a text, got {_shown(value)}.")
    raise ApiError(
        404,
        f"There is no model {_shown(value)} here; this server has {model!r}.",
        param="model",
        code="model_not_found",
    )


def _stop(value: Any) -> tuple[str, ...]:
    if value is None:
        return ()
    stops = [value] if isinstance(value, str) else value
    if not isinstance(stops, list) or not all(isinstance(stop, str) for stop in stops):
        raise refused("stop", f"stop must be a text or a list of texts, got {_shown(value)}.")
    if len(stops) > MOST_STOPS:
        raise refused("stop", f"stop may have at most {MOST_STOPS} texts, got {len(stops)}.")
    for stop in stops:
        if not 1 <= len(stop) <= STOP_LENGTH:
            raise refused("stop", f"A text of stop must have 1 to {STOP_LENGTH:,} characters, got {len(stop):,}.")
        _check_unicode("stop", stop)
    return tuple(stops)


def _include_usage(value: Any, stream: bool) -> bool:
    if value is None:
        return False
    if not isinstance(value, dict):
        raise refused("stream_options", f"stream_options must be an object, got {_shown(value)}.")
    if not stream:
        raise refused("stream_options", "stream_options needs stream.")
    for name in value:
        if name != "include_usage":
            raise refused("stream_options", f"stream_options has no {_shown(name)}; it has include_usage.")
    return _flag(value, "include_usage", "stream_options.")


def _prompts(value: Any, n: int, vocabulary: Vocabulary, limits: Limits) -> tuple[Prompt, ...]:
    """The prompts. No prompt is an empty one, as in OpenAI's interface."""
    kinds = "prompt must be a text, a list of texts, a list of token ids, or a list of such lists"
    if value is None or isinstance(value, str):
        value = [value or ""]
    if not isinstance(value, list):
        raise refused("prompt", f"{kinds}, got {_shown(value)}.")
    if not value:
        raise refused("prompt", f"{kinds}, got an empty list.")
    if all(type(item) is int for item in value):
        value = [value]
    if len(value) * n > limits.texts:
        raise refused(
            "n" if n > 1 else "prompt",
            f"The prompts times n may be at most {limits.texts:,} texts, got {len(value) * n:,}.",
        )
    if all(isinstance(item, str) for item in value):
        for text in value:
            _check_unicode("prompt", text)
        try:
            encoded = vocabulary.encode_batch(value)
        except UserError as error:  # an imported vocabulary may lack a character
            raise refused("prompt", str(error)) from None
        prompts = [Prompt(ids, text) for ids, text in zip(encoded, value, strict=True)]
    elif all(isinstance(item, list) and item and all(type(i) is int for i in item) for item in value):
        prompts = [Prompt(_ids(item, vocabulary.size)) for item in value]
    else:
        raise refused("prompt", f"{kinds}, not a mixture or an empty list.")
    longest = max(len(prompt.ids) for prompt in prompts)
    if longest > limits.prompt_tokens:
        raise refused(
            "prompt",
            f"A prompt may have at most {limits.prompt_tokens:,} tokens, got {longest:,}.",
            code="context_length_exceeded",
        )
    return tuple(prompts)


def _ids(ids: Collection[int], vocab_size: int, name: str = "prompt") -> list[int]:
    wrong = next((i for i in ids if not 0 <= i < vocab_size), None)
    if wrong is not None:
        raise refused(name, f"Token ids must be between 0 and {vocab_size - 1:,}, got {_shown(wrong)}.")
    return list(ids)
