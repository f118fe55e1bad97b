"""Limits, checks at the door, clients that go away, and the end of a server."""

import contextlib
import gc
import http.client
import itertools
import json
import re
import signal
import socket
import subprocess
import threading
import time

import openai
import pytest
from helpers import command

from flashlm_numba.inference.generate import Continuation
from flashlm_numba.serving.guard import host_name
from flashlm_numba.serving.limits import Limits
from flashlm_numba.serving.server import allowed_by_default
from flashlm_numba.serving.steps import Delta
from flashlm_numba.system.process import PYTHON, environment

COMPLETIONS = "/v1/completions"
ENDLESS = {"prompt": "the", "max_tokens": 4000, "stream": True, "seed": 1}


def request_bytes(values, head=""):
    body = json.dumps(values).encode()
    lines = f"POST {COMPLETIONS} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n{head}"
    return f"{lines}Content-Length: {len(body)}\r\n\r\n".encode() + body


@contextlib.contextmanager
def opened(server, data=b""):
    with socket.create_connection((server.host, server.port), timeout=20) as connection:
        connection.sendall(data)
        yield connection


def received(connection, until=None):
    """What arrives until the connection is closed, or until some bytes are there."""
    found = b""
    with contextlib.suppress(ConnectionResetError):
        while until is None or until not in found:
            part = connection.recv(65_536)
            if not part:
                break
            found += part
    return found


# --- pages ---


def test_pages(server):
    assert server.ask("GET", "/health")[2] == {"status": "ok", "model": "tiny"}
    for method, path, status, message in [
        ("GET", "/no", 404, "There is no page '/no'; the pages are /, /v1/completions, "),
        ("GET", "/v1/models/", 404, "has the model 'tiny' only"),
        ("GET", "/v1/completions/", 404, "There is no page"),
        ("GET", "/%ff\x7f", 404, "There is no page"),
        ("DELETE", "/v1/models", 405, "does not take 'DELETE'; it takes GET, HEAD"),
        ("GET", COMPLETIONS, 405, "it takes POST"),
        ("OPTIONS", COMPLETIONS, 405, "it takes POST"),
        ("POST", "/v1/chat/completions", 404, "There is no chat model here"),
    ]:
        found, headers, body = server.ask(method, path.replace("\x7f", ""), b"{}" if method == "POST" else None)
        assert (found, headers["Content-Type"]) == (status, "application/json"), path
        assert message in body["error"]["message"]
        assert not any(name.lower().startswith("access-control") for name in headers)


def test_metrics_are_prometheus_text(server):
    before = metrics(server)
    usage = server.complete(prompt="the people", max_tokens=7)["usage"]
    server.ask("GET", "/no/such/page")
    server.wait(lambda engine: engine.running == 0)
    after = metrics(server)

    def more(name):
        return after[name] - before.get(name, 0)

    assert more("prompt_tokens_total") == 2
    assert more("sampled_tokens_total") == usage["completion_tokens"] > 0
    assert more("completion_seconds_count") == 1
    assert more("completion_seconds_sum") > 0
    assert more('responses_total{path="/v1/completions",status="200"}') == 1
    assert more('responses_total{path="other",status="404"}') == 1
    assert (after["streams"], after["queue"]) == (0, 0)
    assert after["connections"] >= 1


def metrics(server):
    status, headers, text = server.ask("GET", "/metrics")
    assert status == 200
    assert headers["Content-Type"].startswith("text/plain; version=0.0.4")
    found = {}
    for line in text.splitlines():
        if line.startswith("#"):
            assert re.fullmatch(r"# (HELP [a-z_]+ \S.*|TYPE [a-z_]+ (counter|gauge|summary))", line), line
        else:
            name, value = re.fullmatch(r'flashlm_numba_([a-z_]+(?:\{\w+="[^"]*",\w+="[^"]*"\})?) (\S+)', line).groups()
            assert name not in found
            found[name] = float(value)
    return found


