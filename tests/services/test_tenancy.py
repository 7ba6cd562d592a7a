"""API keys: what opens, what does not, and what is stored."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from sqlalchemy import select

from services import tenancy
from services.database import Database
from services.errors import NotFound, WrongKey
from services.tables import ApiKey, AuditEvent
from services.tenancy import NewKey


def test_a_key_opens_its_own_tenant(database: Database, api_key: NewKey) -> None:
    with database.transaction() as session:
        caller = tenancy.authenticate(session, api_key.secret)

    assert (caller.tenant_id, caller.key_id) == (api_key.tenant_id, api_key.id)


def test_a_revoked_key_opens_nothing(database: Database, api_key: NewKey) -> None:
    with database.transaction() as session:
        tenancy.revoke_key(session, api_key.id)

    with database.transaction() as session, pytest.raises(WrongKey):
        tenancy.authenticate(session, api_key.secret)
    with database.transaction() as session, pytest.raises(NotFound):
        tenancy.revoke_key(session, api_key.id)


def test_the_secret_is_stored_nowhere(database: Database, api_key: NewKey) -> None:
    secret = api_key.secret.rsplit("_", 1)[-1]

    with database.transaction() as session:
        stored = [repr(vars(row)) for row in session.scalars(select(ApiKey))]
        stored += [repr(vars(row)) for row in session.scalars(select(AuditEvent))]

    assert not any(secret in row for row in stored)


@hypothesis_settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(position=st.integers(0, 79), character=st.sampled_from("0123456789abcdefXYZ_-. é"))
def test_no_other_text_opens(database: Database, api_key: NewKey, position: int, character: str) -> None:
    text = api_key.secret[:position] + character + api_key.secret[position + 1 :]
    if text == api_key.secret:
        return

    with database.transaction() as session, pytest.raises(WrongKey):
        tenancy.authenticate(session, text)


def test_two_keys_of_one_name_share_the_tenant(database: Database) -> None:
    with database.transaction() as session:
        first = tenancy.create_key(session, tenant="same", name="a")
        second = tenancy.create_key(session, tenant="same", name="b")

    assert first.tenant_id == second.tenant_id
    assert first.secret != second.secret
