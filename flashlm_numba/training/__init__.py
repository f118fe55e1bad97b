"""Training: the loop, starting and resuming runs, the optimiser, compiling the kernels in advance."""
