"""What the tests of jobs about samples share: names of nothing, a distribution, and what an answer has to be."""

from __future__ import annotations

from typing import Any

import httpx

NO_SET, NO_CLASSIFIER = "imgs_" + "0" * 32, "clf_" + "0" * 32
HALVES = {"smiling": 0.5, "other": 0.5}


def accepted(answer: httpx.Response) -> dict[str, Any]:
    assert answer.status_code == 202, answer.text
    job: dict[str, Any] = answer.json()
    return job


def refused(answer: httpx.Response, pointer: str, *words: str, status: int = 422) -> None:
    problem = answer.json()
    assert answer.status_code == status, answer.text
    assert pointer in [error["pointer"] for error in problem["errors"]]
    for word in words:
        assert word in problem["detail"]
