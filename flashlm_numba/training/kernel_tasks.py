"""TASKS: everything that the kernels' compilation consists of, in pieces that processes share out among themselves.

A task calls kernels on small arrays, which compiles them. The compiled code is the same for any size. Tasks compile
different kernels. (Two processes that compile the same kernel do no harm: each writes complete files.)
This module imports no numerical package at the top, because the process that shares the tasks out needs none.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from flashlm_numba.heads.sampling import KINDS
from flashlm_numba.heads.table import HEADS, head_class
from flashlm_numba.model.config import NORMUON_VARIANTS, ModelConfig, OptimizerConfig
from flashlm_numba.system.arrays import for_reading

if TYPE_CHECKING:
    from flashlm_numba.heads.base import Head
    from flashlm_numba.kernels.bit_trunk import BitBuffers
    from flashlm_numba.kernels.trunk import TrunkBuffers, TrunkWeights
    from flashlm_numba.model.trunks import BitTrunk

# an embedding too large for the serial optimiser kernel
CONFIG = ModelConfig(vocab_size=5_000, dim=16, ffn_dim=8, groups=1, ngram_copy_orders=(1,))


@dataclass(frozen=True)
class Task:
    """A piece of the compilation."""

    part: str  # of the kernels: what a command names in system/compiled.py
    run: Callable[[], object]
    seconds: float = 10.0  # on one core of 2.5 GHz; decides the order only
    functions: int = 20  # compiled on the way, helpers too; decides only how far the bar moves


def _trunk() -> tuple[TrunkWeights, TrunkBuffers]:
    from flashlm_numba.kernels.trunk import TrunkBuffers
    from flashlm_numba.model.trunks import TernaryTrunk

    weights = TernaryTrunk(CONFIG).weights
    return weights, TrunkBuffers(weights, 1, 32)


def _forward(name: str) -> None:
    weights, buffers = _trunk()
    buffers.forward_functions(weights)[name]()


def _backward(name: str) -> None:
    weights, buffers = _trunk()
    buffers.backward_functions(weights)[name]()


def _bit_trunk() -> tuple[BitTrunk, BitBuffers]:
    from flashlm_numba.model.trunks import BitTrunk

    trunk = BitTrunk(replace(CONFIG, mixer="mlgru", linear="bitlinear"))
    return trunk, trunk.new_buffers(1, 32)


def _bit_function(name: str, backward: bool) -> None:
    _, buffers = _bit_trunk()
    buffers.functions(backward=backward)[name]()


def _bit_weights() -> None:
    """The weights' layouts, and what both passes and decoding call."""
    from flashlm_numba.kernels._bit_layer import work_functions

    trunk, _ = _bit_trunk()
    for matrices in trunk.weights.layers.values():
        matrices.set(0, np.zeros(matrices.shape, np.float32))
    for function in work_functions(trunk.weights.variant).values():
        function()


def _bit_panels() -> None:
    trunk, _ = _bit_trunk()
    trunk.weights.read(backward=True)


def _bit_decoding() -> None:
    trunk, buffers = _bit_trunk()
    state, embedding = trunk.new_state(), np.zeros((5, CONFIG.dim), np.float32)
    trunk.step(state, embedding, 0)
    trunk.read(state, buffers, embedding, np.zeros(32, np.int32))


def _bit_packed() -> None:
    """For one token, and for several."""
    from flashlm_numba.kernels.ternary_gemv import best_variant
    from flashlm_numba.model.packed_model import random_packed_model

    best_variant()  # compiles what checks it
    config = replace(CONFIG, mixer="mlgru", linear="bitlinear", ngram_copy_orders=())
    model = random_packed_model(config, 0)
    state, _ = model.prefill(np.zeros(3, np.int32))
    model.head.logits(model.decode_step(state, 0))


def _pack_weights(activations: str) -> None:
    """With "int8" also the product, since the program checks it before the first use."""
    from flashlm_numba.heads.dense import DenseHead
    from flashlm_numba.kernels.bitlinear import absmean_ternary
    from flashlm_numba.kernels.ternary import pack_ternary
    from flashlm_numba.model.model import Model
    from flashlm_numba.model.parameters import initial_parameters

    Model(replace(CONFIG, activations=activations), initial_parameters(CONFIG, 0), DenseHead)
    absmean_ternary(np.zeros((4, 8), np.float32))  # export uses it, whatever the head
    if activations == "int8":
        pack_ternary(np.zeros((4, 8), np.float32))


def _float_product() -> None:
    from flashlm_numba.kernels._packed_gemm import packed_gemm_address

    packed_gemm_address()


def _gradient(activations: str) -> None:
    """In float it is BLAS's, called by the backward pass."""
    from flashlm_numba.kernels.ternary_wgrad import ternary_wgrad_address

    if activations == "int8":
        ternary_wgrad_address()


def _decode() -> None:
    from flashlm_numba.kernels import decode

    weights, _ = _trunk()
    decode.decode_step(decode.new_state(weights), np.zeros((5, CONFIG.dim), np.float32), 0)


