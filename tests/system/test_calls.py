"""Scratch per call in flight, one call at a time, readers and a writer."""

import os
import threading
import time

import pytest
from helpers import at_once

from flashlm_numba.system.calls import Gate, OneCall, Pool

HAS_FORK = hasattr(os, "fork")


class Thing:
    def __init__(self, size=0):
        self.size = size


def test_a_pool_lends_an_item_to_one_call_at_a_time():
    pool, kept = Pool(), []
    with pool.item(lambda _: True, Thing) as first, pool.item(lambda _: True, Thing) as second:
        assert first is not second
        kept = [first, second]
    with pool.item(lambda _: True, Thing) as again:
        assert again in kept


def test_items_that_do_not_fit_are_freed_and_errors_give_back():
    pool = Pool()
    with pytest.raises(KeyError), pool.item(lambda _: True, lambda: Thing(1)):
        raise KeyError
    assert len(pool.free) == 1
    with pool.item(lambda item: item.size == 2, lambda: Thing(2)) as item:
        assert pool.free == ()
        assert item.size == 2
    pool.clear()
    assert pool.free == ()


def test_a_pool_keeps_at_most_one_item_per_core(monkeypatch):
    monkeypatch.setattr("flashlm_numba.system.calls.available_cores", lambda: 2)
    pool, inside = Pool(), threading.Barrier(5)

    def call():
        with pool.item(lambda _: True, Thing):
            inside.wait(60)

    at_once([call] * 5)
    assert len(pool.free) == 2


def test_an_item_is_taken_again_only_while_it_is_free():
    pool = Pool()
    with pool.item(lambda _: True, Thing) as item, pool.again(item) as mine:
        assert not mine
    with pool.again(item) as mine:
        assert mine
        assert pool.free == ()
    assert pool.free == (item,)


def test_one_call_at_a_time():
    calls = OneCall("one at a time")
    for _ in range(2):
        with calls.alone(), pytest.raises(RuntimeError, match="one at a time"), calls.alone():
            pass
    with calls.alone():
        pass


def test_readers_together_and_a_writer_alone():
    gate, inside, most, overlap = Gate(), set(), [0], []
    together = threading.Barrier(3)

    def read():
        with gate.reading():
            together.wait(60)  # all three are inside
        for _ in range(50):
            with gate.reading():
                inside.add(threading.get_ident())
                most[0] = max(most[0], len(inside))
                overlap.append("writer" in inside)
                inside.discard(threading.get_ident())

    def write():
        for _ in range(50):
            with gate.writing():
                inside.add("writer")
                time.sleep(1e-4)
                overlap.append(len(inside) > 1)
                inside.discard("writer")

    at_once([read, read, read])
    together.reset()
    at_once([read, read, read, write, write])
    assert not any(overlap)


def test_a_waiting_writer_goes_before_readers_that_come_later():
    gate, order, reading, go_on = Gate(), [], threading.Event(), threading.Event()

    def first():
        with gate.reading():
            reading.set()
            assert go_on.wait(60)

    def writer():
        assert reading.wait(60)
        threading.Timer(0.2, go_on.set).start()
        with gate.writing():
            order.append("writer")

    def later():
        assert reading.wait(60)
        while not gate._writers:
            time.sleep(1e-3)
        with gate.reading():
            order.append("reader")

    at_once([first, writer, later])
    assert order == ["writer", "reader"]


@pytest.mark.skipif(not HAS_FORK, reason="no fork on this system")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_a_forked_child_does_not_wait_for_threads_that_it_does_not_have():
    gate, calls, inside, go_on = Gate(), OneCall("busy"), threading.Event(), threading.Event()

    def hold():
        with gate.reading(), calls.alone():
            inside.set()
            assert go_on.wait(60)

    thread = threading.Thread(target=hold)
    thread.start()
    assert inside.wait(60)
    child = os.fork()
    if child == 0:
        with gate.writing(), calls.alone():
            os._exit(7)
    status = os.waitpid(child, 0)[1]
    go_on.set()
    thread.join()
    assert os.waitstatus_to_exitcode(status) == 7
