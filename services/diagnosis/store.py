"""The object store: every kind of request that the service lives on, tried with one small object of its own."""

from __future__ import annotations

import secrets
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import suppress
from email.utils import parsedate_to_datetime

from botocore.exceptions import BotoCoreError, ClientError, NoCredentialsError

from services.diagnosis.findings import Finding, first_line, ok, warning, wrong
from services.settings import Settings
from services.storage import ObjectStorage

__all__ = ["questions"]

CHECK = "store"
ROOT = "doctor/"
ANSWER_SECONDS = 5.0
CLOCK_SECONDS = 30.0
BODY = b"forgetd doctor was here"
DENIED = ("AccessDenied", "403", "Forbidden", "AllAccessDisabled")
KEYS = ("InvalidAccessKeyId", "SignatureDoesNotMatch", "InvalidToken", "ExpiredToken", "AuthorizationHeaderMalformed")
SKEWED = ("RequestTimeTooSkewed",)
ABSENT = ("NoSuchBucket", "404", "NotFound")
CREDENTIALS = "Correct FORGETD_S3_ACCESS_KEY and FORGETD_S3_SECRET_KEY (and FORGETD_S3_REGION, on AWS)."


def questions(settings: Settings) -> Iterator[Finding]:
    """Bucket, writing, conditional writing, writing in parts, links, deleting, and the clock."""
    try:
        storage = ObjectStorage(settings)
    except (BotoCoreError, ValueError) as error:
        yield wrong(CHECK, first_line(error), "Correct FORGETD_S3_ENDPOINT_URL.")
        return
    prefix = f"{ROOT}{secrets.token_hex(8)}/"
    try:
        began = time.monotonic()
        storage.keys(prefix)  # not a HEAD, whose refusal has no words
        yield ok(CHECK, f"bucket {storage.bucket} answers in {1e3 * (time.monotonic() - began):.0f} ms")
        storage.put(f"{prefix}object", BODY, media_type="text/plain")
        if storage.read(f"{prefix}object") != BODY:
            yield wrong(f"{CHECK} objects", "it gave back other bytes than were written", "Check the store itself.")
            return
        yield ok(f"{CHECK} objects", "written and read")
        yield _condition(storage, prefix)
        yield _parts(storage, prefix)
        yield from _links(settings, storage, f"{prefix}object")
    except (BotoCoreError, ClientError) as error:
        yield _refused(settings, error)
        return
    finally:
        with suppress(BotoCoreError, ClientError, RuntimeError):  # asked again below, where it is answered
            storage.erase(prefix)
    yield _deleted(storage, prefix)


def _condition(storage: ObjectStorage, prefix: str) -> Finding:
    """A manifest and an asset must be written by one and the first."""
    check, mend = f"{CHECK} conditional writes", "Use a store, or a version of it, that honours If-None-Match: *."
    try:
        storage.put(f"{prefix}object", b"another", media_type="text/plain", only_if_absent=True)
    except FileExistsError:
        return ok(check, "a key that is taken is refused")
    except ClientError as error:
        return wrong(check, f"it refuses them: {_code(error)}", mend)
    return wrong(check, "it overwrote a key that was taken: two writers could both believe to be the first", mend)


def _parts(storage: ObjectStorage, prefix: str) -> Finding:
    """Large files arrive in parts, and one that is broken off must leave nothing."""
    check = f"{CHECK} parts"
    upload = storage.upload(f"{prefix}parts")
    upload.feed(BODY)
    upload.flush()
    upload.abort()
    if storage.unfinished(prefix):
        return wrong(check, "an upload in parts that was aborted is still listed", "Check the store itself.")
    return ok(check, "begun, sent and aborted")


def _links(settings: Settings, storage: ObjectStorage, key: str) -> Iterator[Finding]:
    """A link as callers get it, fetched as they would, without credentials; its answer tells the store's time."""
    check = f"{CHECK} links"
    public = settings.s3_public_endpoint_url
    name = "FORGETD_S3_PUBLIC_ENDPOINT_URL" if public else "FORGETD_S3_ENDPOINT_URL"
    where = public or settings.s3_endpoint_url or "AWS"
    link = storage.presigned_get(key, filename="doctor.txt", media_type="text/plain")
    try:
        with urllib.request.urlopen(link, timeout=ANSWER_SECONDS) as answer:  # noqa: S310 a link that we made, of http(s)
            body, date = answer.read(), answer.headers.get("Date")
    except urllib.error.HTTPError as error:
        with error:
            says = f"a link to {where} is answered {error.code}"
        yield wrong(
            check, says, f"Set {name} to the store itself, or to a proxy that passes host, path and query as is."
        )
        return
    except (OSError, ValueError) as error:
        says = f"nothing answers at {where}, where download links point: {first_line(getattr(error, 'reason', error))}"
        mend = (
            f"Correct {name}, or let this address through. If callers reach it and only this host does not, leave it."
        )
        yield warning(check, says, mend)
        return
    if body != BODY:
        yield wrong(check, f"a link to {where} gives something else", f"Set {name} to the store, as callers reach it.")
        return
    yield ok(check, f"{where} gives what they point to")
    if date is not None:
        yield _clock(date)


def _clock(date: str) -> Finding:
    check = f"{CHECK} clock"
    try:
        apart = abs(parsedate_to_datetime(date).timestamp() - time.time())
    except ValueError:
        return warning(
            check, "its answers carry no readable date", "Check what stands between this host and the store."
        )
    if apart > CLOCK_SECONDS:
        says = f"this host's clock and the store's are {apart:.0f} s apart; from 900 s on it refuses every request"
        return warning(check, says, "Let both hosts set their clocks (chrony, systemd-timesyncd).")
    return ok(check, "agrees with this host's")


def _deleted(storage: ObjectStorage, prefix: str) -> Finding:
    check, mend = f"{CHECK} deletion", "Allow DeleteObject, DeleteObjectVersion and ListBucketVersions: images must go."
    try:
        storage.erase(prefix)
    except (BotoCoreError, ClientError, RuntimeError) as error:
        return wrong(check, f"the object of this check stays: {first_line(error)}", mend)
    return ok(check, "nothing is left of this check")


def _refused(settings: Settings, error: BotoCoreError | ClientError) -> Finding:
    """What stands in the way of everything else."""
    where = settings.s3_endpoint_url or f"AWS in {settings.s3_region}"
    if isinstance(error, NoCredentialsError):
        return wrong(CHECK, "no credentials are set, and the host has no role", CREDENTIALS)
    if not isinstance(error, ClientError):
        return wrong(
            CHECK, f"{where} does not answer: {first_line(error)}", "Start it, or correct FORGETD_S3_ENDPOINT_URL."
        )
    code = _code(error)
    if code in ABSENT:
        says = f"there is no bucket {settings.s3_bucket} at {where}"
        return wrong(CHECK, says, f"Make it (aws s3 mb s3://{settings.s3_bucket}), or correct FORGETD_S3_BUCKET.")
    if code in SKEWED:
        return wrong(CHECK, "it refuses this host's clock", "Let the host set its clock (chrony, systemd-timesyncd).")
    if code in KEYS:
        return wrong(CHECK, f"it refuses the credentials: {code}", CREDENTIALS)
    if code in DENIED:
        says = f"it does not allow {error.operation_name} ({code})"
        mend = f"{CREDENTIALS[:-1]}, or allow the key everything on bucket {settings.s3_bucket}."
        return wrong(CHECK, says, mend)
    return wrong(CHECK, f"{error.operation_name} is answered {code}", "Look into the store's log.")


def _code(error: ClientError) -> str:
    return str(error.response["Error"]["Code"])