def _prefill() -> None:
    from flashlm_numba.kernels import decode

    weights, buffers = _trunk()
    decode.prefill(weights, buffers, np.zeros(32, np.int32))


def _embedding_gradient() -> None:
    from flashlm_numba.kernels.embedding import embedding_backward, zero
    from flashlm_numba.kernels.ngram_copy import scatter_copies

    weights, buffers = _trunk()
    dx, gradient = buffers.gradients.dx, np.zeros((5, CONFIG.dim), np.float32)
    zero(gradient)
    embedding_backward(gradient, dx, np.zeros(32, np.int32))
    scatter_copies(gradient, dx, dx, buffers.activations.copies[0], weights.gain_in[0], weights.gain_out[0])


def _copies() -> None:
    """The n-gram copies beside a head, for a text and for one token."""
    from flashlm_numba.heads.copy_mixture import CopyShares
    from flashlm_numba.kernels.copy_mixture import CopyWeights
    from flashlm_numba.kernels.ngram_copy import all_copies, last_copies

    ids, weight = np.zeros((1, 64), np.int32), np.zeros((5, CONFIG.dim), np.float32)
    weights, gradients = (
        CopyWeights(*(np.zeros(shape, np.float32) for shape in ((1,), (1, CONFIG.dim), (1,)))) for _ in range(2)
    )
    shares, h, copies = CopyShares(weights, gradients, weight, weight.copy()), _hidden(), all_copies(ids, (1,), 9)[0]
    logs, matches = shares.log_shares(h, copies)
    shares.backward(logs[:, 1:], matches, h, copies, np.zeros_like(h))
    after = last_copies(ids[0], (1,), 9)[None]
    shares.log_shares(h[:1], after)
    shares.at(h[:1], after)


def _optimizers(normuon: bool) -> None:
    """The update of the matrices, or that of everything else with the running average of the weights."""
    from flashlm_numba.kernels.ema import ema_update
    from flashlm_numba.model.parameters import initial_parameters
    from flashlm_numba.training.optimizer import NORMUON, Optimizer, parameter_groups

    parameters = initial_parameters(CONFIG, 0)
    matrices = parameter_groups(parameters)[NORMUON]
    own = {name: value for name, value in parameters.items() if (name in matrices) == normuon}
    gradients = {name: np.zeros(value.shape, np.float32) for name, value in own.items()}
    for options in (
        [OptimizerConfig(normuon=variant) for variant in NORMUON_VARIANTS]
        if normuon
        else [
            OptimizerConfig(),
            OptimizerConfig(sparse_adamw=True),
            OptimizerConfig(sparse_adamw=True, rowwise_exp_avg_sq=True),
        ]
    ):
        Optimizer(own, gradients, options).step(0.0, 0.0, 1.0)
    if not normuon:
        for value in own.values():
            ema_update(value.copy(), value, 0.999)


def _head(name: str) -> Head:
    from flashlm_numba.heads.config import HeadConfig
    from flashlm_numba.model.parameters import EMBEDDING, initial_parameters

    head, settings = head_class(name), HeadConfig(name=name, num_sampled=100, tree_rank=2, log_prior=True)
    counts = np.arange(CONFIG.vocab_size)
    weight = initial_parameters(CONFIG, 0)[EMBEDDING]
    constants = head.constants_from_data(settings, counts, None)
    return head.from_settings(
        settings, weight, np.zeros_like(weight), constants=constants, parameters={}, counts=counts
    )


def _ngrams() -> None:
    from flashlm_numba.kernels.ngram_counts import count_ngrams

    text = np.array([1, 2, 1, 2, 0], np.int32)
    for vocab_size in (3, 2**16 + 1):  # tokens of 2 and of 4 bytes
        model = count_ngrams(text, vocab_size, 0)
        model.probability(text)
        model.distribution(text)
        model.context_class(text)
        model.draw(text, 0.5)
        model.without_document(text[None, :-1].copy(), text[None, 1:].copy())


def _hidden() -> np.ndarray:
    return np.random.default_rng(0).standard_normal((64, CONFIG.dim), np.float32)


def _loss(name: str) -> None:
    head, h, targets = _head(name), _hidden(), np.arange(64, dtype=np.int32)
    head.begin(np.random.default_rng(0), full=False)
    head.forward_backward(h, targets, np.full(64, 1 / 64, np.float32), accumulate=False)
    head.log_prob(h, targets)


def _sampling(name: str, kind: str) -> None:
    from flashlm_numba.heads.joined import Joined
    from flashlm_numba.kernels.draw import draw_sorted

    head, h, rng = _head(name), _hidden()[:1], np.random.default_rng(0)
    for options in SAMPLING[kind]:
        head.sample(h, rng, **options)
    if kind == "whole":
        head.distribution(h)
    if kind == "plain":
        head.decisions(h[0]).probabilities()
    if kind == "likeliest":  # beside copies or a memory too
        ids, log_p = head.top_mixed(h[0], 4, np.zeros(1, np.int32), np.full(2, 0.5))
        draw_sorted(log_p, 0.5)
        head.log_prob_of(h[0], ids)
    if head.has_int8:
        head.use_int8()
        for options in SAMPLING[kind]:
            head.sample(h, rng, **options)
    if kind == "whole" and head.joins:  # texts of a server, which advance together
        for rows in (_head(name), head):  # float32 and int8
            rows.joined = Joined(_hidden()[:2])
            rows.sample(rows.joined.row(0), rng)


