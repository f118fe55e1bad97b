"""Training: the loop, starting and resuming, the optimiser, what is compiled beforehand."""
