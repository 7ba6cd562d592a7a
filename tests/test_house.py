"""House rules that no linter holds."""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ROOMS = ["api", "services", "worker", "models", "unlearning", "evidence", "cli", "examples"]
SOURCES = [path for room in ROOMS for path in sorted((ROOT / room).rglob("*.py"))]


@pytest.mark.parametrize("module", ["api.app", "worker.control", "worker.supervisor", "worker.main", "cli.main"])
def test_service_processes_leave_torch_out(module: str) -> None:
    code = f"import sys, {module}; sys.exit(int(any(m in sys.modules for m in ('torch', 'numpy', 'matplotlib'))))"

    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False)

    assert done.returncode == 0, f"{module} imports torch, numpy or matplotlib"


def test_what_is_no_module_is_packaged_too() -> None:
    """A wheel holds everything that the rooms read, such as migrations and templates."""
    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    rooms = {room for room in ROOMS if f"{room}*" in setuptools["packages"]["find"]["include"]}
    packaged = {path for room, patterns in setuptools["package-data"].items() for path in globs(ROOT / room, patterns)}

    files = {path for room in rooms for path in (ROOT / room).rglob("*") if path.is_file()}
    loose = {path for path in files - packaged if path.suffix not in (".py", ".pyc")}

    assert rooms == set(ROOMS)
    assert loose == set()


def globs(folder: Path, patterns: list[str]) -> set[Path]:
    return {path for pattern in patterns for path in folder.glob(pattern)}


def test_no_eager_celery() -> None:
    offenders = [path for path in SOURCES if "task_always_eager" in path.read_text()]

    assert offenders == []


def test_services_are_synchronous() -> None:
    offenders = [
        path
        for path in SOURCES
        if path.is_relative_to(ROOT / "services")
        and any(isinstance(node, ast.AsyncFunctionDef) for node in ast.walk(ast.parse(path.read_text())))
    ]

    assert offenders == []


def test_every_module_says_why_it_exists() -> None:
    silent = [path for path in SOURCES if not ast.get_docstring(ast.parse(path.read_text()))]

    assert silent == []


def test_torch_load_stands_in_one_place() -> None:
    users = [path.relative_to(ROOT) for path in SOURCES if "torch.load(" in path.read_text()]

    assert users == [Path("models/convert.py")]
