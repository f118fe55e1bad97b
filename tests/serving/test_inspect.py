"""POST /inspect: the numbers of one token, compared with the head's whole distribution; and wrong bodies."""

import itertools
import json
import math

import numpy as np
import pytest
from helpers import TINY, command
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import flashlm_numba as fl
from flashlm_numba.inference.generate import context_of
from flashlm_numba.serving.limits import Limits
from flashlm_numba.serving.served import load_served

TEXT = "the people of this nation have seen peace and war, the people of 🙂"


def inspected(server, tokens):
    status, _, found = server.ask("POST", "/inspect", {"tokens": tokens})
    assert status == 200, found
    return found


def check(server, served, ids):
    """The answer about the last of some ids agrees with itself and with all V probabilities."""
    found = inspected(server, ids)
    assert inspected(server, [served.token_name(i) for i in ids]) == found
    context = np.array(context_of(served.vocabulary, ids[:-1]), np.int32)
    _, h = served.model.prefill(context)
    p = served.model.head_after(context).distribution(h)[0].astype(np.float64)
    assert found["token"]["id"] == ids[-1]
    assert found["token"]["name"] == served.token_name(ids[-1])
    assert found["token"]["probability"] == pytest.approx(p[ids[-1]], rel=1e-3)
    assert found["token"]["log_prob"] == pytest.approx(math.log(p[ids[-1]]), rel=1e-4)
    likeliest = [other["probability"] for other in found["likeliest"]]
    np.testing.assert_allclose(likeliest, np.sort(p)[::-1][:10], rtol=1e-3)
    for other in found["likeliest"]:
        assert other["probability"] == pytest.approx(p[other["id"]], rel=1e-3)
    parts = found["parts"]
    assert sum(part["share"] for part in parts) == pytest.approx(1)
    total = sum(part["share"] * part["probability"] for part in parts)
    assert total == pytest.approx(found["token"]["probability"], rel=1e-3)
    return found


def check_path(served, found):
    """The path is the tree's, and its probabilities give that of the head."""
    tree, path = served.model.head.tree, found["path"]
    assert [node["node"] for node in path] == [node for node, _ in tree.path(found["token"]["id"])]
    product = math.prod(node["probability"] for node in path)
    (head,) = (part for part in found["parts"] if part["name"] == "head")
    assert product == pytest.approx(head["probability"], rel=1e-3)
    for node, following in itertools.zip_longest(path, path[1:]):
        children = node["children"]
        assert node["tokens"] + node["nodes"] == tree.arity[node["node"]]
        assert len(children) == min(5, tree.arity[node["node"]]) + (node["rank"] > 5)
        assert [child["probability"] for child in children] == sorted(
            (c["probability"] for c in children), reverse=True
        )
        (chosen,) = (child for child in children if child["chosen"])
        assert chosen["probability"] == node["probability"]
        if following is None:
            assert chosen["token"] == found["token"]["name"]
        else:
            assert chosen["node"] == following["node"]
        for child in children:
            if "node" in child:
                below = tree.token_of_row[tree.token_start[child["node"]] : tree.leaf_end[child["node"]]]
                assert child["tokens"] == len(below)
                assert {*child["examples"]} <= {served.token_name(int(i)) for i in below}
                assert len(child["examples"]) == min(3, len(below))


def test_a_tokens_path_and_its_parts(server, served):
    ids = served.vocabulary.encode(TEXT)
    for length in (1, 2, 5, len(ids) - 1, len(ids)):
        found = check(server, served, ids[:length])
        assert found["head"] == "tree"
        check_path(served, found)
    check_path(served, check(server, served, [served.vocabulary.eot]))
    check_path(served, check(server, served, [served.vocabulary.eot, *ids[:3]]))


