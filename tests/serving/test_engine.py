"""The engine: turns, places, ends."""

import asyncio
import threading
import time
import weakref

import pytest
from helpers import at_once

from flashlm_numba.serving.engine import Engine, Job, QueueFull
from flashlm_numba.serving.outbox import Outbox


class Results:
    """Collects what jobs deliver."""

    def __init__(self):
        self.found, self.ended = {}, threading.Semaphore(0)

    def job(self, name, steps):
        self.found[name] = []

        def deliver(result):
            self.found[name].append(result)
            if result is None or isinstance(result, Exception):
                self.ended.release()

        return Job(iter(steps), deliver)

    def wait(self, count):
        for _ in range(count):
            assert self.ended.acquire(timeout=10)


@pytest.fixture
def engine(request):
    found = Engine(*getattr(request, "param", (2, 3, 2)))
    yield found
    found.close()


def test_every_job_is_run_to_its_end(engine):
    results = Results()
    engine.submit([results.job(i, [1, None, 2, i]) for i in range(5)])
    results.wait(5)
    assert results.found == {i: [1, 2, i, None] for i in range(5)}
    assert (engine.running, engine.waiting) == (0, 0)


@pytest.mark.parametrize("cancelled", [False, True])
@pytest.mark.parametrize("engine", [(1, 1, 1)], indirect=True)
def test_a_worker_without_work_keeps_nothing_of_its_last_job(engine, cancelled):
    """Not what was delivered either, which nobody may have taken."""
    delivered, may_end = threading.Event(), threading.Event()

    class Sink:
        def take(self, result):
            delivered.set()

    def steps():
        yield "a result"
        may_end.wait(10)

    sink = Sink()
    kept = weakref.ref(sink)
    job = Job(steps(), sink.take)
    engine.submit([job])
    assert delivered.wait(10)
    if cancelled:
        engine.cancel([job])
    may_end.set()
    while engine.running:
        time.sleep(0.001)
    del sink, job
    assert kept() is None


def test_all_or_none_are_taken(engine):
    results, go = Results(), threading.Event()

    def held():
        go.wait(10)
        yield 1

    engine.submit([results.job(i, held()) for i in range(4)])
    assert (engine.running, engine.waiting, engine.free()) == (3, 1, 1)
    with pytest.raises(QueueFull):
        engine.submit([results.job(i, [1]) for i in (8, 9)])
    assert (engine.running, engine.waiting) == (3, 1)
    go.set()
    results.wait(4)
    assert 8 not in {name for name, found in results.found.items() if found}


@pytest.mark.parametrize("engine", [(1, 3, 0)], indirect=True)
def test_jobs_take_turns(engine):
    order, go = [], threading.Event()
    results = Results()

    def steps(name):
        if name == 0:
            go.wait(10)
        for _ in range(20):
            order.append(name)
            yield None

    engine.submit([results.job(i, steps(i)) for i in range(3)])
    go.set()
    results.wait(3)
    assert order == [0, 1, 2] * 20


def test_an_error_ends_one_job_alone(engine):
    results = Results()

    def fails():
        yield 1
        raise KeyError("wrong")

    engine.submit([results.job("bad", fails()), results.job("good", [1, 2])])
    results.wait(2)
    assert results.found["good"] == [1, 2, None]
    assert isinstance(results.found["bad"][1], KeyError)


def test_a_cancelled_job_ends_after_its_step(engine):
    results, inside, go = Results(), threading.Event(), threading.Event()

    def steps():
        yield 1
        inside.set()
        go.wait(10)
        yield 2
        raise AssertionError("a further step")

    jobs = [results.job(i, steps() if i == 0 else [5]) for i in range(1)]
    engine.submit(jobs)
    assert inside.wait(10)
    engine.cancel(jobs)
    go.set()
    while engine.running:
        time.sleep(0.001)
    assert results.found[0] == [1]


@pytest.mark.parametrize("engine", [(1, 1, 3)], indirect=True)
def test_a_cancelled_job_leaves_the_queue_at_once(engine):
    results, go = Results(), threading.Event()

    def held():
        go.wait(10)
        yield 1

    first, second, third = (results.job(i, held()) for i in range(3))
    engine.submit([first])
    engine.submit([second, third])
    engine.cancel([second])
    assert engine.waiting == 1
    go.set()
    results.wait(2)
    assert results.found == {0: [1, None], 1: [], 2: [1, None]}


def test_results_whose_event_loop_is_closed_are_dropped(engine):
    def deliver(result):
        raise RuntimeError("Event loop is closed")

    engine.submit([Job(iter([1, 2]), deliver)])
    results = Results()
    engine.submit([results.job(i, [i]) for i in range(2)])
    results.wait(2)


def test_many_threads_submit_and_cancel():
    engine, results = Engine(3, 4, 10_000), Results()
    try:

        def some(thread):
            jobs = [results.job((thread, i), range(5)) for i in range(200)]
            for job in jobs:
                engine.submit([job])
            engine.cancel(jobs[::3])

        at_once([lambda thread=thread: some(thread) for thread in range(4)])
        deadline = time.monotonic() + 20
        while engine.running or engine.waiting:
            assert time.monotonic() < deadline
            time.sleep(0.002)
        for (_, i), found in results.found.items():
            assert found == [0, 1, 2, 3, 4, None][: len(found)]
            assert len(found) == 6 or i % 3 == 0
        assert engine.free() == 10_004
    finally:
        engine.close()


def test_closing_ends_jobs_in_the_middle():
    engine = Engine(2, 2, 2)

    def endless():
        while True:
            yield None

    engine.submit([Job(endless(), lambda result: None) for _ in range(4)])
    began = time.perf_counter()
    engine.close()
    assert time.perf_counter() - began < 5


def test_an_outbox_gathers_results_until_one_is_the_last():
    """With a pause; without one it gives what is there at once."""

    async def gather():
        outbox = Outbox(asyncio.get_running_loop())
        times = []

        async def take(pause):
            began = time.perf_counter()
            found = await outbox.take(pause)
            times.append(time.perf_counter() - began)
            return found

        outbox.put(0, "a")
        assert await take(0.0) == [(0, "a")]
        outbox.put(0, "b")
        asyncio.get_running_loop().call_later(0.02, outbox.put, 1, "c")
        assert await take(0.2) == [(0, "b"), (1, "c")]
        for last in (None, ValueError()):
            outbox.put(0, "d")
            asyncio.get_running_loop().call_later(0.02, outbox.put, 1, last)
            assert await take(60.0) == [(0, "d"), (1, last)]
        outbox.put(0, "e")
        assert await take(0.1) == [(0, "e")]
        return times

    first, paused, *hurried, again = asyncio.run(gather())
    assert first < 0.1
    assert paused >= 0.19
    assert max(hurried) < 10
    assert again >= 0.09


def test_an_outbox_loses_nothing():
    count = 20_000

    async def gather():
        outbox, found = Outbox(asyncio.get_running_loop()), []

        def fill(number):
            for i in range(count):
                outbox.put(number, i)
            outbox.put(number, None)

        threads = [threading.Thread(target=fill, args=(number,)) for number in range(3)]
        for thread in threads:
            thread.start()
        while sum(result is None for _, result in found) < 3:
            found += await asyncio.wait_for(outbox.take(len(found) % 2 * 1e-4), 20)
        return found

    found = asyncio.run(gather())
    for number in range(3):
        assert [result for index, result in found if index == number] == [*range(count), None]
