"""Resumable states on their way to the store: beside the runner's work, the newest first, one kept."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from pathlib import Path

from services import leases, object_keys
from services.database import Database
from services.leases import Claim
from services.logs import inheriting
from services.storage import ObjectStorage, Stopped
from worker.patience import GaveUp, database_away, patiently, store_away

__all__ = ["StateKeeper"]

logger = logging.getLogger(__name__)

LEAVE_SECONDS = 5.0


class StateKeeper:
    """Uploads states in a thread of its own. A state that is overtaken by a newer one before its turn is skipped."""

    def __init__(
        self, database: Database, storage: ObjectStorage, claim: Claim, *, going_on: Callable[[], bool]
    ) -> None:
        self._database, self._storage, self._claim = database, storage, claim
        self._going_on = going_on
        self._newest_key: str | None = (claim.resume or {}).get("key")
        self._newest_step: int | None = None
        self._waiting: tuple[Path, int] | None = None
        self._busy = False
        self._closed = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=inheriting(self._work), name=f"states-{claim.job_id}", daemon=True)

    def __enter__(self) -> StateKeeper:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._thread.join(LEAVE_SECONDS)

    def add(self, path: Path, step: int) -> None:
        """Take a state over: the file is uploaded and then removed."""
        with self._changed:
            overtaken, self._waiting = self._waiting, (path, step)
            self._changed.notify_all()
        if overtaken is not None and overtaken[0] != path:
            overtaken[0].unlink(missing_ok=True)

    def settled(self) -> bool:
        """Whether nothing is on its way."""
        with self._changed:
            return self._waiting is None and not self._busy

    def wait(self, timeout: float) -> bool:
        """Wait until nothing is on its way; False after the timeout."""
        with self._changed:
            return self._changed.wait_for(lambda: self._waiting is None and not self._busy, timeout)

    def _work(self) -> None:
        while True:
            with self._changed:
                self._busy = False
                self._changed.notify_all()
                self._changed.wait_for(lambda: self._waiting is not None or self._closed)
                if self._waiting is None:
                    return
                (path, step), self._waiting, self._busy = self._waiting, None, True
            try:
                self._save(path, step)
            except (GaveUp, Stopped):
                logger.warning("%s attempt %d: a state was not saved", self._claim.job_id, self._claim.attempt)
            except Exception:
                logger.exception("%s attempt %d: a state was not saved", self._claim.job_id, self._claim.attempt)
            finally:
                path.unlink(missing_ok=True)

    def _save(self, path: Path, step: int) -> None:
        claim = self._claim
        if step == self._newest_step:  # saved on schedule and again at SIGTERM: the bytes are in place
            return
        key = object_keys.state(claim.tenant_id, claim.job_id, claim.token, step)
        stored = patiently(
            lambda: self._storage.put_file(key, path, going_on=self._going_on),
            away=store_away,
            going_on=self._worth_waiting,
            what=f"{claim.job_id}: state upload",
        )
        resume = {
            "key": key,
            "step": step,
            "token": claim.token,
            "bytes": stored.bytes,
            "sha256": stored.sha256,
        }
        recorded = patiently(
            lambda: self._record(resume),
            away=database_away,
            going_on=self._going_on,
            what=f"{claim.job_id}: state record",
        )
        stale = self._newest_key if recorded else key
        if recorded:
            self._newest_key, self._newest_step = key, step
        if stale is not None and stale != self._newest_key:
            self._storage.erase(stale)

    def _record(self, resume: dict[str, object]) -> bool:
        with self._database.transaction() as session:
            return leases.record_state(session, self._claim, resume)

    def _worth_waiting(self) -> bool:
        """A newer state makes this one pointless."""
        with self._changed:
            return self._waiting is None and self._going_on()
