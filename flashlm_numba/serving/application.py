"""The pages of the server as a Starlette application."""

from __future__ import annotations

import asyncio
import math
import secrets
import time
from collections.abc import Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, Protocol

from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from flashlm_numba.serving.api_error import ApiError, refused
from flashlm_numba.serving.encoding import json_bytes, json_text
from flashlm_numba.serving.engine import Engine, Job, QueueFull
from flashlm_numba.serving.guard import INTERNAL, LOOPBACK, Guard, error_response
from flashlm_numba.serving.inspection import inspection_steps
from flashlm_numba.serving.limits import Limits
from flashlm_numba.serving.metrics import CONTENT_TYPE, Metrics
from flashlm_numba.serving.outbox import Outbox
from flashlm_numba.serving.page_files import PATHS, PageFiles
from flashlm_numba.serving.request import CompletionRequest, parse, parse_inspection
from flashlm_numba.serving.responses import DONE, Completion, event, merged, model_object
from flashlm_numba.serving.runs import Runs
from flashlm_numba.serving.served import Served
from flashlm_numba.serving.steps import Delta, steps
from flashlm_numba.system.errors import UserError

PARSERS = 2  # threads that read bodies and write long answers
EVENT_PAUSE = 0.01  # seconds between events of a stream, at least: tokens that are sampled meanwhile come together
PAUSE = 0.1  # seconds in which an answer that is not streamed lets results gather
LAST_WORDS = 1.0  # seconds that a client has to take the event that ends its stream early
NO_RETRY = {"x-should-retry": "false"}  # asks OpenAI's clients not to send the same request again
PAGES = ("/", "/v1/completions", "/v1/models", "/inspect", "/runs", "/health", "/metrics")
LARGEST_LINE = 10**9  # of a run's log
STREAM_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # asks nginx to pass every event on at once
]


