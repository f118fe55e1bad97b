"""Names, shapes and initial values of the model's parameters, except those of its head.

embedding.weight, and embedding.projection if the embedding has a width of its own
blocks.B.norm1.weight, blocks.B.mixer.*, blocks.B.norm2.weight, blocks.B.glu.{gate,up,down}.weight
    with linear=bitlinear blocks.B.glu.{gate_up,down}.{weight,norm.weight}
router.{weight,bias} or, with linear=bitlinear, lower_bounds; final_norm.weight
ngram_copy.{inputs,outputs}.O.weight, or ngram_copy.inputs.O.weight and ngram_copy.mixture.{bias,hidden,match}
"""

from __future__ import annotations

import math

import numpy as np

from flashlm_numba.kernels import _check
from flashlm_numba.model.config import ModelConfig
from flashlm_numba.model.mixers import MIXERS, Parameter

ENDS = ("inputs", "outputs")  # ends of the trunk, where copied rows are added
EMBEDDING = "embedding.weight"
PROJECTION = "embedding.projection"  # see token_rows.py
COPY_SHARES = "ngram_copy.mixture."  # prefix of the names of kernels.copy_mixture.CopyWeights
COPY_BIAS = -4.0  # initial one: a copy begins with a share of 1.8 %


def _glu_parameters(config: ModelConfig) -> dict[str, Parameter]:
    """Those of a block, by name within the GLU. With linear=bitlinear gate and up are one matrix with one scale."""
    c, inner = config.dim, config.ffn_dim
    if config.linear == "bitlinear":
        return {
            "gate_up.weight": Parameter((2 * inner, c), 0.02, ternary=True),
            "gate_up.norm.weight": Parameter((c,), fill=1.0),
            "down.weight": Parameter((c, inner), 0.02 / math.sqrt(2 * config.n_blocks), ternary=True),
            "down.norm.weight": Parameter((inner,), fill=1.0),
        }
    return {
        "gate.weight": Parameter((inner, c), c**-0.5, ternary=True),
        "up.weight": Parameter((inner, c), c**-0.5, ternary=True),
        "down.weight": Parameter((c, inner), 0.01, ternary=True),
    }


def model_parameters(config: ModelConfig) -> dict[str, Parameter]:
    """Every parameter except the head's, in order, in PyTorch's layouts. Initial values follow FlashLM v3.

    Norms start at one, and the gains of the leaky average and of the n-gram copy at zero. With
    ngram_copy_output=mixture a copy starts with a share of exp(COPY_BIAS) beside the head's 1. Convolutions, gate and
    up have standard deviation fan_in**-0.5, mixer.out and glu.down 0.01. The router is small. The rows of the
    projection are orthonormal. With linear=bitlinear the initial values are those of the MatMul-free LM's authors:
    0.02, and what ends a branch 0.02 / sqrt(2 L).
    """
    c = config.dim
    norm = Parameter((c,), fill=1.0)
    found = {EMBEDDING: Parameter((config.vocab_size, config.embedding_dim or c), 0.02)}
    if config.embedding_dim is not None:
        found[PROJECTION] = Parameter((config.embedding_dim, c), 1.0)
    for block in range(config.n_blocks):
        mixer = MIXERS[config.mixer].parameters(config)
        own = {
            "norm1.weight": norm,
            **{f"mixer.{name}": parameter for name, parameter in mixer.items()},
            "norm2.weight": norm,
            **{f"glu.{name}": parameter for name, parameter in _glu_parameters(config).items()},
        }
        found |= {f"blocks.{block}.{name}": parameter for name, parameter in own.items()}
    if config.linear == "bitlinear":
        found["lower_bounds"] = Parameter((config.n_blocks, c))
    else:
        found |= {"router.weight": Parameter((1, c), c**-0.5), "router.bias": Parameter((1,))}
    found["final_norm.weight"] = norm
    ways = len(config.ngram_copy_orders)
    ends = ENDS if config.copy_adds else ENDS[:1]
    found |= {f"ngram_copy.{end}.{o}.weight": Parameter((c,)) for end in ends for o in range(ways)}
    if config.copy_shares:
        found |= {
            f"{COPY_SHARES}bias": Parameter((ways,), fill=COPY_BIAS),
            f"{COPY_SHARES}hidden": Parameter((ways, c)),
            f"{COPY_SHARES}match": Parameter((ways,)),
        }
    return found


def parameter_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every parameter except the head's, in order."""
    return {name: parameter.shape for name, parameter in model_parameters(config).items()}


def ternary_names(config: ModelConfig) -> list[str]:
    """Names of the matrices that the model evaluates as -1, 0 and +1."""
    return [name for name, parameter in model_parameters(config).items() if parameter.ternary]


def initial_parameters(
    config: ModelConfig, seed: int, embedding: np.ndarray | None = None, embedding_std: float = 0.02
) -> dict[str, np.ndarray]:
    """The initial values, float32. Each tensor has a separate random generator.

    embedding : initial embedding (V, E), E being embedding_dim or dim; None: normal, standard deviation embedding_std
    """
    parameters = {}
    for index, (name, (shape, std, fill, _)) in enumerate(model_parameters(config).items()):
        if name == EMBEDDING and embedding is not None:
            _check.array("initial_parameters", "embedding", embedding, shape)
            parameters[name] = embedding.copy()
            continue
        if not std:
            parameters[name] = np.full(shape, fill, np.float32)
            continue
        rng = np.random.default_rng((seed, index))
        if name == PROJECTION:  # orthonormal rows, which keep the lengths and angles of the embedding's
            drawn = rng.standard_normal(shape[::-1])
            parameters[name] = np.ascontiguousarray(np.linalg.qr(drawn)[0].T, np.float32)
            continue
        std = embedding_std if name == EMBEDDING else std
        parameters[name] = rng.standard_normal(shape, np.float32) * np.float32(std)
    return parameters
