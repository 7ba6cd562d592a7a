"""Nobody without the credentials gets anything out of the embedded servers."""

from __future__ import annotations

import stat
from typing import TYPE_CHECKING

import httpx
import psutil
import psycopg
import pytest
import redis
from botocore.exceptions import ClientError
from sqlalchemy import make_url

from services.local import LocalStack, LocalUrls
from tests.local.helpers import CONTENT

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client


def _processes(stack: LocalStack) -> list[psutil.Process]:
    servers = [psutil.Process(pid) for pid in stack.pids.values()]
    return servers + [child for server in servers for child in server.children(recursive=True)]


def test_all_three_run(stack: LocalStack) -> None:
    assert set(stack.pids) == {"postgres", "valkey", "seaweedfs"}


def test_no_server_listens_or_talks_beyond_loopback(stack: LocalStack, photo: str) -> None:
    connections = [item for process in _processes(stack) for item in process.net_connections(kind="inet")]

    assert {item.laddr.ip for item in connections if item.laddr} == {"127.0.0.1"}
    assert {item.raddr.ip for item in connections if item.raddr} <= {"127.0.0.1"}


def test_only_recorded_ports_are_open(stack: LocalStack) -> None:
    connections = [item for process in _processes(stack) for item in process.net_connections(kind="tcp")]

    listening = {item.laddr.port for item in connections if item.status == psutil.CONN_LISTEN}

    assert listening == set(stack.ports.values())


@pytest.mark.parametrize("password", ["", "wrong"])
def test_postgres_refuses_without_the_password(urls: LocalUrls, password: str) -> None:
    url = make_url(urls.database_url)

    for user in ("forgetd", "postgres"):
        with pytest.raises(psycopg.OperationalError, match="password"):
            psycopg.connect(host=url.host, port=url.port, user=user, password=password, dbname="forgetd")


def test_our_role_is_no_superuser(urls: LocalUrls) -> None:
    with psycopg.connect(urls.database_url.replace("+psycopg", "")) as connection:
        row = connection.execute("SELECT rolsuper, rolbypassrls FROM pg_roles WHERE rolname = current_user").fetchone()

    assert row == (False, False)


def test_valkey_refuses_without_the_password(urls: LocalUrls) -> None:
    host = urls.broker_url.rpartition("@")[2]

    with redis.Redis.from_url(f"redis://{host}") as client, pytest.raises(redis.AuthenticationError):
        client.ping()
    with redis.Redis.from_url(f"redis://:wrong@{host}") as client, pytest.raises(redis.AuthenticationError):
        client.ping()


def test_valkey_never_evicts_a_message(urls: LocalUrls) -> None:
    with redis.Redis.from_url(urls.broker_url) as client:
        assert client.config_get("maxmemory-policy") == {"maxmemory-policy": "noeviction"}
        assert client.config_get("appendonly") == {"appendonly": "yes"}


@pytest.mark.parametrize("path", ["/", "/forgetd", "/forgetd/tenants/1/photo", "/forgetd?versions", "/forgetd?uploads"])
def test_anonymous_s3_is_refused(urls: LocalUrls, photo: str, path: str) -> None:
    assert httpx.get(f"{urls.s3_endpoint_url}{path}").status_code == 403
    assert httpx.put(f"{urls.s3_endpoint_url}{path}", content=b"x").status_code in {403, 405}
    assert httpx.delete(f"{urls.s3_endpoint_url}{path}").status_code in {403, 405}


def test_an_unknown_s3_key_is_refused(s3: S3Client, urls: LocalUrls, photo: str) -> None:
    request = httpx.get(
        f"{urls.s3_endpoint_url}/forgetd/{photo}",
        headers={
            "x-amz-date": "20260101T000000Z",
            "x-amz-content-sha256": "UNSIGNED-PAYLOAD",
            "authorization": "AWS4-HMAC-SHA256 Credential=AKIA/20260101/us-east-1/s3/aws4_request, "
            "SignedHeaders=host;x-amz-date, Signature=00",
        },
    )

    assert request.status_code == 403


def test_a_bucket_is_never_made_on_demand(s3: S3Client) -> None:
    with pytest.raises(ClientError, match="NoSuchBucket"):
        s3.put_object(Bucket="somewhere-else", Key="key", Body=b"x")


@pytest.mark.parametrize("part", ["filer", "master", "volume", "admin"])
@pytest.mark.parametrize(
    "path",
    ["/", "/buckets/forgetd/tenants/1/photo", "/buckets/?pretty=y", "/dir/lookup?volumeId=1", "/dir/assign", "/1,01"],
)
def test_no_other_http_port_of_the_store_serves_anything(stack: LocalStack, photo: str, part: str, path: str) -> None:
    url = f"http://127.0.0.1:{stack.ports[f'seaweedfs_{part}']}{path}"
    # The master has a page about itself (version, disk, volumes), no more.
    allowed = {400, 401, 403, 404} | ({200} if (part, path) == ("master", "/") else set())

    for headers in ({}, {"Authorization": "Bearer x"}):
        answer = httpx.get(url, headers=headers)

        assert answer.status_code in allowed
        assert CONTENT not in answer.content
        assert "photo" not in answer.text
    assert httpx.put(url, content=b"x").status_code in allowed | {405}


def test_the_stored_object_is_still_ours_alone(s3: S3Client, urls: LocalUrls, photo: str) -> None:
    assert s3.get_object(Bucket=urls.s3_bucket, Key=photo)["Body"].read() == CONTENT


def test_no_secret_is_on_a_command_line_or_in_an_environment(stack: LocalStack, urls: LocalUrls) -> None:
    secrets = [make_url(urls.database_url).password, make_url(urls.broker_url).password, urls.s3_secret_key]

    for process in _processes(stack):
        seen = " ".join([*process.cmdline(), *process.environ().values()])
        assert not [secret for secret in secrets if str(secret) in seen]


def test_data_folder_is_private(stack: LocalStack) -> None:
    assert stat.S_IMODE(stack.data_dir.stat().st_mode) == 0o700
    for path in stack.data_dir.iterdir():
        assert stat.S_IMODE(path.stat().st_mode) in {0o600, 0o700}, path


def test_telemetry_is_off(stack: LocalStack) -> None:
    assert "-master.telemetry=false" in psutil.Process(stack.pids["seaweedfs"]).cmdline()
