"""Compile every kernel of training, scoring and generating once, in a separate process.

Freshly compiled code and the same code loaded from the cache have been seen to differ in the last bit. The cause is not
established; perhaps Numba uses a helper already in memory in place of the copy inlined in its caller. A training
process therefore never compiles kernels. It always loads those that this module has put into the cache.
"""

from __future__ import annotations

from functools import partial

import numpy as np

from flashlm_numba.kernels import _jit
from flashlm_numba.system.errors import UserError


def main() -> None:
    """Call every kernel on a narrow model; the compiled code is the same for any width."""
    from flashlm_numba.heads import HEADS, head_class
    from flashlm_numba.heads.config import HeadConfig
    from flashlm_numba.kernels.ema import ema_update
    from flashlm_numba.model.config import NORMUON_VARIANTS, ModelConfig, OptimizerConfig
    from flashlm_numba.model.model import Model
    from flashlm_numba.model.parameters import initial_parameters
    from flashlm_numba.system.threads import set_threads
    from flashlm_numba.training.optimizer import Optimizer

    set_threads(None)
    # an embedding too large for the serial optimiser kernel
    config = ModelConfig(vocab_size=5_000, dim=16, ffn_dim=8, groups=1, ngram_copy_orders=(1,))
    counts = np.arange(config.vocab_size)
    optimizers = (
        *(OptimizerConfig(normuon=variant) for variant in NORMUON_VARIANTS),
        OptimizerConfig(sparse_adamw=True),
        OptimizerConfig(sparse_adamw=True, rowwise_exp_avg_sq=True),
    )
    ids = np.arange(64, dtype=np.int32).reshape(2, 32)
    for name in HEADS:
        head, settings = head_class(name), HeadConfig(name=name, num_sampled=100, tree_rank=2, log_prior=True)
        constants = head.constants_from_data(settings, counts, None)
        make_head = partial(head.from_settings, settings, constants=constants, parameters={}, counts=counts)
        model = Model(config, initial_parameters(config, 0), make_head)
        for optimizer in optimizers:
            model.head.begin(np.random.default_rng(0), full=False)
            model.loss_and_grad(ids, ids, np.full(ids.size, 1 / ids.size, np.float32), accumulate=False)
            Optimizer(model.parameters, model.gradients, optimizer).step(0.0, 0.0, 1.0)
            for value in model.parameters.values():
                ema_update(value.copy(), value, 0.999)
        h = model.forward(ids)
        model.head.log_prob(h, ids.reshape(-1))
        model.head.distribution(h[:1])
        state, _ = model.prefill(ids[0])
        model.decode_step(state, 0)
        for temperature, top_k in ((1.0, None), (0.8, 4), (0.0, None)):
            model.head.sample(h[:1], np.random.default_rng(0), temperature=temperature, top_k=top_k)
        if model.head.has_int8:
            model.head.use_int8()
            model.head.sample(h[:1], np.random.default_rng(0))
        model.use_activations("int8")
        model.loss_and_grad(ids, ids, np.full(ids.size, 1 / ids.size, np.float32), accumulate=False)
        model.decode_step(model.prefill(ids[0])[0], 0)
    _jit.mark_complete()


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:  # the waiting process reports it
        raise SystemExit(130) from None
    except (OSError, MemoryError, UserError) as error:
        raise SystemExit(
            f"The kernels could not be compiled: {error}; free some space, or give Numba another folder with the "
            "variable NUMBA_CACHE_DIR."
        ) from None
