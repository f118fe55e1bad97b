"""Connections: uvicorn's, with limits on their number and on the patience with slow clients."""

from __future__ import annotations

import asyncio
import contextlib
import time
from http import HTTPStatus
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from flashlm_numba.serving.api_error import ApiError
from flashlm_numba.serving.encoding import json_bytes
from flashlm_numba.serving.limits import Limits


class Connection(H11Protocol):
    """A connection. Errors of HTTP itself are answered in JSON too."""

    limits = Limits()  # a subclass has those of its server

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Refuse the connection if there are too many."""
        super().connection_made(transport)
        self._waits_since: float | None = time.monotonic()  # for a request, or for the client to take or close
        if len(self.connections) > self.limits.connections:
            self._refuse(ApiError(503, "The server has too many open connections; try again later."))

    def data_received(self, data: bytes) -> None:
        """Take a part of a request."""
        if self.transport.is_closing():
            return
        super().data_received(data)
        if self._in_flight():
            self._waits_since = None

    def on_response_complete(self) -> None:
        """Wait for the next request, unless it is there already."""
        super().on_response_complete()
        self._waits_since = None if self._in_flight() else time.monotonic()

    def pause_writing(self) -> None:
        """Note that the client does not take what is sent."""
        super().pause_writing()
        self._stuck_since = time.monotonic()

    _stuck_since = 0.0
    _closing_since: float | None = None

    def _in_flight(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def sweep(self) -> None:
        """End the connection if its client is too slow. The server calls this every second."""
        now, patience = time.monotonic(), self.limits.read_seconds
        if self.transport.is_closing():
            if self._closing_since is None:
                self._closing_since = now
            elif now - self._closing_since > patience:  # the client does not take the rest
                self.transport.abort()
        elif self.flow.write_paused:
            if now - self._stuck_since > patience:
                self.transport.abort()
        elif self._waits_since is not None and now - self._waits_since > patience:
            self.transport.close()

    def send_400_response(self, msg: str) -> None:
        """Answer what is no HTTP. msg : uvicorn's text"""
        self._refuse(ApiError(400, "This is no valid HTTP request, or its headers are too large."))

    def _refuse(self, error: ApiError) -> None:
        """Answer with an error, if an answer has not begun, and close."""
        body = json_bytes(error.body)
        headers = [("content-type", "application/json"), ("content-length", str(len(body))), ("connection", "close")]
        events: list[Any] = [
            h11.Response(status_code=error.status, headers=headers, reason=HTTPStatus(error.status).phrase),
            h11.Data(body),
            h11.EndOfMessage(),
        ]
        with contextlib.suppress(h11.LocalProtocolError):
            self.transport.writelines([self.conn.send(event) or b"" for event in events])
        self.transport.close()
