"""Bringing an attempt's end into the database, once, however often it has to be asked for."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any

from sqlalchemy.exc import DataError

from services import leases, object_keys
from services.database import Database
from services.leases import Claim
from services.metrics import Metrics
from services.settings import Settings
from services.storage import ObjectStorage
from worker.endings import Ending, internal
from worker.lease import LeaseKeeper
from worker.patience import GaveUp, database_away, patiently

__all__ = ["Settlement"]

logger = logging.getLogger(__name__)

# A finished attempt goes on asking for its publication through an outage; the token keeps that safe past the lease.
SETTLING_SECONDS = 900.0


class Settlement:
    """Writes endings for the attempts of one worker.

    Args:
        settings: the budgets.
        database: where to.
        metrics: told of leases that turn out to be gone.
        until: when a draining worker has to go (``time.monotonic``).
    """

    def __init__(
        self,
        settings: Settings,
        database: Database,
        metrics: Metrics,
        *,
        until: Callable[[], float],
    ) -> None:
        self._settings, self._database = settings, database
        self._metrics, self._until = metrics, until

    def settle(self, storage: ObjectStorage, claim: Claim, keeper: LeaseKeeper, ending: Ending) -> str:
        """Bring the attempt's end into the database, or learn that it is not ours to bring.

        ``storage`` is where the artifacts lie of an attempt that came too late.
        """
        if ending.kind == "gone":
            return self._lost(storage, claim)
        limit = time.monotonic() + SETTLING_SECONDS

        def going_on() -> bool:
            keeper.moved()
            return time.monotonic() < min(limit, self._until())

        notes: list[tuple[str, dict[str, Any] | None]] = []

        def once(ending: Ending) -> str:
            notes.extend(keeper.take_notes())
            with self._database.transaction() as session:
                for phase, progress in notes:
                    leases.record_progress(session, claim, phase=phase, progress=progress)
                return ending.write(session, claim, self._settings) or self._already(session, claim, ending)

        def settle(ending: Ending) -> str:
            what = f"{claim.job_id}: ending"
            return patiently(lambda: once(ending), away=database_away, going_on=going_on, what=what)

        last_words = internal("The runner's last words hold something that the database refuses.")
        try:
            # What the database refuses once it would refuse again: first the progress is given up, then the ending.
            for words in (ending, ending, last_words):
                try:
                    outcome = settle(words)
                    break
                except DataError as error:
                    what = type(error.orig).__name__
                    logger.error("%s attempt %d: its end cannot be stored (%s)", claim.job_id, claim.attempt, what)
                    notes.clear()
            else:
                return "unsettled"
        except GaveUp:
            return "unsettled"  # the reaper will find the lease expired
        return self._lost(storage, claim) if outcome == "lost" else outcome

    def _lost(self, storage: ObjectStorage, claim: Claim) -> str:
        self._metrics.count("lease_losses", cause="taken")
        self._erase_own(storage, claim)
        return "lost"

    @staticmethod
    def _already(session: Any, claim: Claim, ending: Ending) -> str:
        """The fenced statements changed nothing: our own earlier COMMIT arrived after all, or the lease is gone."""
        now = leases.standing(session, claim.job_id)
        if now is None or now.token != claim.token:
            return "lost"
        if now.published_prefix is not None and now.published_prefix == ending.prefix:
            return now.status
        # Our token, yet not held: we or the reaper gave it back; either way what we wrote is referenced by nobody.
        return now.status if ending.prefix is None else "lost"

    @staticmethod
    def _erase_own(storage: ObjectStorage, claim: Claim) -> None:
        """Leave no artifacts behind that nobody will ever name."""
        try:
            storage.erase(object_keys.attempt_prefix(claim.tenant_id, claim.job_id, claim.token))
        except Exception as error:
            logger.warning("%s attempt %d: leftovers stay (%s)", claim.job_id, claim.attempt, type(error).__name__)
