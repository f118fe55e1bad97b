"""What the benchmark programs in tools/ share: timing, the machine's own speed, candidates and their checks, rows."""
