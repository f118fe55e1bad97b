"""Texts that are generated at the same time advance together, where what a token reads can be read once for all.

Whoever generates a text announces each token before others get their turn, and feeds it when its own turn comes again.
When the first of the texts feeds its token, the steps of all are computed.
Letters: N texts, C channels.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np

from flashlm_numba.heads.joined import Joined

MOST_TEXTS = 64  # that advance at once


class _Joins(Protocol):
    joined: Joined | None


class Together:
    """The announced tokens of texts.

    step : computes step(states, tokens), the hidden states (N, C) after a token of each of at most MOST_TEXTS texts
    head : whose `joined` is set after each step
    A state is anything that can be referred to weakly; a text that nobody holds any more is forgotten. The methods may
    be called from several threads.
    """

    def __init__(self, step: Callable[[list[Any], list[int]], np.ndarray], head: _Joins) -> None:
        self._step, self._head = step, head
        self._lock = threading.RLock()
        self._announced: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()
        self._found: weakref.WeakKeyDictionary[Any, tuple[int, np.ndarray]] = weakref.WeakKeyDictionary()

    def __len__(self) -> int:
        """Texts with an announced token."""
        return len(self._announced)

    def announce(self, state: Any, token: int) -> None:
        """Note the token that the next call for this state will feed. Raises ValueError if it waits for one already."""
        with self._lock:
            self.check_free(state)
            self._announced[state] = token

    def check_free(self, state: Any) -> None:
        """Raise ValueError if the state waits for a token that was announced."""
        with self._lock:
            waits = self._announced.get(state, self._found.get(state, (None, None))[0])
            if waits is not None:
                raise ValueError(f"the state of this text waits for token {waits}, which was announced")

    def take(self, state: Any, token: int) -> np.ndarray | None:
        """The hidden state (1, C) after the announced token of a text; None if none was announced.

        Raises ValueError if it was another one.
        """
        with self._lock:
            announced = self._announced.get(state)
            if announced is None:
                if state not in self._found:
                    return None
                announced = self._found[state][0]
            if announced != token:
                raise ValueError(f"token {announced} was announced, and {token} came")
            if state in self._announced:
                others = [other for other in list(self._announced) if other is not state]
                self._advance([state, *others[: MOST_TEXTS - 1]])
            return self._found.pop(state)[1]

    def _advance(self, states: list[Any]) -> None:
        tokens = [self._announced.pop(state) for state in states]
        joined = self._head.joined = Joined(self._step(states, tokens))
        for number, (state, token) in enumerate(zip(states, tokens, strict=True)):
            self._found[state] = token, joined.row(number)
