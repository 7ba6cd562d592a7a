"""What is wrong with a service, and what to do: one list of findings about everything that it stands on."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace

from sqlalchemy.exc import SQLAlchemyError

from services.database import Database
from services.diagnosis import accelerators, broker, database, host, store, work
from services.diagnosis.findings import Check, Finding, ask
from services.diagnosis.variables import read, scrubbed
from services.settings import Settings

__all__ = ["Finding", "diagnose"]

ANSWER_SECONDS = 10.0  # of a server, all questions together
HOST_SECONDS = 5.0
GPU_SECONDS = 20.0


@dataclass
class _Facts:
    """What one check learns and another needs."""

    live: list[work.Listener] = field(default_factory=list)
    largest_checkpoint: int = 0
    seen: accelerators.Seen | None = None


def diagnose(environment: Mapping[str, str] | None = None, *, seconds: float = ANSWER_SECONDS) -> list[Finding]:
    """Look at settings, servers, work and this host. Raises nothing, tells no secret, and ends.

    Args:
        environment: The ``FORGETD_*`` variables to look at; the process's own by default.
        seconds: For each server, beside the others; then `HOST_SECONDS` for what needs their answers.
    """
    environment = dict(os.environ if environment is None else environment)
    reading = read(environment)
    settings, facts = reading.settings, _Facts()

    def torch() -> Iterator[Finding]:
        facts.seen = accelerators.look(environment, seconds=GPU_SECONDS - 1)
        return iter(())

    def unheard(queues: list[str]) -> dict[str, int]:
        return {} if "broker_url" in reading.nowhere else broker.unheard(settings, queues)

    checks = [Check("gpu", GPU_SECONDS, torch, "Look at: nvidia-smi")]
    if "broker_url" not in reading.nowhere:
        mend = "Look at the broker and at the way to it: a firewall drops what it does not let through."
        checks.insert(0, Check("broker", seconds, lambda: broker.questions(settings), mend))
    mend = "Look at the store and at the way to it: a firewall drops what it does not let through."
    checks.insert(0, Check("store", seconds, lambda: store.questions(settings), mend))
    if "database_url" not in reading.nowhere:
        mend = "Look at PostgreSQL and at the way to it: a firewall drops what it does not let through."
        checks.insert(0, Check("database", seconds, lambda: _database(settings, facts, unheard), mend))
    findings = [*reading.findings, *ask(checks)]
    mend = "Look at the disk of FORGETD_SCRATCH_DIR."
    findings += ask(
        [
            Check("scratch", HOST_SECONDS, lambda: host.scratch(settings.scratch_dir, facts.largest_checkpoint), mend),
            Check("gpu", HOST_SECONDS, lambda: host.gpu(facts.seen, facts.live, environment), "Look at: nvidia-smi"),
        ]
    )
    return [_without_secrets(finding, settings) for finding in findings]


def _database(settings: Settings, facts: _Facts, unheard: Callable[[list[str]], dict[str, int]]) -> Iterator[Finding]:
    """The server, and what it tells of the work. Nothing is written: the transaction is rolled back."""
    there = Database(settings.database_url.get_secret_value(), pool_size=1)
    try:
        try:
            connection = there.engine.connect()
        except SQLAlchemyError as error:
            yield database.unreachable(error)
            return
        with connection:
            yield from database.questions(connection)
            if not database.connected(connection):
                return
        with there.transaction() as session:
            facts.live, facts.largest_checkpoint = work.listeners(session), work.largest_checkpoint(session)
            yield from work.questions(session, settings, facts.live, unheard=unheard)
            session.rollback()
    finally:
        there.close()


def _without_secrets(finding: Finding, settings: Settings) -> Finding:
    return replace(finding, says=scrubbed(finding.says, settings), mend=scrubbed(finding.mend, settings))