class Service:
    """A model behind the interface: its engine, its limits and its counts.

    served : the model; None: a server that only shows runs
    runs : the folder of runs that the page shows, if there is one
    stopping : set when the server no longer accepts requests;  cut : set when those in flight must end
    """

    def __init__(self, served: Served | None, limits: Limits, *, workers: int, runs: Runs | None = None) -> None:
        self._served, self.runs, self.limits, self.metrics = served, runs, limits, Metrics()
        self.engine = Engine(workers, limits.streams, limits.queue)
        self.connections: Collection[object] = ()  # the open ones; the server sets it
        self.stopping = False
        self.cut = asyncio.Event()
        self._pool = ThreadPoolExecutor(PARSERS, thread_name_prefix="parse")

    @property
    def served(self) -> Served:
        """The model. Raises ApiError if there is none."""
        if self._served is None:
            raise ApiError(404, "This server has no model; it only shows runs.", code="model_not_found")
        return self._served

    def close(self) -> None:
        """End all threads."""
        self.engine.close()
        self._pool.shutdown(cancel_futures=True)

    def application(self, *, allowed_hosts: Collection[str] = LOOPBACK, api_key: str | None = None) -> ASGIApp:
        """The application. The arguments are those of Guard."""
        page = PageFiles().response
        routes = [
            Route("/v1/completions", _Completions(self), methods=["POST"]),
            Route("/v1/chat/completions", self._chat, methods=["POST"]),
            Route("/v1/models", self._models),
            Route("/v1/models/{name:path}", self._model),
            Route("/health", self._health),
            Route("/metrics", self._metrics_page),
            Route("/inspect", _Inspections(self), methods=["POST"]),
            Route("/runs", self._runs),
            Route("/runs/{name}/metrics", self._run_metrics),
            *(Route(path, page) for path in PATHS),
        ]
        app = Starlette(
            routes=routes,
            exception_handlers={ApiError: _told, HTTPException: _told_of_http, Exception: _told_of_failure},
        )
        app.router.redirect_slashes = False
        return Guard(
            app,
            self.metrics,
            allowed_hosts=allowed_hosts,
            api_key=api_key,
            paths=PAGES,
            open_paths=("/health", *PATHS),  # the page asks for the key
        )

    async def _models(self, request: Request) -> Response:
        return _json({"object": "list", "data": [model_object(self._served)] if self._served else []})

    async def _model(self, request: Request) -> Response:
        if request.path_params["name"] != self.served.name:
            raise ApiError(
                404, f"This server has the model {self.served.name!r} only.", param="model", code="model_not_found"
            )
        return _json(model_object(self.served))

    async def _chat(self, request: Request) -> Response:
        raise ApiError(404, "There is no chat model here: use /v1/completions, with the text to continue as prompt.")

    async def _health(self, request: Request) -> Response:
        if self.stopping:
            raise ApiError(503, "The server is stopping.")
        return _json({"status": "ok", "model": self._served.name if self._served else None})

    async def _metrics_page(self, request: Request) -> Response:
        return Response(self.metrics.text(self.engine, len(self.connections)), headers={"content-type": CONTENT_TYPE})

    # --- runs ---

    async def _runs(self, request: Request) -> Response:
        """The list of runs; null without a folder, which is no error, since the page asks."""
        if self.runs is None:
            return _json({"runs": None})
        return await self._in_pool(lambda runs: runs.list())

    async def _run_metrics(self, request: Request) -> Response:
        after = request.query_params.get("after", "0")
        if not (after.isascii() and after.isdecimal() and len(after) < 11 and int(after) <= LARGEST_LINE):
            raise refused("after", f"after must be a whole number between 0 and {LARGEST_LINE:,}.")
        name = request.path_params["name"]
        return await self._in_pool(lambda runs: runs.metrics(name, int(after)))

    async def _in_pool(self, work: Callable[[Runs], object]) -> Response:
        """An answer about the runs, whose files are read in another thread."""
        runs = self.runs
        if runs is None:
            raise ApiError(404, "This server shows no runs; its option --runs names a folder.", code="no_runs")
        body = await asyncio.get_running_loop().run_in_executor(self._pool, lambda: json_bytes(work(runs)))
        return Response(body, media_type="application/json")

    # --- texts and tokens ---

    async def parsed(self, body: bytes) -> CompletionRequest:
        """The request in a body, checked in another thread, since a long prompt takes a while."""
        work = partial(parse, body, model=self.served.name, vocabulary=self.served.vocabulary, limits=self.limits)
        return await asyncio.get_running_loop().run_in_executor(self._pool, work)

    async def parsed_inspection(self, body: bytes) -> list[int]:
        """The token ids in a body of /inspect, checked in another thread too."""
        served = self.served

        def work() -> list[int]:
            return parse_inspection(
                body,
                vocab_size=served.vocabulary.size,
                token_of_name=lambda name: served.token_of_name.get(name),
                limits=self.limits,
            )

        return await asyncio.get_running_loop().run_in_executor(self._pool, work)

    def full(self) -> ApiError:
        """Status 429, with the time after which another request may find a place."""
        self.metrics.refused += 1
        seconds = min(60, max(1, math.ceil(self.metrics.mean_seconds())))
        return ApiError(
            429,
            "Too many texts are being generated; try again later.",
            code="queue_full",
            headers={"Retry-After": str(seconds)},
        )

    def jobs(self, request: CompletionRequest, outbox: Outbox) -> list[Job]:
        """The jobs of a request's texts, of which n follow one another for each prompt."""
        found: list[Job] = []
        for prompt in request.prompts:
            for index in range(request.n):
                work = steps(self.served, request, prompt, seed_of(request.seed, index))
                found.append(Job(work, partial(outbox.put, len(found))))
        return found


def seed_of(seed: int | None, index: int) -> int | list[int]:
    """The seed of the text `index` of a prompt.

    That of the first is the request's, so that its text is the one that `generate --seed` writes. Without a seed it is
    random.
    """
    if seed is None:
        return secrets.randbits(63)
    seed %= 1 << 64
    return seed if index == 0 else [seed, index]


class _Writer(Protocol):
    """What writes the response to a request whose jobs run."""

    async def write(self) -> None:
        """Write the whole response. Raises ApiError if nothing was sent before the error."""

    async def end_early(self, error: ApiError) -> None:
        """Tell of an error, if it is not too late; raise it if nothing was sent."""


