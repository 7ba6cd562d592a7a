"""Lets the faults of a plan loose at an even pace; at one site one after the other."""

from __future__ import annotations

import random
import threading
import time
from collections import Counter, deque
from concurrent.futures import Future, ThreadPoolExecutor

from tests.chaos.faults import CATALOGUE, Broken, Fault
from tests.chaos.fleet import Fleet

__all__ = ["Monkey"]

AT_ONCE = 6
LAST_SECONDS = 120.0  # for what is still broken at the end to be mended


class Monkey:
    """Runs a plan; ``finish`` returns when everything that it broke is whole again.

    Args:
        fleet: what is to be broken.
        faults: the plan.
        spares: further faults, one at once in the place of each that found nothing to break.
        seconds: in which the plan takes place.
    """

    def __init__(self, fleet: Fleet, faults: list[Fault], spares: list[Fault], seconds: float) -> None:
        self.broken = Broken()
        self.done: Counter[str] = Counter()  # of each kind, that found something to break
        self.missed = 0  # that did not
        self._fleet, self._faults, self._spares, self._seconds = fleet, faults, deque(spares), seconds
        self._counting = threading.Lock()
        self._sites = {kind.site: threading.Lock() for kind in CATALOGUE.values()}
        self._pool = ThreadPoolExecutor(AT_ONCE, thread_name_prefix="fault")
        self._under_way: list[Future[None]] = []
        self._thread = threading.Thread(target=self._run, name="monkey", daemon=True)

    @property
    def hits(self) -> int:
        """Faults that found something to break."""
        return self.done.total()

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def finish(self) -> None:
        """Wait until the plan is through.

        Raises:
            Exception: of the first fault that could not be done: then the harness is broken, not the fleet.
        """
        self._thread.join()
        for fault in self._under_way:
            fault.result(LAST_SECONDS)
        self._pool.shutdown()

    def _run(self) -> None:
        pause = self._seconds / max(len(self._faults), 1)
        began = time.monotonic()
        for number, fault in enumerate(self._faults):
            time.sleep(max(0.0, began + number * pause - time.monotonic()))
            self._under_way.append(self._pool.submit(self._break, fault))

    def _break(self, fault: Fault | None) -> None:
        """This one, or the first spare that finds something to break."""
        while fault is not None:
            kind = CATALOGUE[fault.kind]
            with self._sites[kind.site]:
                hit = kind.act(self._fleet, random.Random(fault.seed), self.broken)
            with self._counting:
                self.done[fault.kind] += hit
                self.missed += not hit
                fault = None if hit or not self._spares else self._spares.popleft()
