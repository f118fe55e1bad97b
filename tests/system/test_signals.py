"""Signals are kept until the work at hand is done."""

import os
import signal
import threading

import pytest

from flashlm_numba.system.signals import caught_signals


def test_the_first_signal_is_kept_and_the_second_ends_at_once():
    said, before = [], signal.getsignal(signal.SIGTERM)
    with caught_signals(lambda: said.append(1)) as caught:
        os.kill(os.getpid(), signal.SIGTERM)
        assert caught == [signal.SIGTERM]
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert (said, caught) == ([1], [signal.SIGTERM])
    assert signal.getsignal(signal.SIGTERM) is before


def test_another_thread_leaves_the_handlers_alone():
    before, inside = signal.getsignal(signal.SIGINT), []

    def work():
        with caught_signals(lambda: None) as caught:
            inside.append((signal.getsignal(signal.SIGINT), caught))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert inside == [(before, [])]
