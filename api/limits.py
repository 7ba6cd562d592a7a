"""How many threads something may take of those that all requests share."""

from __future__ import annotations

import anyio
from anyio.lowlevel import RunVar

__all__ = ["LoopLimiter"]


class LoopLimiter:
    """So many at once, on each event loop: a limiter belongs to the loop that it is first asked on.

    Args:
        name: Of what is limited.
        tokens: How many at once.
    """

    def __init__(self, name: str, tokens: int) -> None:
        self._limiters: RunVar[anyio.CapacityLimiter] = RunVar(name)
        self._tokens = tokens

    def here(self) -> anyio.CapacityLimiter:
        """That of the running loop."""
        try:
            return self._limiters.get()
        except LookupError:
            limiter = anyio.CapacityLimiter(self._tokens)
            self._limiters.set(limiter)
            return limiter