# --- at the door ---


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Host": "localhost:8000"}, 200),
        ({"Host": "LOCALHOST."}, 200),
        ({"Host": "[::1]:8000"}, 200),
        ({"Host": "evil.example"}, 403),
        ({"Host": "localhost.evil.example"}, 403),
        ({"Host": "127.0.0.1@evil.example"}, 403),
        ({"Host": ""}, 403),
        ({"Host": "localhost", "Origin": "http://localhost"}, 200),
        ({"Host": "localhost", "Origin": "http://localhost:3000"}, 403),
        ({"Host": "localhost", "Origin": "https://evil.example"}, 403),
        ({"Host": "localhost", "Origin": "null"}, 403),
    ],
)
def test_hosts_and_origins(server, headers, status):
    for method, path in [("GET", "/health"), ("GET", "/metrics"), ("GET", "/nowhere")]:
        found, _, _ = server.ask(method, path, headers=headers)
        assert found == (404 if (status, path) == (200, "/nowhere") else status)
    assert server.ask("POST", COMPLETIONS, {"max_tokens": 1}, headers)[0] == status


def test_further_hosts(served, start):
    server = start(served, Limits(), allowed_hosts=("Models.Example", "[2001:db8::1]"))
    for host, status in [("models.example:80", 200), ("[2001:DB8::1]", 200), ("localhost", 403)]:
        assert server.ask("GET", "/health", headers={"Host": host})[0] == status
    server = start(served, Limits(), allowed_hosts=("*",))
    assert server.ask("GET", "/health", headers={"Host": "anything.example"})[0] == 200


def test_names_of_hosts():
    assert host_name("a-b.c:1") == "a-b.c"
    for wrong in ("", ":80", "a b", "a:", "a:123456", "[::1", "::1", "a/b", "a\n", "é"):
        assert host_name(wrong) is None, wrong
    assert allowed_by_default("127.0.0.1") == allowed_by_default("::") == allowed_by_default("localhost")
    assert "models.example" in allowed_by_default("Models.Example")


def test_a_key(served, start):
    server = start(served, Limits(), api_key="a key é")
    for key, status in [("a key é", 200), ("a key", 401), ("", 401), ("a key é!", 401)]:
        value = {"Authorization": b"Bearer " + key.encode()}
        assert server.ask("GET", "/v1/models", headers=value)[0] == status
        assert server.ask("POST", COMPLETIONS, {"max_tokens": 1}, value)[0] == status
    status, headers, body = server.ask("GET", "/metrics")
    assert (status, headers["WWW-Authenticate"], body["error"]["code"]) == (401, "Bearer", "invalid_api_key")
    assert server.ask("GET", "/health")[0] == 200
    with (
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="wrong", max_retries=0) as client,
        pytest.raises(openai.AuthenticationError, match="The API key is missing or wrong"),
    ):
        client.models.list()


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Content-Type": "application/json; charset=utf-8"}, 200),
        ({"Content-Type": "text/plain"}, 415),
        ({"Content-Type": "application/x-www-form-urlencoded"}, 415),
        ({"Content-Type": ""}, 415),
        ({"Content-Encoding": "gzip"}, 415),
    ],
)
def test_a_body_is_plain_json(server, headers, status):
    assert server.ask("POST", COMPLETIONS, {"max_tokens": 1}, headers)[0] == status


# --- limits ---


def test_large_bodies(served, start):
    server = start(served, Limits(body_bytes=1000))
    assert server.ask("POST", COMPLETIONS, b" " * 998 + b"{}")[0] == 200
    status, _, body = server.ask("POST", COMPLETIONS, b" " * 999 + b"{}")
    assert (status, body["error"]["code"]) == (413, "body_too_large")
    chunks = b"".join(b"c8\r\n" + b" " * 200 + b"\r\n" for _ in range(6)) + b"0\r\n\r\n"
    head = request_bytes({}).partition(b"Content-Length")[0] + b"Transfer-Encoding: chunked\r\n\r\n"
    with opened(server, head + chunks) as connection:
        assert received(connection, b"}}").startswith(b"HTTP/1.1 413 ")
    huge = {"Content-Type": "application/json", "Content-Length": "9" * 20}
    assert server.ask("POST", COMPLETIONS, headers=huge)[0] == 413


