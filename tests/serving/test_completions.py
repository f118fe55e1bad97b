"""The official OpenAI client against a live server: what it gets is what the model generates and scores directly."""

import asyncio
import itertools

import numpy as np
import openai
import pytest
from helpers import TINY, command

import flashlm_numba as fl
from flashlm_numba.data.vocabularies import vocabulary_named
from flashlm_numba.heads import DenseHead
from flashlm_numba.inference.generate import generate_ids, generate_text
from flashlm_numba.model.config import ModelConfig
from flashlm_numba.model.model import Model
from flashlm_numba.model.parameters import initial_parameters
from flashlm_numba.serving.application import seed_of
from flashlm_numba.serving.limits import Limits
from flashlm_numba.serving.served import Served, load_served

BYTES = vocabulary_named("bytes")
PROMPTS = ["the people", "war,", "", "ünïcode 🙂", "the ", "peace\n"]


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0) as found:
        yield found


def direct(served, prompt, **options):
    options = {"max_tokens": 12, "temperature": 1.0, **options}
    return "".join(generate_text(served.model, served.vocabulary, prompt, **options))


def test_models(client, served):
    (model,) = client.models.list().data
    assert model.id == "tiny"
    assert client.models.retrieve("tiny").id == "tiny"
    with pytest.raises(openai.NotFoundError, match="has the model 'tiny' only"):
        client.models.retrieve("other")


@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize("options", [{}, {"temperature": 0}, {"temperature": 0.7, "top_p": 0.9}, {"top_p": 0.5}])
def test_a_text_is_the_one_that_the_model_generates(client, served, prompt, options):
    found = client.completions.create(model="tiny", prompt=prompt, max_tokens=12, seed=5, **options)
    assert found.choices[0].text == direct(served, prompt, seed=5, **options)
    assert found.usage.prompt_tokens == len(served.vocabulary.encode(prompt))
    assert 1 <= found.usage.completion_tokens <= 12
    assert found.choices[0].finish_reason in ("length", "stop")


def test_top_k_is_an_extension(client, served):
    found = client.completions.create(model="tiny", prompt="war", seed=2, extra_body={"top_k": 3})
    assert found.choices[0].text == direct(served, "war", seed=2, top_k=3, max_tokens=16)


def test_several_prompts_and_texts(client, served):
    found = client.completions.create(model="tiny", prompt=["war", "peace"], n=3, max_tokens=5, seed=9)
    texts = [choice.text for choice in found.choices]
    assert [choice.index for choice in found.choices] == [*range(6)]
    assert texts[0] == direct(served, "war", seed=9, max_tokens=5)
    assert texts[3] == direct(served, "peace", seed=9, max_tokens=5)
    assert len(set(texts[:3])) == 3
    # neither the other prompts nor the number of texts change one
    alone = client.completions.create(model="tiny", prompt="peace", n=2, max_tokens=5, seed=9)
    assert [choice.text for choice in alone.choices] == texts[3:5]
    assert 6 <= found.usage.completion_tokens <= 30


def test_without_a_seed_texts_differ(client):
    found = client.completions.create(model="tiny", prompt=["war", "war"], n=2, max_tokens=10)
    assert len({choice.text for choice in found.choices}) == 4


def test_negative_seeds_are_seeds(client):
    texts = [client.completions.create(model="tiny", prompt="war", seed=seed).choices[0].text for seed in (-1, -1, -2)]
    assert texts[0] == texts[1] != texts[2]


def test_token_ids_as_prompts(client, served):
    ids = served.vocabulary.encode("the people")
    wanted = direct(served, "the people", seed=4, max_tokens=6)
    for prompt in (ids, [ids], [ids, ids], [served.vocabulary.eot, *ids]):
        found = client.completions.create(model="tiny", prompt=prompt, seed=4, max_tokens=6, echo=True)
        assert found.choices[-1].text.removeprefix("<|endoftext|>") == "the people" + wanted
    # ids are taken as they are, so that a space at the end is a token
    space = served.vocabulary.encode("the ")
    model_ids = generate_ids(served.model, [served.vocabulary.eot, *space], rng=np.random.default_rng(4))
    found = client.completions.create(model="tiny", prompt=space, seed=4, max_tokens=3)
    assert found.choices[0].text == served.vocabulary.decode(itertools.islice(model_ids, 3))


