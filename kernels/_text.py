"""What the decoding states of all trunks share: the number of tokens read, and the refusal of two calls at once."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any


@dataclass(eq=False)
class TextState:
    """State of a text, and the weights with which it was started.

    state : a NamedTuple of arrays, among them out (1, C), the last token's hidden state, and copies (O,) int32, the
        rows to copy at that token
    weights : a NamedTuple
    step : the serial kernel that reads a token: step(embedding, row, position, *fields)
    """

    state: Any
    weights: Any
    step: Any
    position: int = 0  # tokens read
    calls: list[object] = field(default_factory=list)  # the first is in flight

    def __post_init__(self) -> None:
        self.fields = (*self.state, *self.weights)

    @contextlib.contextmanager
    def alone(self, where: str) -> Iterator[None]:
        """Raises RuntimeError if another thread is using the state."""
        this_call = object()
        try:
            self.calls.append(this_call)
            if self.calls[0] is not this_call:
                raise RuntimeError(
                    f"{where}: another thread is using this state; start a state of its own for each text"
                )
            yield
        finally:  # also after an interrupt anywhere above
            if this_call in self.calls:
                self.calls.remove(this_call)
