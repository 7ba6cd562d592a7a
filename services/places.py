"""The free slots of workers that listen to several queues each: which doorbells they can answer together."""

from __future__ import annotations

from collections import Counter

__all__ = ["Places"]


class Places:
    """Places by the set of queues that each takes from; one bell takes one place, of any worker that listens.

    Bells already placed give way to later ones where another place does for them (Kuhn's augmenting paths), so that a
    set of bells is refused only if no way of placing it exists.
    """

    def __init__(self) -> None:
        self._free: Counter[frozenset[str]] = Counter()
        self._taken: dict[frozenset[str], Counter[str]] = {}

    @property
    def queues(self) -> set[str]:
        """Every queue that somebody listens to."""
        return set().union(*self._taken)

    def add(self, queues: set[str], free: int) -> None:
        """A worker with that many free slots; one that has none still joins its queues."""
        key = frozenset(queues)
        self._free[key] += max(0, free)
        self._taken.setdefault(key, Counter())

    def room(self, queue: str) -> int:
        """How many bells of one queue could be placed at most, if no other one rang."""
        return sum(free for queues, free in self._free.items() if queues <= self.pool(queue))

    def take(self, queue: str) -> bool:
        """Place one bell; False where none is left for it."""
        return self._place(queue, set())

    def _place(self, queue: str, tried: set[frozenset[str]]) -> bool:
        for queues in self._taken:
            if queue not in queues or queues in tried:
                continue
            tried.add(queues)
            if self._free[queues] > 0:
                self._free[queues] -= 1
                self._taken[queues][queue] += 1
                return True
            for other in [name for name, count in self._taken[queues].items() if count and name != queue]:
                if self._place(other, tried):
                    self._taken[queues][other] -= 1
                    self._taken[queues][queue] += 1
                    return True
        return False

    def pool(self, queue: str) -> frozenset[str]:
        """All queues whose workers are connected with this one's: among them slots are shared."""
        reached = frozenset({queue})
        while True:
            wider = reached.union(*(queues for queues in self._taken if queues & reached))
            if wider == reached:
                return reached
            reached = wider
