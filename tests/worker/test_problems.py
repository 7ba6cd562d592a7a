"""Problems of a job point at the place in the request that they are about."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from worker.runner.images import Reader
from worker.runner.problems import UserError


@pytest.mark.parametrize(
    ("role", "pointer"),
    [
        ("target", "/target/images"),
        ("remember", "/remember/images"),
        ("same_identity", "/evaluation/same_identity/images"),
        ("held_out", "/evaluation/held_out/images"),
    ],
)
def test_a_refused_image_points_at_its_set(tmp_path: Path, role: str, pointer: str) -> None:
    (tmp_path / "a.png").write_bytes(b"no image")
    reader = Reader(tmp_path, image_size=8, channels=1, fit="crop")

    with pytest.raises(UserError) as refusal:
        reader.read(["a.png"], role)

    problem = refusal.value.problem
    assert problem["errors"] == [{"pointer": pointer, "detail": problem["detail"]}]
    assert "pointer" not in problem


def test_a_pointer_joins_the_errors_that_are_given() -> None:
    given = {"pointer": "/seed", "detail": "odd"}

    problem = UserError("odd", "Odd", "It is odd.", errors=[given], pointer="/remember").problem

    assert problem["errors"] == [given, {"pointer": "/remember", "detail": "It is odd."}]


def test_every_type_that_a_runner_reports_is_documented() -> None:
    root = Path(__file__).resolve().parents[2]
    sources = "".join(path.read_text() for path in (root / "worker" / "runner").glob("*.py"))
    page = (root / "docs" / "problems.md").read_text()

    types = set(re.findall(r'UserError\(\s*"([a-z-]+)"', sources))

    assert len(types) >= 8
    assert {name for name in types if f"`{name}`" not in page} == set()
