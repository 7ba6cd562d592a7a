"""What one process counts, for Prometheus: kept in memory here, shown by way of the database.

No process opens a port for it. Each writes what it has counted so far to one row of its own every few seconds
(``services.metrics_table``), and any gateway shows the sums: one scrape shows the fleet.
"""

from __future__ import annotations

import logging
import threading
from functools import lru_cache

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest

from services import metrics_table
from services.counted import COUNTERS, CounterName
from services.database import Database

__all__ = ["Metrics", "Push", "headers"]

logger = logging.getLogger(__name__)

PREFIX = "forgetd_"
PUSH_SECONDS = 3.0
LEAVE_SECONDS = 3.0  # for the last push of an orderly exit
REFRESH_SECONDS = 60.0  # what has not changed is written again after this: else its row would pass for a dead one's
PHASE_SECONDS = (1, 5, 15, 60, 300, 900, 3600, 4 * 3600, 12 * 3600, 24 * 3600)
REQUEST_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1, 5, 30, 300)
METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
# Known before they happen, and so shown as 0: an alert on an increase needs the value before it.
BEGINNINGS: tuple[tuple[CounterName, dict[str, tuple[str, ...]]], ...] = (
    ("lease_losses", {"cause": ("expired", "taken", "runner")}),
    (
        "attempts_ended",
        {"outcome": ("succeeded", "failed", "cancelled", "drained", "out_of_memory", "lost", "expired")},
    ),
    ("loop_faults", {"loop": ("dispatch", "reap", "sweep", "tidy")}),
)


class Metrics:
    """The counters and histograms of a process."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry(auto_describe=False)
        self._counters = {
            name: Counter(f"{PREFIX}{name}", told, labels, registry=self.registry)
            for name, (told, labels) in COUNTERS.items()
        }
        self._phases = Histogram(
            f"{PREFIX}phase_seconds",
            "How long the phases of attempts took.",
            ("phase", "method"),
            buckets=PHASE_SECONDS,
            registry=self.registry,
        )
        self._requests = Histogram(
            f"{PREFIX}http_request_seconds",
            "From a request to the end of its answer; long polls and event streams take as long as they were asked to.",
            ("route",),
            buckets=REQUEST_SECONDS,
            registry=self.registry,
        )
        for counter, labels in BEGINNINGS:
            for label, values in labels.items():
                for value in values:
                    self._counters[counter].labels(**{label: value})
        self._answered: dict[tuple[str, str, int], Counter] = {}
        self._timed: dict[str, Histogram] = {}

    def count(self, name: CounterName, **labels: str) -> None:
        """One more."""
        counter = self._counters[name]
        (counter.labels(**labels) if labels else counter).inc()

    def phase(self, phase: str, method: str, seconds: float) -> None:
        """A phase of an attempt is over."""
        self._phases.labels(phase, method).observe(seconds)

    def request(self, method: str, route: str, status: int, seconds: float) -> None:
        """A request was answered. ``route`` is a template, so that there are few."""
        key = (method if method in METHODS else "other", route, status)
        counter = self._answered.get(key)
        if counter is None:
            counter = self._answered[key] = self._counters["http_requests"].labels(*key[:2], str(status))
        counter.inc()
        timer = self._timed.get(route)
        if timer is None:
            timer = self._timed[route] = self._requests.labels(route)
        timer.observe(seconds)

    def samples(self) -> dict[str, float]:
        """Everything counted so far, by name and labels as Prometheus writes them."""
        lines = generate_latest(self.registry).decode().splitlines()
        pairs = (line.rpartition(" ") for line in lines if not line.startswith("#"))
        return {key: float(value) for key, _, value in pairs if not key.partition("{")[0].endswith("_created")}


@lru_cache(maxsize=1)
def headers() -> dict[str, str]:
    """HELP and TYPE of every counter and histogram, by the family's name."""
    found: dict[str, str] = {}
    for line in generate_latest(Metrics().registry).decode().splitlines():
        if line.startswith("#") and not (name := line.split(" ", 3)[2]).endswith("_created"):
            found[name] = found.get(name, "") + line + "\n"
    return found


class Push(threading.Thread):
    """Writes a process's figures to its row, and once more when it leaves. A database that is away delays them.

    Args:
        database: where to.
        metrics: whose.
        process: a name that no other process has, or had.
        kind: gateway, control or worker.
    """

    def __init__(
        self, database: Database, metrics: Metrics, *, process: str, kind: str, every_seconds: float = PUSH_SECONDS
    ) -> None:
        super().__init__(name="metrics", daemon=True)
        self._database, self._metrics, self._every = database, metrics, every_seconds
        self._row = metrics_table.Row(process, kind)
        self._leaving = threading.Event()
        self._quiet = 0.0  # how long nothing was written
        self._written: dict[str, float] = {}

    def run(self) -> None:
        """Until the process leaves."""
        while not self._leaving.wait(self._every):
            self._once()
        self._once()

    def leave(self) -> None:
        """The last push, within some seconds."""
        self._leaving.set()
        if self.is_alive():
            self.join(LEAVE_SECONDS)

    def _once(self) -> None:
        samples = self._metrics.samples()
        self._quiet += self._every
        if samples == self._written and self._quiet < REFRESH_SECONDS:
            return
        try:
            self._row.write(self._database, samples)
        except Exception as error:  # whatever it is, figures must not end a process that works
            logger.debug("figures not written (%s)", type(error).__name__)
        else:
            self._written, self._quiet = samples, 0.0
