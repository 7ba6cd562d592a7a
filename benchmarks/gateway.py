"""What does the gateway cost over a bare route that does one SELECT, and how soon does it answer at a steady rate?

    python -m benchmarks.gateway [--quick]

Embedded servers, a migrated database, one uvicorn process for the gateway and one for the baselines
(``benchmarks.gateway_baseline``) with the same settings; the callers are this process. In every round each of these is
asked for the same job in turn, by as many callers, for as long, with the same request but for its path:

    sync, async   the bare routes; the faster of the two is the baseline
    get           GET /jobs/{id} of the gateway: the key checked, the tenant's job, its resource, its entity tag
    not modified  the same with If-None-Match and the current entity tag, answered 304

The ratios are of answers a second. The gateway answers together what is asked together, so that it gains by callers:
with one alone it has as many statements and one thread more than the baseline, which is measured and printed too. The
machine's other work comes and goes: a round is a slice of half a second of each, in an order that turns, and a ratio is
the median over the rounds of a round's own, with its quartiles. The processor time that an answer costs either server,
over all rounds, stands beside it and hardly feels other work. Then POST /jobs/forget and GET /jobs/{id} at a fixed rate
each, both at once, with latencies from when a request was due; and the resident memory of the gateway after all of it.
Before anything is timed, gateway and baselines must tell of the same job. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import statistics
import tempfile
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import httpx
from sqlalchemy import make_url

from benchmarks import gateway_baseline
from benchmarks.load import Load, at_a_rate, flood, request
from benchmarks.serving import GATEWAY, Server, checkpoint, server, settings_of, tenant
from services.database import Database
from services.local import LocalStack
from services.migrations import upgrade

GET_GOAL, NOT_MODIFIED_GOAL = 0.7, 1.0
POST_GOAL_MS, GET_GOAL_MS = 100, 25  # bounds of our own
RSS_GOAL_MB = 150
RATE = 50.0  # of each kind
CALLERS = 16
TENANTS = 8  # that post: a queue of one alone would soon be full
BASELINE = "benchmarks.gateway_baseline:create_app"


@dataclass(frozen=True)
class Plan:
    """How long it takes."""

    rounds: int
    seconds: float
    requests: int
    """At the fixed rate, of each kind."""


FULL, QUICK, TINY = Plan(60, 0.5, 1500), Plan(30, 0.5, 300), Plan(2, 0.2, 8)
ALONE = 5  # a fifth of the rounds with one caller


@dataclass(frozen=True)
class Asked:
    """One of what is compared."""

    server: Server
    raw: bytes
    status: int


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two minutes")
    given = parser.parse_args(arguments)
    print(json.dumps(run(QUICK if given.quick else FULL)))


def run(plan: Plan) -> dict[str, float]:
    """The figures, which are also printed as they come."""
    facts = f"{platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}"
    print(f"{facts}, Python {platform.python_version()}; {plan.rounds} rounds of {plan.seconds:g} s")
    with tempfile.TemporaryDirectory() as folder, LocalStack(Path(folder), durable=False) as urls:
        upgrade(urls.database_url)
        plain = make_url(urls.database_url).set(drivername="postgresql").render_as_string(hide_password=False)
        database = Database(urls.database_url)
        try:
            with (
                server(GATEWAY, settings_of(urls)) as ours,
                server(BASELINE, {gateway_baseline.DATABASE: plain}) as bare,
            ):
                return _measure(ours, bare, database, plan)
        finally:
            database.close()


def _measure(ours: Server, bare: Server, database: Database, plan: Plan) -> dict[str, float]:
    posts = [_post(database, number) for number in range(TENANTS)]
    headers, body = posts[0]
    with httpx.Client(trust_env=False, headers=headers) as client:
        said = {"Content-Type": "application/json"}
        path = client.post(f"{ours.url}/jobs/forget", content=body, headers=said).headers["location"]
        tag = client.get(ours.url + path).headers["etag"]
        _same(client, ours, bare, path, tag)
    # The same headers to all, so that all read as much; the baselines ignore them.
    asked = {
        "sync": Asked(bare, request("GET", f"{bare.url}/sync{path}", headers), 200),
        "async": Asked(bare, request("GET", f"{bare.url}/async{path}", headers), 200),
        "get": Asked(ours, request("GET", ours.url + path, headers), 200),
        "not modified": Asked(ours, request("GET", ours.url + path, headers | {"If-None-Match": tag}), 304),
    }
    _ratios(asked, replace(plan, rounds=-(-plan.rounds // ALONE)), callers=1)
    figures = _ratios(asked, plan, callers=CALLERS)
    figures |= _latencies(ours, path, posts, plan)
    figures["rss_mb"] = round(ours.resident_mb, 1)
    print(f"gateway resident: {figures['rss_mb']} MB (goal {RSS_GOAL_MB})")
    return figures


def _post(database: Database, number: int) -> tuple[dict[str, str], bytes]:
    """The headers and the body of what a tenant of its own posts."""
    caller, key = tenant(database, f"benchmark {number}")
    target = {"class_label": 0, "where": "prior"}
    body = {"checkpoint": checkpoint(database, caller), "target": target, "metadata": {"ticket": "R-1"}}
    return {"Authorization": f"Bearer {key}"}, json.dumps(body).encode()


def _same(client: httpx.Client, ours: Server, bare: Server, path: str, tag: str) -> None:
    """Raise unless all tell of one job, and the gateway knows what did not change."""
    told = client.get(ours.url + path).json()
    for kind in ("sync", "async"):
        row = client.get(f"{bare.url}/{kind}{path}").json()
        assert all(row[name] == told[name] for name in ("id", "status", "seed", "attempt")), (row, told)
    assert client.get(ours.url + path, headers={"If-None-Match": tag}).status_code == 304


def _ratios(asked: Mapping[str, Asked], plan: Plan, *, callers: int) -> dict[str, float]:
    """Both ratios to the faster baseline, with so many callers at once, and what an answer costs beside it."""
    rates, cpu = _rates(asked, plan, callers)
    baseline = max(("sync", "async"), key=lambda name: statistics.median(rates[name]))
    figures: dict[str, float] = {}
    for key, name, goal in (
        ("get_ratio", "get", GET_GOAL),
        ("not_modified_ratio", "not modified", NOT_MODIFIED_GOAL),
    ):
        each = [mine / theirs for mine, theirs in zip(rates[name], rates[baseline], strict=True)]
        figures[key] = round(statistics.median(each), 3)
        wanted = f"; goal {goal}" if callers > 1 else ""
        spread = f"quartiles {_quantile(each, 0.25):.2f} to {_quantile(each, 0.75):.2f}{wanted}"
        print(f"{name} / {baseline}: {figures[key]:.2f} ({spread})")
    figures["get_cpu_ratio"] = round(cpu["get"] / cpu[baseline], 3)
    print(f"CPU of an answer: {figures['get_cpu_ratio']:.2f} of {baseline}'s")
    return figures


def _rates(asked: Mapping[str, Asked], plan: Plan, callers: int) -> tuple[dict[str, list[float]], dict[str, float]]:
    """By what was asked: answers a second in each round, and CPU seconds of its server an answer, over all rounds.

    Two rounds before the first warm all up.
    """
    rates: dict[str, list[float]] = {name: [] for name in asked}
    spent, answers = dict.fromkeys(asked, 0.0), dict.fromkeys(asked, 0)
    names = list(asked)
    for number in range(-2, plan.rounds):
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            it = asked[name]
            before = it.server.process.cpu_times()
            load = asyncio.run(flood(it.server.url, it.raw, callers=callers, seconds=plan.seconds))
            after = it.server.process.cpu_times()
            assert set(load.statuses) == {it.status}, (name, load.statuses)
            if number >= 0:
                rates[name].append(load.rate)
                spent[name] += after.user + after.system - before.user - before.system
                answers[name] += load.statuses[it.status]
    cpu = {name: spent[name] / answers[name] for name in names}
    for name, found in rates.items():
        spread = f"quartiles {_quantile(found, 0.25):.0f} to {_quantile(found, 0.75):.0f}"
        shown = f"{statistics.median(found):7.0f} /s  ({spread}), {1e6 * cpu[name]:.0f} us of CPU each"
        print(f"{callers:>3} callers  {name:>12}  {shown}")
    return rates, cpu


def _latencies(
    ours: Server, path: str, posting: Sequence[tuple[dict[str, str], bytes]], plan: Plan
) -> dict[str, float]:
    """The slowest hundredth of both kinds, in milliseconds."""
    posts = []
    for number in range(plan.requests):
        headers, body = posting[number % len(posting)]
        posts.append(request("POST", f"{ours.url}/jobs/forget", headers | {"Idempotency-Key": str(uuid.uuid4())}, body))
    gets = [request("GET", ours.url + path, posting[0][0])] * plan.requests

    async def both() -> tuple[Load, Load]:
        posted = at_a_rate(ours.url, posts, rate=RATE, callers=CALLERS)
        got = at_a_rate(ours.url, gets, rate=RATE, callers=CALLERS)
        return await asyncio.gather(posted, got)

    posted, got = asyncio.run(both())
    assert set(posted.statuses) == {202}, posted.statuses
    assert set(got.statuses) == {200}, got.statuses
    figures: dict[str, float] = {}
    for kind, load, goal in (("post", posted, POST_GOAL_MS), ("get", got, GET_GOAL_MS)):
        p50, p99 = (1e3 * _quantile(load.latencies, share) for share in (0.5, 0.99))
        figures[f"{kind}_p99_ms"] = round(p99, 2)
        print(f"{kind.upper()} at {RATE:g} /s beside the other: p50 {p50:.1f} ms, p99 {p99:.1f} ms (own bound {goal})")
    return figures


def _quantile(values: Sequence[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


if __name__ == "__main__":
    main()
