"""What a body may hold: every parameter out of range is told of, and nothing makes the server fail."""

import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flashlm_numba.data.vocabularies import vocabulary_named
from flashlm_numba.serving.api_error import ApiError
from flashlm_numba.serving.limits import Limits
from flashlm_numba.serving.request import SUPPORTED, UNSUPPORTED, parse

BYTES = vocabulary_named("bytes")


def parsed(values, **limits):
    body = values if isinstance(values, bytes) else json.dumps(values).encode()
    return parse(body, model="tiny", vocabulary=BYTES, limits=Limits(**limits))


REFUSED = [
    ({"prompt": 5}, "prompt", "prompt must be a text, .*, got 5"),
    ({"prompt": {}}, "prompt", "got an object"),
    ({"prompt": []}, "prompt", "got an empty list"),
    ({"prompt": [[]]}, "prompt", "not a mixture or an empty list"),
    ({"prompt": ["a", 5]}, "prompt", "not a mixture"),
    ({"prompt": [[5], "a"]}, "prompt", "not a mixture"),
    ({"prompt": [True]}, "prompt", "not a mixture"),
    ({"prompt": [5.0]}, "prompt", "not a mixture"),
    ({"prompt": [257]}, "prompt", "Token ids must be between 0 and 256, got 257"),
    ({"prompt": [-1]}, "prompt", "Token ids must be between 0 and 256, got -1"),
    ({"prompt": [10**300]}, "prompt", r"got 1000.*\.\.\."),
    ({"prompt": "\ud83d"}, "prompt", "half a surrogate pair"),
    ({"prompt": ["a", "\udc00"]}, "prompt", "half a surrogate pair"),
    ({"prompt": "a" * 101}, "prompt", "A prompt may have at most 100 tokens, got 101"),
    ({"prompt": ["a"] * 33, "n": 10}, "n", "The prompts times n may be at most 320 texts, got 330"),
    ({"prompt": ["a" * 90] * 5, "max_tokens": 50}, "max_tokens", "may have 700 tokens, .* at most 600"),
    ({"max_tokens": 0}, "max_tokens", "at least 1, or 0 with echo"),
    ({"max_tokens": -1}, "max_tokens", "between 0 and 80, got -1"),
    ({"max_tokens": 81}, "max_tokens", "between 0 and 80, got 81"),
    ({"max_tokens": 5.0}, "max_tokens", "must be a whole number, got 5.0"),
    ({"max_tokens": True}, "max_tokens", "must be a whole number, got true"),
    ({"max_tokens": "5"}, "max_tokens", "must be a whole number, got '5'"),
    ({"max_tokens": 10**400}, "max_tokens", "got 1000"),
    ({"temperature": -0.1}, "temperature", "between 0 and 2"),
    ({"temperature": 10**400}, "temperature", "between 0 and 2"),
    (b'{"temperature": 1e999}', "temperature", "between 0 and 2, got inf"),
    ({"temperature": "1"}, "temperature", "must be a number, got '1'"),
    ({"temperature": False}, "temperature", "must be a number, got false"),
    ({"top_p": 1.01}, "top_p", "between 0 and 1, got 1.01"),
    ({"top_k": 0}, "top_k", "at least 1, got 0"),
    ({"n": 0}, "n", "between 1 and 320"),
    ({"n": 2, "best_of": 3}, "best_of", "best_of must be n, which is 2"),
    ({"n": 2, "best_of": 1}, "best_of", "best_of must be n, which is 2"),
    ({"best_of": 5}, "best_of", "best_of must be n, which is 1"),
    ({"logprobs": 21}, "logprobs", "between 0 and 20"),
    ({"logprobs": True}, "logprobs", "must be a whole number, got true"),
    ({"echo": 1}, "echo", "must be true or false, got 1"),
    ({"stream": "yes"}, "stream", "must be true or false, got 'yes'"),
    ({"stop": 5}, "stop", "a text or a list of texts, got 5"),
    ({"stop": [5]}, "stop", "a text or a list of texts, got a list"),
    ({"stop": ["a"] * 5}, "stop", "at most 4 texts, got 5"),
    ({"stop": ""}, "stop", "1 to 1,000 characters, got 0"),
    ({"stop": "a" * 1001}, "stop", "1 to 1,000 characters, got 1,001"),
    ({"stop": "\ud800"}, "stop", "half a surrogate pair"),
    ({"seed": 1.5}, "seed", "whole number"),
    ({"seed": 2**63}, "seed", "between"),
    ({"seed": -(2**63) - 1}, "seed", "between"),
    ({"user": 5}, "user", "must be a text"),
    ({"stream_options": {}}, "stream_options", "needs stream"),
    ({"stream": True, "stream_options": 5}, "stream_options", "must be an object"),
    ({"stream": True, "stream_options": {"x": 1}}, "stream_options", "has no 'x'"),
    ({"stream": True, "stream_options": {"include_usage": 1}}, "stream_options.include_usage", "true or false"),
    ({"suffix": "the end"}, "suffix", "suffix is not supported"),
    ({"frequency_penalty": 0.1}, "frequency_penalty", "not supported"),
    ({"presence_penalty": -2}, "presence_penalty", "not supported"),
    ({"presence_penalty": False}, "presence_penalty", "not supported"),
    ({"logit_bias": {"5": 1}}, "logit_bias", "not supported"),
    ({"min_p": 0.1}, "min_p", "There is no parameter 'min_p'"),
    ({"x" * 90: 1}, "x" * 40 + "...", "There is no parameter 'x"),
    ({"model": 5}, "model", "model must be a text"),
    (b"", None, "The body is not JSON in UTF-8"),
    (b"[]", None, "must be a JSON object"),
    (b'"text"', None, "must be a JSON object"),
    (b'{"prompt": NaN}', None, "NaN is no number of JSON"),
    (b'{"temperature": -Infinity}', None, "-Infinity is no number of JSON"),
    (b'{"prompt": "a", "prompt": "b"}', None, "occurs twice"),
    (b'{"prompt": "\xff"}', None, "not JSON in UTF-8"),
    ('{"prompt": "a"}'.encode("utf-16"), None, "not JSON in UTF-8"),
    (b'\xef\xbb\xbf{"prompt": "a"}', None, "not JSON in UTF-8"),
    (b'{"seed": ' + b"9" * 5000 + b"}", None, "not JSON in UTF-8"),
    (b'{"prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", None, "nested too deeply"),
    (b'{"prompt": "a"} {}', None, "not JSON in UTF-8"),
]


@pytest.mark.parametrize(("values", "param", "message"), REFUSED, ids=[f"{i}" for i in range(len(REFUSED))])
def test_a_wrong_value_is_told_of(values, param, message):
    with pytest.raises(ApiError, match=message) as caught:
        parsed(values, prompt_tokens=100, max_tokens=80, request_tokens=600)
    assert caught.value.status == 400
    assert caught.value.param == param
    assert len(caught.value.message) < 300


def test_every_parameter_that_is_not_supported_is_in_the_table():
    assert {param for _, param, _ in REFUSED} >= set(UNSUPPORTED)


def test_defaults_and_values_that_change_nothing():
    plain = parsed({})
    assert (plain.max_tokens, plain.temperature, plain.n, plain.stop) == (16, 1.0, 1, ())
    assert plain.prompts[0].text == ""
    neutral = {name: values[0] for name, values in UNSUPPORTED.items()}
    assert parsed(neutral) == plain
    assert parsed(dict.fromkeys([*SUPPORTED, *UNSUPPORTED])) == plain
    assert parsed({"top_p": 1, "top_k": 257, "best_of": 1, "user": "me", "stop": [], "model": "tiny"}) == plain
    greedy = parsed({"top_p": 0})
    assert (greedy.temperature, greedy.top_p) == (0.0, None)


JUNK = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(-(10**30), 10**30)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(codec=None), max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=2),
    max_leaves=5,
)
GOOD = {
    "model": st.just("tiny"),
    "prompt": st.text(max_size=12)
    | st.lists(st.text(max_size=6), min_size=1, max_size=3)
    | st.lists(st.integers(0, 50_256), min_size=1, max_size=6)
    | st.lists(st.lists(st.integers(0, 50_256), min_size=1, max_size=4), min_size=1, max_size=3),
    "max_tokens": st.integers(0, 6),
    "temperature": st.floats(0, 2) | st.sampled_from([0, 1, 5e-324, 1e-300, 1e-30, 1e-5]),
    "top_p": st.floats(0, 1) | st.sampled_from([5e-324, 1e-300, 1e-9]),
    "top_k": st.integers(1, 2**70) | st.integers(1, 50),
    "n": st.integers(1, 3),
    "stop": st.text(min_size=1, max_size=3) | st.lists(st.text(min_size=1, max_size=2), max_size=4),
    "logprobs": st.integers(0, 20),
    "echo": st.booleans(),
    "seed": st.integers(-(2**63), 2**63 - 1),
    "stream": st.booleans(),
    "user": st.text(max_size=3),
}
BODIES = st.fixed_dictionaries({}, optional={name: values | st.none() for name, values in GOOD.items()})
WRONG = st.fixed_dictionaries(
    {},
    optional={
        **{name: values | JUNK for name, values in GOOD.items()},
        **dict.fromkeys([*UNSUPPORTED, "best_of", "stream_options", "min_p"], JUNK),
    },
)


def check(server, body):
    """The response is a completion, or an error in one sentence; never a failure."""
    status, _, found = server.ask("POST", "/v1/completions", body)
    if status == 200 and isinstance(found, str):
        events = [event.removeprefix("data: ") for event in found.split("\n\n")]
        assert events[-2:] == ["[DONE]", ""]
        assert all("error" not in json.loads(event) for event in events[:-2])
    elif status == 200:
        assert found["choices"]
    else:
        assert status in (400, 404), found
        error = found["error"]
        assert error["message"].endswith(".")
        assert error["type"] == "invalid_request_error"
    return status


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(BODIES)
def test_a_valid_body_is_answered(server, body):
    status = check(server, body)
    assert status == (400 if body.get("max_tokens") == 0 and not body.get("echo") else 200)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(WRONG)
def test_no_values_make_the_server_fail(server, body):
    check(server, body)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=40) | st.text(max_size=20).map(str.encode))
def test_no_bytes_make_the_server_fail(server, body):
    check(server, body)
