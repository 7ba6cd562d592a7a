"""What README and docs claim and a program can check: links, files, commands, programs, settings, tasks."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from pydantic_core import PydanticUndefined
from typer.testing import CliRunner

from cli.main import app
from services.settings import Settings

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
ALONE = ("up", "demo", "migrate", "train", "doctor", "worker")
GROUPS = ("checkpoints", "classifiers", "images", "jobs", "keys", "tenants")
COMMAND = re.compile(rf"(?<![\w/.\-])forgetd ((?:{'|'.join(ALONE)}|(?:{'|'.join(GROUPS)}) [a-z]+)\b[^\n`#|)]*)")
PROGRAM = re.compile(r"python -m ((?:benchmarks|examples|tests|worker)(?:\.\w+)*)([^\n`#|]*)")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    targets = [target for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()) if "://" not in target]

    assert [target for target in targets if not (page.parent / target).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_named_files_exist(page: Path) -> None:
    rooms = "api|services|worker|models|unlearning|evidence|cli|tests|examples|docs|benchmarks"
    names = re.findall(rf"`((?:{rooms})/[\w./\-]+\.(?:py|md|yml|svg))`", page.read_text())

    assert [name for name in names if not (ROOT / name).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_and_their_options_exist(page: Path) -> None:
    runner = CliRunner()
    for text in COMMAND.findall(page.read_text()):
        words = text.split()
        path = words[:1] if words[0] in ALONE else words[:2]
        shown = runner.invoke(app, [*path, "--help"], env={"COLUMNS": "300"}, prog_name="forgetd")

        assert shown.exit_code == 0, text
        assert [word for word in words if word.startswith("--") and word not in shown.output] == [], text


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_programs_and_their_options_exist(page: Path) -> None:
    for module, rest in PROGRAM.findall(page.read_text()):
        known = options(module)

        assert [word for word in rest.split() if word.startswith("--") and word not in known] == [], module


def options(module: str) -> set[str]:
    """What a program may be given: in its own words, or in those of a module of its room that it takes in."""
    program = source(module)
    beside = re.findall(rf"^from ({module.split('.')[0]}(?:\.\w+)+) import", program, re.MULTILINE)
    return set(re.findall(r'"(--[a-z\-]+)"', "".join([program, *map(source, beside)])))


def source(module: str) -> str:
    place = ROOT.joinpath(*module.split("."))
    return (place / "__main__.py" if place.is_dir() else place.with_suffix(".py")).read_text()


def test_the_table_of_settings_is_complete_and_right() -> None:
    rows = re.findall(
        r"^\| `(FORGETD_\w+)` \| ([^|]*) \| ([^|]+) \|$", (ROOT / "docs/running.md").read_text(), re.MULTILINE
    )

    defaults = {
        f"FORGETD_{name.upper()}": "required"
        if field.default is PydanticUndefined
        else "unset"
        if field.default is None
        else str(field.default)
        for name, field in Settings.model_fields.items()
    }
    assert {name: default for name, default, _ in rows} == defaults


def test_the_tasks_named_are_those_of_the_makefile() -> None:
    targets = set(re.findall(r"^([a-z]+):.*## ", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = set(re.findall(r"(?:`|^ {4})make ([a-z]+)", "\n".join(page.read_text() for page in PAGES), re.MULTILINE))

    assert named - targets == set()
