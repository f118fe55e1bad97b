"""The web page: static files, sent as they are."""

from __future__ import annotations

import hashlib
from importlib import resources

from starlette.requests import Request
from starlette.responses import Response

TYPES = {
    "index.html": "text/html; charset=utf-8",
    "page.css": "text/css; charset=utf-8",
    "page.js": "text/javascript; charset=utf-8",
    "icon.svg": "image/svg+xml",
}
PATHS = ("/", *(f"/{name}" for name in TYPES if name != "index.html"))
HEADERS = {
    # nothing from elsewhere, and no script or style within the page
    "Content-Security-Policy": "default-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",  # asked for again each time, and answered with 304
}


class PageFiles:
    """The files by path, read once."""

    def __init__(self) -> None:
        folder = resources.files("flashlm_numba.serving") / "page"
        self._files = {}
        for name, kind in TYPES.items():
            data = (folder / name).read_bytes()
            tag = f'"{hashlib.sha256(data).hexdigest()[:32]}"'
            self._files["/" if name == "index.html" else f"/{name}"] = (
                data,
                {**HEADERS, "Content-Type": kind, "ETag": tag},
            )

    async def response(self, request: Request) -> Response:
        """Send a file, or status 304 if the browser has it."""
        data, headers = self._files[request.url.path]
        known = request.headers.get("if-none-match", "")
        if headers["ETag"] in (tag.strip().removeprefix("W/") for tag in known.split(",")):
            return Response(status_code=304, headers=headers)
        return Response(data, headers=headers)
