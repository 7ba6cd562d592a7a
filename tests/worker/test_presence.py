"""A worker that leaves says so before its process ends, whoever asked it to."""

from __future__ import annotations

import threading

import pytest
from sqlalchemy import select
from sqlalchemy.orm import Session

from services import dispatch
from services.database import Database
from services.tables import WorkerSlot
from tests.worker.helpers import PATIENCE_SECONDS, eventually
from worker.main import Presence


def listening(database: Database) -> list[str]:
    with database.transaction() as session:
        return list(session.scalars(select(WorkerSlot.id)))


def test_the_end_of_the_process_waits_for_the_last_word(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    retire, asked, gate = dispatch.retire_worker, threading.Event(), threading.Event()

    def slowly(session: Session, worker: str) -> None:
        asked.set()
        gate.wait(PATIENCE_SECONDS)
        retire(session, worker)

    monkeypatch.setattr(dispatch, "retire_worker", slowly)
    presence = Presence(database, "w", ["cpu"], 1)
    presence.start()
    eventually(lambda: listening(database) == ["w"])
    drain = threading.Thread(target=presence.leave)
    drain.start()
    assert asked.wait(PATIENCE_SECONDS)

    end = threading.Thread(target=presence.leave)
    end.start()
    end.join(0.3)
    assert end.is_alive()
    gate.set()
    end.join(PATIENCE_SECONDS)

    assert listening(database) == []
    drain.join(PATIENCE_SECONDS)
