"""How fast do large checkpoints travel beside what boto3 does with the same store, and does the gateway hold them?

    python -m benchmarks.transfer [--mebibytes 6144] [--piece 2048]

So much goes up and comes down in pieces, each a file of its own: up by the client's ``push_checkpoint`` (in parts, by
presigned URLs, its SHA-256 taken on the way) and by boto3's ``upload_file``; down by ``download`` (307 to a presigned
URL, SHA-256 verified, synced to the disk) and by ``download_file``; against one embedded store. Over plain HTTP boto3
by its defaults signs what it sends and sums it up for a CRC, which presigned URLs spare the client; so it runs twice:

    boto3    as it is
    lean     without payload signatures and checksums, with the client's sizes of parts and as many threads

What arrived must have the file's SHA-256 on every side: objects and files are hashed, untimed. The machine's other work
comes and goes: a round is one piece by each, in an order that turns, and a ratio is the median over the rounds of a
round's own ratio, to the harder of the two baselines. The growth of the gateway's resident memory is from before the
first round to the most that was seen after any transfer. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import boto3
from boto3.s3.transfer import TransferConfig
from botocore.config import Config

from benchmarks.serving import GATEWAY, Server, checkpoint, server, settings_of, tenant
from cli.client import Client
from cli.parts import AT_ONCE, FETCHED_PART_BYTES
from services import jobs, leases, object_keys
from services.database import Database
from services.local import LocalStack, LocalUrls
from services.migrations import upgrade
from services.requests import ForgetRequest
from services.storage import file_sha256
from services.tenancy import Caller
from services.uploads import PART_BYTES

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

GOAL = 0.9
BASELINES = ("boto3", "lean")
MIB = 2**20
HEADER = b"\x02\0\0\0\0\0\0\0{}"  # as a safetensors file begins: the door looks no further


@dataclass(frozen=True)
class Place:
    """Where the file lies in the store for the downloads, and which job published it."""

    job_id: str
    key: str


@dataclass(frozen=True)
class Baseline:
    """boto3, set up one way."""

    client: S3Client
    up: TransferConfig
    down: TransferConfig


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mebibytes", type=int, default=6144, help="in all, each way")
    parser.add_argument("--piece", type=int, default=2048, help="mebibytes of a file, 64 and more")
    given = parser.parse_args(arguments)
    print(json.dumps(run(given.mebibytes, given.piece)))


def run(mebibytes: int, piece: int) -> dict[str, float]:
    """The figures, which are also printed as they come."""
    rounds = max(1, mebibytes // piece)
    facts = f"{platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}"
    print(f"{facts}, Python {platform.python_version()}; {rounds} rounds of {piece} MiB")
    with tempfile.TemporaryDirectory() as name, LocalStack(Path(name) / "servers", durable=False) as urls:
        upgrade(urls.database_url)
        folder = Path(name)
        path = _file(folder / "base.safetensors", piece)
        database = Database(urls.database_url)
        try:
            with server(GATEWAY, settings_of(urls)) as gateway:
                return _measure(gateway, urls, database, path, rounds)
        finally:
            database.close()


def _file(path: Path, mebibytes: int) -> Path:
    """A file that a store cannot make smaller."""
    block = os.urandom(16 * MIB)
    with path.open("wb") as file:
        file.write(HEADER)
        for number in range(mebibytes // 16):
            file.write(number.to_bytes(8, "big") + block[8:])
    return path


def _measure(gateway: Server, urls: LocalUrls, database: Database, path: Path, rounds: int) -> dict[str, float]:
    caller, key = tenant(database, "benchmark")
    baselines = _baselines(urls)
    s3, bucket = baselines["boto3"].client, urls.s3_bucket
    sha256, size = file_sha256(path), path.stat().st_size
    place = _published(database, caller, checkpoint(database, caller), size, sha256)
    s3.upload_file(str(path), bucket, place.key)
    target = path.parent / "down"
    target.mkdir()
    before = most = gateway.resident_mb
    with Client(gateway.url, key) as client:

        def push() -> str:
            pushed = client.push_checkpoint(path, wait=False)
            return object_keys.checkpoint_source(caller.tenant_id, pushed.id)

        def by(base: Baseline, way: str) -> str:
            if way == "up":
                base.client.upload_file(str(path), bucket, "beside", Config=base.up)
                return "beside"
            base.client.download_file(bucket, place.key, str(target / "raw"), Config=base.down)
            return "raw"

        steps: dict[str, Callable[[], object]] = {"up": push, "down": lambda: client.download(place.job_id, target)}
        for name, base in baselines.items():
            steps |= {f"{name} {way}": partial(by, base, way) for way in ("up", "down")}
        names, seconds = list(steps), {name: list[float]() for name in steps}
        for number in range(rounds):
            turn = number % len(names)
            for name in names[turn:] + names[:turn]:
                began = time.perf_counter()
                made = steps[name]()
                seconds[name].append(time.perf_counter() - began)
                most = max(most, gateway.resident_mb)
                _check_up(s3, bucket, str(made), sha256) if name.endswith("up") else _check_down(target, sha256)
    figures = {f"{way}_ratio": _ratio(way, seconds, size) for way in ("up", "down")}
    figures["gateway_rss_growth_mb"] = round(most - before, 1)
    print(f"gateway resident: {before:.1f} MB before, {most:.1f} MB at most")
    return figures


def _check_up(s3: S3Client, bucket: str, key: str, sha256: str) -> None:
    digest = hashlib.sha256()
    for chunk in s3.get_object(Bucket=bucket, Key=key)["Body"].iter_chunks(MIB):
        digest.update(chunk)
    assert digest.hexdigest() == sha256, key
    s3.delete_object(Bucket=bucket, Key=key)


def _check_down(folder: Path, sha256: str) -> None:
    (file,) = folder.iterdir()
    assert file_sha256(file) == sha256, file.name
    file.unlink()


def _ratio(way: str, seconds: dict[str, list[float]], size: int) -> float:
    """To the harder baseline; both are printed."""
    ratios: dict[str, float] = {}
    for name in (way, *(f"{base} {way}" for base in BASELINES)):
        median, (low, high) = statistics.median(seconds[name]), _quartiles(seconds[name])
        print(f"{name:>10}  {median:6.2f} s (quartiles {low:.2f} to {high:.2f}), {size / median / 1e6:.0f} MB/s")
    for base in BASELINES:
        each = [raw / own for raw, own in zip(seconds[f"{base} {way}"], seconds[way], strict=True)]
        ratios[base], (low, high) = round(statistics.median(each), 3), _quartiles(each)
        print(f"{way}: {ratios[base]:.2f} of {base} (quartiles {low:.2f} to {high:.2f}; goal {GOAL})")
    return min(ratios.values())


def _quartiles(values: Sequence[float]) -> tuple[float, float]:
    ordered = sorted(values)
    return ordered[len(ordered) // 4], ordered[3 * len(ordered) // 4]


def _baselines(urls: LocalUrls) -> dict[str, Baseline]:
    def client(**options: Any) -> S3Client:
        return boto3.client(
            "s3",
            endpoint_url=urls.s3_endpoint_url,
            region_name="us-east-1",
            aws_access_key_id=urls.s3_access_key,
            aws_secret_access_key=urls.s3_secret_key,
            config=Config(**options),
        )

    lean = client(
        s3={"addressing_style": "path", "payload_signing_enabled": False},
        request_checksum_calculation="when_required",
        response_checksum_validation="when_required",
    )
    up, down = (
        TransferConfig(multipart_chunksize=part_bytes, max_concurrency=AT_ONCE)
        for part_bytes in (PART_BYTES, FETCHED_PART_BYTES)
    )
    found = (
        Baseline(client(s3={"addressing_style": "path"}), TransferConfig(), TransferConfig()),
        Baseline(lean, up, down),
    )
    return dict(zip(BASELINES, found, strict=True))


def _published(database: Database, caller: Caller, checkpoint_id: str, size: int, sha256: str) -> Place:
    """A job that ended with the file as its weights; the file itself is still to come."""
    body = {"checkpoint": checkpoint_id, "target": {"class_label": 0, "where": "prior"}}
    with database.transaction() as session:
        job = jobs.create(session, caller, ForgetRequest.model_validate(body), open_jobs=1)
    with database.transaction() as session:
        held = leases.claim(session, job.id, worker="benchmark", ttl_seconds=60)
        assert held is not None
        prefix = object_keys.attempt_prefix(caller.tenant_id, job.id, held.token)
        weights = {"name": "tamed.safetensors", "media_type": "application/octet-stream"}
        artifacts = [{**weights, "bytes": size, "sha256": sha256}]
        assert leases.publish(session, held, prefix=prefix, artifacts=artifacts, summary={})
    return Place(job.id, f"{prefix}tamed.safetensors")


if __name__ == "__main__":
    main()
