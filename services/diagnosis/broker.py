"""The broker: whether it answers, lets this service in, and keeps what it is given."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from typing import Any
from urllib.parse import urlsplit

import redis

from services.diagnosis.findings import Finding, first_line, ok, warning, wrong
from services.settings import Settings

__all__ = ["questions", "unheard"]

CHECK = "broker"
ANSWER_SECONDS = 3.0
LENGTH_SECONDS = 1.0
FULL = 0.9  # of maxmemory
REFUSALS = ("WRONGPASS", "NOAUTH", "invalid password", "invalid username-password", "Authentication required")


def questions(settings: Settings) -> Iterator[Finding]:
    """Of Valkey or Redis. Nothing is lost without it: jobs are accepted, and wait."""
    url = settings.broker_url.get_secret_value()
    try:
        client = redis.Redis.from_url(url, socket_connect_timeout=ANSWER_SECONDS, socket_timeout=ANSWER_SECONDS)
    except ValueError as error:
        yield wrong(CHECK, f"FORGETD_BROKER_URL: {first_line(error)}", "Set it to redis://:password@host:port/0.")
        return
    with client:
        try:
            began = time.monotonic()
            client.ping()
            took = time.monotonic() - began
            info: dict[str, Any] = client.info()
        except redis.RedisError as error:
            yield _away(error)
            return
        yield ok(CHECK, f"{_name(info)} answers in {1e3 * took:.0f} ms")
        yield from _keeps(info)
        if urlsplit(url).password is None:
            says = "it asks for no password: whoever reaches it can ring doorbells and drop them"
            yield warning(f"{CHECK} password", says, "Set requirepass there, and the password in FORGETD_BROKER_URL.")


def unheard(settings: Settings, queues: Iterable[str]) -> dict[str, int]:
    """Doorbells that lie in these queues; empty of a broker that does not say, of which ``questions`` says why."""
    try:
        url = settings.broker_url.get_secret_value()
        with redis.Redis.from_url(url, socket_connect_timeout=LENGTH_SECONDS, socket_timeout=LENGTH_SECONDS) as client:
            return {queue: int(client.llen(queue)) for queue in queues}  # a queue of Celery's is a list of its name
    except (ValueError, redis.RedisError):
        return {}


def _away(error: redis.RedisError) -> Finding:
    told = first_line(error)
    if isinstance(error, redis.AuthenticationError) or any(word in told for word in REFUSALS):
        return wrong(CHECK, f"it refuses the credentials: {told}", "Put its password into FORGETD_BROKER_URL.")
    mend = "Start it, or correct host and port in FORGETD_BROKER_URL. Until then jobs are accepted and wait."
    return wrong(CHECK, f"it does not answer: {told}", mend)


def _name(info: dict[str, Any]) -> str:
    if "valkey_version" in info:
        return f"Valkey {info['valkey_version']}"
    return f"Redis {info.get('redis_version', 'of an unknown version')}"


def _keeps(info: dict[str, Any]) -> Iterator[Finding]:
    if info.get("role") == "slave":
        yield wrong(
            f"{CHECK} role", "it is a replica, which takes no messages", "Name the primary in FORGETD_BROKER_URL."
        )
    check, policy = f"{CHECK} memory", info.get("maxmemory_policy")
    most, used = int(info.get("maxmemory") or 0), int(info.get("used_memory") or 0)
    if policy not in (None, "noeviction"):
        says = f"maxmemory-policy is {policy}: doorbells may be dropped, and jobs then wait until they ring again"
        yield warning(check, says, "Run there: CONFIG SET maxmemory-policy noeviction, and write it into its file.")
    elif most and used > FULL * most:
        says = f"{used / most:.0%} of its memory is in use: soon it takes no more messages"
        yield warning(check, says, "Raise maxmemory, or see what else it is used for.")
    else:
        yield ok(check, f"maxmemory-policy {policy or 'unknown'}")
