"""flashlm-numba: train and run a ternary-weight language model on a CPU."""

__version__ = "0.1.0"
