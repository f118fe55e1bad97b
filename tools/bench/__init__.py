"""Shared code of the benchmark programs in tools/: timing, machine speed, candidates and their checks, rows."""
