"""Errors, files, cache, processes, threads and display. Nothing in this package knows about models."""
