"""The adapter for EleutherAI's lm-evaluation-harness: its model `flashlm`, and what `eval --lm-eval` runs.

Importing this module needs the package lm_eval, which the extra `eval` installs.
"""

from __future__ import annotations

import contextlib
import difflib
import logging
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from lm_eval.api.model import LM
from lm_eval.api.registry import register_model

from flashlm_numba.data.documents import quiet_datasets, reason
from flashlm_numba.heads.sampling import KINDS, check_settings
from flashlm_numba.inference.continuations import score_continuations
from flashlm_numba.inference.evaluate import check_causal, document_nll
from flashlm_numba.inference.generate import generate_text
from flashlm_numba.model.model import Model
from flashlm_numba.model.packed_reading import load_for_generation
from flashlm_numba.system.cache import set_hub_home
from flashlm_numba.system.display import TERMINAL, Progress
from flashlm_numba.system.errors import UserError
from flashlm_numba.system.paths import expanded, printable
from flashlm_numba.system.threads import set_threads

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance

MAX_TOKENS = 256  # of a generated text, unless the task says otherwise; that of the harness's own models
_LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")  # names of one option
_NO_TEMPLATE = "This model was trained on plain text and has no chat template; leave out --apply_chat_template."


@dataclass(frozen=True)
class Generation:
    """How a task wants its texts to be generated."""

    until: tuple[str, ...] = ()  # a text ends before the first of these
    max_tokens: int = MAX_TOKENS
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None

    @classmethod
    def of(cls, options: dict[str, Any]) -> Generation:
        """From the harness's generation_kwargs, which name what may be left out in several ways.

        Without do_sample a text is greedy, unless there is a temperature. Raises UserError for an option that would
        change the texts and that this program does not have.

        >>> Generation.of({"until": "Q:", "max_gen_toks": 9, "do_sample": False, "temperature": 0.7})
        Generation(until=('Q:',), max_tokens=9, temperature=0.0, top_k=None, top_p=None)
        """
        given = {name: value for name, value in options.items() if value is not None}
        until = given.pop("until", ())
        lengths = [given.pop(name) for name in _LENGTHS if name in given]
        temperature = float(given.pop("temperature", 1.0 if given.get("do_sample") else 0.0))
        if not given.pop("do_sample", True):
            temperature = 0.0
        top_k, top_p = given.pop("top_k", None), given.pop("top_p", None)
        without_effect = {"num_beams": 1, "repetition_penalty": 1, "min_p": 0, "num_return_sequences": 1}
        for name, value in given.items():
            if without_effect.get(name, ...) != value:
                raise UserError(f"The option {name} of generation, here {value!r}, is not supported; remove it.")
        return cls(
            until=tuple(filter(None, [until] if isinstance(until, str) else until)),
            max_tokens=int(lengths[0]) if lengths else MAX_TOKENS,
            temperature=temperature,
            top_k=None if temperature == 0 or top_k in (None, 0, -1) else int(top_k),
            top_p=None if temperature == 0 or top_p in (None, 0) else float(top_p),
        )


def until_stop(pieces: Iterator[str], stops: Sequence[str]) -> str:
    """A text that arrives in pieces, up to the first of the stop texts; no piece is taken after it.

    >>> until_stop(iter(["one tw", "o.\\nthr", "ee"]), ["\\n\\n", ".\\n"])
    'one two'
    """
    text, longest = "", max(map(len, stops), default=0)
    for piece in pieces:
        start = max(0, len(text) - longest + 1)  # where a stop text could begin that this piece completes
        text += piece
        found = [at for stop in stops if (at := text.find(stop, start)) >= 0]
        if found:
            return text[: min(found)]
    return text