class _Work:
    """A page whose answers the engine computes. It is no function of a Request, because it watches the connection."""

    def __init__(self, service: Service) -> None:
        self._service = service

    async def _begin(self, body: bytes, outbox: Outbox, began: float, send: Send) -> tuple[list[Job], _Writer]:
        """The jobs of a request, and what writes their results. Raises ApiError for a wrong one."""
        raise NotImplementedError

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        service, began = self._service, time.monotonic()
        if service.stopping:
            raise ApiError(503, "The server is stopping.")
        _ = service.served  # raises ApiError if there is no model
        if not service.engine.free():
            raise service.full()
        body = await read_body(Headers(scope=scope), receive, service.limits)
        if body is None:
            return
        outbox = Outbox(asyncio.get_running_loop())
        jobs, answer = await self._begin(body, outbox, began, send)
        try:
            service.engine.submit(jobs)
        except QueueFull:
            raise service.full() from None
        writing = asyncio.ensure_future(answer.write())
        gone = asyncio.ensure_future(disconnected(receive))
        cut = asyncio.ensure_future(service.cut.wait())
        try:
            left = max(0.0, began + service.limits.seconds - time.monotonic())
            done, _ = await asyncio.wait({writing, gone, cut}, timeout=left, return_when=asyncio.FIRST_COMPLETED)
            if writing in done:
                await writing
            elif gone in done:
                service.metrics.cancelled += 1
            else:
                service.engine.cancel(jobs)
                await _ended(writing)
                await answer.end_early(stopped() if cut in done else too_slow(service.limits.seconds))
        finally:
            service.engine.cancel(jobs)
            await _ended(writing, gone, cut)


class _Completions(_Work):
    """The page that generates and scores."""

    async def _begin(self, body: bytes, outbox: Outbox, began: float, send: Send) -> tuple[list[Job], _Writer]:
        service = self._service
        request = await service.parsed(body)
        jobs = service.jobs(request, outbox)
        return jobs, _Answer(service, request, outbox, began, len(jobs), send)


class _Inspections(_Work):
    """The page that shows how one token's probability comes about."""

    async def _begin(self, body: bytes, outbox: Outbox, began: float, send: Send) -> tuple[list[Job], _Writer]:
        ids = await self._service.parsed_inspection(body)
        job = Job(inspection_steps(self._service.served, ids), partial(outbox.put, 0))
        return [job], _OneResult(outbox, send)


class _OneResult:
    """The response that is the only result of one job."""

    def __init__(self, outbox: Outbox, send: Send) -> None:
        self._outbox, self._send = outbox, send
        self._started = False

    async def write(self) -> None:
        """See _Writer."""
        found: Any = None
        while True:
            for _, result in await self._outbox.take(PAUSE):
                if result is None:
                    body = json_bytes(found)
                    self._started = True
                    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
                    await self._send({"type": "http.response.start", "status": 200, "headers": headers})
                    await self._send({"type": "http.response.body", "body": body})
                    return
                if isinstance(result, UserError):
                    raise ApiError(500, str(result))
                if isinstance(result, Exception):
                    raise result
                found = result

    async def end_early(self, error: ApiError) -> None:
        """See _Writer."""
        if not self._started:
            raise error


class _Answer:
    """The response to a request for completions."""

    def __init__(
        self, service: Service, request: CompletionRequest, outbox: Outbox, began: float, texts: int, send: Send
    ) -> None:
        self._service, self._request, self._outbox, self._send = service, request, outbox, send
        self._began, self._texts = began, texts
        self._completion = Completion(f"cmpl-{secrets.token_hex(12)}", int(time.time()), service.served.name, request)
        self._left = texts  # texts that have not ended
        self._started = False  # whether the status has been sent

    async def write(self) -> None:
        """Write the whole response. Raises ApiError if nothing was sent before the error."""
        self._service.metrics.prompt_tokens += self._request.prompt_tokens
        if not self._request.stream:
            await self._write_whole()
            return
        try:
            await self._write_stream()
        except Exception as error:
            if not self._started:
                raise
            told = error if isinstance(error, ApiError) else ApiError(500, INTERNAL)
            await self._send_body(event(json_text(told.body)), more=False)
            if told is not error:
                raise

    async def _take(self, pause: float) -> dict[int, list[Delta]]:
        """The next results by text. pause : as in Outbox.take.  Raises ApiError if a text ended with an error."""
        found: dict[int, list[Delta]] = {}
        for index, result in await self._outbox.take(pause):
            if result is None:
                self._left -= 1
            elif isinstance(result, UserError):
                raise ApiError(500, str(result))
            elif isinstance(result, Exception):
                raise result
            else:
                found.setdefault(index, []).append(result)
                self._service.metrics.sampled_tokens += result.sampled
        return found

    async def _write_whole(self) -> None:
        texts: list[list[Delta]] = [[] for _ in range(self._texts)]
        while self._left:
            for index, deltas in (await self._take(PAUSE)).items():
                texts[index] += deltas
        work = partial(self._json, texts)
        body = await asyncio.get_running_loop().run_in_executor(self._service._pool, work)
        self._count()
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
        await self._start(headers)
        await self._send_body(body, more=False)

    def _json(self, texts: list[list[Delta]]) -> bytes:
        return self._completion.whole([merged(deltas) for deltas in texts]).encode()

    async def _write_stream(self) -> None:
        sampled, sent = 0, -math.inf
        while self._left:
            results = await self._take(sent + EVENT_PAUSE - time.monotonic())
            sent = time.monotonic()
            for index, deltas in results.items():
                delta = merged(deltas)
                sampled += delta.sampled
                if delta.text or delta.scores or delta.finish_reason:
                    if not self._started:
                        await self._start(STREAM_HEADERS)
                    await self._send_body(event(self._completion.chunk(index, delta)))
        if self._request.include_usage:
            await self._send_body(event(self._completion.last_chunk(sampled)))
        self._count()
        await self._send_body(DONE, more=False)

    def _count(self) -> None:
        """Count the answer, before the client has it."""
        self._service.metrics.completions += 1
        self._service.metrics.completion_seconds += time.monotonic() - self._began

    async def _start(self, headers: list[tuple[bytes, bytes]]) -> None:
        self._started = True
        await self._send({"type": "http.response.start", "status": 200, "headers": headers})

    async def _send_body(self, data: bytes, *, more: bool = True) -> None:
        await self._send({"type": "http.response.body", "body": data, "more_body": more})

    async def end_early(self, error: ApiError) -> None:
        """Tell of an error, in the stream if it has begun; a client that takes nothing is not waited for."""
        if not self._started:
            raise error
        if self._request.stream:
            last = asyncio.ensure_future(self._send_body(event(json_text(error.body)), more=False))
            await asyncio.wait({last}, timeout=LAST_WORDS)
            await _ended(last)


