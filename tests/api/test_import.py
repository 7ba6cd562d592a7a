"""What ``import api.app`` costs over its libraries, and what it leaves out."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
ALLOWED_RATIO = 1.3
HEAVY = {"torch", "numpy", "celery", "redis", "alembic", "PIL", "worker", "models", "unlearning", "evidence"}

LIST_LIBRARIES = """
import json, sys, api.app
ours = ("api", "services")
foreign = [name for name, module in sys.modules.items()
           if "site-packages" in (getattr(module, "__file__", None) or "") and name.partition(".")[0] not in ours]
print(json.dumps({"foreign": foreign, "roots": sorted({name.partition(".")[0] for name in sys.modules})}))
"""

COUNT_CALLS = """
import sys
calls = 0
def count(frame, event, argument):
    global calls
    calls += event in ("call", "c_call")
sys.setprofile(count)
{code}
sys.setprofile(None)
print(calls)
"""


def _run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stdout


def _calls(code: str) -> int:
    """How many functions the code calls: work that neither the machine's load nor its speed changes."""
    return int(_run(COUNT_CALLS.format(code=code)))


@pytest.fixture(scope="module")
def loaded() -> Any:
    """What importing loads; it happens without any setting in the environment."""
    return json.loads(_run(LIST_LIBRARIES))


def test_import_leaves_heavy_libraries_out(loaded: Any) -> None:
    assert HEAVY.isdisjoint(loaded["roots"])


def test_import_costs_at_most_a_third_more_than_its_libraries(loaded: Any) -> None:
    libraries = f"import importlib\nfor name in {loaded['foreign']!r}:\n    importlib.import_module(name)"

    ratio = _calls("import api.app") / _calls(libraries)

    assert ratio <= ALLOWED_RATIO, f"import api.app makes {ratio:.2f} times the calls of its libraries"
