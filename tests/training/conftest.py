"""Signals at a given step."""

import os

import pytest

from flashlm_numba.training import loop


@pytest.fixture
def stop_at(monkeypatch):
    """stop_at(n, number): send this process a signal while step n is at work."""

    def arrange(step, number):
        real = loop.train_step

        def train_step(session, phase, at, **options):
            if at == step and options["lr"] > 0:
                os.kill(os.getpid(), number)
            return real(session, phase, at, **options)

        monkeypatch.setattr(loop, "train_step", train_step)
        return monkeypatch.undo

    return arrange
