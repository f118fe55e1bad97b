"""Errors, files, cache, processes, threads, display: nothing here knows a model."""
