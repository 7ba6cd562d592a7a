"""A stack of these tests' own: they kill and restart servers that the rest of the suite shares."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

from services.local import LocalStack, LocalUrls
from tests.local.helpers import CONTENT, s3_client

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client


@pytest.fixture(scope="package")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalStack]:
    """Running servers that are only looked at."""
    stack = LocalStack(tmp_path_factory.mktemp("local"), durable=False)
    stack.start()
    yield stack
    stack.stop()


@pytest.fixture(scope="package")
def urls(stack: LocalStack) -> LocalUrls:
    """Where they are."""
    return stack.urls


@pytest.fixture(scope="package")
def s3(urls: LocalUrls) -> Iterator[S3Client]:
    """A client of the store."""
    client = s3_client(urls)
    yield client
    client.close()


@pytest.fixture(scope="package")
def photo(s3: S3Client, urls: LocalUrls) -> str:
    """The key of a stored object."""
    s3.put_object(Bucket=urls.s3_bucket, Key="tenants/1/photo", Body=CONTENT)
    return "tenants/1/photo"
