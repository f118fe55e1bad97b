"""The model in lm-evaluation-harness: tasks of local files, against what `eval`, `score` and `generate` give."""

import importlib
import importlib.metadata
import importlib.util
import json
import math
import os
import re
import subprocess
import sys

import numpy as np
import pytest
from helpers import TINY, command
from hypothesis import given
from hypothesis import strategies as st

import flashlm_numba as fl

if "CI" not in os.environ:  # where it must be installed
    pytest.importorskip("lm_eval", reason="needs lm-evaluation-harness: pip install -e '.[eval]'")

import lm_eval
from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model
from lm_eval.tasks import TaskManager

from flashlm_numba.inference.evaluate import evaluate_run
from flashlm_numba.inference.harness import FlashLM, Generation
from flashlm_numba.system.errors import UserError

WORDS = ["the", "people", "of", "this", "nation", "have", "seen", "peace", "and", "war,", "ünïcode", "🙂"]
TASK = """\
task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: {kind}
metadata:
  version: 1.0
"""
KINDS = {
    "perplexity": (
        "loglikelihood_rolling",
        """\
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list:
  - metric: word_perplexity
  - metric: bits_per_byte
""",
    ),
    "choice": (
        "multiple_choice",
        """\
doc_to_text: "{{text}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{answer}}"
metric_list:
  - metric: acc
  - metric: acc_norm
""",
    ),
    "last_word": (
        "loglikelihood",
        """\
doc_to_text: "{{text}}"
doc_to_target: " {{choices[0]}}"
metric_list:
  - metric: perplexity
  - metric: acc
""",
    ),
    "generation": (
        "generate_until",
        """\
doc_to_text: "{{text}}"
doc_to_target: "{{wanted}}"
generation_kwargs:
  until: ["the"]
  max_gen_toks: 6
  do_sample: false
metric_list:
  - metric: exact_match
""",
    ),
}


def requests(kind, *arguments):
    return [Instance(kind, {}, given, n) for n, given in enumerate(arguments)]


def texts(seed, count, most=60):
    rng = np.random.default_rng(seed)
    return [" ".join(rng.choice(WORDS, rng.integers(1, most))) for _ in range(count)]


@pytest.fixture(scope="module")
def model(run):
    return fl.load(run)


@pytest.fixture(scope="module")
def harness_model(run):
    return FlashLM(run, progress=fl.Progress())


@pytest.fixture(scope="module")
def tasks(tmp_path_factory, model):
    """Folder of the YAML files, and the rows of their data."""
    folder, rng = tmp_path_factory.mktemp("tasks"), np.random.default_rng(3)
    rows = [
        {
            "text": text,
            "choices": [" ".join(rng.choice(WORDS, n)) for n in rng.permutation(4) + 1],
            "answer": int(rng.integers(4)),
        }
        for text in texts(3, 8)
    ]
    for n, row in enumerate(rows):  # every other answer is what is generated
        found = model.generate(row["text"], max_tokens=6, temperature=0).partition("the")[0]
        row["wanted"] = found if n % 2 else found + "!"
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    for name, (kind, rest) in KINDS.items():
        yaml = TASK.format(name=f"local_{name}", data=json.dumps(str(folder / "data.jsonl")), kind=kind) + rest
        (folder / f"{name}.yaml").write_text(yaml, encoding="utf-8")
    (folder / "away.yaml").write_text(
        TASK.format(name="local_away", data=str(folder / "missing.jsonl"), kind=KINDS["perplexity"][0])
        + KINDS["perplexity"][1],
        encoding="utf-8",
    )
    return folder, rows


