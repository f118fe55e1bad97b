"""Texts that are generated at the same time advance together, where what a token reads can be read once for all.

Whoever generates a text announces each token before others get their turn, and feeds it when its own turn comes again.
When the first of the texts feeds its token, the steps of all are computed.
Letters: N texts, C channels.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import numpy as np

from flashlm_numba.heads.joined import Joined
from flashlm_numba.system.calls import call_after_fork

MOST_TEXTS = 16  # that advance at once: more save little, and a text that is cancelled waits for the step of all


class _Joins(Protocol):
    joined: Joined | None


class Together:
    """The announced tokens of texts.

    step : step(states, tokens, h) writes the hidden states h (N, C) after a token of each text, at most MOST_TEXTS, and
        yields the number of each when it has advanced
    head, dim : whose `joined` is set for each step; C
    A state is anything that can be referred to weakly; a text that nobody holds any more is forgotten. The methods may
    be called from several threads.
    """

    def __init__(
        self, step: Callable[[list[Any], list[int], np.ndarray], Iterator[int]], head: _Joins, dim: int
    ) -> None:
        self._step, self._head, self._dim = step, head, dim
        self.reset()
        call_after_fork(self)
        self._announced: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()
        self._found: weakref.WeakKeyDictionary[Any, tuple[int, np.ndarray]] = weakref.WeakKeyDictionary()
        self._broken: weakref.WeakKeyDictionary[Any, BaseException] = weakref.WeakKeyDictionary()

    def reset(self) -> None:
        """Forget the call in flight, in a forked process."""
        self._lock = threading.RLock()

    def __len__(self) -> int:
        """Texts with an announced token."""
        return len(self._announced)

    def announce(self, state: Any, token: int) -> None:
        """Note the token that the next call for this state will feed. Raises ValueError if it waits for one already."""
        with self._lock:
            self.check_free(state)
            self._announced[state] = token

    def check_free(self, state: Any) -> None:
        """Raise ValueError if the state waits for a token that was announced, and RuntimeError if an error ended its
        step.
        """
        with self._lock:
            if (error := self._broken.get(state)) is not None:
                raise RuntimeError("the step of this text was interrupted, so that the text cannot go on") from error
            waits = self._announced.get(state, self._found.get(state, (None, None))[0])
            if waits is not None:
                raise ValueError(f"the state of this text waits for token {waits}, which was announced")

    def take(self, state: Any, token: int) -> np.ndarray | None:
        """The hidden state (1, C) after the announced token of a text; None if none was announced.

        Raises ValueError if it was another one, and RuntimeError if an error ended the text's step.
        """
        with self._lock:
            announced = self._announced.get(state)
            if announced is None:
                if state not in self._found:
                    self.check_free(state)
                    return None
                announced = self._found[state][0]
            if announced != token:
                raise ValueError(f"token {announced} was announced, and {token} came")
            if state in self._announced:
                others = [other for other in list(self._announced) if other is not state]
                self._advance([state, *others[: MOST_TEXTS - 1]])
            return self._found.pop(state)[1]

    def _advance(self, states: list[Any]) -> None:
        """An error ends the text in whose step it came, which may have advanced or not. Those before it have their
        results, and those after it still wait. The caller, whose text is the first, gets the error if it is its own,
        or not an Exception.
        """
        tokens = [self._announced[state] for state in states]
        joined = self._head.joined = Joined(np.zeros((len(states), self._dim), np.float32))
        done = 0
        try:
            for number in self._step(states, tokens, joined.h):
                self._found[states[number]] = tokens[number], joined.row(number)
                del self._announced[states[number]]
                done += 1
        except BaseException as error:
            if done < len(states):
                del self._announced[states[done]]
                self._broken[states[done]] = error
            if done == 0 or not isinstance(error, Exception):
                raise