def _writing(linear: str, kind: str) -> None:
    """With a tree; its draws and the trunk's decoding are compiled by other tasks."""
    from flashlm_numba.kernels.copy_mixture import CopyWeights
    from flashlm_numba.kernels.tree_draw import CopyModel
    from flashlm_numba.kernels.writing import compile_writing
    from flashlm_numba.model.trunks import TRUNKS

    config = CONFIG if linear == "ternary" else replace(CONFIG, mixer="mlgru", linear=linear)
    head = _head("tree")
    weight = for_reading(head.parameters.get("weight", np.zeros((CONFIG.vocab_size, CONFIG.dim), np.float32)))
    weights = CopyWeights(*(np.zeros(shape, np.float32) for shape in ((1,), (1, CONFIG.dim), (1,))))
    for options in SAMPLING[kind]:
        drawing = head.drawing(**options, copies=CopyModel(weight, weights))
        if drawing is not None:
            compile_writing(TRUNKS[linear](config).new_state(), drawing, weight)


SAMPLING: dict[str, list[dict[str, Any]]] = {
    "plain": [{}],
    "likeliest": [{"temperature": 0.8, "top_k": 4}, {"temperature": 0.0}],
    "whole": [{"temperature": 0.8}, {"top_p": 0.9}],
}


# by name; seconds and functions as measured
TASKS: dict[str, Task] = {
    "float weights": Task("float", partial(_pack_weights, "float"), 1, 3),
    "float product": Task("float", _float_product, 4, 21),
    "float gradient": Task("float-backward", partial(_gradient, "float"), 0, 1),
    "int8 weights": Task("int8", partial(_pack_weights, "int8"), 5, 24),
    "int8 gradient": Task("int8-backward", partial(_gradient, "int8"), 3, 14),
    "forward: mixer": Task("forward", partial(_forward, "mixer_forward"), 6, 23),
    "forward": Task("forward", partial(_forward, "forward"), 4, 12),
    "forward: region": Task("forward", partial(_forward, "region"), 3, 1),
    "decoding": Task("decoding", _decode, 17, 50),
    "decoding: first state": Task("decoding", _prefill, 3, 7),
    "backward: mixer": Task("backward", partial(_backward, "mixer_backward"), 8, 25),
    "backward": Task("backward", partial(_backward, "backward"), 4, 9),
    "backward: region": Task("backward", partial(_backward, "region"), 4, 1),
    "bitlinear": Task("bitlinear", _bit_weights, 8, 30),
    "bitlinear panels": Task("bitlinear-backward", _bit_panels, 1, 2),
    "bitlinear forward": Task("bitlinear-forward", partial(_bit_function, "forward", False), 5, 15),
    "bitlinear forward: region": Task("bitlinear-forward", partial(_bit_function, "region", False), 4, 1),
    "bitlinear backward": Task("bitlinear-backward", partial(_bit_function, "backward", True), 9, 15),
    "bitlinear backward: region": Task("bitlinear-backward", partial(_bit_function, "region", True), 7, 1),
    "bitlinear decoding": Task("bitlinear-decoding", _bit_decoding, 12, 20),
    "bitlinear packed": Task("bitlinear-packed", _bit_packed, 15, 40),
    "embedding's gradient": Task("embedding", _embedding_gradient, 2, 3),
    "n-gram copies beside a head": Task("copies", _copies, 3, 15),
    "NorMuon": Task("optimizer", partial(_optimizers, normuon=True), 7, 21),
    "n-grams": Task("ngrams", _ngrams, 8, 30),
    "AdamW": Task("optimizer", partial(_optimizers, normuon=False), 5, 16),
}
# of sampled and bitlinear: after the dense head, whose kernels they use
_LOSS = {"tree": (24, 63), "dense": (10, 40), "sampled": (1, 40), "bitlinear": (2, 45)}
_DRAWS = {("tree", "plain"): (3, 12), ("tree", "likeliest"): (4, 22), ("tree", "whole"): (7, 20)}
for _name in HEADS:
    TASKS[f"{_name} head"] = Task(_name, partial(_loss, _name), *_LOSS.get(_name, ()))
    for _kind in KINDS:
        TASKS[f"{_name} head: {_kind} sampling"] = Task(
            f"{_name}-{_kind}", partial(_sampling, _name, _kind), *_DRAWS.get((_name, _kind), (2, 10))
        )
for _kind in ("plain", "likeliest"):
    for _linear, _part in (("ternary", "tree"), ("bitlinear", "bitlinear-tree")):
        TASKS[f"writing: {_linear}, {_kind}"] = Task(f"{_part}-{_kind}", partial(_writing, _linear, _kind), 2, 2)
