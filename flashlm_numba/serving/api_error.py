"""Errors of the interface: a status and OpenAI's error object."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


class ApiError(Exception):
    """A request that is not answered as asked. The message is one sentence for the client.

    status : of HTTP;  param : the parameter of the request that is wrong;  code : a word for programs
    headers : further ones of the response
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers = dict(headers or {})

    @property
    def body(self) -> dict[str, Any]:
        """The JSON object of the response."""
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        kind = "rate_limit_error" if self.status == 429 else kind
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


def refused(param: str | None, message: str, code: str | None = None) -> ApiError:
    """Status 400: a parameter that is not supported, or whose value is out of range."""
    return ApiError(400, message, param=param, code=code)
