"""The settings as an operator set them: every variable that is missing, wrong or misspelt, by its name."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote, urlsplit

from pydantic import SecretStr, ValidationError
from sqlalchemy import make_url
from sqlalchemy.exc import ArgumentError

from services.diagnosis.findings import Finding, ok, warning, wrong
from services.settings import Settings

__all__ = ["Reading", "read", "scrubbed"]

PREFIX = "FORGETD_"
# Read by the command, by compose files and by examples; no setting of a process.
OTHERS = {f"{PREFIX}{name}" for name in ("URL", "KEY", "DATA_DIR", "CACHE", "DATABASE_PASSWORD", "BROKER_PASSWORD")}
NOWHERE = {"database_url": "postgresql+psycopg://nowhere", "broker_url": "redis://nowhere"}
DRIVER = "postgresql+psycopg"
HIDDEN = "***"


@dataclass(frozen=True)
class Reading:
    """The settings with what is wrong left out, whom that leaves without an address, and what is to be said of it."""

    settings: Settings
    nowhere: frozenset[str]  # of database_url, broker_url
    findings: list[Finding]


def read(environment: Mapping[str, str]) -> Reading:
    """The settings of these variables. Never raises: what is wrong takes its default, and is told."""
    given: dict[str, Any] = {
        name: environment[_variable(name)] for name in Settings.model_fields if _variable(name) in environment
    }
    findings: list[Finding] = []
    nowhere: set[str] = set()
    while True:
        try:
            settings = Settings(**given)
            break
        except ValidationError as error:
            for problem in error.errors(include_url=False, include_context=False, include_input=False):
                names = (
                    [str(problem["loc"][0])] if problem["loc"] else ["lease_ttl_seconds", "control_interval_seconds"]
                )
                findings.append(_told(names[0], str(problem["type"]), problem["msg"]))
                nowhere |= set(names) & set(NOWHERE)
                given |= {name: NOWHERE.get(name, Settings.model_fields[name].default) for name in names}
    for finding in _addresses(settings, nowhere):
        findings.append(finding)
    findings += _misspelt(environment)
    if not findings:
        findings.append(ok("settings", f"{len(given)} of {len(Settings.model_fields)} set, the rest by default"))
    return Reading(settings, frozenset(nowhere), findings)


def scrubbed(text: str, settings: Settings) -> str:
    """The text without any secret of the settings, should a library's error have quoted one."""
    for secret in _secrets(settings):
        text = text.replace(secret, HIDDEN)
    return text


def _told(name: str, kind: str, message: str) -> Finding:
    variable = _variable(name)
    meaning = Settings.model_fields[name].description if name in Settings.model_fields else None
    mend = f"Set {variable}" + (
        f" to {meaning}." if meaning and name in NOWHERE else "; docs/running.md has the table."
    )
    if kind == "missing":
        return wrong("settings", f"{variable} is not set", mend)
    return wrong("settings", f"{variable}: {message.removeprefix('Value error, ')}", mend)


def _addresses(settings: Settings, nowhere: set[str]) -> Iterator[Finding]:
    """What is text to a setting and an address to a library."""
    if "database_url" not in nowhere:
        try:
            driver = make_url(settings.database_url.get_secret_value()).drivername
        except (ArgumentError, ValueError):
            driver = "no URL"
        if driver != DRIVER:
            nowhere.add("database_url")
            yield _told("database_url", "url", f"it begins with {driver}, not {DRIVER}")
    if "broker_url" not in nowhere:
        scheme = _scheme(settings.broker_url.get_secret_value())
        if scheme not in ("redis", "rediss"):
            nowhere.add("broker_url")
            yield _told("broker_url", "url", f"it begins with {scheme}, not redis or rediss")
    for name in ("s3_endpoint_url", "s3_public_endpoint_url"):
        value = getattr(settings, name)
        if value is not None and _scheme(value) not in ("http", "https"):
            yield _told(name, "url", "it is no address that begins with http:// or https://")
    if (settings.s3_access_key is None) != (settings.s3_secret_key is None):
        missing = "s3_secret_key" if settings.s3_secret_key is None else "s3_access_key"
        yield _told(missing, "missing", "")


def _misspelt(environment: Mapping[str, str]) -> Iterator[Finding]:
    known = {_variable(name) for name in Settings.model_fields}
    for name in sorted(set(environment) - known - OTHERS):
        if name.startswith(PREFIX):
            near = difflib.get_close_matches(name, known, n=1)
            mend = f"Did you mean {near[0]}?" if near else "Take it away; docs/running.md has the table of settings."
            yield warning("settings", f"{name} is no setting and is ignored", mend)


def _scheme(value: str) -> str:
    try:
        return urlsplit(value).scheme or "no scheme"
    except ValueError:
        return "no URL"


def _secrets(settings: Settings) -> list[str]:
    """Every secret in each form in which it is written somewhere, the longest first."""
    found: set[str] = set()
    for value in (getattr(settings, name) for name in Settings.model_fields):
        if isinstance(value, SecretStr):
            found.add(value.get_secret_value())
    for url in (settings.database_url.get_secret_value(), settings.broker_url.get_secret_value()):
        try:
            password = make_url(url).password
        except (ArgumentError, ValueError):
            password = None
        if password:
            found |= {password, quote(password, safe="")}
    return sorted((secret for secret in found if secret and secret not in NOWHERE.values()), key=len, reverse=True)


def _variable(name: str) -> str:
    return f"{PREFIX}{name.upper()}"
