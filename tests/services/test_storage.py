"""Erasing: whole pages at once, and no refusal overlooked."""

from __future__ import annotations

from typing import Any

import pytest

from services import storage as storage_module
from services.storage import ObjectStorage


def test_everything_under_a_prefix_goes_in_batches(storage: ObjectStorage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage_module, "DELETE_AT_ONCE", 2)
    for number in range(5):
        storage.put(f"tenants/erase/a/{number}", b"x", media_type="text/plain")
    storage.put("tenants/erase/b", b"x", media_type="text/plain")

    gone = storage.erase("tenants/erase/a/")

    assert gone == 5
    assert storage.keys("tenants/erase/") == ["tenants/erase/b"]


def test_a_refused_deletion_is_an_error(storage: ObjectStorage, monkeypatch: pytest.MonkeyPatch) -> None:
    storage.put("tenants/refused/a", b"x", media_type="text/plain")

    def refuse(**_: Any) -> dict[str, Any]:
        return {"Errors": [{"Key": "tenants/refused/a", "Code": "AccessDenied", "Message": "no"}]}

    monkeypatch.setattr(storage._client, "delete_objects", refuse)

    with pytest.raises(RuntimeError, match="1 of 1 deletions: AccessDenied"):
        storage.erase("tenants/refused/")
