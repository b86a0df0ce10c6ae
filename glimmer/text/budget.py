"""ThinkingBudget: a constraint that ends the reasoning of an answer after a number of tokens.

It may stand before another constraint, which then holds for what comes besides. Not here: what other constraints say.
"""

from typing import Protocol


class Constraint(Protocol):
    """As engine/sequence.py has it."""

    def mask(self) -> bytes | bytearray | None: ...
    def accept(self, token: int) -> None: ...
    def rollback(self, count: int) -> None: ...


class ThinkingBudget:
    """When `tokens` tokens of reasoning have come, nothing but `close` may come: the token of </think>.

    open: the token of <think>, with which the answer may begin its reasoning; thinking: the prompt has done so. only:
    the set of ids that has `close` alone. An answer thinks once.
    """

    def __init__(
        self, tokens: int, open: int, close: int, only: bytes | bytearray, thinking: bool, inner: Constraint | None
    ):
        self._open, self._close, self._only, self._inner, self._tokens = open, close, only, inner, tokens
        self._left: list[int | None] = [tokens if thinking else None]  # before each token; None: it does not think

    def mask(self) -> bytes | bytearray | None:
        """As Constraint.mask."""
        if self._left[-1] == 0:
            return self._only
        return None if self._inner is None else self._inner.mask()

    def accept(self, token: int) -> None:
        """As Constraint.accept."""
        left = self._left[-1]
        if token == self._close:
            left = None
        elif left is not None:
            left = max(left - 1, 0)
        elif token == self._open and len(self._left) <= FIRST:
            left = self._tokens
        self._left.append(left)
        if self._inner is not None:
            self._inner.accept(token)

    def rollback(self, count: int) -> None:
        """As Constraint.rollback."""
        del self._left[len(self._left) - count :]
        if self._inner is not None:
            self._inner.rollback(count)


FIRST = 2  # tokens within which an answer opens its reasoning: a line break may come before
