"""What a handler asks for by type: who calls, one transaction, the store, and ids that have the form of one."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated

from fastapi import Depends, Header, Path, Query, Request
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from fastapi.security.utils import get_authorization_scheme_param
from sqlalchemy.orm import Session

from api.problems import not_found
from api.together import Together
from services import lookups
from services.database import Database
from services.errors import MissingKey
from services.ids import is_id
from services.lookups import Asked, JobMark, JobView
from services.settings import Settings
from services.storage import ObjectStorage
from services.tenancy import Caller, Credential

__all__ = [
    "AppDatabase",
    "AppSettings",
    "AppStorage",
    "AskedJob",
    "Authenticated",
    "CheckpointId",
    "ClassifierId",
    "IdempotencyKey",
    "IfNoneMatch",
    "ImageSetId",
    "JobId",
    "Limit",
    "Lookups",
    "Transaction",
    "Wait",
    "asked_job",
    "lookups_of",
]

bearer = HTTPBearer(auto_error=False, description="An API key: forgetd keys create.", bearerFormat="fgt_...")
Bearer = Annotated[HTTPAuthorizationCredentials | None, Depends(bearer)]


async def _settings(request: Request) -> Settings:
    settings: Settings = request.app.state.settings
    return settings


async def _database(request: Request) -> Database:
    database: Database = request.app.state.database
    return database


async def _storage(request: Request) -> ObjectStorage:
    storage: ObjectStorage = request.app.state.storage
    return storage


class Lookups:
    """What is asked all the time, each kind by all who ask it at once."""

    def __init__(self, database: Database) -> None:
        self.callers = Together[Credential, Caller](lambda asked: database.read(lambda it: lookups.callers(it, asked)))
        self.marks = Together[Asked, JobMark](lambda asked: database.read(lambda it: lookups.marks(it, asked)))
        self.views = Together[Asked, JobView](lambda asked: database.read(lambda it: lookups.views(it, asked)))

    def close(self) -> None:
        """Nobody asks any more."""
        for each in (self.callers, self.marks, self.views):
            each.close()


def lookups_of(request: Request) -> Lookups:
    """The application's."""
    found: Lookups = request.app.state.lookups
    return found


AppSettings = Annotated[Settings, Depends(_settings)]
AppDatabase = Annotated[Database, Depends(_database)]
AppStorage = Annotated[ObjectStorage, Depends(_storage)]


def _presented(request: Request) -> Credential:
    """The key that came with a request, unchecked."""
    scheme, text = get_authorization_scheme_param(request.headers.get("authorization"))
    if scheme.lower() != "bearer" or not text:
        raise MissingKey("Send the header Authorization: Bearer fgt_... with a key from: forgetd keys create.")
    return Credential.of(text)


async def _caller(request: Request, _documented: Bearer) -> Caller:
    """Who calls. No connection of its own: a request holds none while it waits for a thread or for bytes."""
    return await lookups_of(request).callers.ask(_presented(request))


def _transaction(database: AppDatabase) -> Iterator[Session]:
    with database.transaction() as session:
        yield session


Authenticated = Annotated[Caller, Depends(_caller)]
# Scope "function": committed before the answer is sent, so that what a caller was told is true.
Transaction = Annotated[Session, Depends(_transaction, scope="function")]


async def _job_id(job_id: Annotated[str, Path(examples=["job_0192f3c1a2b47d0e8f1a2b3c4d5e6f70"])]) -> str:
    if not is_id("job", job_id):
        raise not_found("job")
    return job_id


async def _checkpoint_id(
    checkpoint_id: Annotated[str, Path(examples=["ckpt_0192f3c1a2b47d0e8f1a2b3c4d5e6f70"])],
) -> str:
    if not is_id("ckpt", checkpoint_id):
        raise not_found("checkpoint")
    return checkpoint_id


async def _classifier_id(
    classifier_id: Annotated[str, Path(examples=["clf_0192f3c1a2b47d0e8f1a2b3c4d5e6f70"])],
) -> str:
    if not is_id("clf", classifier_id):
        raise not_found("classifier")
    return classifier_id


async def _image_set_id(
    image_set_id: Annotated[str, Path(examples=["imgs_0192f3c1a2b47d0e8f1a2b3c4d5e6f70"])],
) -> str:
    if not is_id("imgs", image_set_id):
        raise not_found("image set")
    return image_set_id


def asked_job(request: Request) -> Asked:
    """Who asks for which job, for a question that checks the key with what it asks."""
    credential, job_id = _presented(request), request.path_params["job_id"]
    if not is_id("job", job_id):
        raise not_found("job")
    return credential, job_id


async def _asked_job(
    request: Request,
    job_id: Annotated[str, Path(examples=["job_0192f3c1a2b47d0e8f1a2b3c4d5e6f70"])],  # noqa: ARG001 for its documentation
    _documented: Bearer,
) -> Asked:
    return asked_job(request)


AskedJob = Annotated[Asked, Depends(_asked_job)]
JobId = Annotated[str, Depends(_job_id)]
CheckpointId = Annotated[str, Depends(_checkpoint_id)]
ClassifierId = Annotated[str, Depends(_classifier_id)]
ImageSetId = Annotated[str, Depends(_image_set_id)]

IdempotencyKey = Annotated[
    str | None,
    Header(
        alias="Idempotency-Key",
        max_length=255,
        pattern=r"^[\x21-\x7e]+$",
        description="Repeat a request with the same key and it is done once; the first answer comes again.",
    ),
]
IfNoneMatch = Annotated[str | None, Header(alias="If-None-Match", description="an ETag: 304 while nothing changed")]
Limit = Annotated[int, Query(ge=1, le=100, description="items on a page")]
Wait = Annotated[float, Query(ge=0, le=30, description="seconds to hold the answer back until something changes")]
