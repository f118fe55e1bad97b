"""The model: embedding, trunk and head, with named parameters and gradients. Backward is forward in reverse.

Letters: B batch, T time, N = B*T positions, V vocabulary, C channels.
"""

from __future__ import annotations

import contextlib
import dataclasses
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from flashlm_numba.heads import Head
from flashlm_numba.heads.copy_mixture import CopyMixture, CopyShares
from flashlm_numba.kernels import _check
from flashlm_numba.kernels.copy_mixture import CopyWeights
from flashlm_numba.kernels.embedding import embedding_backward, zero
from flashlm_numba.kernels.ngram_copy import all_copies, last_copies, scatter_copies
from flashlm_numba.kernels.writing import Writer
from flashlm_numba.memory.gate import Recalled
from flashlm_numba.memory.mixed_head import MixedHead
from flashlm_numba.memory.ngrams import GatedMemory
from flashlm_numba.model.config import ACTIVATIONS, ModelConfig
from flashlm_numba.model.dropout import NO_DROPOUT, Dropout, InputRows
from flashlm_numba.model.parameters import COPY_SHARES, EMBEDDING, PROJECTION, parameter_shapes
from flashlm_numba.model.together import Together
from flashlm_numba.model.token_rows import TokenRows
from flashlm_numba.model.trunks import TRUNKS
from flashlm_numba.system.arrays import for_reading, hash_of_arrays
from flashlm_numba.system.calls import Gate, OneCall, Pool
from flashlm_numba.system.errors import UserError
from flashlm_numba.system.threads import adopt_threads

PROMPT_PART = 64
READ_TOKENS = 512  # of a text that a model without a finite receptive field reads at once


