"""The server's life: its socket, uvicorn, signals, and the end in which streams finish."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
import threading
from collections.abc import Callable, Collection, Iterator
from typing import Any

import uvicorn

from flashlm_numba.serving.application import Service
from flashlm_numba.serving.connection import Connection
from flashlm_numba.serving.guard import LOOPBACK
from flashlm_numba.serving.limits import Limits
from flashlm_numba.serving.runs import Runs
from flashlm_numba.serving.served import Served
from flashlm_numba.system.errors import UserError
from flashlm_numba.system.threads import available_threads, set_threads

KEEP_ALIVE = 15  # seconds that an idle connection stays open; clients close theirs earlier, so that none is lost
SPARE_SECONDS = 5  # after drain_seconds, for the last words of what was cut


def bind(host: str, port: int) -> socket.socket:
    """A listening socket. Raises UserError if the address cannot be used. port : 0 takes a free one"""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        found = socket.socket(family, kind, protocol)
    except (OSError, UnicodeError) as error:
        raise UserError(f"{host} is no address of this machine ({error}); give another --host.") from None
    try:
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind(address)
        found.listen(1024)
    except OSError as error:
        found.close()
        raise UserError(
            f"The server cannot listen on {host} port {port}: {error.strerror}; give another --port or --host."
        ) from None
    return found


def url_of(listening: socket.socket) -> str:
    """The address of a socket as clients write it."""
    host, port = listening.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


def allowed_by_default(host: str) -> tuple[str, ...]:
    """The names that requests may use for a server on a host: those of this machine, and the host if it is one name.

    >>> allowed_by_default("0.0.0.0"), allowed_by_default("192.168.1.5")[-1], allowed_by_default("::2")[-1]
    (('localhost', '127.0.0.1', '[::1]'), '192.168.1.5', '[::2]')
    """
    if host in ("0.0.0.0", "::", ""):
        return LOOPBACK
    name = f"[{host}]" if ":" in host else host.lower()
    return LOOPBACK if name in LOOPBACK else (*LOOPBACK, name)


def choose_threads(served: Served | None, threads: int | None) -> int:
    """Divide the threads for a model, and return the number of workers: 1 without a model.

    Decoding a token is serial, so each worker has one thread, and as many texts advance as there are threads. Where
    texts advance together, one worker has all threads. threads : default: every core
    Raises ValueError for more threads than this machine has.
    """
    if served is None:
        return 1
    threads = threads or available_threads()
    workers = 1 if served.uses_all_threads else threads
    set_threads(threads)  # refuses too many
    if not served.uses_all_threads:
        set_threads(1)
    return workers


class Server(uvicorn.Server):
    """uvicorn's server for a service. It ends in order after the first signal, and at once after the second."""

    def __init__(
        self,
        service: Service,
        *,
        allowed_hosts: Collection[str],
        api_key: str | None = None,
        on_start: Callable[[], object] = lambda: None,
    ) -> None:
        self.service, self._on_start = service, on_start
        limits = service.limits
        super().__init__(
            uvicorn.Config(
                service.application(allowed_hosts=allowed_hosts, api_key=api_key),
                http=type("Connection", (Connection,), {"limits": limits}),
                loop="asyncio",
                ws="none",
                lifespan="off",
                proxy_headers=False,
                server_header=False,
                log_config=None,
                log_level="critical",  # errors are told of in guard.py
                access_log=False,
                timeout_keep_alive=KEEP_ALIVE,
                timeout_graceful_shutdown=int(limits.drain_seconds) + SPARE_SECONDS,
            )
        )
        service.connections = self.server_state.connections

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Replace uvicorn's handlers, which raise each signal again at the end, so that the status would not be 0."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        loop = asyncio.get_running_loop()
        numbers = [signal.SIGINT, signal.SIGTERM]
        if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # as under nohup
            numbers.append(signal.SIGHUP)
        for number in numbers:
            loop.add_signal_handler(number, self.stop)
        try:
            yield
        finally:
            for number in numbers:
                loop.remove_signal_handler(number)

    def stop(self) -> None:
        """End, in the thread of the event loop: let requests finish. A second call ends them."""
        if self.should_exit:
            self.service.cut.set()
        self.should_exit = self.service.stopping = True

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start to accept connections."""
        await super().startup(sockets)
        self._on_start()

    async def on_tick(self, counter: int) -> bool:
        """Look after slow clients once per second."""
        if counter % 10 == 0:
            for connection in list(self.server_state.connections):
                if isinstance(connection, Connection):
                    connection.sweep()
        return await super().on_tick(counter)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Accept nothing more, and cut what has not finished within drain_seconds."""
        self.service.stopping = True
        drain = asyncio.get_running_loop().call_later(self.service.limits.drain_seconds, self.service.cut.set)
        try:
            await super().shutdown(sockets)
        finally:
            drain.cancel()


def serve(
    served: Served | None,
    listening: socket.socket,
    limits: Limits,
    *,
    allowed_hosts: Collection[str],
    api_key: str | None = None,
    workers: int,
    runs: Runs | None = None,
    on_start: Callable[[], Any] = lambda: None,
) -> None:
    """Serve a model, the page and a folder of runs until a signal comes.

    allowed_hosts, api_key : as in Guard;  workers : from choose_threads;  on_start : called when connections are taken
    """
    service = Service(served, limits, workers=workers, runs=runs)
    try:
        Server(service, allowed_hosts=allowed_hosts, api_key=api_key, on_start=on_start).run([listening])
    finally:
        service.close()