def test_a_full_queue(slow, start):
    server = start(slow, Limits(streams=1, queue=1))
    with opened(server, request_bytes(ENDLESS)) as first, opened(server) as second:
        received(first, b"data: ")
        second.sendall(request_bytes(ENDLESS))
        server.wait(lambda engine: engine.waiting == 1)
        status, headers, body = server.ask("POST", COMPLETIONS, {"max_tokens": 1})
        assert (status, body["error"]["type"], body["error"]["code"]) == (429, "rate_limit_error", "queue_full")
        assert 1 <= int(headers["Retry-After"]) <= 60
        with (
            openai.OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0) as client,
            pytest.raises(openai.RateLimitError, match="try again later"),
        ):
            client.completions.create(model="slow", prompt="the", max_tokens=1)
        # one place is free, which two texts do not get
        second.close()
        server.wait(lambda engine: engine.waiting == 0)
        assert server.ask("POST", COMPLETIONS, {"max_tokens": 1, "n": 2})[0] == 429
        assert metrics(server)["refused_total"] == 3
    server.wait(lambda engine: engine.running == 0)
    assert len(server.complete(max_tokens=1, n=2)["choices"]) == 2


def test_time_per_request(slow, start):
    server = start(slow, Limits(seconds=0.4))
    values = {**ENDLESS, "stream": False}
    status, headers, body = server.ask("POST", COMPLETIONS, values)
    assert (status, headers["x-should-retry"], body["error"]["code"]) == (504, "false", "timeout")
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="any") as client:
        stream = client.completions.create(model="slow", **ENDLESS)
        with pytest.raises(openai.APIError, match=r"not complete within 0\.4 seconds"):
            for _ in stream:
                pass
    server.wait(lambda engine: engine.running == 0)
    assert server.complete(max_tokens=2)["usage"]["completion_tokens"] == 2


def test_open_connections(served, start):
    server = start(served, Limits(connections=3))
    with opened(server) as first, opened(server), opened(server):
        while len(server.service.connections) < 3:
            time.sleep(0.002)
        with opened(server) as fourth:
            answer = received(fourth)
        assert answer.startswith(b"HTTP/1.1 503 ")
        assert b"too many open connections" in answer
        first.close()
        while len(server.service.connections) > 2:
            time.sleep(0.002)
        assert server.ask("GET", "/health")[0] == 200


def test_slow_clients(served, start):
    """A head that does not come, or never ends; a body that does not come; a second request that never ends."""
    server = start(served, Limits(read_seconds=0.5))
    whole = request_bytes({"max_tokens": 1})
    with (
        opened(server) as silent,
        opened(server, b"GET /health HTTP/1.1\r\nHost: localhost\r\n") as headless,
        opened(server, whole[:-3]) as bodiless,
        opened(server, whole + whole[:30]) as again,
    ):
        began = time.monotonic()
        received(again, b"}}")

        def trickle():
            with contextlib.suppress(OSError):
                while time.monotonic() - began < 10:
                    headless.sendall(b"x: y\r\n")
                    time.sleep(0.1)

        thread = threading.Thread(target=trickle)
        thread.start()
        assert received(bodiless).startswith(b"HTTP/1.1 408 ")
        for connection in (silent, headless, again):
            assert received(connection) == b""
        thread.join()
        assert time.monotonic() - began < 5
    assert server.ask("GET", "/health")[0] == 200


def test_a_client_that_does_not_read(slow, start):
    """Its request ends in time, and then its connection."""
    server = start(slow, Limits(seconds=0.5, read_seconds=0.5, request_tokens=1_000_000))
    values = {**ENDLESS, "n": 32, "logprobs": 20}
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect((server.host, server.port))
        connection.sendall(request_bytes(values))
        server.wait(lambda engine: engine.running == 32)
        server.wait(lambda engine: engine.running == 0)
        deadline = time.monotonic() + 10
        while server.service.connections:
            assert time.monotonic() < deadline
            time.sleep(0.01)
    assert server.ask("GET", "/health")[0] == 200


@pytest.mark.parametrize(
    "data",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc",
        b"GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n",
        b"GET / HTTP/1.1\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: localhost\r\nx: " + b"y" * 2_000_000 + b"\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: localhost\r\n" + b"x: y\r\n" * 400_000 + b"\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: -5\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        b"Transfer-Encoding: chunked\r\n\r\nno length\r\n",
    ],
    ids=["TLS", "two hosts", "no host", "long header", "many headers", "negative length", "wrong chunk"],
)
def test_what_is_no_http_is_answered_in_json(server, data):
    with opened(server) as connection:
        with contextlib.suppress(OSError):
            connection.sendall(data)
        answer = received(connection)
    # a client that has not sent everything may lose the answer
    if len(data) < 1000 or answer:
        head, _, body = answer.partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 400 ")
        assert json.loads(body)["error"]["message"].startswith("This is no valid HTTP request")
    assert server.ask("GET", "/health")[0] == 200


