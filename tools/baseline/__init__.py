"""FlashLM v3 in PyTorch: the baseline of the benchmarks and the oracle of the tests. The program never imports it."""
