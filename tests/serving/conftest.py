"""A tiny model behind a live server, in a thread of this process."""

import asyncio
import contextlib
import http.client
import json
import queue
import threading
import time

import numba
import pytest
from helpers import TINY, command

import flashlm_numba as fl
from flashlm_numba.serving.application import Service
from flashlm_numba.serving.guard import LOOPBACK
from flashlm_numba.serving.limits import Limits
from flashlm_numba.serving.runs import Runs
from flashlm_numba.serving.served import FixedModel, Served, load_served
from flashlm_numba.serving.server import Server, bind, choose_threads, url_of
from flashlm_numba.system.threads import set_threads


class Live:
    """A running server."""

    def __init__(self, server, listening, thread, loop):
        self.server, self.service, self.thread, self.loop = server, server.service, thread, loop
        self.host, self.port = listening.getsockname()
        self.url = url_of(listening)

    def connection(self):
        return contextlib.closing(http.client.HTTPConnection(self.host, self.port, timeout=30))

    def ask(self, method, path, body=None, headers=()):
        """Status, headers and body of a response, from JSON if it is that."""
        with self.connection() as connection:
            data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
            kind = {} if data is None else {"Content-Type": "application/json"}
            connection.request(method, path, data, {**kind, **dict(headers)})
            response = connection.getresponse()
            content = response.read()
            is_json = response.headers.get("Content-Type") == "application/json"
            return response.status, response.headers, json.loads(content) if is_json else content.decode()

    def complete(self, **values):
        """The response to a request for completions, which must succeed."""
        status, _, found = self.ask("POST", "/v1/completions", values)
        assert status == 200, found
        return found

    def wait(self, condition, seconds=10.0):
        """Wait until a condition on the engine holds; returns the seconds that it took."""
        began = time.perf_counter()
        while not condition(self.service.engine):
            assert time.perf_counter() - began < seconds
            time.sleep(0.002)
        return time.perf_counter() - began


@contextlib.contextmanager
def live(served, limits, runs=None, **options):
    listening, started = bind("127.0.0.1", 0), queue.SimpleQueue()
    before = numba.get_num_threads()
    service = Service(served, limits, workers=choose_threads(served, min(2, before)), runs=runs and Runs(runs))
    options = {"allowed_hosts": LOOPBACK, "on_start": lambda: started.put(asyncio.get_running_loop()), **options}
    server = Server(service, **options)
    thread = threading.Thread(target=server.run, args=([listening],))
    thread.start()
    try:
        yield Live(server, listening, thread, started.get(timeout=30))
    finally:
        server.should_exit = True
        thread.join(30)
        service.close()
        listening.close()
        set_threads(before)
        assert not thread.is_alive()


@pytest.fixture(scope="session")
def serving_run(corpus, tmp_path_factory):
    """A trained run with the tree head: its folder."""
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    settings = [part for setting in TINY for part in ("--set", setting)]
    done = command("train", corpus, "--out", folder, "--steps", 3, "--threads", 1, *settings)
    assert done.exit_code == 0, done.output
    return folder


@pytest.fixture(scope="session")
def served(serving_run):
    return load_served(serving_run, progress=fl.Progress())


@pytest.fixture(scope="module")
def server(served):
    with live(served, Limits(max_tokens=64, prompt_tokens=300, request_tokens=4_000, read_seconds=5)) as found:
        yield found


class EndlessHead:
    """A head that never samples the end of text."""

    def __init__(self, head, eot):
        self._head, self._eot = head, eot

    def __getattr__(self, name):
        return getattr(self._head, name)

    def sample(self, *arguments, **options):
        found = self._head.sample(*arguments, **options)
        while found[0] == self._eot:
            found = self._head.sample(*arguments, **options)
        return found


class SlowModel(FixedModel):
    """A model whose texts do not end, and that takes five milliseconds per token, as a large one would."""

    def __init__(self, model, eot):
        super().__init__(model)
        self.head, self._eot = EndlessHead(model.head, eot), eot

    def head_after(self, ids):
        return EndlessHead(self._model.head_after(ids), self._eot)

    def writer(self, state, **settings):
        return None

    def decode_step(self, state, token):
        time.sleep(0.005)
        return self._model.decode_step(state, token)


@pytest.fixture
def slow(served):
    found = Served(served.model, served.vocabulary, "slow", 0)
    found.model = SlowModel(served.model, served.vocabulary.eot)
    return found


@pytest.fixture
def start():
    """Starts servers, which end with the test."""
    with contextlib.ExitStack() as stack:
        yield lambda served, limits, **options: stack.enter_context(live(served, limits, **options))
