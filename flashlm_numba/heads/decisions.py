"""The choice of a token as a sequence of decisions, each with few outcomes: what a program that codes tokens needs.

A softmax decides once, among all tokens. A tree decides at every node of the path, so that only these nodes are
computed. Encoder and decoder go through the same decisions: the encoder asks which outcome leads to its token, and the
decoder is told the outcome.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import numpy as np

NO_TOKENS = np.empty(0, np.int32)


class Decisions(Protocol):
    """The decisions on the token after one position. Use the methods in this order until `take` returns a token."""

    def probabilities(self) -> np.ndarray:
        """Of the outcomes of the next decision, (K,) float64, up to a common factor. All zero: nothing is known."""

    def outcome_of(self, token: int) -> int:
        """The outcome that leads to a token, which the earlier outcomes must allow."""

    def take(self, outcome: int) -> int | None:
        """Decide. Returns the token if there is nothing more to decide."""


class OneDecision:
    """All tokens at once. p : (V,), by token id"""

    def __init__(self, p: np.ndarray) -> None:
        self._p = p

    def probabilities(self) -> np.ndarray:
        """See Decisions."""
        return self._p.astype(np.float64)

    def outcome_of(self, token: int) -> int:
        """The token itself."""
        return token

    def take(self, outcome: int) -> int:
        """See Decisions."""
        return outcome


class PathDecisions:
    """One decision per node of a tree. Leaf rows have further shares beside it:

        shares[0] * p(row) + sum over o of shares[o + 1] [row = rows[o]]

    At a node, the probability of a child is that of the mixture below it: the tree's, and the shares of the rows there.

    spans : (M + 1, 5) int32, as in label_tree.Tree
    node : function that returns log p of the children of a node, given that node, (K,) float64
    rows : (O,) int32, leaf rows, -1 for none;  shares : (O + 1,) float64
    """

    def __init__(
        self,
        spans: np.ndarray,
        token_of_row: np.ndarray,
        row_of_token: np.ndarray,
        node: Callable[[int], np.ndarray],
        rows: np.ndarray,
        shares: np.ndarray,
    ) -> None:
        self._spans, self._token_of_row, self._row_of_token, self._node = spans, token_of_row, row_of_token, node
        self._own = float(shares[0])  # of the tree below this node
        self._more = [(row, share) for row, share in zip(rows.tolist(), shares[1:].tolist(), strict=True) if row >= 0]
        self._enter(0)

    def _enter(self, m: int) -> None:
        self._first, end, self._child, self._child_end, _ = (int(x) for x in self._spans[m])
        self._tokens = end - self._first
        self._own_p = self._own * np.exp(self._node(m))
        self._p = self._own_p.copy()
        self._outcomes = [self._outcome(row) for row, _ in self._more]
        for outcome, (_, share) in zip(self._outcomes, self._more, strict=True):
            self._p[outcome] += share

    def _outcome(self, row: int) -> int:
        """The child of this node above a leaf row."""
        if row < self._first + self._tokens:
            return row - self._first
        ends = self._spans[self._child : self._child_end, 4]
        return self._tokens + int(np.searchsorted(ends, row, side="right"))

    def probabilities(self) -> np.ndarray:
        """See Decisions."""
        return self._p

    def outcome_of(self, token: int) -> int:
        """See Decisions."""
        return self._outcome(int(self._row_of_token[token]))

    def take(self, outcome: int) -> int | None:
        """See Decisions."""
        if outcome < self._tokens:
            return int(self._token_of_row[self._first + outcome])
        kept = [more for more, there in zip(self._more, self._outcomes, strict=True) if there == outcome]
        total = float(self._p[outcome])
        # given this outcome; where nothing is left, the tree decides
        self._own = float(self._own_p[outcome]) / total if total > 0 else 1.0
        self._more = [(row, share / total) for row, share in kept] if total > 0 else []
        self._enter(self._child + outcome - self._tokens)
        return None
