"""The interface of a head, what a head does unless it says otherwise, and the checks that heads share.

A head goes from hidden states to the probability of a token, its loss and its gradients. A class that inherits from
Head, with a line in HEADS, is all that a new head needs: docs/extending.md has one.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np

from flashlm_numba.heads.config import HeadConfig
from flashlm_numba.kernels import _check


class Head(ABC):
    """What the model, training, evaluation, generation and the commands ask of a head.

    h is (N, C) float32; targets are token ids (N,) int32; weights (N,) float32 are each position's share of a step's
    loss. `parameters` and `gradients` hold the head's own arrays by name (not the rows that it shares with the
    embedding); `row_of_token` is (V,) int32, or None where row v of the embedding belongs to token v;
    `log_prior` (V,) float32 is added to the logits, by token id, and kept with the weights, or None.

    own_settings : the fields of HeadConfig that change nothing with a head that does not name them
    has_int8 : whether `use_int8` does something
    """

    name: str
    vocab_size: int
    parameters: dict[str, np.ndarray]
    gradients: dict[str, np.ndarray]
    row_of_token: np.ndarray | None = None
    log_prior: np.ndarray | None = None
    own_settings: ClassVar[tuple[str, ...]] = ()
    has_int8: ClassVar[bool] = False

    # --- from settings: what is asked of the class, in this order, and of the head when it is saved ---

    @classmethod
    def check(cls, settings: HeadConfig, *, has_rows: bool) -> None:
        """Raise UserError where the settings do not fit together; has_rows: the embedding does not start at random."""

    @classmethod
    def title(cls, settings: HeadConfig) -> str:
        """The head's name in the line that training starts with."""
        return settings.name

    @classmethod
    def full_ratio(cls, settings: HeadConfig) -> float:
        """Share of the steps, the last ones, that `begin` is told to be full; in the others loss and NLL read low."""
        return 1.0

    @classmethod
    def constants_from_data(
        cls, settings: HeadConfig, counts: np.ndarray, rows: np.ndarray | None
    ) -> dict[str, np.ndarray]:
        """What `constants` of a new head will be, by name: fixed from the start, and saved beside the parameters.

        counts (V,): how often each token occurs in the training text.  rows (V, C) float32, what the embedding
        starts from, or None where that is random; both by token id
        """
        if not settings.log_prior:
            return {}
        # of counts plus one: every token can occur
        return {"log_prior": np.log((counts + 1) / (counts + 1).sum()).astype(np.float32)}

    @classmethod
    def token_of_row(cls, constants: dict[str, np.ndarray]) -> np.ndarray | None:
        """The token (V,) that each row of the embedding is to belong to, or None where row v is token v's."""
        return None

    @classmethod
    @abstractmethod
    def from_settings(
        cls,
        settings: HeadConfig,
        weight: np.ndarray,
        dweight: np.ndarray,
        *,
        constants: dict[str, np.ndarray],
        parameters: dict[str, np.ndarray],
        counts: np.ndarray | None,
    ) -> Head:
        """A head on the embedding weight (V, C) and its gradient, the rows in its order.

        constants, parameters : of a new head, constants_from_data's and none; of a saved one, what was saved, other
        names beside it.  counts (V,) : as in constants_from_data; None where the head will not be trained on.
        Raises ValueError, KeyError or UserError if they do not fit.
        """

    def constants(self) -> dict[str, np.ndarray]:
        """What is saved beside the parameters, by name; no name begins with "head."."""
        return {} if self.log_prior is None else {"log_prior": self.log_prior}

    def describe(self, counts: Callable[[], np.ndarray | None]) -> dict[str, Any]:
        """What `info` shows of this head alone, in JSON's types.

        counts : reads all of the training text for the tokens' counts (V,); None where the text is not there
        """
        return {}

    # --- training ---

    def begin(self, rng: np.random.Generator, *, full: bool) -> None:
        """Before a micro-batch of training: whatever its loss draws comes from rng; full: draw nothing."""

    def prepare(self) -> None:
        """Bring up to date what is computed from the parameters; after every change of these."""

    @abstractmethod
    def forward_backward(
        self, h: np.ndarray, targets: np.ndarray, weights: np.ndarray, *, accumulate: bool = True
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """loss (N,), nll (N,), dh (N, C), float32; adds the gradients of sum(weights * loss) to the parameters'.

        accumulate=False: the gradients take the place of whatever was there, those of the shared rows too.
        """

    # --- evaluation and generation ---

    @abstractmethod
    def log_prob(self, h: np.ndarray, targets: np.ndarray) -> np.ndarray:
        """Natural logarithm of the probability of each target, (N,) float32."""

    @abstractmethod
    def distribution(self, h: np.ndarray) -> np.ndarray:
        """Probabilities of every token, (N, V) float32, columns by token id. For tests and small use."""

    @abstractmethod
    def sample(
        self,
        h: np.ndarray,
        rng: np.random.Generator,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
    ) -> np.ndarray:
        """One token id per row, (N,) int32; temperature, then top-k, then top-p, on the token distribution."""

    def use_int8(self) -> None:
        """From now on sample from rows rounded to int8, where has_int8 says that there are such."""


# --- what heads share: checks of arguments, with the sentences of kernels/_check.py, and options ---


def check_options(
    where: str, *, label_smoothing: float = 0.0, z_loss: float = 0.0, soft_cap: float | None = None
) -> None:
    """Raise ValueError unless the loss options are in their ranges."""
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"{where}: label_smoothing must be between 0 and 1, got {label_smoothing}")
    if not 0 <= z_loss < math.inf:
        raise ValueError(f"{where}: z_loss must be 0 or more, got {z_loss}")
    if soft_cap is not None and not 0 < soft_cap < math.inf:
        raise ValueError(f"{where}: soft_cap must be above 0, or None for no cap, got {soft_cap}")


def check_rows(where: str, weight: np.ndarray, dweight: np.ndarray | None) -> None:
    """Raise ValueError unless weight is (V, C) float32, V and C at least 1, and dweight has its shape."""
    _check.array(where, "weight", weight, (None, None))
    if not weight.size:
        raise ValueError(f"{where}: weight must have a row and a column, got {weight.shape}")
    if dweight is not None:
        _check.array(where, "dweight", dweight, weight.shape)


def check_targets(where: str, targets: np.ndarray, vocab_size: int) -> None:
    """Raise ValueError unless targets (N,) are int32 token ids of the vocabulary."""
    _check.array(where, "targets", targets, (None,), np.int32)
    _check.indices(where, "targets", targets, vocab_size, "check the tokenizer's vocabulary size")


def loss_options(settings: HeadConfig, constants: dict[str, np.ndarray]) -> dict[str, Any]:
    """The arguments that the heads' constructors share, from what Head.from_settings is given."""
    return {
        "label_smoothing": settings.label_smoothing,
        "z_loss": settings.z_loss,
        "soft_cap": settings.soft_cap,
        "log_prior": constants.get("log_prior"),
    }
