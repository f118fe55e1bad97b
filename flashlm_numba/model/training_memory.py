"""The memory that training a model takes, from its settings alone, and the refusal of a model that is too large."""

from __future__ import annotations

import math

from flashlm_numba.heads import head_class
from flashlm_numba.model.config import RunConfig
from flashlm_numba.model.mixers import MIXERS
from flashlm_numba.model.parameters import EMBEDDING, model_parameters
from flashlm_numba.model.sizes import in_units
from flashlm_numba.system.errors import UserError
from flashlm_numba.system.memory import machine_bytes

COUNTING = 120  # bytes per token of a text whose n-grams are counted, at the peak
PROGRAM = 200_000_000  # bytes of Python, the libraries and the compiled kernels


def training_bytes(run: RunConfig) -> int:
    """Bytes that training takes at its peak, about: the program, the weights and what is computed from them, one batch.

    The pages of the training text, which the system can drop, are not counted. Nothing is allocated.
    """
    model, phases = run.model, run.training.phases
    positions = max(phase.batch_size * phase.seq_len for phase in phases)
    layers = model.n_blocks * model.n_passes
    total = PROGRAM
    for name, parameter in model_parameters(model).items():
        size = math.prod(parameter.shape)
        if name == EMBEDDING:
            total += 4 * size * (2 + _moments(run)) + (0 if run.optimizer.rowwise_exp_avg_sq else 4 * size)
            if model.embedding_dim is not None:  # the rows that it gives, and their gradient
                total += 4 * 2 * model.vocab_size * model.dim
        elif parameter.ternary:
            # weight, gradient, momentum; NorMuon's scratch, or AdamW's second moment; a gradient per thread; ternary
            # values in three layouts, or, with linear=bitlinear, in one, as codes, and as the transposes' panels
            layouts = 6 if model.linear == "bitlinear" else 2 if model.activations == "int8" else 8
            rule = 4 if run.optimizer.matrices == "adamw" else 12 + 4
            total += size * (4 * 3 + rule + layouts + 4 * run.threads)
        else:  # weight, gradient, second moment, two layouts as of the convolutions, a gradient per thread
            total += 4 * size * (5 + _moments(run) + run.threads)
        total += 4 * size * bool(run.training.ema)
    floats = 2 * model.dim + 2 * model.ffn_dim + 2 + MIXERS[model.mixer].activation_floats(model)
    total += 4 * positions * (layers * floats + 3 * model.dim)
    head = head_class(run.head.name)
    return total + head.training_bytes(run.head, model.vocab_size, model.dim, positions)


def check_memory(run: RunConfig, tokens: int = 0) -> int:
    """The result of training_bytes. Raises UserError if the machine has less.

    tokens : of the training text, which are counted first if the run has a memory
    """
    needed, has = training_bytes(run), machine_bytes()
    if has is not None and run.memory.memory != "none" and tokens * COUNTING > has:
        raise UserError(
            f"Counting the n-grams of {tokens:,} tokens takes about {in_units(tokens * COUNTING)} of memory, and this "
            f"machine has {in_units(has)}; leave out --memory."
        )
    if has is not None and needed > has:
        raise UserError(
            f"Training this model takes about {in_units(needed)} of memory, and this machine has {in_units(has)}; "
            "choose a smaller model or smaller batches, such as --set phases=4x128."
        )
    return needed


def _moments(run: RunConfig) -> int:
    """Moments of AdamW that are as large as the weight, without the second."""
    return int(run.optimizer.adamw_beta1 > 0)
