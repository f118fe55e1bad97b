"""What every request passes first: the checks of host, origin and key, and the count of its response.

A page of another site can make a browser send requests to this machine. It cannot read the answers, as no CORS header
allows it, unless its own name resolves to this machine's address. So the name in Host must be one of those allowed, and
a request that names another origin is refused.
"""

from __future__ import annotations

import re
import secrets
import traceback
from collections.abc import Collection

from starlette.datastructures import Headers
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from flashlm_numba.serving.api_error import ApiError
from flashlm_numba.serving.encoding import json_bytes
from flashlm_numba.serving.metrics import Metrics
from flashlm_numba.system.display import say

LOOPBACK = ("localhost", "127.0.0.1", "[::1]")
ANY = "*"  # as an allowed host
_HOST = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9_.-]+)(:[0-9]{1,5})?")
INTERNAL = "The server failed; its log says why."


def error_response(error: ApiError) -> Response:
    """The response that tells of an error."""
    return Response(json_bytes(error.body), error.status, error.headers, "application/json")


def host_name(host: str) -> str | None:
    """The name in a Host header, without the port; None if there is none.

    >>> host_name("LocalHost:8000"), host_name("[::1]"), host_name("a/b")
    ('localhost', '[::1]', None)
    """
    match = _HOST.fullmatch(host)
    return match[1].lower().rstrip(".") if match else None


class Guard:
    """Checks each request and answers in JSON whatever happens.

    allowed_hosts : names that Host may have; ANY allows all
    api_key : that requests need, but those for open_paths; None: any key, or none
    paths : pages that are counted by name
    """

    def __init__(
        self,
        app: ASGIApp,
        metrics: Metrics,
        *,
        allowed_hosts: Collection[str],
        api_key: str | None,
        paths: Collection[str],
        open_paths: Collection[str],
    ) -> None:
        self._app, self._metrics = app, metrics
        self._hosts = {host.lower() for host in allowed_hosts}
        self._key = None if api_key is None else api_key.encode("utf-8", "surrogateescape")
        self._paths, self._open_paths = frozenset(paths), frozenset(open_paths)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        path = scope["path"] if scope["path"] in self._paths else "other"
        started = False

        async def counted(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                self._metrics.responses[path, message["status"]] += 1
            await send(message)

        try:
            self._check(Headers(scope=scope), scope["path"])
            await self._app(scope, receive, counted)
        except ApiError as error:
            await error_response(error)(scope, receive, counted)
        except Exception:
            for line in traceback.format_exc().splitlines():
                say(line)
            if not started:
                await error_response(ApiError(500, INTERNAL))(scope, receive, counted)

    def _check(self, headers: Headers, path: str) -> None:
        """Raise ApiError for a request that may not come in."""
        host = headers.get("host", "")
        if ANY not in self._hosts and host_name(host) not in self._hosts:
            raise ApiError(
                403,
                f"The host {host[:100]!a} is not allowed; the server's option --allowed-host adds a name.",
                code="host_not_allowed",
            )
        origin = headers.get("origin")
        if origin is not None and origin.lower().partition("://")[2] != host.lower():
            raise ApiError(403, "Pages of other sites may not use this server.", code="origin_not_allowed")
        if self._key is None or path in self._open_paths:
            return
        scheme, _, key = headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not secrets.compare_digest(key.strip().encode("latin-1"), self._key):
            raise ApiError(
                401,
                "The API key is missing or wrong; send it as `Authorization: Bearer KEY`.",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )
