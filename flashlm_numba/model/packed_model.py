"""A MatMul-free LM for generation alone, whose weights stay packed: it takes little more memory than its weights.

Ternary weights take 2 bits in memory, and the embedding's rows the bytes of an exported file (rounded_rows.py). Nothing
is unpacked but the rows of the tokens that are read. The trunk and the head use all threads.
Letters: T tokens, V vocabulary, C channels, L blocks, W packed bytes per row.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import numpy as np

from flashlm_numba.heads.base import Part, head_part, likeliest_of_logits
from flashlm_numba.heads.decisions import Decisions, OneDecision
from flashlm_numba.heads.joined import Joined
from flashlm_numba.heads.sampling import check_settings, sample_rows
from flashlm_numba.kernels import _check, draw
from flashlm_numba.kernels.bit_packed import PackedTrunk, packed_outputs
from flashlm_numba.kernels.bit_trunk import BitConfig
from flashlm_numba.kernels.ternary import packed_width
from flashlm_numba.model.config import ACTIVATIONS, ModelConfig
from flashlm_numba.model.rounded_rows import round_rows, widen_rows
from flashlm_numba.model.together import Together
from flashlm_numba.system.arrays import for_reading, hash_of_arrays
from flashlm_numba.system.calls import Gate
from flashlm_numba.system.threads import adopt_threads

_SCORED_ROWS = 64  # of logits (rows, V) in memory


class RoundedRows(NamedTuple):
    """The embedding as a file has it: codes and scales of round_rows, or float32 rows without scales."""

    codes: np.ndarray
    scales: np.ndarray | None
    kind: str  # one of ROWS

    def rows(self, ids: np.ndarray, dim: int) -> np.ndarray:
        """The rows of these tokens (T, C) float32."""
        if self.scales is None:
            return self.codes[ids]
        return widen_rows(self.codes[ids], self.scales[ids], dim, self.kind)

    @property
    def nbytes(self) -> int:
        """Bytes in memory."""
        return self.codes.nbytes + (0 if self.scales is None else self.scales.nbytes)


@dataclass(eq=False)
class PackedState:
    """The decoding state of a text: what its recurrences hold after the tokens that were read."""

    layers: np.ndarray  # (R, C) float32


def _log_sums(logits: np.ndarray) -> np.ndarray:
    """ln of the sum of exp of each row (N, V), (N,) float64."""
    exact = logits.astype(np.float64)
    top = exact.max(1)
    return top + np.log(np.exp(exact - top[:, None]).sum(1))


@dataclass
class PackedHead:
    """An output layer of its own with packed weights, a BitLinear: what Head offers for generation."""

    norm: np.ndarray  # (C,)
    packed: np.ndarray  # (V, W) uint8
    scale: float
    joined: Joined | None = None
    name: ClassVar[str] = "bitlinear"
    has_int8: ClassVar[bool] = False

    @property
    def vocab_size(self) -> int:
        """V."""
        return len(self.packed)

    def logits(self, h: np.ndarray) -> np.ndarray:
        """Logits (N, V) float32 of hidden states h (N, C)."""
        joined = None if self.joined is None else self.joined.find(h, self._logits)
        return self._logits(h) if joined is None else joined.copy()

    def _logits(self, h: np.ndarray) -> np.ndarray:
        return packed_outputs(for_reading(h), self.norm, self.packed, self.scale)

    def distribution(self, h: np.ndarray) -> np.ndarray:
        """Probabilities of all tokens, (N, V) float32."""
        logits = self.logits(h)
        shares = np.exp(logits - logits.max(1, keepdims=True))
        return shares / shares.sum(1, keepdims=True)

    def decisions(self, x: np.ndarray) -> Decisions:
        """The choice of the token for one x (C,) as a sequence of decisions: one, among all tokens."""
        return OneDecision(self.distribution(x[None])[0])

    def log_prob(self, h: np.ndarray, targets: np.ndarray) -> np.ndarray:
        """Natural logarithm of each target's probability, (N,) float32, for h (N, C) and targets (N,) int32."""
        _check.indices("PackedHead", "targets", targets, self.vocab_size, "check the tokenizer's vocabulary size")
        out = np.empty(len(targets), np.float32)
        for start in range(0, len(targets), _SCORED_ROWS):
            part = slice(start, start + _SCORED_ROWS)
            logits = self.logits(h[part])
            out[part] = logits[np.arange(len(logits)), targets[part]] - _log_sums(logits)
        return out

    def log_prob_of(self, x: np.ndarray, tokens: np.ndarray) -> np.ndarray:
        """ln p of some tokens (K,) int32 for one x (C,), (K,) float64."""
        logits = self.logits(x[None])
        return logits[0, tokens] - _log_sums(logits)

    def likeliest(self, h: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
        """The likeliest tokens after each row of h (N, C); see Head.likeliest."""
        return likeliest_of_logits(self.logits(h), count)

    def parts(self, h: np.ndarray, token: int) -> list[Part]:
        """The only part of a token's probability, for h (1, C); see Head.parts."""
        return [head_part(self, h, token)]

    def use_int8(self) -> None:
        """Does nothing: the rows have 2 bits per weight."""

    def sample(
        self,
        h: np.ndarray,
        rng: np.random.Generator,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
    ) -> np.ndarray:
        """Sample one token id per row, (N,) int32; see Head.sample. Raises ValueError as it does."""
        temperature = float(temperature)
        top_k, top_p = check_settings(temperature, top_k, top_p, self.vocab_size)
        if temperature > 0 and top_k is None and top_p is not None:  # needs all probabilities in order
            return sample_rows(self.distribution(h), rng, temperature, top_k, top_p)
        out = np.empty(len(h), np.int32)
        for n, logits in enumerate(self.logits(h)):
            if temperature > 0 and top_k is None:
                out[n] = draw.draw(logits, rng.random(), temperature)
                continue
            ids, values = draw.largest(logits, 1 if temperature == 0 else top_k or 1)
            out[n] = ids[0] if temperature == 0 else ids[draw.draw_sorted(values, rng.random(), temperature, top_p)]
        return out


class PackedModel:
    """What generation needs of Model: prefill, new_state, read and decode_step, and a head. It cannot be trained.

    trunk : the weights, packed;  embedding : (V, C);  head : PackedHead
    Calls from several Python threads take turns, because each one uses all threads; see `announce`. Raises ValueError
    for a configuration with another trunk, or with the n-gram copy.
    """

    memory: ClassVar[None] = None
    advances_together: ClassVar[bool] = True
    prompt_part: ClassVar[int] = 64  # see Model

    def __init__(self, config: ModelConfig, trunk: PackedTrunk, embedding: RoundedRows, head: PackedHead) -> None:
        if config.linear != "bitlinear" or config.ngram_copy_orders:
            raise ValueError("PackedModel: the trunk must be that of linear=bitlinear, without ngram_copy_orders")
        self.config, self.trunk, self.embedding, self.head = config, trunk, embedding, head
        self._turn = Gate()
        self._together = Together(self._step_each, head, config.dim)

    @property
    def bytes_per_token(self) -> int:
        """Bytes of packed weights that a generated token reads: those of the trunk and of the head."""
        return self.trunk.weights.codes.nbytes + self.head.packed.nbytes

    def new_state(self) -> PackedState:
        """The decoding state before the first token of a text."""
        return PackedState(self.trunk.new_state())

    def read(self, state: PackedState, ids: np.ndarray) -> np.ndarray:
        """Feed the next tokens of a text, ids (T,) int32, to a state. Returns their hidden states (T, C) float32.

        Every division of a text into calls gives the same bits. Raises ValueError if a token is not in [0, V).
        """
        ids = for_reading(ids)
        _check.array("PackedModel.read", "ids", ids, (None,), np.int32)
        self._check(ids)
        first = self._together.take(state, int(ids[0])) if len(ids) else None
        rest = ids if first is None else ids[1:]
        adopt_threads()
        with self._turn.writing():
            h = self.trunk.read(state.layers, self.embedding.rows(rest, self.config.dim))
        if first is None:
            return h
        return np.concatenate([first, h]) if len(h) else first

    def prefill(self, ids: np.ndarray) -> tuple[PackedState, np.ndarray]:
        """Read a text, ids (T,) int32 with T >= 1. Returns a decoding state and the last hidden state (1, C)."""
        if not len(ids):
            raise ValueError("PackedModel.prefill: ids must contain at least one token")
        state = self.new_state()
        return state, self.read(state, ids)[-1:]

    def copy_state(self, state: PackedState) -> PackedState:
        """A copy of a decoding state, which continues the text in another way. Raises ValueError after `announce`."""
        self._together.check_free(state)
        return PackedState(state.layers.copy())

    def announce(self, state: PackedState, token: int) -> None:
        """Say which token the state's next call will feed; see Model.announce."""
        self._check(np.array([token], np.int32))
        self._together.announce(state, token)

    def decode_step(self, state: PackedState, token: int) -> np.ndarray:
        """Feed one token id to a state. Returns its hidden state (1, C) float32."""
        return self.read(state, np.array([token], np.int32))

    def _check(self, ids: np.ndarray) -> None:
        _check.indices("PackedModel", "ids", ids, self.config.vocab_size, "the text uses another vocabulary")

    def _step_each(self, states: list[PackedState], tokens: list[int], h: np.ndarray) -> Iterator[int]:
        """See Together. One pass over the weights."""
        rows = self.embedding.rows(np.array(tokens, np.int32), self.config.dim)
        adopt_threads()
        with self._turn.writing():
            h[...] = self.trunk.read_each([state.layers for state in states], rows)
        yield from range(len(states))

    def writer(
        self, state: PackedState, *, temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None
    ) -> None:
        """None: its head computes the logits of all tokens, beside which Python is cheap."""

    remembered: ClassVar[int] = 1

    def copied(self, ids: np.ndarray) -> None:
        """None: the model has no n-gram copies."""

    def log_prob(
        self, h: np.ndarray, targets: np.ndarray, recalled: object = None, copies: object = None
    ) -> np.ndarray:
        """Natural logarithm of each target's probability (N,); see Model.log_prob. There is nothing beside the head."""
        return self.head.log_prob(h, targets)

    def head_after(self, ids: np.ndarray) -> PackedHead:
        """The head, whatever the text."""
        return self.head

    def sync_weights(self) -> None:
        """Does nothing: the weights do not change."""

    def fingerprint(self) -> str:
        """A hash of all that the model computes with, 16 hexadecimal digits."""
        arrays = {f"trunk.{name}": value for name, value in self.trunk.weights._asdict().items()}
        arrays |= {"head.norm": self.head.norm, "head.packed": self.head.packed, "head.scale": self.head.scale}
        arrays |= {"rows": self.embedding.codes, "scales": self.embedding.scales}
        return hash_of_arrays(arrays)

    def use_activations(self, kind: str) -> None:
        """Does nothing: a BitLinear rounds its inputs to int8 in any case. Raises ValueError for an unknown kind."""
        if kind not in ACTIVATIONS:
            raise ValueError(f"PackedModel: activations must be one of {', '.join(ACTIVATIONS)}, got {kind!r}")


def random_packed_model(config: ModelConfig, seed: int, *, std: float = 0.02) -> PackedModel:
    """A model with random weights for measurements: ternary values of equal shares, and int8 rows.

    Each matrix has the scale that keeps the variance of its inputs; norms are ones. No float32 matrix is made.
    Raises ValueError as PackedModel does.
    """
    rng = np.random.default_rng(seed)
    bit = BitConfig(config.dim, config.ffn_dim, config.n_blocks, config.n_passes, config.norm_eps)
    trunk = PackedTrunk(bit)
    for block in range(config.n_blocks):
        for matrix, (name, (_, columns)) in enumerate(trunk.shapes.items()):
            _fill_ternary(trunk.matrix(block, name), columns, rng)
            trunk.weights.scales[block, matrix] = (2 / 3 * columns) ** -0.5
    head = np.empty((config.vocab_size, packed_width(config.dim)), np.uint8)
    _fill_ternary(head, config.dim, rng)
    rows, groups = np.empty((config.vocab_size, config.dim), np.int8), []
    for start in range(0, config.vocab_size, 256):
        part = rng.standard_normal(rows[start : start + 256].shape, np.float32)
        rows[start : start + 256], found = round_rows(part * np.float32(std), "int8")
        groups.append(found)
    embedding = RoundedRows(rows, np.concatenate(groups), "int8")
    scale = (2 / 3 * config.dim) ** -0.5
    return PackedModel(config, trunk, embedding, PackedHead(np.ones(config.dim, np.float32), head, scale))


def _fill_ternary(packed: np.ndarray, columns: int, rng: np.random.Generator) -> None:
    """Random codes 0, 1, 2 in packed (R, W) uint8, and the code of zero beyond the columns."""
    fours = np.arange(81, dtype=np.uint8)
    bytes_ = sum((fours // 3**i % 3 << 2 * i).astype(np.uint8) for i in range(4)).astype(np.uint8)
    for start in range(0, len(packed), 256):
        part = packed[start : start + 256]
        part[...] = bytes_[rng.integers(0, 81, part.shape, np.uint8)]
    for k in range(columns, 4 * packed.shape[1]):
        block, place = divmod(k, 256)
        shift = 2 * (place // 64)
        column = packed[:, 64 * block + place % 64]
        column &= np.uint8(255 ^ 3 << shift)
        column |= np.uint8(1 << shift)
