"""Many questions in one statement: each is answered for its own key, and for no other's job."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import Connection, text

from services import checkpoints, lookups, object_keys, tenancy
from services.database import Database
from services.errors import NotFound, WrongKey
from services.ids import new_id
from services.lookups import JobView
from services.storage import StoredObject
from services.tables import Job
from services.tenancy import Caller, Credential

NOBODY = "fgt_" + "0" * 32 + "_" + "x" * 43


def a_job(database: Database, caller: Caller, kind: str = "forget") -> str:
    checkpoint_id, job_id = new_id("ckpt"), new_id("job")
    source = StoredObject(object_keys.checkpoint_source(caller.tenant_id, checkpoint_id), 10, "0" * 64)
    with database.transaction() as session:
        checkpoints.register(session, caller, checkpoint_id, name="base", declared={}, source=source)
        session.add(
            Job(
                id=job_id,
                tenant_id=caller.tenant_id,
                kind=kind,
                queue="gpu.flow",
                checkpoint_id=checkpoint_id,
                request={"method": "flow-taming"},
                seed=1,
            )
        )
    return job_id


@pytest.fixture
def world(database: Database) -> tuple[list[str], list[tuple[str, str]]]:
    """Keys (two of one tenant, one of another, one revoked, one unknown, no key) and jobs with their tenant."""
    made = []
    with database.transaction() as session:
        for tenant in ("one", "one", "two", "two"):
            made.append(tenancy.create_key(session, tenant=tenant, name="test"))
        tenancy.revoke_key(session, made[3].id)
    keys = [*(key.secret for key in made), NOBODY, "nonsense", made[0].secret[:-43] + "y" * 43]
    owners = [Caller(made[index].tenant_id, made[index].id) for index in (0, 2)]
    jobs = [(owner.tenant_id, a_job(database, owner)) for owner in owners for _ in range(2)]
    jobs.append(("nobody", a_job(database, owners[0], "import")))
    jobs.append(("nobody", new_id("job")))
    return keys, jobs


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(asked=st.lists(st.tuples(st.integers(0, 6), st.integers(0, 5)), min_size=1, max_size=30))
def test_each_is_told_what_it_would_be_told_alone(
    database: Database, world: tuple[list[str], list[tuple[str, str]]], asked: list[tuple[int, int]]
) -> None:
    keys, jobs = world
    questions = [(Credential.of(keys[key]), jobs[job][1]) for key, job in asked]

    views = database.read(lambda it: lookups.views(it, questions))
    marks = database.read(lambda it: lookups.marks(it, questions))
    callers = database.read(lambda it: lookups.callers(it, [credential for credential, _ in questions]))

    for (key, job), view, mark, caller in zip(asked, views, marks, callers, strict=True):
        if key > 2:
            assert isinstance(caller, WrongKey)
            assert isinstance(view, WrongKey)
            assert isinstance(mark, WrongKey)
            continue
        assert isinstance(caller, Caller)
        with database.transaction() as session:
            assert tenancy.authenticate(session, keys[key]) == caller
        if jobs[job][0] != caller.tenant_id:
            assert isinstance(view, NotFound)
            assert isinstance(mark, NotFound)
        else:
            assert isinstance(view, JobView)
            assert view.id == jobs[job][1]
            assert (view.version, view.status) == mark[:2]


def test_view_has_what_the_row_has(database: Database, caller: Caller, api_key: tenancy.NewKey) -> None:
    job_id = a_job(database, caller)

    view = database.read(lambda it: lookups.views(it, [(Credential.of(api_key.secret), job_id)]))[0]

    with database.transaction() as session:
        row = session.get_one(Job, job_id)
    assert isinstance(view, JobView)
    assert view._asdict() == {name: getattr(row, name) for name in JobView._fields}


def test_reads_outlive_the_loss_of_every_connection(database: Database) -> None:
    def pid(connection: Connection) -> int:
        return int(connection.execute(text("SELECT pg_backend_pid()")).scalar_one())

    before = database.read(pid)
    with database.transaction() as session:
        session.execute(text("SELECT pg_terminate_backend(:pid, 5000)"), {"pid": before})

    assert database.read(pid) != before


def test_what_fails_otherwise_is_not_asked_again(database: Database) -> None:
    asked: list[int] = []

    def wrong(connection: Connection) -> None:
        asked.append(1)
        connection.execute(text("SELECT nothing_of_that_name"))

    with pytest.raises(Exception, match="nothing_of_that_name"):
        database.read(wrong)
    assert asked == [1]


def test_wrong_secret_is_told_nothing_of_the_job(database: Database, caller: Caller) -> None:
    wrong = Credential.of(f"fgt_{caller.key_id.removeprefix('key_')}_" + "z" * 43)
    asked = [(wrong, a_job(database, caller)), (wrong, new_id("job"))]

    one, other = database.read(lambda it: lookups.views(it, asked))

    assert isinstance(one, WrongKey)
    assert str(one) == str(other)