@pytest.fixture(autouse=True)
def folders(tmp_path_factory, monkeypatch):
    """Where `datasets` writes, and no network."""
    datasets = importlib.import_module("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path_factory.getbasetemp() / "datasets"))


def run_tasks(run, folder, *words):
    return command("eval", run, "--lm-eval-path", folder, *words)


def test_word_perplexity_is_that_of_the_scores(run, model, tasks):
    folder, rows = tasks
    done = run_tasks(run, folder, "--lm-eval", "local_perplexity", "--json")
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)["results"]["local_perplexity"]
    nll = sum(model.score(row["text"]).token_nll.sum() for row in rows)
    words = sum(len(re.split(r"\s+", row["text"])) for row in rows)
    assert found["word_perplexity,none"] == pytest.approx(math.exp(nll / words), rel=1e-5)
    own = evaluate_run(run, str(folder / "data.jsonl"))
    assert found["bits_per_byte,none"] == pytest.approx(own["bits_per_byte"], rel=1e-9)  # the same batches


def test_rolling_is_the_nll_of_eval(run, harness_model, tmp_path):
    for n, text in enumerate([*texts(5, 6, 900), "a"]):
        path = tmp_path / f"{n}.txt"
        path.write_text(text, encoding="utf-8")
        (found,) = harness_model.loglikelihood_rolling(requests("loglikelihood_rolling", (text,)))
        want = evaluate_run(run, str(path))
        assert -found == pytest.approx(want["nll"] * want["tokens"], rel=1e-12)
    assert harness_model.loglikelihood_rolling(requests("loglikelihood_rolling", ("",))) == [0.0]
    assert harness_model.loglikelihood_rolling([]) == []


def test_the_choice_is_the_likeliest_continuation(run, model, tasks):
    folder, rows = tasks
    done = run_tasks(run, folder, "--lm-eval", "local_choice", "--json")
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)["results"]["local_choice"]
    right = {"acc": 0, "acc_norm": 0}
    for row in rows:
        before = len(model.score(row["text"]).tokens)
        logs = np.array([-model.score(f"{row['text']} {c}").token_nll[before:].sum() for c in row["choices"]])
        right["acc"] += int(logs.argmax() == row["answer"])
        right["acc_norm"] += int((logs / list(map(len, row["choices"]))).argmax() == row["answer"])
    for name, count in right.items():
        assert found[f"{name},none"] == pytest.approx(count / len(rows))


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")  # the harness forks to estimate an error
def test_the_perplexity_of_the_last_words(run, model, tasks):
    folder, rows = tasks
    done = run_tasks(run, folder, "--lm-eval", "local_last_word", "--json")
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)["results"]["local_last_word"]  # nothing else is printed there
    nll = []
    for row in rows:
        before = len(model.score(row["text"]).tokens)
        nll.append(model.score(f"{row['text']} {row['choices'][0]}").token_nll[before:].sum())
    assert found["perplexity,none"] == pytest.approx(math.exp(np.mean(nll)), rel=1e-4)
    assert found["acc,none"] == 0  # an untrained model


def test_generated_texts_are_those_of_generate(run, tasks):
    folder, rows = tasks
    done = run_tasks(run, folder, "--lm-eval", "local_generation", "--json")
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["results"]["local_generation"]["exact_match,none"] == 0.5
    assert len(rows) == 8


@pytest.mark.parametrize("prompt", ["the people", "the people ", "", "peace\n"])
def test_generation_goes_on_to_the_first_stop_text(run, harness_model, prompt):
    def generated(**options):
        return harness_model.generate_until(requests("generate_until", (prompt, options)))[0]

    want = command("generate", run, "--prompt", prompt, "--temperature", 0, "--max-tokens", 12).stdout
    whole = generated(until=[], max_gen_toks=12)
    assert prompt + whole + "\n" == want
    assert len(whole) > 3
    for stop in (whole[2], whole[2:4], whole[-1]):
        assert generated(until=stop, max_gen_toks=12, do_sample=False, temperature=0.9) == whole.split(stop)[0]
    sampled = generated(until=["\n\n"], max_new_tokens=12, do_sample=True, temperature=1.2, top_k=50)
    again = generated(until=["\n\n"], max_new_tokens=12, do_sample=True, temperature=1.2, top_k=50)
    assert len({whole, sampled, again}) == 3  # a repeated request gets another text


