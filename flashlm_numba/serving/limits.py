"""What a server refuses, and when it ends a request."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """Limits of one server. A text is a continuation that is generated or scored; a request may ask for several."""

    body_bytes: int = 1 << 20  # of a request's body
    prompt_tokens: int = 8_192  # of one prompt
    max_tokens: int = 4_096  # of one text
    request_tokens: int = 65_536  # of all texts of a request, their prompts included
    streams: int = 64  # texts that are generated at the same time
    queue: int = 256  # texts that wait until others have ended
    connections: int = 256  # open ones
    seconds: float = 300.0  # from a request's first byte of the body to the last one of the answer
    read_seconds: float = 30.0  # that a client may take to send a request
    drain_seconds: float = 30.0  # for requests to finish after SIGTERM

    @property
    def texts(self) -> int:
        """The most texts that one request may ask for."""
        return self.streams + self.queue
