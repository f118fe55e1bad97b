"""The Python interface: prepare a text, train on it, load a model and use it.

    import flashlm_numba as fl

    run = fl.train(minutes=10)
    model = run.load()
    print(model.generate("The people"))

Each function is a thin layer over the code behind the command of the same name. Nothing prints: functions that take
long report to the `progress` argument. An error that the caller can correct raises UserError with one sentence.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, overload

import numpy as np

from flashlm_numba.data.builtin import default_corpus
from flashlm_numba.data.prepare import prepare as prepare_tokens
from flashlm_numba.data.splits import SplitChoice
from flashlm_numba.data.vocabularies import DEFAULT_VOCABULARY
from flashlm_numba.heads import Head
from flashlm_numba.heads.sampling import check_settings
from flashlm_numba.inference.compress import compress, decompress
from flashlm_numba.inference.evaluate import token_nll
from flashlm_numba.inference.generate import generate_text
from flashlm_numba.model import build
from flashlm_numba.model.config import RunConfig
from flashlm_numba.model.recipes import from_recipe, names_head
from flashlm_numba.model.trained import settings_from
from flashlm_numba.system.arguments import whole
from flashlm_numba.system.display import Progress
from flashlm_numba.system.errors import UserError
from flashlm_numba.system.paths import expanded
from flashlm_numba.training import run as runs
from flashlm_numba.training.metrics import read_metrics
from flashlm_numba.training.plan import Length

SILENT = Progress()
StrPath = str | Path


def prepare(
    source: StrPath | None = None,
    out: StrPath | None = None,
    *,
    validation: StrPath | None = None,
    subset: str | None = None,
    split: SplitChoice = "auto",
    max_tokens: int | None = None,
    max_docs: int | None = None,
    lines: bool = False,
    column: str = "text",
    skip_missing: bool = False,
    workers: int | None = None,
    vocab: StrPath | int = DEFAULT_VOCABULARY,
    progress: bool = False,
) -> Path:
    """Tokenise documents for training. Returns `out`, the folder that holds the tokens.

    source : a .parquet, .jsonl or .txt file, a folder or a glob of such files, or the name of a Hugging Face dataset;
        None for the built-in text, which needs no `out` with GPT-2's vocabulary
    vocab : "gpt2"; "bytes"; a number of tokens, to train a vocabulary on the text; or the path of a tokenizer.json
    progress : show a progress bar on standard error
    The other arguments are the options of `flashlm-numba prepare`.
    Raises UserError if the source cannot be read or `out` holds something else.
    """
    if out is None:
        changed = (validation, subset, max_tokens, max_docs) != (None,) * 4 or lines or split != "auto"
        changed = changed or vocab != DEFAULT_VOCABULARY
        if source is not None or changed:
            raise UserError("Give out, the folder for the tokens.")
        return default_corpus(progress=progress)
    prepare_tokens(
        None if source is None else str(source),
        out,
        validation=None if validation is None else str(validation),
        subset=subset,
        split=split,
        max_tokens=max_tokens,
        max_docs=max_docs,
        lines=lines,
        column=column,
        skip_missing=skip_missing,
        workers=workers,
        vocab=vocab,
        progress=progress,
    )
    return expanded(out)


@dataclass(frozen=True)
class Run:
    """A training run: its folder, and the status that its training ended with."""

    folder: Path
    status: int = 0  # 0, or 128 plus the number of the signal that stopped training; 130 after an interrupt

    def __post_init__(self) -> None:
        object.__setattr__(self, "folder", expanded(self.folder))

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl: one object per logged step. A line that is being written is left out.

        Raises UserError if there is no such file.
        """
        return read_metrics(self.folder)

    def load(self, checkpoint: str | None = None, *, ema: bool = False) -> TrainedModel:
        """Load the model of the newest or the named checkpoint. With ema=True, use the EMA of its weights."""
        return load(self.folder, checkpoint, ema=ema)

    def resume(
        self,
        *,
        steps: int | None = None,
        tokens: int | None = None,
        minutes: float | None = None,
        settings: Mapping[str, Any] | None = None,
        data: StrPath | None = None,
        progress: Progress = SILENT,
    ) -> Run:
        """Resume training; by default up to the planned end.

        steps, tokens : total length of the run, counted from its first step;  minutes : additional minutes
        settings : changes to the few settings that a resumed run may change, such as {"adamw_lr": 5e-4}
        data : folder of the tokens that the run was trained on, if they have moved
        Raises UserError for anything that the caller can correct.
        """
        length = Length(steps=steps, tokens=tokens, minutes=minutes)
        moved = None if data is None else expanded(data)
        done = runs.resume_run(self.folder, length, settings=_texts(settings), data=moved, progress=progress)
        return Run(done.folder, done.status)