@pytest.mark.parametrize(
    ("options", "want"),
    [
        ({}, Generation()),
        ({"temperature": 0.7}, Generation(temperature=0.7)),
        ({"do_sample": True}, Generation(temperature=1.0)),
        ({"do_sample": False, "temperature": 0.7, "top_p": 0.9}, Generation()),
        ({"until": ["a", ""], "max_tokens": 3, "num_beams": 1}, Generation(until=("a",), max_tokens=3)),
        ({"do_sample": True, "top_k": 0, "top_p": 0.9, "min_p": None}, Generation(temperature=1.0, top_p=0.9)),
    ],
)
def test_options_of_generation(options, want):
    assert Generation.of(options) == want


@pytest.mark.parametrize("options", [{"num_beams": 4}, {"no_such_option": 1}, {"do_sample": True, "top_p": 7}])
def test_options_that_it_does_not_have_are_refused(harness_model, options):
    with pytest.raises(UserError, match=f"{list(options)[-1]}"):
        harness_model.generate_until(requests("generate_until", ("a", options)))


@given(st.lists(st.sampled_from(WORDS), min_size=3, max_size=20), st.data())
def test_two_continuations_after_one_another_are_one(harness_model, words, data):
    """At spaces, where no token crosses."""
    first = data.draw(st.integers(0, len(words) - 2))
    second = data.draw(st.integers(first + 1, len(words) - 1))
    a = " ".join(words[:first])
    b, c = ("".join(" " + word for word in part) for part in (words[first:second], words[second:]))
    (ab, _), (abc, _), (whole, _) = harness_model.loglikelihood(
        requests("loglikelihood", (a, b), (a + b, c), (a, b + c))
    )
    assert ab + abc == pytest.approx(whole, abs=2e-4)


def test_the_context_may_be_empty_and_its_last_spaces_belong_to_the_continuation(model, harness_model):
    nothing, apart, joined, none, again = harness_model.loglikelihood(
        requests(
            "loglikelihood", ("", "the people"), ("the ", "people"), ("the", " people"), ("the", ""), ("", "the people")
        )
    )
    assert nothing[0] == pytest.approx(-model.score("the people").token_nll.sum(), abs=1e-5)
    assert (apart, nothing) == (joined, again)
    assert none == (0.0, True)
    assert harness_model.loglikelihood([]) == []


def test_a_continuation_within_a_token_has_that_token(model, harness_model):
    """The tokens are those of the whole text, of which the context alone has more."""
    assert len(model.score("the peo").tokens) == 3
    whole = model.score("the people")
    assert whole.tokens == ["the", " people"]
    (found,) = harness_model.loglikelihood(requests("loglikelihood", ("the peo", "ple")))
    assert found[0] == pytest.approx(-whole.token_nll[1], abs=1e-5)


def test_greedy_is_the_likeliest_token(model, harness_model):
    vocabulary, tried = model.vocabulary, 0
    for text in texts(7, 30):
        ids = vocabulary.encode(text)
        log_p = model.logits(np.array([[vocabulary.start, *ids]]))[0, -1]  # those of a tree
        likely = np.argsort(-log_p)[:2].tolist()
        pairs = [(text, vocabulary.decode([token])) for token in likely]
        if [vocabulary.encode(text + rest) for _, rest in pairs] == [[*ids, token] for token in likely]:
            found = harness_model.loglikelihood(requests("loglikelihood", *pairs))
            assert [greedy for _, greedy in found] == [True, False]
            assert [value for value, _ in found] == pytest.approx(log_p[likely].tolist(), abs=1e-4)
            tried += 1
    assert tried


def test_one_pass_reads_the_context_of_several_continuations(harness_model, monkeypatch):
    read = []
    prefill = harness_model.model.prefill
    monkeypatch.setattr(harness_model.model, "prefill", lambda ids: read.append(len(ids)) or prefill(ids))
    harness_model.loglikelihood(requests("loglikelihood", *[("the people of", f" {word}") for word in WORDS] * 2))
    assert read == [4]


