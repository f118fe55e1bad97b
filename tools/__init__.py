"""Benchmark and maintenance programs, which run from the checkout and are not installed."""