def test_a_character_that_begins_in_a_prompt_of_ids_is_completed(client, served):
    first, *rest = served.vocabulary.encode("🦔")
    assert len(rest) >= 1
    found = client.completions.create(model="tiny", prompt=[first], max_tokens=0, echo=True)
    assert found.choices[0].text == "\ufffd"
    found = client.completions.create(model="tiny", prompt=[first, *rest], max_tokens=0, echo=True, logprobs=1)
    assert found.choices[0].text == "🦔"
    assert found.choices[0].logprobs.tokens[0].startswith("bytes:\\x")
    assert found.choices[0].logprobs.text_offset == [0] * (1 + len(rest))


def pieces(stream):
    found = list(stream)
    return found, "".join(chunk.choices[0].text for chunk in found if chunk.choices)


@pytest.mark.parametrize("prompt", PROMPTS)
def test_a_stream_is_the_same_text(client, prompt):
    values = {"model": "tiny", "prompt": prompt, "max_tokens": 20, "seed": 3, "logprobs": 2, "echo": True}
    whole = client.completions.create(**values)
    chunks, text = pieces(client.completions.create(**values, stream=True, stream_options={"include_usage": True}))
    assert text == whole.choices[0].text
    assert chunks[-1].choices == []
    assert chunks[-1].usage == whole.usage
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert chunks[-2].choices[0].finish_reason == whole.choices[0].finish_reason
    assert {chunk.id for chunk in chunks} == {chunks[0].id}
    for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
        parts = [getattr(chunk.choices[0].logprobs, name) for chunk in chunks[:-1]]
        assert [*itertools.chain(*parts)] == getattr(whole.choices[0].logprobs, name)
    # a token comes with the text that holds its first character
    told = -len(prompt)
    for chunk in chunks[:-1]:
        told += len(chunk.choices[0].text)
        assert all(offset <= told + len(prompt) for offset in chunk.choices[0].logprobs.text_offset)


def test_a_stream_of_several_texts(client):
    values = {"model": "tiny", "prompt": ["war", "peace"], "max_tokens": 8, "seed": 3, "n": 2}
    whole = client.completions.create(**values)
    texts, ends = [""] * 4, [None] * 4
    for chunk in client.completions.create(**values, stream=True):
        (choice,) = chunk.choices
        assert ends[choice.index] is None
        texts[choice.index] += choice.text
        ends[choice.index] = choice.finish_reason
    assert texts == [choice.text for choice in whole.choices]
    assert ends == [choice.finish_reason for choice in whole.choices]


def test_stop_texts_across_tokens(client, served):
    values = {"model": "tiny", "prompt": "the people", "max_tokens": 30, "seed": 6}
    whole = client.completions.create(**values, logprobs=0).choices[0]
    tokens, offsets = whole.logprobs.tokens, whole.logprobs.text_offset
    start = next(i for i in range(4, len(tokens) - 1) if len(tokens[i]) > 1 and len(tokens[i + 1]) > 1)
    stop = tokens[start][-1] + tokens[start + 1][0]
    at = whole.text.index(stop)
    for stops in (stop, [stop], ["never this", stop, "nor this"], [stop + "x" * 50, stop]):
        for stream in (False, True):
            if stream:
                chunks, text = pieces(client.completions.create(**values, stop=stops, stream=True, logprobs=0))
                scores = [offset for chunk in chunks for offset in chunk.choices[0].logprobs.text_offset]
                reason = chunks[-1].choices[0].finish_reason
            else:
                found = client.completions.create(**values, stop=stops, logprobs=0)
                text, scores = found.choices[0].text, found.choices[0].logprobs.text_offset
                reason = found.choices[0].finish_reason
                assert found.usage.completion_tokens <= start + 2
            assert text == whole.text[:at]
            assert reason == "stop"
            assert scores == [offset for offset in offsets if offset < len("the people") + at]


def test_what_is_held_back_for_a_stop_text_comes_at_the_end(client):
    values = {"model": "tiny", "prompt": "the people", "max_tokens": 10, "seed": 6}
    whole = client.completions.create(**values).choices[0].text
    _, text = pieces(client.completions.create(**values, stream=True, stop=[whole[1:] + "!", whole[-1] + "?"]))
    assert text == whole


@pytest.mark.parametrize("text", ["the people of this nation have seen peace and war,", "ünïcode 🙂🦔", "the ", "x"])
def test_echo_scores_a_text_as_score_does(client, served, serving_run, text):
    wanted = fl.load(serving_run, progress=fl.Progress()).score(text)
    found = client.completions.create(model="tiny", prompt=text, max_tokens=0, echo=True, logprobs=20)
    (choice,) = found.choices
    assert choice.text == text
    assert choice.finish_reason == "length"
    scores = choice.logprobs
    np.testing.assert_allclose(scores.token_logprobs, -wanted.token_nll, rtol=1e-6)
    assert len(scores.tokens) == len(wanted.tokens)
    for name, told in zip(scores.tokens, wanted.tokens, strict=True):
        assert name == told or name.startswith("bytes:")
    for name, value, likeliest in zip(scores.tokens, scores.token_logprobs, scores.top_logprobs, strict=True):
        assert likeliest[name] == value
        assert 20 <= len(likeliest) <= 21
        assert [*likeliest.values()][:20] == sorted(likeliest.values(), reverse=True)[:20]
    assert found.usage.completion_tokens == 0


