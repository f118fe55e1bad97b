"""The interface of a head, its defaults, and checks that the heads share.

A head turns hidden states into token probabilities, loss and gradients. A new head needs a class that inherits from
Head and an entry in HEADS; docs/extending.md shows one.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import numpy as np

from flashlm_numba.heads.config import HeadConfig
from flashlm_numba.heads.decisions import NO_TOKENS, Decisions, OneDecision
from flashlm_numba.heads.joined import Joined
from flashlm_numba.kernels import _check, draw
from flashlm_numba.kernels.tree_draw import CopyModel, Drawing
from flashlm_numba.system.calls import OneCall


class Part(NamedTuple):
    """A part of what predicts a token. The token's probability is the sum of share * probability over the parts.

    name : "head", "copies" or "memory";  share : of the part in the mixture
    probability : that the part alone gives to the token
    """

    name: str
    share: float
    probability: float


class Head(ABC):
    """The interface that the model, training, evaluation, generation and the commands use.

    In all methods h is (N, C) float32, targets are token ids (N,) int32, and weights (N,) float32 are each position's
    share of a step's loss. They are only read, and may be read-only.

    Threads: `log_prob`, `sample`, `distribution`, `likeliest` and `top` may be called from any number of threads at the
    same time. `begin` and `forward_backward`, which change the head, raise RuntimeError while another forward_backward
    is in flight. `use_int8` may be called at any time; calls in flight finish without it. Call `prepare`, and change
    parameters, only when no call is in flight.

    parameters, gradients : the head's arrays by name, without the rows that it shares with the embedding
    row_of_token : (V,) int32, row of the embedding per token; None if row v belongs to token v
    log_prior : (V,) float32 by token id, added to the logits and stored with the weights; or None
    own_settings : fields of HeadConfig that this head reads; they have no effect with other heads
    has_int8 : whether `use_int8` has an effect
    joins : whether the logits of several texts are computed at once if `joined` is set; each has the bits it has alone
    joined : the hidden states of the last step of several texts (joined.py)
    has_search : whether `top` and `log_prob_of` compute only some of the tokens
    ternary : names in `parameters` of the matrices that the head evaluates as a scale times -1, 0 and +1, by
        kernels.bitlinear.absmean_ternary
    """

    name: str
    vocab_size: int
    parameters: dict[str, np.ndarray]
    gradients: dict[str, np.ndarray]
    row_of_token: np.ndarray | None = None
    log_prior: np.ndarray | None = None
    own_settings: ClassVar[tuple[str, ...]] = ()
    has_int8: ClassVar[bool] = False
    joins: ClassVar[bool] = False
    joined: Joined | None = None
    has_search: ClassVar[bool] = False
    ternary: ClassVar[tuple[str, ...]] = ()

    # --- from settings: methods in the order in which the class is used, and those for saving a head ---

    @classmethod
    def check(cls, settings: HeadConfig, *, has_rows: bool) -> None:
        """Raise UserError if the settings contradict each other.

        has_rows : whether there is an initial embedding that is not random
        """

    @classmethod
    def title(cls, settings: HeadConfig) -> str:
        """The head's name in the first line of training."""
        return settings.name

    @classmethod
    def full_ratio(cls, settings: HeadConfig) -> float:
        """Final share of the steps in which `begin` gets full=True. In the other steps loss and NLL read low."""
        return 1.0

    @classmethod
    def training_bytes(cls, settings: HeadConfig, vocab_size: int, dim: int, positions: int) -> int:
        """Bytes that training takes for the head, about: scratch for so many positions, and rows of its own."""
        return 4 * positions * dim

    @classmethod
    def constants_from_data(
        cls, settings: HeadConfig, counts: np.ndarray, rows: np.ndarray | None
    ) -> dict[str, np.ndarray]:
        """The `constants` of a new head, by name. They never change and are saved with the parameters.

        counts : (V,) token counts of the training text
        rows : initial embedding (V, C) float32, or None if it is random. Both are by token id.
        """
        if not settings.log_prior:
            return {}
        # counts plus one, because every token can occur
        return {"log_prior": np.log((counts + 1) / (counts + 1).sum()).astype(np.float32)}

    @classmethod
    def token_of_row(cls, constants: dict[str, np.ndarray]) -> np.ndarray | None:
        """The token (V,) that each row of the embedding belongs to, or None if row v belongs to token v."""
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
        """A head on the embedding weight (V, C) and its gradient, whose rows are in the head's order.

        constants, parameters : for a new head the result of constants_from_data and an empty dict; for a saved head the
            saved arrays, possibly among others
        counts : (V,) as in constants_from_data; None if the head will not be trained
        Raises ValueError, KeyError or UserError if the arrays do not fit the settings.
        """

    def constants(self) -> dict[str, np.ndarray]:
        """Arrays to save with the parameters, by name. No name begins with "head."."""
        return {} if self.log_prior is None else {"log_prior": self.log_prior}

    def describe(self, counts: Callable[[], np.ndarray | None]) -> dict[str, Any]:
        """Entries that `info` shows only for this head, as JSON values.

        counts : function that reads the training text and returns the token counts (V,), or None without the text
        """
        return {}

    # --- training ---

    def begin(self, rng: np.random.Generator, *, full: bool) -> None:
        """Prepare for a training micro-batch. rng : for all random choices of its loss;  full : make none"""

    def prepare(self) -> None:
        """Update everything that is computed from the parameters. Call this after every change of a parameter."""
        self.joined = None

    @abstractmethod
    def forward_backward(
        self, h: np.ndarray, targets: np.ndarray, weights: np.ndarray, *, accumulate: bool = True
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Returns loss (N,), nll (N,), dh (N, C), float32, and adds the gradients of sum(weights * loss).

        accumulate : False replaces the previous gradients, including those of the shared rows
        """

    def training_log_prob(self, h: np.ndarray, targets: np.ndarray, at: np.ndarray) -> np.ndarray:
        """-nll of the next forward_backward of h and targets, (n,) float32, at the positions `at` (n,)."""
        return self.log_prob(np.ascontiguousarray(h[at]), targets[at])

    # --- evaluation and generation ---

    @abstractmethod
    def log_prob(self, h: np.ndarray, targets: np.ndarray) -> np.ndarray:
        """Natural logarithm of each target's probability, (N,) float32."""

    @abstractmethod
    def distribution(self, h: np.ndarray) -> np.ndarray:
        """Probabilities of all tokens, (N, V) float32, columns by token id. For tests and small inputs."""

    def logits(self, h: np.ndarray) -> np.ndarray:
        """Logits of all tokens, (N, V) float32, columns by token id: a softmax over them gives `distribution`.

        Default: the logarithm of the distribution.
        """
        with np.errstate(divide="ignore"):
            return np.log(self.distribution(h))

    def likeliest(self, h: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
        """The k = min(count, V) likeliest tokens after each row, likeliest first.

        Returns ids (N, k) int32 and the logarithms of their probabilities (N, k) float64. Default: from `logits`.
        """
        return likeliest_of_logits(self.logits(h), count)

    @abstractmethod
    def sample(
        self,
        h: np.ndarray,
        rng: np.random.Generator,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
    ) -> np.ndarray:
        """Sample one token id per row, (N,) int32, applying temperature, then top-k, then top-p."""

    def top(self, x: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
        """The k = min(count, V) likeliest tokens for one x (C,), likeliest first.

        Returns ids (k,) int32 and numbers (k,) float64: log p if has_search is True, else log p up to a constant.
        Default: the result of `likeliest`.
        """
        ids, log_p = self.likeliest(x[None], count)
        return ids[0], log_p[0]

    def top_mixed(
        self, x: np.ndarray, count: int, tokens: np.ndarray, shares: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """The k = min(count, V) likeliest tokens of a mixture with some tokens for one x (C,), likeliest first.

        The mixture is shares[0] * p(v) + sum over o of shares[o + 1] [v = tokens[o]].
        tokens : (O,) int32 token ids, -1 for none;  shares : (O + 1,) float64
        Returns ids (k,) int32 and their ln p (k,) float64. Default: from `distribution`.
        """
        p = self.distribution(x[None])[0].astype(np.float64)
        return likeliest_of_mixture(np.arange(len(p), dtype=np.int32), p, tokens, shares, count)

    def decisions(self, x: np.ndarray, tokens: np.ndarray = NO_TOKENS, shares: np.ndarray | None = None) -> Decisions:
        """The choice of the token after one x (C,) as a sequence of decisions. The arguments are those of top_mixed.

        The same arguments give the same bits. Default: one decision, by `distribution`.
        """
        p = self.distribution(x[None])[0].astype(np.float64)
        return OneDecision(mixed_with(p, tokens, shares))

    def log_prob_of(self, x: np.ndarray, tokens: np.ndarray) -> np.ndarray:
        """ln p of some tokens (K,) int32 for one x (C,), (K,) float64."""
        return self.log_prob(np.repeat(x[None], len(tokens), axis=0), tokens).astype(np.float64)

    def parts(self, h: np.ndarray, token: int) -> list[Part]:
        """The parts of a token's probability after one position, for h (1, C). A head alone is one part."""
        return [head_part(self, h, token)]

    def drawing(
        self,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        copies: CopyModel | None = None,
    ) -> Drawing | None:
        """How compiled code draws the next token with these settings of sample, for one thread at a time.

        copies : of a mixture with the n-gram copies; None for the head alone
        It gives the tokens of sample with the same random numbers, as rows (tokens_of_rows). None if only Python can
        draw so. Default: None.
        """
        return None

    def tokens_of_rows(self, rows: np.ndarray) -> np.ndarray:
        """The token ids of rows of the embedding, int32: the inverse of row_of_token. Default: the rows."""
        return rows.astype(np.int32)

    def use_int8(self) -> None:
        """From now on, sample with rows quantised to int8. Has no effect unless has_int8 is True."""


# --- shared by the heads: argument checks, with the messages of kernels/_check.py, and options ---


def likeliest_of_logits(logits: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """The k = min(count, V) likeliest columns of each row of logits (N, V) float32, likeliest first.

    Returns ids (N, k) int32 and the logarithms of their probabilities (N, k) float64. A logit of minus infinity counts
    as -1e30. Raises ValueError if another one is not finite, or if count is below 1.

    >>> ids, log_p = likeliest_of_logits(np.log(np.array([[0.25, 0.5, 0.25]], np.float32)), 1)
    >>> ids.tolist(), np.exp(log_p).round(6).tolist()
    ([[1]], [[0.5]])
    """
    k = min(count, logits.shape[1])
    ids, log_p = np.empty((len(logits), k), np.int32), np.empty((len(logits), k))
    for n, row in enumerate(np.maximum(logits, np.float32(-1e30))):
        ids[n], log_p[n] = draw.largest(row, count)
        log_p[n] -= np.log(np.exp(row - row.max()).sum(dtype=np.float64)) + row.max()
    return ids, log_p


def mixed_with(p: np.ndarray, tokens: np.ndarray, shares: np.ndarray | None) -> np.ndarray:
    """shares[0] * p (V,) float64 with shares[1:] (O,) added at tokens (O,), -1 for none; p if there are no shares."""
    if shares is None:
        return p
    p = shares[0] * p
    found = tokens >= 0
    np.add.at(p, tokens[found], shares[1:][found])
    return p


def likeliest_of_mixture(
    ids: np.ndarray, p: np.ndarray, tokens: np.ndarray, shares: np.ndarray, count: int
) -> tuple[np.ndarray, np.ndarray]:
    """The result of Head.top_mixed from different ids (K,), all that can be in it, and the head's p of them (K,).

    Of equal tokens the smaller id comes first. Raises ValueError if a probability is not finite.

    >>> ids, log_p = likeliest_of_mixture(np.arange(3), np.array([0.5, 0.3, 0.2]), np.array([2]), np.full(2, 0.5), 2)
    >>> ids.tolist(), np.exp(log_p).round(6).tolist()
    ([2, 0], [0.6, 0.25])
    """
    p = shares[0] * p
    for token, share in zip(tokens.tolist(), shares[1:].tolist(), strict=True):
        if token >= 0:
            p[ids == token] += share
    if not np.isfinite(p).all():
        raise ValueError("the probabilities must be finite to find the largest")
    if count < len(p):
        kept = np.flatnonzero(p >= np.partition(p, -count)[-count])
        ids, p = ids[kept], p[kept]
    order = np.lexsort((ids, -p))[:count]
    with np.errstate(divide="ignore"):
        return ids[order].astype(np.int32), np.log(p[order])


def head_part(head: Any, h: np.ndarray, token: int) -> Part:
    """The only part where a head is not mixed with anything. See Head.parts."""
    return Part("head", 1.0, float(np.exp(np.float64(head.log_prob(h, np.array([token], np.int32))[0]))))


def check_options(
    where: str, *, label_smoothing: float = 0.0, z_loss: float = 0.0, soft_cap: float | None = None
) -> None:
    """Raise ValueError unless the loss options are in range."""
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"{where}: label_smoothing must be between 0 and 1, got {label_smoothing}")
    if not 0 <= z_loss < math.inf:
        raise ValueError(f"{where}: z_loss must be finite and at least 0, got {z_loss}")
    if soft_cap is not None and not 0 < soft_cap < math.inf:
        raise ValueError(f"{where}: soft_cap must be above 0 and finite, or None for no cap, got {soft_cap}")


def check_rows(where: str, weight: np.ndarray, dweight: np.ndarray | None) -> None:
    """Raise ValueError unless weight is (V, C) float32 with V and C at least 1, and dweight another, writable one."""
    _check.array(where, "weight", weight, (None, None))
    if not weight.size:
        raise ValueError(f"{where}: weight must have at least one row and one column, got {weight.shape}")
    if dweight is not None:
        _check.array(where, "dweight", dweight, weight.shape)
        if not dweight.flags.writeable:
            raise ValueError(
                f"{where}: dweight must be writable, because gradients are added to it; use dweight.copy()"
            )
        if np.may_share_memory(weight, dweight):
            raise ValueError(f"{where}: dweight must not be weight, because gradients are added to it; leave it out")


def check_targets(where: str, targets: np.ndarray, vocab_size: int) -> None:
    """Raise ValueError unless targets are token ids (N,) int32 of the vocabulary."""
    _check.array(where, "targets", targets, (None,), np.int32)
    _check.indices(where, "targets", targets, vocab_size, "check the tokenizer's vocabulary size")


def one_training_call(where: str) -> OneCall:
    """Refuses forward_backward while another one is in flight."""
    return OneCall(
        f"{where}: another thread is in forward_backward, which adds to the head's gradients; call it from one thread "
        "at a time, or give each thread a head of its own"
    )


def loss_options(settings: HeadConfig, constants: dict[str, np.ndarray]) -> dict[str, Any]:
    """The arguments that all head constructors take, from the arguments of Head.from_settings."""
    return {
        "label_smoothing": settings.label_smoothing,
        "z_loss": settings.z_loss,
        "soft_cap": settings.soft_cap,
        "log_prior": constants.get("log_prior"),
    }
