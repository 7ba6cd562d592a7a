"""What we rely on in an S3 store, held by the embedded one; the same calls go to a store in production."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import httpx
import pytest
from botocore.exceptions import ClientError

from services.local import LocalStack, LocalUrls
from tests.local.helpers import CONTENT, s3_client, wait_until

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

PART_BYTES = 5 * 2**20


def _upload(s3: S3Client, bucket: str, key: str, body: bytes) -> None:
    upload = s3.create_multipart_upload(Bucket=bucket, Key=key)["UploadId"]
    parts = [body[start : start + PART_BYTES] for start in range(0, len(body), PART_BYTES)]
    tags = [
        s3.upload_part(Bucket=bucket, Key=key, UploadId=upload, PartNumber=number, Body=part)["ETag"]
        for number, part in enumerate(parts, start=1)
    ]
    done = [{"PartNumber": number, "ETag": tag} for number, tag in enumerate(tags, start=1)]
    s3.complete_multipart_upload(Bucket=bucket, Key=key, UploadId=upload, MultipartUpload={"Parts": done})  # type: ignore[typeddict-item]  # the stubs ask for parts that S3 does not


def test_multipart_upload_gives_back_the_same_bytes(s3: S3Client, urls: LocalUrls) -> None:
    body = os.urandom(2 * PART_BYTES + 12345)

    _upload(s3, urls.s3_bucket, "multipart", body)

    assert s3.get_object(Bucket=urls.s3_bucket, Key="multipart")["Body"].read() == body
    assert s3.head_object(Bucket=urls.s3_bucket, Key="multipart")["ContentLength"] == len(body)


def test_range_across_parts(s3: S3Client, urls: LocalUrls) -> None:
    body = os.urandom(PART_BYTES + 100)
    _upload(s3, urls.s3_bucket, "ranged", body)

    answer = s3.get_object(Bucket=urls.s3_bucket, Key="ranged", Range=f"bytes={PART_BYTES - 10}-{PART_BYTES + 9}")

    assert answer["ResponseMetadata"]["HTTPStatusCode"] == 206
    assert answer["Body"].read() == body[PART_BYTES - 10 : PART_BYTES + 10]


def test_aborted_multipart_leaves_nothing(s3: S3Client, urls: LocalUrls) -> None:
    upload = s3.create_multipart_upload(Bucket=urls.s3_bucket, Key="aborted")["UploadId"]
    s3.upload_part(Bucket=urls.s3_bucket, Key="aborted", UploadId=upload, PartNumber=1, Body=b"x")
    listed = s3.list_multipart_uploads(Bucket=urls.s3_bucket)["Uploads"]

    s3.abort_multipart_upload(Bucket=urls.s3_bucket, Key="aborted", UploadId=upload)

    assert [item["Key"] for item in listed] == ["aborted"]
    assert "Uploads" not in s3.list_multipart_uploads(Bucket=urls.s3_bucket)
    with pytest.raises(ClientError, match="404"):
        s3.head_object(Bucket=urls.s3_bucket, Key="aborted")


def test_presigned_get_needs_no_credentials_and_takes_ranges(s3: S3Client, urls: LocalUrls, photo: str) -> None:
    url = s3.generate_presigned_url("get_object", Params={"Bucket": urls.s3_bucket, "Key": photo}, ExpiresIn=60)

    assert httpx.get(url).content == CONTENT
    part = httpx.get(url, headers={"Range": "bytes=2-6"})
    assert (part.status_code, part.content) == (206, CONTENT[2:7])


def test_presigned_get_can_name_the_download(s3: S3Client, urls: LocalUrls, photo: str) -> None:
    parameters = {
        "Bucket": urls.s3_bucket,
        "Key": photo,
        "ResponseContentDisposition": 'attachment; filename="tamed.safetensors"',
    }

    answer = httpx.get(s3.generate_presigned_url("get_object", Params=parameters, ExpiresIn=60))

    assert answer.headers["content-disposition"] == 'attachment; filename="tamed.safetensors"'


@pytest.mark.parametrize("change", [("photo", "other"), ("X-Amz-Expires=60", "X-Amz-Expires=600")])
def test_tampered_url_is_refused(s3: S3Client, urls: LocalUrls, photo: str, change: tuple[str, str]) -> None:
    url = s3.generate_presigned_url("get_object", Params={"Bucket": urls.s3_bucket, "Key": photo}, ExpiresIn=60)

    assert httpx.get(url.replace(*change)).status_code == 403


def test_presigned_get_does_not_allow_another_verb(s3: S3Client, urls: LocalUrls, photo: str) -> None:
    url = s3.generate_presigned_url("get_object", Params={"Bucket": urls.s3_bucket, "Key": photo}, ExpiresIn=60)

    assert httpx.delete(url).status_code == 403
    assert httpx.put(url, content=b"x").status_code == 403


def test_presigned_url_expires(s3: S3Client, urls: LocalUrls, photo: str) -> None:
    url = s3.generate_presigned_url("get_object", Params={"Bucket": urls.s3_bucket, "Key": photo}, ExpiresIn=1)

    wait_until(lambda: httpx.get(url).status_code == 403)


def test_one_of_racing_conditional_puts_wins(urls: LocalUrls, s3: S3Client) -> None:
    def put(number: int) -> int:
        try:
            s3.put_object(Bucket=urls.s3_bucket, Key="race", Body=str(number).encode(), IfNoneMatch="*")
        except ClientError as error:
            return error.response["ResponseMetadata"]["HTTPStatusCode"]
        return 200

    with ThreadPoolExecutor(16) as pool:
        statuses = list(pool.map(put, range(16)))

    assert statuses.count(200) == 1
    assert set(statuses) <= {200, 409, 412}
    assert s3.get_object(Bucket=urls.s3_bucket, Key="race")["Body"].read() == str(statuses.index(200)).encode()


def test_every_version_is_listed_and_can_be_erased(s3: S3Client) -> None:
    s3.create_bucket(Bucket="versioned")
    s3.put_bucket_versioning(Bucket="versioned", VersioningConfiguration={"Status": "Enabled"})
    for body in (b"first", b"second"):
        s3.put_object(Bucket="versioned", Key="a/photo", Body=body)
    s3.delete_object(Bucket="versioned", Key="a/photo")

    listed = s3.list_object_versions(Bucket="versioned", Prefix="a/")
    doomed = [item["VersionId"] for item in [*listed["Versions"], *listed["DeleteMarkers"]]]
    for version in doomed:
        s3.delete_object(Bucket="versioned", Key="a/photo", VersionId=version)

    assert (len(listed["Versions"]), len(listed["DeleteMarkers"])) == (2, 1)
    left = s3.list_object_versions(Bucket="versioned")
    assert not left.get("Versions")
    assert not left.get("DeleteMarkers")


def test_listing_pages_through_a_prefix(s3: S3Client, urls: LocalUrls) -> None:
    keys = [f"pages/{number:03}" for number in range(25)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda key: s3.put_object(Bucket=urls.s3_bucket, Key=key, Body=b"x"), keys))

    pages = s3.get_paginator("list_objects_v2").paginate(
        Bucket=urls.s3_bucket, Prefix="pages/", PaginationConfig={"PageSize": 10}
    )

    assert [item["Key"] for page in pages for item in page["Contents"]] == keys


def test_batch_delete(s3: S3Client, urls: LocalUrls) -> None:
    keys = [f"batch/{number}" for number in range(5)]
    for key in keys:
        s3.put_object(Bucket=urls.s3_bucket, Key=key, Body=b"x")

    s3.delete_objects(Bucket=urls.s3_bucket, Delete={"Objects": [{"Key": key} for key in keys]})

    assert s3.list_objects_v2(Bucket=urls.s3_bucket, Prefix="batch/")["KeyCount"] == 0


def test_a_wrong_checksum_is_refused(s3: S3Client, urls: LocalUrls) -> None:
    with pytest.raises(ClientError, match=r"BadDigest|InvalidDigest|checksum"):
        s3.put_object(Bucket=urls.s3_bucket, Key="bad", Body=b"x", ChecksumSHA256="A" * 43 + "=")


def test_a_secret_of_another_store_is_refused(urls: LocalUrls) -> None:
    client = s3_client(
        LocalUrls(s3_endpoint_url=urls.s3_endpoint_url, s3_access_key=urls.s3_access_key, s3_secret_key="x")
    )

    with pytest.raises(ClientError, match="SignatureDoesNotMatch"):
        client.list_objects_v2(Bucket=urls.s3_bucket)
    client.close()


def test_the_store_takes_little_more_room_than_what_is_in_it(stack: LocalStack, s3: S3Client, urls: LocalUrls) -> None:
    objects = s3.list_objects_v2(Bucket=urls.s3_bucket)["Contents"]
    stored = sum(item["Size"] for item in objects)

    files = [path for path in (stack.data_dir / "seaweedfs" / "data").rglob("*") if path.is_file()]
    taken = sum(path.stat().st_blocks * 512 for path in files)

    assert taken < stored + 16 * 2**20