def test_a_long_text_is_scored_in_windows(start, served, serving_run):
    """Longer than a window, and without likeliest tokens, which take another way."""
    text = "the people of this nation have seen peace and war, " * 250
    wanted = fl.load(serving_run, progress=fl.Progress()).score(text)
    assert len(wanted.tokens) > 2_600
    server = start(served, Limits())
    found = server.complete(prompt=text, max_tokens=0, echo=True, logprobs=0)["choices"][0]
    np.testing.assert_allclose(found["logprobs"]["token_logprobs"], -wanted.token_nll, rtol=1e-6)
    assert all(len(likeliest) == 1 for likeliest in found["logprobs"]["top_logprobs"])


def test_the_token_that_begins_a_text_has_no_probability(client, served):
    ids = [served.vocabulary.eot, *served.vocabulary.encode("the people")]
    scores = (
        client.completions.create(model="tiny", prompt=ids, max_tokens=0, echo=True, logprobs=1).choices[0].logprobs
    )
    assert scores.tokens[0] == "<|endoftext|>"
    assert scores.token_logprobs[0] is None
    assert scores.top_logprobs[0] is None
    text = client.completions.create(model="tiny", prompt="the people", max_tokens=0, echo=True, logprobs=1)
    assert scores.token_logprobs[1:] == text.choices[0].logprobs.token_logprobs


@pytest.mark.parametrize("prompt", PROMPTS)
def test_log_probabilities_of_generated_tokens_are_the_models(client, served, prompt):
    found = client.completions.create(model="tiny", prompt=prompt, max_tokens=9, seed=8, logprobs=3, echo=True)
    (choice,) = found.choices
    tokens = choice.logprobs.tokens
    if not any(name.startswith("bytes:") for name in tokens):
        assert "".join(tokens) == choice.text  # also where the prompt ends in a space
        assert choice.logprobs.text_offset == [0, *itertools.accumulate(map(len, tokens))][:-1]
    # each is predicted from those before it
    names = {served.token_name(i): i for i in range(served.vocabulary.size)}
    ids = np.array([served.vocabulary.eot, *(names[name] for name in tokens)], np.int32)
    p = served.model.head.distribution(served.model.forward(ids[None, :-1]))
    np.testing.assert_allclose(
        choice.logprobs.token_logprobs, np.log(p[np.arange(len(p)), ids[1:]]), rtol=1e-4, atol=1e-4
    )
    for row, likeliest in zip(p, choice.logprobs.top_logprobs, strict=True):
        best = np.log(np.sort(row)[::-1][:3])
        np.testing.assert_allclose(sorted(likeliest.values(), reverse=True)[:3], best, rtol=1e-4, atol=1e-4)


def test_fifty_requests_at_the_same_time(server, served):
    """Each text is the one that its seed gives alone."""
    wanted = [direct(served, PROMPTS[i % 6], seed=i, max_tokens=20, temperature=0.9) for i in range(50)]

    async def everything():
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0) as client:

            async def one(i):
                values = {"prompt": PROMPTS[i % 6], "seed": i, "max_tokens": 20, "temperature": 0.9}
                if i % 2:
                    return (await client.completions.create(model="tiny", **values)).choices[0].text
                parts = []
                async for chunk in await client.completions.create(model="tiny", **values, stream=True):
                    parts.append(chunk.choices[0].text)
                return "".join(parts)

            return await asyncio.gather(*(one(i) for i in range(50)))

    assert asyncio.run(everything()) == wanted


def test_errors_are_the_clients_exceptions(client):
    with pytest.raises(openai.BadRequestError, match="temperature must be between 0 and 2") as caught:
        client.completions.create(model="tiny", prompt="war", temperature=2.5)
    assert caught.value.param == "temperature"
    assert caught.value.type == "invalid_request_error"
    with pytest.raises(openai.NotFoundError, match="There is no model 'gpt-4' here; this server has 'tiny'") as caught:
        client.completions.create(model="gpt-4", prompt="war")
    assert caught.value.code == "model_not_found"
    with pytest.raises(openai.NotFoundError, match="There is no chat model here"):
        client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": "war"}])