async def read_body(headers: Headers, receive: Receive, limits: Limits) -> bytes | None:
    """The body of a request; None if the client went away. Raises ApiError if it is too large, too slow or no JSON."""
    kind = headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":  # a page of another site cannot send this type without asking first
        raise ApiError(415, "The body must be JSON: send the header `Content-Type: application/json`.")
    if headers.get("content-encoding", "identity").lower() != "identity":
        raise ApiError(415, "The body must not be compressed.")
    large = ApiError(413, f"The body may have at most {limits.body_bytes:,} bytes.", code="body_too_large")
    length = headers.get("content-length", "0")
    if not length.isdecimal() or len(length) > 15 or int(length) > limits.body_bytes:
        raise large
    body = bytearray()
    try:
        async with asyncio.timeout(limits.read_seconds):
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    return None
                body += message.get("body", b"")
                if len(body) > limits.body_bytes:
                    raise large
                if not message.get("more_body", False):
                    return bytes(body)
    except TimeoutError:
        raise ApiError(
            408, f"The body did not arrive within {limits.read_seconds:g} seconds.", headers={"Connection": "close"}
        ) from None


async def disconnected(receive: Receive) -> None:
    """Wait until the client has gone away."""
    while (await receive())["type"] != "http.disconnect":
        pass


def stopped() -> ApiError:
    """Status 503: the server ends."""
    return ApiError(503, "The server is stopping, and the text is not complete.", code="stopping", headers=NO_RETRY)


def too_slow(seconds: float) -> ApiError:
    """Status 504: a request took too long."""
    return ApiError(
        504,
        f"The texts were not complete within {seconds:g} seconds; ask for fewer tokens.",
        code="timeout",
        headers=NO_RETRY,
    )


async def _ended(*tasks: asyncio.Task[None] | asyncio.Task[bool]) -> None:
    """Cancel tasks and wait until they have ended, however that may be."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def _json(value: object) -> Response:
    return Response(json_bytes(value), media_type="application/json")


async def _told(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return error_response(error)


async def _told_of_http(request: Request, error: Exception) -> Response:
    """Of a path or a method that there is not."""
    assert isinstance(error, HTTPException)
    status, headers = error.status_code, dict(error.headers or {})
    if "Allow" in headers:
        headers["Allow"] = ", ".join(sorted(headers["Allow"].split(", ")))
    what = {
        404: f"There is no page {request.scope['path'][:100]!a}; the pages are {', '.join(PAGES)}.",
        405: f"This page does not take {request.method[:20]!a}; it takes {headers.get('Allow', 'another method')}.",
    }
    return error_response(ApiError(status, what.get(status, error.detail), headers=headers))


async def _told_of_failure(request: Request, error: Exception) -> Response:
    return error_response(ApiError(500, INTERNAL))