@pytest.mark.parametrize("kind", ["memory", "export", "matmul-free", "packed"])
def test_other_models(corpus, run, tmp_path, kind):
    """With n-grams, from one file, and MatMul-free ones, also packed."""
    path, settings = run, TINY
    if kind in ("memory", "matmul-free", "packed"):
        path = tmp_path / "run"
        if kind != "memory":
            shape = [setting for setting in TINY if not setting.startswith(("groups", "dilations"))]
            settings = (*shape, "mixer=mlgru", "linear=bitlinear", "n_passes=1", "ngram_copy_orders=")
        more = {"memory": ("--memory", "ngrams"), "packed": ("--head", "bitlinear")}.get(kind, ())
        words = [part for setting in settings for part in ("--set", setting)]
        done = command("train", corpus, "--out", path, "--steps", 2, "--threads", 1, *words, *more)
        assert done.exit_code == 0, done.output
    if kind in ("export", "packed"):
        assert command("export", path, tmp_path / "model.safetensors", "--rows", "float").exit_code == 0
        path = tmp_path / "model.safetensors"
    plain, lm = fl.load(path), FlashLM(path, progress=fl.Progress())
    assert (type(lm.model) is not type(plain.model)) == (kind == "packed")
    text = texts(1, 1, 50)[0]
    want = -plain.score(text + " people and war,").token_nll
    before = len(plain.score(text).tokens)
    (found,) = lm.loglikelihood(requests("loglikelihood", (text, " people and war,")))
    assert found[0] == pytest.approx(want[before:].sum(), abs=1e-4)
    (rolling,) = lm.loglikelihood_rolling(requests("loglikelihood_rolling", (text + " people and war,",)))
    assert rolling == pytest.approx(want.sum(), abs=1e-3)
    (generated,) = lm.generate_until(requests("generate_until", (text, {"max_gen_toks": 5})))
    assert generated == plain.generate(text, max_tokens=5, temperature=0)
    if kind == "memory":
        alone = FlashLM(path, memory="none", progress=fl.Progress())
        assert alone.loglikelihood(requests("loglikelihood", (text, " people")))[0][0] != found[0]


def test_the_table_in_words_and_a_limit(run, tasks):
    folder, _ = tasks
    done = run_tasks(run, folder, "--lm-eval", f"local_choice, {folder / 'perplexity.yaml'}", "--limit", 3)
    assert done.exit_code == 0, done.output
    assert "|local_choice" in done.stdout
    assert "|local_perplexity" in done.stdout
    found = json.loads(run_tasks(run, folder, "--lm-eval", "local_choice", "--limit", 3, "--json").stdout)
    assert found["n-samples"]["local_choice"] == {"original": 8, "effective": 3}


def test_a_task_without_its_data_is_one_sentence(run, tasks):
    done = run_tasks(run, tasks[0], "--lm-eval", "local_away")
    assert done.exit_code == 1
    assert "The task local_away cannot be loaded (" in done.stderr
    assert "needs its data set" in done.stderr


@pytest.fixture
def few_tasks(monkeypatch):
    """The harness without its own 14,000 files, which take half a minute. Tells whether they were asked for."""
    start, asked = TaskManager.__init__, []

    def begin(self, include_path=None, include_defaults=True):
        asked.append(include_defaults)
        start(self, include_path=include_path, include_defaults=False)

    monkeypatch.setattr(TaskManager, "__init__", begin)
    return asked


def test_a_wrong_name_names_the_nearest(run, tasks, few_tasks):
    done = run_tasks(run, tasks[0], "--lm-eval", "local_choise")
    assert done.exit_code == 1
    assert "There is no task local_choise" in done.stderr
    assert "the nearest are local_choice" in done.stderr
    assert any(few_tasks)
    done = command("eval", run, "--lm-eval", "x", "--lm-eval-path", tasks[0] / "nothing")
    assert "There is no folder" in done.stderr