def test_weights_that_cannot_be_used_are_told_of(start):
    """A sentence with status 500, whatever was asked for."""
    config = ModelConfig(BYTES.size, 8, 8, 2, kernel_size=2, dilations=(1,), n_passes=1)
    parameters = initial_parameters(config, 0)
    parameters["final_norm.weight"][:] = 3e38
    parameters["embedding.weight"][:] = 3e38
    server = start(Served(Model(config, parameters, DenseHead), BYTES, "wrong", 0), Limits())
    for values in ({}, {"temperature": 0}, {"stream": True}, {"echo": True, "max_tokens": 0, "logprobs": 3}):
        status, _, body = server.ask("POST", "/v1/completions", {"prompt": "war", **values})
        assert (status, body["error"]["type"]) == (500, "server_error")
        assert "weights are too large; use an earlier checkpoint" in body["error"]["message"]
    status, _, body = server.ask("POST", "/inspect", {"tokens": [1, 2]})
    assert (status, body["error"]["type"]) == (500, "server_error")
    assert "weights are too large; use an earlier checkpoint" in body["error"]["message"]


def test_a_packed_model_is_served(start, corpus, tmp_path, monkeypatch):
    """An exported MatMul-free LM, whose weights stay packed."""
    run, file = tmp_path / "run", tmp_path / "mmf.safetensors"
    shape = ("dim=16", "ffn_dim=24", "phases=2x16", "n_blocks=1", "validation_tokens=60", "sample_tokens=3")
    settings = [part for setting in shape for part in ("--set", setting)]
    done = command("train", corpus, "--recipe", "mmf", "--steps", 2, "--out", run, "--threads", 1, *settings)
    assert done.exit_code == 0, done.output
    assert command("export", run, file, "--rows", "float").exit_code == 0
    served = load_served(file, progress=fl.Progress())
    assert served.uses_all_threads
    server, text = start(served, Limits()), "the people of this nation"
    found = server.complete(model="mmf", prompt=text, echo=True, logprobs=2, max_tokens=6, seed=3)["choices"][0]
    assert found["text"] == text + direct(served, text, seed=3, max_tokens=6)
    wanted = -fl.load(file, progress=fl.Progress()).score(text).token_nll
    np.testing.assert_allclose(found["logprobs"]["token_logprobs"][: len(wanted)], wanted, rtol=1e-5)
    passes, trunk = [], served.model.trunk
    read_each = trunk.read_each
    monkeypatch.setattr(trunk, "read_each", lambda states, x: passes.append(len(states)) or read_each(states, x))
    choices = server.complete(prompt=text, n=4, max_tokens=6, seed=3)["choices"]
    assert max(passes) == 4  # the texts advance together
    seeds = [seed_of(3, index) for index in range(4)]
    assert [choice["text"] for choice in choices] == [direct(served, text, seed=seed, max_tokens=6) for seed in seeds]


def test_a_model_with_a_memory_is_served(start, corpus, tmp_path):
    """Its probabilities are those of the mixture with counted n-grams."""
    run = tmp_path / "memory"
    settings = [part for setting in TINY for part in ("--set", setting)]
    arguments = ("train", corpus, "--memory", "ngrams", "--out", run, "--steps", 2, "--threads", 1, *settings)
    done = command(*arguments)
    assert done.exit_code == 0, done.output
    served, text = load_served(run, progress=fl.Progress()), "the people of this nation have seen peace"
    assert served.model.memory is not None
    server, model = start(served, Limits()), fl.load(run, progress=fl.Progress())
    found = server.complete(prompt=text, echo=True, logprobs=4, max_tokens=6, seed=3)["choices"][0]
    assert found["text"] == text + direct(served, text, seed=3, max_tokens=6)
    scores, wanted = found["logprobs"], model.score(found["text"])
    if wanted.tokens == scores["tokens"]:  # the sampled tokens are those of their text
        np.testing.assert_allclose(scores["token_logprobs"], -wanted.token_nll, rtol=1e-4)
    told = -model.score(text).token_nll
    np.testing.assert_allclose(scores["token_logprobs"][: len(told)], told, rtol=1e-6)
    for i, likeliest in enumerate(scores["top_logprobs"]):
        if not any(name.startswith("bytes:") for name in scores["tokens"][:i]):
            expected = model.next_tokens("".join(scores["tokens"][:i]), 4)
            best = np.exp(sorted(likeliest.values(), reverse=True)[:4])
            np.testing.assert_allclose(best, [p for _, p in expected], rtol=1e-3, err_msg=str(i))