def test_http_1_0(server):
    body = request_bytes({"max_tokens": 3, "stream": True}).replace(b"HTTP/1.1", b"HTTP/1.0")
    with opened(server, body) as connection:
        answer = received(connection)
    assert answer.startswith(b"HTTP/1.1 200 ")
    assert answer.endswith(b"data: [DONE]\n\n")
    with opened(server, b"GET /health HTTP/1.0\r\n\r\n") as connection:
        assert received(connection).startswith(b"HTTP/1.1 403 ")


def test_requests_one_after_another_on_one_connection(server):
    with server.connection() as connection:
        for values, status in [({"max_tokens": 2}, 200), ({"n": 0}, 400), ({"stream": True}, 200), ([], 400)]:
            connection.request("POST", COMPLETIONS, json.dumps(values), {"Content-Type": "application/json"})
            response = connection.getresponse()
            response.read()
            assert response.status == status
    with opened(server, request_bytes({"max_tokens": 2}) * 3) as connection:
        answer = b""
        while answer.count(b"HTTP/1.1 200") < 3 or not answer.endswith(b"}"):
            answer += connection.recv(65_536)


@pytest.mark.parametrize("after", [0, 3])
def test_a_failure_is_told_of_and_logged(slow, start, monkeypatch, after):
    """A bug of the program, before the first token or in a stream: the traceback goes to the log, not to the client."""
    steps, right = itertools.count(), slow.model.decode_step

    def fails(state, token):
        if next(steps) >= after:
            raise ZeroDivisionError("a bug")
        return right(state, token)

    log = []
    monkeypatch.setattr("flashlm_numba.serving.guard.say", log.append)
    slow.model.decode_step = fails
    server = start(slow, Limits())
    for stream in (False, True):
        status, _, body = server.ask("POST", COMPLETIONS, {**ENDLESS, "stream": stream})
        if stream and status == 200:
            body = json.loads(body.split("data: ")[-1])
        else:
            assert status == 500
        assert body["error"]["message"] == "The server failed; its log says why."
        assert body["error"]["type"] == "server_error"
    server.wait(lambda engine: log.count("ZeroDivisionError: a bug") == 2)  # the client has its answer first
    assert log[0] == "Traceback (most recent call last):"
    assert server.ask("GET", "/health")[0] == 200


# --- clients that go away ---


@pytest.mark.parametrize("stream", [True, False])
def test_the_work_ends_when_the_client_goes_away(slow, start, stream):
    """Within 100 ms, in the best of three tries, since the test's machine may have other work."""
    server = start(slow, Limits(streams=8, queue=8))
    before, seconds = metrics(server)["cancelled_total"], []
    for _ in range(3):
        with opened(server, request_bytes({**ENDLESS, "stream": stream, "n": 12})) as connection:
            if stream:
                received(connection, b"data: ")
            server.wait(lambda engine: (engine.running, engine.waiting) == (8, 4))
            connection.close()
            seconds.append(server.wait(lambda engine: (engine.running, engine.waiting) == (0, 0)))
    assert min(seconds) < 0.1
    assert metrics(server)["cancelled_total"] == before + 3


def test_a_finished_request_leaves_nothing_behind(server):
    """No circle of references keeps a decoding state until a garbage collection, and no worker keeps a result."""
    values = {"prompt": "the ", "max_tokens": 5, "logprobs": 2, "echo": True, "n": 2, "stop": "x"}

    def held():
        return any(type(x) in (Continuation, Delta) for x in gc.get_objects())

    gc.collect()
    gc.disable()
    try:
        for _ in range(3):
            server.complete(**values)
            assert server.ask("POST", COMPLETIONS, {**values, "stream": True})[0] == 200
            with opened(server, request_bytes({**ENDLESS, "max_tokens": 64})) as connection:
                received(connection, b"data: ")
        server.wait(lambda engine: engine.running == 0)
        server.wait(lambda engine: not held())
    finally:
        gc.enable()