def train(
    data: StrPath | None = None,
    *,
    head: str | None = None,
    recipe: str = "default",
    model: str | None = None,
    init: StrPath | None = None,
    settings: Mapping[str, Any] | None = None,
    steps: int | None = None,
    tokens: int | None = None,
    minutes: float | None = None,
    out: StrPath | None = None,
    seed: int | None = None,
    threads: int | None = None,
    tensorboard: StrPath | None = None,
    progress: Progress = SILENT,
) -> Run:
    """Train a model on a prepared folder, by default on the built-in text. Returns the run.

    steps, tokens, minutes : length of the run; give at most one. Default: the recipe's length, or 20 minutes
    model : shape of the model, such as "nano"; default: the recipe's
    init : a run, a checkpoint, an exported file or folder, or hf:USER/NAME, whose weights, model and head to start from
    settings : settings to change, as with `--set`, such as {"adamw_lr": 1e-3, "dilations": (1, 4)}
    out : folder of the run; default: a new folder in runs/
    tensorboard : folder in which TensorBoard finds the values of every step
    progress : a Progress object that receives notes and steps; TERMINAL shows the progress bar of the command line
    An interrupt finishes the step, saves a checkpoint and returns a run with status 130.
    Raises UserError for anything that the caller can correct, and ValueError for more threads than there are.

    >>> train("no such folder", steps=1)
    Traceback (most recent call last):
    flashlm_numba.system.errors.UserError: There is no folder no such folder; make one with `flashlm-numba prepare ...
    """
    changes = [*([f"head.name={head}"] if head else []), *_texts(settings)]
    if init is None:
        run = from_recipe(recipe, changes, model)
    elif model is None:
        run = settings_from(from_recipe(recipe), changes, expanded(init), progress)
    else:
        raise UserError("Give only one of model and init: trained weights have their own shape.")
    run = run if seed is None else replace(run, seed=whole("seed", seed, 0))
    done = runs.start_run(
        run,
        Length(steps=steps, tokens=tokens, minutes=minutes),
        data=None if data is None else str(expanded(data)),
        out=None if out is None else expanded(out),
        threads=None if threads is None else whole("threads", threads),
        any_head=init is None and not names_head(changes, run.head.name),
        tensorboard=None if tensorboard is None else expanded(tensorboard),
        progress=progress,
    )
    return Run(done.folder, done.status)


def load(
    path: StrPath,
    checkpoint: str | None = None,
    *,
    ema: bool = False,
    activations: str | None = None,
    progress: Progress = SILENT,
) -> TrainedModel:
    """Load a trained model.

    path : folder of a run, or of one of its checkpoints; file or folder written by `export`; or hf:USER/NAME, to
        download a model from the Hugging Face hub
    checkpoint : its name, such as "step-500";  ema : use the EMA of the weights
    activations : "float" or "int8", the arithmetic of the ternary layers; default: as the model was trained
    progress : receives a note and a bar if kernels must be compiled first, which takes up to a minute
    Raises UserError if there is no model at path, or if it is damaged.
    """
    path = expanded(path)
    if path.absolute().parent.name == "checkpoints" and checkpoint is None:
        path, checkpoint = path.absolute().parent.parent, path.name
    loaded = build.load_model(path, checkpoint, ema=ema, progress=progress)
    if activations is not None:
        loaded.model.use_activations(activations)
    return TrainedModel(loaded, activations)


@dataclass(frozen=True)
class Score:
    """How well a model predicts a text, token by token."""

    tokens: list[str]  # text of each token; bytes of an incomplete character show as U+FFFD
    token_nll: np.ndarray  # (n,) float64: -ln p of each token, nats
    n_bytes: int  # UTF-8 bytes of the text

    @property
    def nll(self) -> float:
        """Mean of -ln p, nats per token."""
        return float(self.token_nll.mean())

    @property
    def bits_per_byte(self) -> float:
        """Sum of -log2 p, divided by the number of UTF-8 bytes of the text."""
        return float(self.token_nll.sum()) / (math.log(2) * self.n_bytes)