def test_a_group_of_tasks(run, tasks, few_tasks, tmp_path):
    folder, _ = tasks
    group = "group: both\ntask: [local_choice]\naggregate_metric_list:\n  - metric: acc\n"
    for path in folder.glob("*.yaml"):
        (tmp_path / path.name).write_text(path.read_text(encoding="utf-8"), encoding="utf-8")
    (tmp_path / "both.yaml").write_text(group, encoding="utf-8")
    done = run_tasks(run, tmp_path, "--lm-eval", "both", "--json")
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert found["groups"]["both"]["acc,none"] == found["results"]["local_choice"]["acc,none"]
    assert few_tasks[-1]  # a group may hold the harness's own tasks
    assert "|both" in run_tasks(run, tmp_path, "--lm-eval", "both").stdout


def test_a_task_that_runs_code_is_refused(run, tasks, few_tasks, tmp_path):
    text = (tasks[0] / "generation.yaml").read_text(encoding="utf-8")
    (tmp_path / "code.yaml").write_text(text + "unsafe_code: true\n", encoding="utf-8")
    done = run_tasks(run, tmp_path, "--lm-eval", "local_generation")
    assert done.exit_code == 1
    assert "runs the code that a model writes" in done.stderr


@pytest.mark.parametrize(
    ("words", "want"),
    [
        (["--lm-eval", "a", "some.txt"], "runs tasks instead of scoring a text"),
        (["--lm-eval", "a", "--smoothed"], "runs tasks instead of scoring a text"),
        (["--lm-eval", "a", "--memory", "ngrams"], "runs tasks instead of scoring a text"),
        (["--limit", 3], "need --lm-eval"),
        (["--lm-eval", " , "], "names no task"),
    ],
)
def test_options_that_do_not_go_together(run, words, want):
    done = command("eval", run, *words)
    assert done.exit_code == 2
    assert want in done.stderr


def test_the_entry_point_and_the_registry_know_the_model(run, tasks):
    (point,) = importlib.metadata.entry_points(group="lm_eval.models", name="flashlm")
    assert point.load() is FlashLM
    assert get_model("flashlm") is FlashLM
    folder, _ = tasks
    want = json.loads(
        run_tasks(run, folder, "--lm-eval", "local_perplexity", "--json", "--checkpoint", "step-1").stdout
    )
    found = lm_eval.simple_evaluate(
        model="flashlm",
        model_args=f"path={run},checkpoint=step-1",
        batch_size=1,
        device="cpu",
        tasks=["local_perplexity"],
        task_manager=TaskManager(include_path=str(folder), include_defaults=False),
    )
    for name, value in want["results"]["local_perplexity"].items():
        assert found["results"]["local_perplexity"][name] == value


# as `python -m`, but without the harness's own 14,000 files, which take half a minute
OWN_COMMAND = """
import functools, runpy
from lm_eval.tasks import TaskManager
TaskManager.__init__ = functools.partialmethod(TaskManager.__init__, include_defaults=False)
runpy.run_module("flashlm_numba.inference.harness", run_name="__main__", alter_sys=True)
"""


def test_the_harness_own_command(run, tasks, tmp_path):
    words = ["--model", "flashlm", "--model_args", f"path={run}", "--tasks", str(tasks[0] / "choice.yaml")]
    done = subprocess.run([sys.executable, "-c", OWN_COMMAND, *words], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "|local_choice" in done.stdout


def test_there_is_no_chat_template(harness_model):
    with pytest.raises(UserError, match="no chat template"):
        harness_model.apply_chat_template([{"role": "user", "content": "a"}])
    with pytest.raises(UserError, match="no chat template"):
        _ = harness_model.tokenizer_name


def test_without_the_package_it_says_what_to_install(run, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    done = command("eval", run, "--lm-eval", "a")
    assert done.exit_code == 1
    assert "pip install 'flashlm-numba[eval]'" in done.stderr