class Model:
    """Parameters, gradients, forward and backward pass.

    make_head : function that builds the head on the tokens' live rows and their gradient, both (V, C) float32
    `parameters` and `gradients` are dicts with the same keys: those of parameter_shapes, then the head's.

    Threads: `forward`, `prefill` and `decode_step` (with a state per thread) may be called from any number of threads
    at the same time; each call has buffers of its own while it runs. `sync_weights` and `use_activations` wait for
    forward passes in flight, and passes that start meanwhile wait for them. `loss_and_grad`, `backward` and `zero_grad`
    change the gradients, and raise RuntimeError while another one of these calls is in flight. Change parameters only
    when no call is in flight.
    """

    def __init__(
        self,
        config: ModelConfig,
        parameters: dict[str, np.ndarray],
        make_head: Callable[[np.ndarray, np.ndarray], Head],
        memory: GatedMemory | None = None,
    ) -> None:
        self.config = config
        for name, shape in parameter_shapes(config).items():
            if name not in parameters:
                raise ValueError(f"Model: parameter {name} is missing")
            _check.array("Model", name, parameters[name], shape)
        self.parameters = {name: parameters[name] for name in parameter_shapes(config)}
        # np.zeros allocates memory on the first write, so a model that only generates has no gradients in memory
        self.gradients = {name: np.zeros(value.shape, np.float32) for name, value in self.parameters.items()}
        self._rows = TokenRows(self.parameters, self.gradients)
        self.head = make_head(self._rows.values, self._rows.gradient)
        for name, value in self.head.parameters.items():
            self.parameters[f"head.{name}"] = value
            self.gradients[f"head.{name}"] = self.head.gradients[name]
        self.memory = memory
        if memory is not None:
            for name, value in memory.gate.parameters.items():
                self.parameters[f"memory.{name}"] = value
                self.gradients[f"memory.{name}"] = memory.gate.gradients[name]
        self._copy_shares = None
        if config.copy_shares:
            weights, gradients = (
                CopyWeights(*(arrays[COPY_SHARES + name] for name in CopyWeights._fields))
                for arrays in (self.parameters, self.gradients)
            )
            tied = self._rows.values, self._rows.gradient
            self._copy_shares = CopyShares(weights, gradients, *tied, self.head.row_of_token)
        self._trunk = TRUNKS[config.linear](config)
        self._weights = self._trunk.weights
        self._embedding = for_reading(self._rows.values)
        self._buffers: Pool[Any] = Pool()
        # the thread, buffers and rows of the last call of forward, until another call uses buffers
        self._last: tuple[int, Any, np.ndarray] | None = None
        self._weights_in_use = Gate()
        self._training = OneCall(
            "Model: another thread is computing gradients of this model, which are added to one set of arrays; train "
            "from one thread at a time"
        )
        # a memory's probabilities take longer than the head's, and are computed for each text alone
        joins = self.head.joins and memory is None
        self._together = Together(self._step_each, self.head, config.dim) if joins else None
        self.use_activations(config.activations)

    def use_activations(self, kind: str) -> None:
        """Select the arithmetic of the ternary products, "float" or "int8"; the default is that of the configuration.

        With "int8" both passes quantise the inputs of the products with one scale per row. This is faster and less
        accurate. A decoding state keeps the arithmetic with which it was started. Raises ValueError for another kind.
        """
        if kind not in ACTIVATIONS:
            raise ValueError(f"Model: activations must be one of {', '.join(ACTIVATIONS)}, got {kind!r}")
        with self._weights_in_use.writing():
            try:
                self._trunk.use_int8(kind == "int8")
            except ValueError as error:  # the environment variable that selects a variant is wrong
                raise UserError(f"{error}.") from None
            self._last = None  # a backward pass must not follow a forward pass with other activations
            self._buffers.clear()
            self._sync_weights()

    def sync_weights(self) -> None:
        """Ternarise and pack the weights for the kernels. Call this after every change of the parameters."""
        adopt_threads()
        with self._weights_in_use.writing():
            self._sync_weights()

    def _sync_weights(self) -> None:
        self._rows.sync()
        self._trunk.set_weights(self.parameters)
        self.head.prepare()

    @property
    def head_ternary_names(self) -> list[str]:
        """Names in `parameters` of the head's ternary matrices, which have a scale each."""
        return [f"head.{name}" for name in self.head.ternary]

    def logits(self, ids: np.ndarray) -> np.ndarray:
        """Logits of the next token (B, T, V) float32 for ids (B, T), of any type of integer. For tests and small input.

        A softmax over the last axis gives the probabilities. Those of a tree, of a mixture with the n-gram copies or
        with a memory are log-probabilities already. If parameters have changed, call sync_weights first. Raises
        ValueError if ids are no matrix of ids in [0, V).
        """
        ids = np.asarray(ids)
        if ids.ndim != 2 or ids.dtype.kind not in "iu":
            raise ValueError(f"Model.logits: ids must be integers of shape (B, T), got {ids.dtype} {ids.shape}")
        _check.indices("Model.logits", "ids", ids, self.config.vocab_size, "the data use another vocabulary")
        if not ids.size:
            return np.zeros((*ids.shape, self.config.vocab_size), np.float32)
        ids = np.ascontiguousarray(ids, np.int32)
        h = self.forward(ids)
        if self.memory is None:
            return self.head_at(self.copied(ids)).logits(h).reshape(*ids.shape, self.config.vocab_size)
        out = np.empty((*ids.shape, self.config.vocab_size), np.float32)
        for index in np.ndindex(ids.shape):
            row, t = index
            at = row * ids.shape[1] + t
            p = self.head_after(ids[row, : t + 1]).distribution(h[at : at + 1])
            np.log(np.maximum(p[0], np.float32(1e-45)), out=out[index])
        return out

    def zero_grad(self) -> None:
        """Set every gradient to zero."""
        with self._training.alone():
            for gradient in self.gradients.values():
                zero(gradient)
            self._rows.zero_grad()

    @contextlib.contextmanager
    def _buffers_for(self, batch: int, time: int) -> Iterator[Any]:
        """Buffers for one call; meanwhile no other thread changes the weights."""

        def make() -> Any:
            self._last = None  # frees the old buffers before new ones are allocated
            return self._trunk.new_buffers(batch, time)

        adopt_threads()
        with (
            self._weights_in_use.reading(),
            self._buffers.item(lambda buffers: buffers.fits(self._weights, batch, time), make) as buffers,
        ):
            self._last = None
            yield buffers

    def _rows_of(self, ids: np.ndarray) -> np.ndarray:
        """Rows of the embedding (B*T,) int32 for ids (B, T). Raises ValueError if these are not ids."""
        _check.array("Model.forward", "ids", ids, (None, None), np.int32)
        _check.indices("Model.forward", "ids", ids, self.config.vocab_size, "the data use another vocabulary")
        rows = ids.reshape(-1)
        if self.head.row_of_token is not None:
            rows = self.head.row_of_token[rows]
        return np.ascontiguousarray(rows, np.int32)

    def forward(self, ids: np.ndarray) -> np.ndarray:
        """Hidden states (B*T, C) float32 for token ids (B, T) int32.

        A hidden state depends on no later token. Raises ValueError if an id is not in [0, V).
        """
        ids = for_reading(ids)
        rows = self._rows_of(ids)
        with self._buffers_for(*ids.shape) as buffers:
            h = self._trunk.forward(buffers, self._embedding, rows).copy()
            self._last = threading.get_ident(), buffers, rows
        return h

    def prefill(self, ids: np.ndarray) -> tuple[Any, np.ndarray]:
        """Read a text, ids (T,) int32 with T >= 1, in one pass. Returns a decoding state and the last hidden state
        (1, C).

        Only the last receptive_field tokens matter, if it is finite, so only these are read. If parameters have
        changed, call sync_weights first. Raises ValueError if there is no token or if one is not in [0, V).
        """
        ids = for_reading(ids)
        _check.array("Model.prefill", "ids", ids, (None,), np.int32)
        if not len(ids):
            raise ValueError("Model.prefill: ids must contain at least one token; a text begins with <|endoftext|>")
        if self.config.receptive_field is None:
            state = self.new_state()
            return state, self.read(state, ids)[-1:]
        rows = self._rows_of(ids[None, -self.config.receptive_field :])
        with self._buffers_for(1, len(rows)) as buffers:
            state, h = self._trunk.prefill(buffers, self._embedding, rows)
            return state, h[-1:].copy()

    def new_state(self) -> Any:
        """The decoding state before the first token of a text, for the weights of the last sync_weights."""
        with self._weights_in_use.reading():
            return self._trunk.new_state()

    def read(self, state: Any, ids: np.ndarray) -> np.ndarray:
        """Feed the next tokens of a text, ids (T,) int32, to a state. Returns their hidden states (T, C) float32.

        With linear=bitlinear they have the bits of `forward` over the whole text, and of decode_step. Raises ValueError
        if a token is not in [0, V), and RuntimeError if another thread is using the state.
        """
        ids = for_reading(ids)
        _check.array("Model.read", "ids", ids, (None,), np.int32)
        rows = self._rows_of(ids[None])
        h = np.empty((len(rows), self.config.dim), np.float32)
        if self._together is not None and self.config.receptive_field is None:
            self._together.check_free(state)
        if self.config.receptive_field is not None:
            for t, token in enumerate(ids):
                h[t] = self.decode_step(state, int(token))[0]
            return h
        for start in range(0, len(rows), READ_TOKENS):
            some = rows[start : start + READ_TOKENS]
            with self._buffers_for(1, len(some)) as buffers:
                h[start : start + READ_TOKENS] = self._trunk.read(state, buffers, self._embedding, some)
        return h

    @property
    def prompt_part(self) -> int | None:
        """Ids of a text that `read` takes in some milliseconds, or None where `prefill` does with a text of any length.

        Whoever runs several texts reads a long one in such parts, by prefill and then by read, and gives the others
        their turns between.
        """
        return PROMPT_PART if self.config.receptive_field is None else None

    def copy_state(self, state: Any) -> Any:
        """A copy of a decoding state, which continues the text in another way. It shares the weights.

        Raises ValueError after `announce`.
        """
        if self._together is not None:
            self._together.check_free(state)
        own = {name: getattr(state, name) for name in ("state", "mixer_state") if hasattr(state, name)}
        for name, parts in own.items():
            arrays = {key: part.copy() for key, part in parts._asdict().items() if isinstance(part, np.ndarray)}
            own[name] = parts._replace(**arrays)
        return dataclasses.replace(state, **own, calls=[])

    @property
    def advances_together(self) -> bool:
        """Whether texts with announced tokens advance together, on all threads: where the head reads all its rows, and
        these are most of what a token reads.
        """
        return self._together is not None

    def announce(self, state: Any, token: int) -> None:
        """Say which token the state's next call will feed, by decode_step.

        When the first of several texts with announced tokens asks for its step, the steps of all are computed, and
        the head reads its rows once for them. A text has the bits that it has alone. Raises ValueError if the token is
        not in [0, V), or if another one was announced. Nothing happens if texts of this model do not advance together.
        """
        self._row_of(token)
        if self._together is not None:
            self._together.announce(state, token)

    def decode_step(self, state: Any, token: int) -> np.ndarray:
        """Feed one token id to a state from prefill or new_state. Returns the hidden state (1, C) float32.

        The result is valid until the state's next call. Raises ValueError if the token is not in [0, V), and
        RuntimeError if another thread is using the state.
        """
        row = self._row_of(token)
        if self._together is not None and (h := self._together.take(state, token)) is not None:
            return h
        return self._trunk.step(state, self._embedding, row)

    def _row_of(self, token: int) -> int:
        """The row of the embedding of a token."""
        if not 0 <= token < self.config.vocab_size:
            raise ValueError(f"Model.decode_step: token must be in [0, {self.config.vocab_size}), got {token}")
        return int(token if self.head.row_of_token is None else self.head.row_of_token[token])

    def _step_each(self, states: list[Any], tokens: list[int], h: np.ndarray) -> Iterator[int]:
        """See Together."""
        for number, (state, token) in enumerate(zip(states, tokens, strict=True)):
            h[number] = self._trunk.step(state, self._embedding, self._row_of(token))[0]
            yield number

    def writer(
        self, state: Any, *, temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None
    ) -> Writer | None:
        """What continues the text of a state from prefill or decode_step in compiled code, several tokens per call.

        It draws what head_after(text).sample draws with the same settings and random numbers. None if that needs Python
        for every token. Raises ValueError if a setting is out of range.
        """
        if self.memory is not None:
            return None
        shares = None if self._copy_shares is None else self._copy_shares.model
        drawing = self.head.drawing(temperature, top_k, top_p, shares)
        if drawing is None:
            return None
        token_of_row = self.head.tokens_of_rows(np.arange(self.config.vocab_size))
        return Writer(state, drawing, self._embedding, token_of_row)

    def backward(self, dh: np.ndarray) -> None:
        """Add the gradients of this thread's last forward call, given dh (B*T, C) float32, to `gradients`.

        Those of the embedding are included. Raises ValueError if another call has used the buffers since.
        """
        with self._training.alone(), self._weights_in_use.reading():
            caller, buffers, rows = self._last or (None, None, None)
            if buffers is None or rows is None or caller != threading.get_ident():
                raise ValueError(
                    "Model.backward: call forward first, in the same thread and with no other call between; to train "
                    "beside other threads, use loss_and_grad"
                )
            with self._buffers.again(buffers) as mine:
                if not mine:
                    raise ValueError("Model.backward: another call is using the buffers of forward; use loss_and_grad")
                dh = for_reading(dh)
                _check.array("Model.backward", "dh", dh, buffers.activations.out.shape)
                self._trunk_backward(buffers, dh, self._embedding, accumulate=True)
                self._embedding_backward(buffers, rows, dh, self._rows.gradient)
                self._rows.backward()

    def _head_pass(
        self,
        h: np.ndarray,
        targets: np.ndarray,
        weights: np.ndarray,
        recalled: Recalled | None,
        copies: np.ndarray | None,
        accumulate: bool,
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Head.forward_backward, with the nll of the mixture if there is a memory, whose gate is trained too."""
        head = self.head_at(copies)
        if self.memory is None or recalled is None:
            return head.forward_backward(h, targets, weights, accumulate=accumulate)
        return self.memory.gate.forward_backward(head, h, targets, weights, recalled, accumulate=accumulate)

    def log_prob(
        self,
        h: np.ndarray,
        targets: np.ndarray,
        recalled: Recalled | None = None,
        copies: np.ndarray | None = None,
    ) -> np.ndarray:
        """Natural logarithm of each target's probability (N,), for hidden states h (N, C) and targets (N,) int32.

        recalled : what the memory says of the targets, if the model has one; None: the probability without it
        copies : what is copied at these positions (N, O), from copied; None: the head's probability without them
        """
        own = self.head_at(copies).log_prob(h, targets)
        return own if self.memory is None or recalled is None else self.memory.mixed(h, own, recalled)

    def copied(self, ids: np.ndarray) -> np.ndarray | None:
        """The token ids (B*T, O) int32 that have shares beside the head at each position of ids (B, T), -1 for none.

        None if the model has no such shares. A position's copies depend on the ids up to it only.
        """
        if self._copy_shares is None:
            return None
        adopt_threads()
        found = all_copies(for_reading(ids), self.config.ngram_copy_orders, self.config.ngram_copy_reach)
        return found.reshape(-1, found.shape[-1])

    def head_at(self, copies: np.ndarray | None) -> Head | CopyMixture:
        """The head, or its mixture with what is copied at some positions (N, O), from copied; without the memory."""
        if self._copy_shares is None or copies is None:
            return self.head
        return CopyMixture(self.head, self._copy_shares, copies)

    def head_after(self, ids: np.ndarray) -> Head | CopyMixture | MixedHead:
        """What predicts the token after a text, ids (n,) int32: the head, mixed with the n-gram copies and the memory.

        Its methods take the text's last hidden state (1, C). Of the copies, only the last `remembered` ids matter.
        """
        head: Head | CopyMixture = self.head
        if self._copy_shares is not None:
            recent = for_reading(ids)[-self.remembered :]
            head = self.head_at(last_copies(recent, self.config.ngram_copy_orders, self.config.ngram_copy_reach)[None])
        return head if self.memory is None else self.memory.beside(head, ids)

    def fingerprint(self) -> str:
        """A hash of all that the model computes with, 16 hexadecimal digits.

        Of a memory it covers the gate, which is trained with it, rather than a gigabyte of counts.
        """
        settings = repr(self.config).encode()
        arrays: dict[str, Any] = {"config": np.frombuffer(settings, np.uint8)}
        return hash_of_arrays(arrays | self.head.constants() | self.parameters)

    @property
    def remembered(self) -> int:
        """The last ids of a text in which head_after finds what is copied, at least 1."""
        config = self.config
        return config.ngram_copy_reach + max(config.ngram_copy_orders) if config.copy_shares else 1

    def _embedding_backward(self, buffers: Any, rows: np.ndarray, dh: np.ndarray, gradient: np.ndarray) -> None:
        """Add to `gradient` that of the embedding from the input rows, and from the copied rows at input and output."""
        w, dx = self._weights, buffers.gradients.dx
        embedding_backward(gradient, dx, rows)
        gain_out = w.gain_out if self.config.copy_adds else np.zeros_like(w.gain_in)
        for o, copies in enumerate(buffers.activations.copies):
            scatter_copies(gradient, dx, dh, copies, w.gain_in[o], gain_out[o])

    def _trunk_backward(self, buffers: Any, dh: np.ndarray, embedding: np.ndarray, *, accumulate: bool) -> None:
        """Add the trunk's gradients to `gradients`, or replace all but the embedding's and the head's."""
        named = self._trunk.backward(buffers, dh, embedding)
        for name, gradient in self.gradients.items():
            if name in named:
                np.add(gradient if accumulate else np.float32(0), named[name], out=gradient)
            elif name in (EMBEDDING, PROJECTION) or name.startswith(("head.", "memory.", COPY_SHARES)):
                continue  # they are not the trunk's
            elif not accumulate:
                gradient[...] = 0  # of the router, which has none

    def loss_and_grad(
        self,
        ids: np.ndarray,
        targets: np.ndarray,
        weights: np.ndarray,
        *,
        accumulate: bool = True,
        dropout: Dropout = NO_DROPOUT,
    ) -> tuple[np.ndarray, np.ndarray, dict[str, float]]:
        """Run one micro-batch: forward, head, backward. Gradients are added to `gradients` or replace them.

        ids, targets : (B, T) int32
        weights : (B*T,) float32, the share of each position in the step's loss; the shares of a step sum to 1.
            Positions of weight 0 cost the head nothing.
        accumulate : False replaces the gradients, for the first micro-batch of a step. It is cheaper than zero_grad,
            because the head, which has most of the gradients, clears only those that it does not write.
        dropout : what becomes 0 in this micro-batch; loss and nll are those with it
        Returns loss (n,) and nll (n,) float32, in nats, of the positions of non-zero weight, in order; and the seconds
        spent in `embedding`, `trunk` and `head`. Raises RuntimeError if another thread is computing gradients.
        """
        start = time.perf_counter()
        ids, targets, weights = for_reading(ids), for_reading(targets), for_reading(weights)
        rows = self._rows_of(ids)
        _check.array("Model.loss_and_grad", "targets", targets, ids.shape, np.int32)
        _check.array("Model.loss_and_grad", "weights", weights, (ids.size,))
        with self._training.alone(), self._buffers_for(*ids.shape) as buffers:
            table = InputRows(self._embedding, rows, dropout)
            h = self._trunk.forward(buffers, table.weight, table.rows)
            gains = dropout.hidden_gains(*h.shape)
            h = h if gains is None else h * gains
            after_forward = time.perf_counter()
            flat = targets.reshape(-1)
            recalled = None if self.memory is None else self.memory.recall_in_training(ids, targets)
            copies = self.copied(ids)
            if weights.all():
                loss, nll, dh = self._head_pass(h, flat, weights, recalled, copies, accumulate)
            else:
                kept = np.flatnonzero(weights)
                loss, nll, dh_kept = self._head_pass(
                    np.ascontiguousarray(h[kept]),
                    np.ascontiguousarray(flat[kept]),
                    weights[kept],
                    None if recalled is None else recalled.at(kept),
                    None if copies is None else copies[kept],
                    accumulate,
                )
                dh = np.zeros_like(h)
                dh[kept] = dh_kept
            dh = dh if gains is None else dh * gains
            after_head = time.perf_counter()
            self._trunk_backward(buffers, dh, table.weight, accumulate=accumulate)
            after_trunk = time.perf_counter()
            gradient = table.gradient_into(self._rows.gradient)
            self._embedding_backward(buffers, table.rows, dh, gradient)
            table.add_gradient(self._rows.gradient, gradient)
            self._rows.backward()
        end = time.perf_counter()
        seconds = {
            "embedding": end - after_trunk,
            "trunk": after_forward - start + after_trunk - after_head,
            "head": after_head - after_forward,
        }
        return loss, nll, seconds