class TrainedModel:
    """A trained model. It continues a text, scores a text, lists the likeliest next tokens, and compresses files."""

    def __init__(self, loaded: build.Loaded, activations: str | None = None) -> None:
        self.config: RunConfig = loaded.run
        self._activations = activations or loaded.run.model.activations
        self.trained: dict[str, Any] = {name: loaded.state[name] for name in ("step", "tokens", "seconds")}
        self.model = loaded.model
        self.vocabulary = loaded.vocabulary
        self.vocabulary.load()

    @property
    def parameters(self) -> dict[str, np.ndarray]:
        """The parameters by name. They are the live arrays: after changing one, call model.sync_weights."""
        return self.model.parameters

    @property
    def head(self) -> Head:
        """The output head."""
        return self.model.head

    def __repr__(self) -> str:
        size = sum(value.size for value in self.parameters.values())
        title = self.head.title(self.config.head)
        return f"TrainedModel({size:,} parameters, {title} head, trained on {self.trained['tokens']:,} tokens)"

    @overload
    def generate(
        self,
        prompt: str = ...,
        *,
        max_tokens: int = ...,
        temperature: float = ...,
        top_k: int | None = ...,
        top_p: float | None = ...,
        seed: int | None = ...,
        stream: Literal[False] = ...,
    ) -> str: ...

    @overload
    def generate(
        self,
        prompt: str = ...,
        *,
        max_tokens: int = ...,
        temperature: float = ...,
        top_k: int | None = ...,
        top_p: float | None = ...,
        seed: int | None = ...,
        stream: Literal[True],
    ) -> Iterator[str]: ...

    def generate(
        self,
        prompt: str = "",
        *,
        max_tokens: int = 200,
        temperature: float = 0.8,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int | None = None,
        stream: bool = False,
    ) -> str | Iterator[str]:
        """The continuation of a prompt, without the prompt. With stream=True, an iterator over its pieces.

        A space at the end of the prompt becomes the beginning of the next token, as in the training text.
        Sampling applies temperature, then top-k, then top-p. The same seed gives the same text.
        Raises UserError or ValueError at once, also with stream=True, if an argument is out of range.
        """
        whole("max_tokens", max_tokens, 0)
        seed = secrets.randbits(32) if seed is None else whole("seed", seed, 0)
        check_settings(temperature, top_k, top_p, self.head.vocab_size)
        pieces = generate_text(
            self.model,
            self.vocabulary,
            prompt,
            max_tokens=max_tokens,
            seed=seed,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
        )
        return pieces if stream else "".join(pieces)

    def score(self, text: str) -> Score:
        """Score a text: -ln p of every token, predicted from the tokens before it. The rule is that of `eval`.

        Raises ValueError if the text is empty.
        """
        ids = np.array(self.vocabulary.encode(text), np.int32)
        if not len(ids):
            raise ValueError("TrainedModel.score: the text must contain at least one token")
        tokens = [self._text(int(token)) for token in ids]
        nll = token_nll(self.model, ids, eot=self.vocabulary.start)
        return Score(tokens, nll, len(text.encode("utf-8", "surrogatepass")))

    def next_tokens(self, text: str = "", k: int = 10) -> list[tuple[str, float]]:
        """The k likeliest next tokens after a text and their probabilities, likeliest first."""
        self.model.sync_weights()
        ids = np.array([self.vocabulary.start, *self.vocabulary.encode(text)], np.int32)
        _, h = self.model.prefill(ids)
        p = self.model.head_after(ids).distribution(h)[0]
        order = np.argsort(-p, kind="stable")[: max(k, 0)]
        return [(self._text(int(token)), float(p[token])) for token in order]

    def compress(self, data: bytes) -> bytes:
        """The bytes of a file, compressed with the model's probabilities, as `flashlm-numba compress` does.

        Raises UserError if the package of the extra `compress` is missing.
        """
        return compress(self.model, self.vocabulary, data, activations=self._activations, progress=SILENT).data

    def decompress(self, data: bytes) -> bytes:
        """The file that `compress` took. Raises UserError if data is damaged or of another model."""
        try:
            return decompress(data, self.model, self.vocabulary, progress=SILENT)
        finally:
            self.model.use_activations(self._activations)  # data may have named another arithmetic

    def logits(self, ids: np.ndarray) -> np.ndarray:
        """Logits of the next token (B, T, V) float32 for token ids (B, T), any type of integer. For small inputs.

        logits[b, t] predict what follows ids[b, : t + 1], up to a constant per position: those of a tree head are
        log-probabilities. Nothing is put before the ids. Raises ValueError if they are no matrix of ids in [0, V).
        """
        self.model.sync_weights()
        return self.model.logits(ids)

    def _text(self, token: int) -> str:
        return self.vocabulary.decode_bytes([token]).decode("utf-8", "replace")


def _texts(settings: Mapping[str, Any] | None) -> tuple[str, ...]:
    """The settings as texts in the form that `--set` takes."""

    def text(value: Any) -> str:
        return ",".join(map(str, value)) if isinstance(value, list | tuple) else str(value)

    return tuple(f"{name}={text(value)}" for name, value in (settings or {}).items())
