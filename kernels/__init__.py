"""Numba kernels: one operation per file, forward above backward; reference.py holds their NumPy twins."""
