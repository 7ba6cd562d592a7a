"""Tenants and their API keys."""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
from dataclasses import dataclass, field

from sqlalchemy import func, select, update
from sqlalchemy.orm import Session

from services import audit
from services.errors import NotFound, WrongKey
from services.ids import new_id
from services.tables import ApiKey, Tenant

__all__ = ["Caller", "Credential", "NewKey", "authenticate", "create_key", "list_keys", "revoke_key"]

KEY_FORM = re.compile(r"^fgt_([0-9a-f]{32})_([A-Za-z0-9_-]{43})$")


@dataclass(frozen=True)
class Caller:
    """Who calls: every query that a caller can reach takes the tenant from here."""

    tenant_id: str
    key_id: str


@dataclass(frozen=True)
class NewKey:
    """A key just made. ``secret`` is shown once and stored nowhere."""

    id: str
    tenant_id: str
    tenant: str
    name: str
    secret: str


@dataclass(frozen=True)
class Credential:
    """A key as somebody presents it: which one it says that it is, and the digest of its secret."""

    key_id: str  # empty: the text has not the form of a key
    digest: bytes = field(repr=False)

    @classmethod
    def of(cls, presented: str) -> Credential:
        """From the text of an Authorization header."""
        form = KEY_FORM.match(presented)
        return cls(f"key_{form[1]}" if form else "", _digest(form[2] if form else presented))

    def caller(self, tenant_id: str | None, secret_sha256: bytes | None) -> Caller:
        """The caller, from what the live key of that id has on record (None: there is none); raises ``WrongKey``."""
        # An unknown id costs the same comparison as a known one.
        known = hmac.compare_digest(self.digest, secret_sha256 if secret_sha256 is not None else bytes(32))
        if not known or tenant_id is None:
            raise WrongKey("Check the key, or ask the operator for a new one: forgetd keys create.")
        return Caller(tenant_id, self.key_id)


def _digest(secret: str) -> bytes:
    return hashlib.sha256(secret.encode()).digest()


def create_key(session: Session, *, tenant: str, name: str) -> NewKey:
    """Make a key for the tenant of this name, and the tenant if it is new."""
    owner = session.scalar(select(Tenant).where(Tenant.name == tenant))
    if owner is None:
        owner = Tenant(id=new_id("ten"), name=tenant)
        session.add(owner)
        session.flush()
    key_id, secret = new_id("key"), secrets.token_urlsafe(32)
    session.add(ApiKey(id=key_id, tenant_id=owner.id, name=name, secret_sha256=_digest(secret)))
    audit.record(session, owner.id, actor="operator", action="key.created", subject=key_id)
    return NewKey(key_id, owner.id, tenant, name, f"fgt_{key_id.removeprefix('key_')}_{secret}")


def list_keys(session: Session) -> list[tuple[ApiKey, Tenant]]:
    """Every key with its tenant, oldest first, for the operator."""
    rows = session.execute(select(ApiKey, Tenant).join(Tenant, Tenant.id == ApiKey.tenant_id).order_by(ApiKey.id))
    return [(row.ApiKey, row.Tenant) for row in rows]


def revoke_key(session: Session, key_id: str) -> None:
    """End a key at once; raises ``NotFound`` for an unknown or already revoked one."""
    tenant_id = session.execute(
        update(ApiKey)
        .where(ApiKey.id == key_id, ApiKey.revoked_at.is_(None))
        .values(revoked_at=func.now())
        .returning(ApiKey.tenant_id)
    ).scalar_one_or_none()
    if tenant_id is None:
        raise NotFound(f"There is no live API key {key_id}.")
    audit.record(session, tenant_id, actor="operator", action="key.revoked", subject=key_id)


def authenticate(session: Session, presented: str) -> Caller:
    """The caller behind a presented key; raises ``WrongKey`` without saying what about it is wrong."""
    credential = Credential.of(presented)
    live = select(ApiKey).where(ApiKey.id == credential.key_id, ApiKey.revoked_at.is_(None))
    row = session.scalar(live)
    return credential.caller(*(row.tenant_id, row.secret_sha256) if row is not None else (None, None))