def test_a_client_that_goes_away_before_its_body_is_complete(server):
    with opened(server, request_bytes({"max_tokens": 5})[:-5]):
        pass
    with opened(server, request_bytes({"max_tokens": 64, "prompt": "a" * 2000})):
        pass
    server.wait(lambda engine: (engine.running, engine.waiting) == (0, 0))
    assert server.ask("GET", "/health")[0] == 200


# --- the end ---


@contextlib.contextmanager
def process(run, *options):
    """The command in a process of its own; yields the process and the address that it printed."""
    arguments = [*PYTHON, "-m", "flashlm_numba", "serve", str(run), "--port", "0", "--threads", "1", *options]
    variables = {"OMP_WAIT_POLICY": "passive"}
    started = subprocess.Popen(
        arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment(**variables)
    )
    try:
        line = started.stdout.readline()
        assert " at http://127.0.0.1:" in line, started.communicate(timeout=30)
        yield started, int(re.search(r":(\d+)/v1", line)[1])
    finally:
        started.kill()
        started.communicate(timeout=30)


def test_a_signal_lets_requests_finish(serving_run):
    """A stream in flight is complete, new connections are refused, the status is 0; a second signal ends at once."""
    values = {**ENDLESS, "max_tokens": 400, "logprobs": 5, "n": 8}
    with process(serving_run) as (running, port):
        with contextlib.closing(http.client.HTTPConnection("127.0.0.1", port, timeout=30)) as connection:
            connection.request("POST", COMPLETIONS, json.dumps(values), {"Content-Type": "application/json"})
            response = connection.getresponse()
            first = response.readline()
            running.send_signal(signal.SIGTERM)
            deadline = time.monotonic() + 10
            while True:  # the socket closes
                with contextlib.suppress(ConnectionRefusedError, ConnectionResetError):
                    socket.create_connection(("127.0.0.1", port), timeout=5).close()
                    assert time.monotonic() < deadline
                    continue
                break
            rest = response.read()
        assert first.startswith(b"data: {")
        assert rest.endswith(b"data: [DONE]\n\n")
        assert len(re.findall(rb'"finish_reason":"(?:length|stop)"', rest)) == 8
        assert running.wait(20) == 0
        assert running.stderr.read() == ""


@pytest.mark.parametrize("second", [True, False])
def test_what_does_not_finish_in_time_is_told_of(slow, start, second):
    """After drain_seconds, or at a second signal."""
    server = start(slow, Limits(drain_seconds=60 if second else 0.3))
    with (
        opened(server, request_bytes(ENDLESS)) as stream,
        opened(server, request_bytes({**ENDLESS, "stream": False})) as other,
    ):
        received(stream, b"data: ")
        server.wait(lambda engine: engine.running == 2)
        server.loop.call_soon_threadsafe(server.server.stop)
        if second:
            server.loop.call_soon_threadsafe(server.server.stop)
        assert b'data: {"error":{"message":"The server is stopping, and the text is not complete."' in received(stream)
        answer = received(other)
        assert answer.startswith(b"HTTP/1.1 503 ")
        assert b"x-should-retry: false" in answer
    server.thread.join(10)
    assert not server.thread.is_alive()


# --- the command ---


def test_the_command_says_what_is_missing(serving_run, monkeypatch):
    monkeypatch.setattr("flashlm_numba.cli.serve_command.PACKAGES", ("no_such_package", "click"))
    done = command("serve", serving_run)
    assert done.exit_code == 1
    assert (
        "`serve` needs no_such_package; install what is missing with `pip install 'flashlm-numba[serve]'`."
        in done.output
    )


def test_the_command_refuses_addresses_and_keys(serving_run, server):
    done = command("serve", serving_run, "--port", server.port)
    assert done.exit_code == 1
    assert f"cannot listen on 127.0.0.1 port {server.port}: Address already in use; give another --port" in done.output
    done = command("serve", serving_run, "--host", "no.such.host.invalid")
    assert done.exit_code == 1
    assert "no.such.host.invalid is no address of this machine" in done.output
    assert command("serve", serving_run, "--api-key", "").exit_code == 2
    done = command("serve", serving_run, "--threads", 10_000)
    assert done.exit_code == 2
    assert "--threads" in done.output
    assert command("serve", "no such run").exit_code == 1