@register_model("flashlm")
class FlashLM(LM):
    """A trained model for lm-evaluation-harness.

    path : folder of a run or of a checkpoint, or a file written by `export`
    checkpoint, ema, activations : as for `flashlm-numba eval`
    memory : "none" leaves out the memory of a run that has one
    threads : default: every core;  seed : of sampled texts
    batch_size, max_batch_size, device : the harness passes them; they have no effect
    No text is cut off, since the model has no limit of length.
    """

    def __init__(
        self,
        path: str | Path,
        checkpoint: str | None = None,
        ema: bool = False,
        activations: str | None = None,
        memory: str | None = None,
        threads: int | None = None,
        seed: int = 0,
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
        device: str | None = None,
        progress: Progress = TERMINAL,
    ) -> None:
        super().__init__()
        if memory not in (None, "none"):
            raise UserError(f"memory must be none or left out, got {memory!r}.")
        set_threads(threads)
        place = expanded(path)
        if place.absolute().parent.name == "checkpoints" and checkpoint is None:
            place, checkpoint = place.absolute().parent.parent, place.name
        uses = ["score", "generate", *KINDS, *filter(None, [activations])]
        self.model, self.vocabulary = load_for_generation(place, checkpoint, ema=ema, uses=uses, progress=progress)
        if activations is not None:
            self.model.use_activations(activations)
        self.model.sync_weights()
        if isinstance(self.model, Model):
            check_causal(self.model, place)
            if memory == "none":
                self.model.memory = None
        self.vocabulary.load()
        self.vocabulary.encode("a")  # refuses a vocabulary without a tokenizer
        self._progress, self._seed, self._sampled = progress, seed, 0

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """ln p of each continuation after its context, and whether temperature 0 generates it."""
        pairs = [request.args for request in requests]
        groups: dict[tuple[int, ...], dict[tuple[int, ...], list[int]]] = {}  # numbers of requests: context, then rest
        for number, (context, continuation) in enumerate(self._encoded(pairs)):
            groups.setdefault(tuple(context), {}).setdefault(tuple(continuation), []).append(number)
        answers = [(0.0, True)] * len(requests)
        with self._bar(disable_tqdm).texts("scoring", len(requests)) as bar:
            for before, rest in groups.items():
                scored = score_continuations(self.model, (self.vocabulary.start, *before), list(rest))
                for found, numbers in zip(scored, rest.values(), strict=True):
                    for number in numbers:
                        answers[number] = found.log_prob, found.greedy
                        self.cache_hook.add_partial("loglikelihood", pairs[number], answers[number])
                bar.advance(sum(map(len, rest.values())))
        return answers

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """ln p of each text as a document of its own, by the rule of `eval`."""
        texts = [request.args[0] for request in requests]
        documents = [np.array(ids, np.int32) for ids in self.vocabulary.encode_batch(texts)]
        with self._bar(disable_tqdm).tokens("scoring", sum(map(len, documents))) as bar:
            nll = document_nll(self.model, documents, eot=self.vocabulary.start, progress=bar.advance)
        if not np.isfinite(nll).all():
            raise UserError("The NLL is not finite: the model's weights are too large; use an earlier checkpoint.")
        answers = [0.0 - float(value) for value in nll]
        for request, answer in zip(requests, answers, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, answer)
        return answers

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """The text that continues each context up to the first stop text, the end of text or the number of tokens."""
        answers = []
        with self._bar(disable_tqdm).texts("generating", len(requests)) as bar:
            for request in requests:
                prompt, options = request.args
                wanted = Generation.of(options)
                try:
                    check_settings(wanted.temperature, wanted.top_k, wanted.top_p, self.vocabulary.size)
                except ValueError as error:
                    raise UserError(f"A task's {error}; correct its generation_kwargs.") from None
                pieces = generate_text(
                    self.model,
                    self.vocabulary,
                    prompt,
                    max_tokens=wanted.max_tokens,
                    seed=self._seed + self._sampled,
                    temperature=wanted.temperature,
                    top_k=wanted.top_k,
                    top_p=wanted.top_p,
                )
                self._sampled += wanted.temperature > 0  # a request that is repeated gets another text
                answers.append(until_stop(pieces, wanted.until))
                self.cache_hook.add_partial("generate_until", request.args, answers[-1])
                bar.advance(1)
        return answers

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Raises UserError."""
        raise UserError(_NO_TEMPLATE)

    @property
    def tokenizer_name(self) -> str:
        """Asked for with a chat template only. Raises UserError."""
        raise UserError(_NO_TEMPLATE)

    def _bar(self, disabled: bool) -> Progress:
        return Progress() if disabled else self._progress

    def _encoded(self, pairs: Sequence[tuple[str, str]]) -> Iterator[tuple[list[int], list[int]]]:
        """The ids of contexts and continuations, as the harness's own models divide them.

        Both are encoded as one text, and the continuation begins after as many ids as its context has alone. The
        context's last spaces belong to the continuation, where they are the beginning of a token. A continuation that
        is not empty has at least the last id, also where that holds the end of the context.
        """
        contexts = [context.rstrip() for context, _ in pairs]
        encode = self.vocabulary.encode_batch
        unique = list(dict.fromkeys(contexts))
        sizes = dict(zip(unique, map(len, encode(unique)), strict=True))
        texts = [context + rest for context, rest in pairs]
        for context, text, ids in zip(contexts, texts, encode(texts), strict=True):
            size = len(ids) if text == context else min(sizes[context], len(ids) - 1)
            yield ids[:size], ids[size:]


def evaluate_tasks(
    run: Path,
    names: Sequence[str],
    *,
    folder: Path | None = None,
    limit: int | None = None,
    progress: Progress = TERMINAL,
    **options: Any,
) -> dict[str, Any]:
    """Run tasks of lm-evaluation-harness with the model in run. Returns its results as JSON values, and `table`.

    names : of tasks, groups and tags;  folder : holds YAML files of further tasks
    limit : of documents per task;  options : of FlashLM
    Raises UserError if a task is not there or cannot be read, and as FlashLM.
    """
    set_hub_home()
    quiet_datasets()
    from lm_eval import evaluate
    from lm_eval.utils import make_table

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    model = FlashLM(run, progress=progress, **options)
    tasks = _load_tasks(names, folder, progress)
    for name, task in tasks["tasks"].items():
        if getattr(task, "UNSAFE_CODE", False):
            raise UserError(
                f"The task {name} runs the code that a model writes; use the harness's own command (docs/harness.md)."
            )
        if getattr(task, "MULTIMODAL", False):
            raise UserError(f"The task {name} needs a model that sees or hears; leave it out.")
        # as the harness does without options
        if task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=1234)
    with contextlib.redirect_stdout(sys.stderr):  # it prints notes, where the results go
        results = evaluate(lm=model, task_dict=tasks, limit=limit, log_samples=False)
    tables = [make_table(results, column) for column in ("results", "groups") if results.get(column)]
    kept = ("results", "groups", "versions", "n-shot", "n-samples", "higher_is_better")
    return _json({name: results[name] for name in kept if name in results}) | {"table": "\n".join(tables)}


def _json(value: Any) -> Any:
    """A value of the harness as JSON has it; a number that is not finite is None."""
    if isinstance(value, dict):
        return {str(name): _json(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_json(item) for item in value]
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if isinstance(value, str | int | None) else str(value)


def _load_tasks(names: Sequence[str], folder: Path | None, progress: Progress) -> dict[str, dict[str, Any]]:
    """The harness's tasks of these names, as TaskManager.load returns them."""
    from lm_eval.tasks import TaskManager

    if folder is not None and not folder.is_dir():
        raise UserError(f"There is no folder {folder}; name one that holds YAML files of tasks.")
    paths = None if folder is None else str(folder)
    manager = TaskManager(include_path=paths, include_defaults=False)
    # groups and tags may hold the harness's own tasks too
    if not all(name in manager.all_subtasks or _is_file(name) for name in names):
        progress.note("Reading the names of the harness's tasks, which takes up to a minute.")
        manager = TaskManager(include_path=paths)
    loaded: dict[str, dict[str, Any]] = {"tasks": {}, "groups": {}, "group_map": {}}
    for name in names:
        if name not in manager.all_tasks and not _is_file(name):
            near = difflib.get_close_matches(name, manager.all_tasks)
            hint = f"the nearest are {', '.join(near)}" if near else "no name is like it"
            raise UserError(
                f"There is no task {printable(name)} in lm-evaluation-harness"
                f"{'' if folder is None else f' or in a YAML file of {folder} that can be read'}; {hint}."
            )
        try:
            found = manager.load([name])
        except Exception as error:  # a missing data set, a broken connection and a wrong YAML raise many kinds
            raise UserError(
                f"The task {printable(name)} cannot be loaded ({printable(reason(error))}): it needs its data set from "
                "Hugging Face, or the local files that its YAML names."
            ) from error
        for kind, part in loaded.items():
            part |= found.get(kind) or {}
    return loaded


def _is_file(name: str) -> bool:
    return name.endswith((".yaml", ".yml")) and Path(name).is_file()


if __name__ == "__main__":  # the harness's own command, which then knows the model
    from lm_eval.__main__ import cli_evaluate

    try:
        cli_evaluate()
    except UserError as error:
        sys.exit(f"Error: {error}")