def test_the_tokens_of_a_completion_can_be_asked_about(server, served):
    """By the names that it gave, also where the prompt ends in a space and where a character is divided."""
    for prompt in ("the ", TEXT):
        values = {"prompt": prompt, "max_tokens": 6, "seed": 1, "echo": True, "logprobs": 0}
        scores = server.complete(**values)["choices"][0]["logprobs"]
        for i in range(len(scores["tokens"])):
            found = inspected(server, scores["tokens"][: i + 1])
            assert found["token"]["log_prob"] == pytest.approx(scores["token_logprobs"][i], rel=1e-4)


def test_other_heads_and_a_memory(start, corpus, tmp_path):
    settings = [part for setting in TINY for part in ("--set", setting)]
    for name, options in [("dense", ("--head", "dense")), ("memory", ("--memory", "ngrams"))]:
        arguments = ("train", corpus, *options, "--out", tmp_path / name, "--steps", 2, "--threads", 1, *settings)
        done = command(*arguments)
        assert done.exit_code == 0, done.output
        served = load_served(tmp_path / name, progress=fl.Progress())
        ids = served.vocabulary.encode(TEXT)
        found = check(start(served, Limits()), served, ids)
        if name == "dense":
            assert (found["head"], found["path"]) == ("dense", None)
        else:
            check_path(served, found)
            assert found["parts"][-1]["name"] == "memory"


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"{", "The body is not JSON in UTF-8"),
        (b"[]", "The body must be a JSON object."),
        (b"{}", "tokens must be a list of token ids, or of names as in logprobs.tokens, got null."),
        ({"tokens": []}, "got an empty list."),
        ({"tokens": "the"}, "got 'the'."),
        ({"tokens": [1, "the"]}, "not a mixture."),
        ({"tokens": [1.5]}, "not a mixture."),
        ({"tokens": [True]}, "not a mixture."),
        ({"tokens": [-1]}, "Token ids must be between 0 and 50,256, got -1."),
        ({"tokens": [1, 10**30]}, "Token ids must be between 0 and 50,256, got 1000"),
        ({"tokens": ["no such token!"]}, "The model has no token 'no such token!'."),
        ({"tokens": ["\ud800"]}, "The model has no token '\\ud800'."),
        ({"tokens": ["x" * 5000]}, "The model has no token 'xxx"),
        ({"tokens": [1] * 365}, "tokens may have at most 364 of them, got 365."),
        ({"tokens": [1], "prompt": "a"}, "There is no parameter 'prompt'; /inspect has tokens."),
    ],
)
def test_wrong_bodies(server, body, message):
    status, headers, found = server.ask("POST", "/inspect", body)
    assert (status, headers["Content-Type"]) == (400, "application/json")
    assert message in found["error"]["message"]
    assert found["error"]["type"] == "invalid_request_error"


def test_it_has_the_servers_checks(start, served):
    server = start(served, Limits(body_bytes=100), api_key="key")
    good = {"Authorization": "Bearer key"}
    assert server.ask("POST", "/inspect", {"tokens": [1]})[0] == 401
    assert server.ask("POST", "/inspect", {"tokens": [1]}, good)[0] == 200
    assert server.ask("POST", "/inspect", {"tokens": [1]}, {**good, "Origin": "http://evil.example"})[0] == 403
    assert server.ask("POST", "/inspect", b"{}", {**good, "Content-Type": "text/plain"})[0] == 415
    assert server.ask("POST", "/inspect", {"tokens": [1] * 99}, good)[0] == 413
    assert server.ask("GET", "/inspect", headers=good)[0] == 405


JUNK = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.dictionaries(st.sampled_from(["tokens", "tokens", "token", ""]), JUNK, max_size=2) | JUNK)
def test_no_values_make_it_fail(server, body):
    status, _, found = server.ask("POST", "/inspect", json.dumps(body).encode())
    if status == 200:
        assert found["token"]["id"] == body["tokens"][-1] or found["token"]["name"] == body["tokens"][-1]
    else:
        assert status == 400, found
        assert found["error"]["message"].endswith(".")
