"""The model that a server serves: loaded once, never changed, and asked by several threads."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np

from flashlm_numba.data.tokenizer import END_OF_TEXT, Vocabulary
from flashlm_numba.heads.sampling import KINDS
from flashlm_numba.model.hub import repository_of
from flashlm_numba.model.hub_folder import exported_file
from flashlm_numba.model.packed_reading import load_for_generation
from flashlm_numba.system.display import TERMINAL, Progress
from flashlm_numba.system.errors import UserError

TOO_LARGE = "Probabilities must be finite: the model's weights are too large; use an earlier checkpoint."
LEAST_LOG_PROBABILITY = -9999.0  # what OpenAI's interface writes for less, since JSON has no infinity


class FixedModel:
    """A model whose weights do not change, so that no call packs them anew. It has the model's other methods.

    Model.sync_weights waits for passes in flight, and new passes wait for it: with many requests at the same time, one
    long pass would stop all of them.
    """

    def __init__(self, model: Any) -> None:
        model.sync_weights()
        self._model = model

    def sync_weights(self) -> None:
        """Do nothing."""

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)


class Served:
    """A model and its vocabulary, and what the interface tells of them.

    model : as generation and scoring use it;  name : as requests name it;  created : time of its file, seconds
    uses_all_threads : whether texts advance together, on all threads
    """

    def __init__(self, model: Any, vocabulary: Vocabulary, name: str, created: int) -> None:
        self.uses_all_threads = bool(model.advances_together)
        self.model: Any = FixedModel(model)
        self.vocabulary, self.name, self.created = vocabulary, name, created
        self._names: list[str | None] = [None] * vocabulary.size

    def token_name(self, token: int) -> str:
        """The text of a token in lists of log-probabilities, or `bytes:` and the bytes of a part of a character."""
        name = self._names[token]
        if name is None:
            data = self.vocabulary.token_bytes[token]
            if not data:
                name = END_OF_TEXT if token == self.vocabulary.eot else f"<token {token}>"
            else:
                try:
                    name = data.decode()
                except UnicodeDecodeError:
                    name = "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)
            self._names[token] = name
        return name

    @functools.cached_property
    def token_of_name(self) -> dict[str, int]:
        """The id of each token by its name; of several with one name, the first."""
        return {self.token_name(token): token for token in reversed(range(self.vocabulary.size))}

    def likeliest(self, head: Any, h: np.ndarray, count: int) -> list[dict[str, float]]:
        """The names of the likeliest tokens after each row of h (N, C), and the logarithms of their probabilities.

        head : of the model, or what predicts the token after a text in its place. Raises UserError if the model's
        weights give no probabilities.
        """
        if count == 0:
            return [{} for _ in h]
        try:
            found = zip(*head.likeliest(h, count), strict=True)
        except ValueError:
            raise UserError(TOO_LARGE) from None
        return [
            {self.token_name(i): float(value) for i, value in zip(ids, written(log_p), strict=True)}
            for ids, log_p in ((ids.tolist(), log_p) for ids, log_p in found)
        ]


def written(log_prob: np.ndarray) -> np.ndarray:
    """Logarithms of probabilities as the interface writes them. Raises UserError if one is not a number."""
    if np.isnan(log_prob).any():
        raise UserError(TOO_LARGE)
    return np.maximum(log_prob.astype(np.float64), LEAST_LOG_PROBABILITY)


def load_served(
    path: Path,
    checkpoint: str | None = None,
    *,
    ema: bool = False,
    activations: str | None = None,
    name: str | None = None,
    progress: Progress = TERMINAL,
) -> Served:
    """Load the model at path: a run, one of its checkpoints, an exported file or folder, or hf:USER/NAME.

    checkpoint, ema, activations : as for `generate`
    name : as requests name the model; default: that of the run or the file
    Raises UserError if there is no model, or if its vocabulary has no text.
    """
    file = exported_file(path, progress)
    uses = ["generate", "score", *KINDS, *filter(None, [activations])]
    model, vocabulary = load_for_generation(file, checkpoint, ema=ema, uses=uses, progress=progress)
    if activations is not None:
        model.use_activations(activations)
    vocabulary.load()
    vocabulary.encode("a")  # refuses a vocabulary without a tokenizer
    _ = vocabulary.token_bytes  # built here rather than by the first request
    return Served(model, vocabulary, name or name_of(path), int(file.stat().st_mtime))


def name_of(path: Path) -> str:
    """The name of a run, of an exported file without its suffix, or of a model on the hub.

    >>> name_of(Path("runs/mine/checkpoints/step-5")), name_of(Path("exports/mine.safetensors"))
    ('mine', 'mine')
    """
    if (repository := repository_of(path)) is not None:
        return repository.name.partition("/")[2]
    path = path.absolute()
    if path.parent.name == "checkpoints":
        path = path.parent.parent
    name = path.name.removesuffix(".safetensors") or "model"
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "replace")  # a name of a file may be no text
