"""What the tests of the embedded servers share."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import boto3
from botocore.config import Config

from services.local import LocalUrls

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

CONTENT = b"a photo of somebody, which nobody else may read"


def wait_until(condition: Callable[[], bool], seconds: float = 20.0) -> None:
    """Return as soon as the condition holds; fail when it does not in time."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds} s"
        time.sleep(0.02)


def s3_client(urls: LocalUrls) -> S3Client:
    """A client with the stack's credentials; it does not retry, so that a refusal is seen as one."""
    return boto3.client(
        "s3",
        endpoint_url=urls.s3_endpoint_url,
        aws_access_key_id=urls.s3_access_key,
        aws_secret_access_key=urls.s3_secret_key,
        region_name="us-east-1",
        config=Config(s3={"addressing_style": "path"}, retries={"total_max_attempts": 1}, signature_version="s3v4"),
    )
