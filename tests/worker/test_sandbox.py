"""The walls around the reader of hostile files, tried from inside."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

from tests.worker.helpers import ROOT

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the walls are Linux's")

INSIDE = """
import json, os, socket, sys
from pathlib import Path
from worker.runner import sandbox
folder = Path(sys.argv[1])
seen = {"walls": sandbox.close_doors(folder)}
def attempt(name, call):
    try:
        call()
        seen[name] = "done"
    except BaseException as error:
        seen[name] = type(error).__name__
attempt("canary", lambda: Path(sys.argv[4]).read_text())
attempt("names beside the code", lambda: os.listdir(Path(sys.argv[4]).parent.parent))
attempt("own file", lambda: (folder / "mine").write_text("x"))
attempt("other file", lambda: Path(sys.argv[2]).read_text())
attempt("new file outside", lambda: Path(sys.argv[2]).with_name("new").write_text("x"))
attempt("environment of the parent", lambda: Path(f"/proc/{os.getppid()}/environ").read_bytes())
attempt("network", lambda: socket.create_connection(("127.0.0.1", int(sys.argv[3])), 2))
attempt("import", lambda: __import__("decimal"))
sandbox.limit_resources(memory_bytes=64 * 2**20, cpu_seconds=1, source_bytes=0)
attempt("memory", lambda: bytearray(256 * 2**20))
attempt("large file", lambda: open(folder / "large", "wb").truncate(2**30))
def spin():
    while True:
        pass
attempt("cpu", spin)
print(json.dumps(seen))
"""


@pytest.fixture(scope="module")
def inside(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What a process behind the walls could do."""
    import socket

    folder = tmp_path_factory.mktemp("folder")
    secret = tmp_path_factory.mktemp("elsewhere") / "secret"
    secret.write_text("secret")
    with (
        socket.create_server(("127.0.0.1", 0)) as server,
        tempfile.TemporaryDirectory(prefix=".forgetd-", dir=ROOT) as data,
    ):
        port = server.getsockname()[1]
        canary = Path(data) / "credentials"
        canary.write_text("secret")
        done = subprocess.run(
            [sys.executable, "-c", INSIDE, str(folder), str(secret), str(port), str(canary)],
            capture_output=True,
            text=True,
            env={**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(folder)},
            timeout=60,
            check=False,
        )
    assert done.returncode == 0, done.stderr
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def test_it_reads_and_writes_its_folder_and_imports(inside: dict[str, Any]) -> None:
    assert (inside["own file"], inside["import"]) == ("done", "done")


@pytest.mark.parametrize(
    "act",
    [
        "other file",
        "new file outside",
        "environment of the parent",
        "canary",
        "names beside the code",
    ],
)
def test_it_reaches_no_other_file(inside: dict[str, Any], act: str) -> None:
    if "files" not in inside["walls"]:
        pytest.skip("this kernel has no Landlock")

    assert inside[act] == "PermissionError"


def test_it_has_no_network(inside: dict[str, Any]) -> None:
    if "network" not in inside["walls"]:
        pytest.skip("this container allows no namespaces")

    assert inside["network"] == "OSError"


def test_memory_files_and_time_are_limited(inside: dict[str, Any]) -> None:
    assert (inside["memory"], inside["large file"], inside["cpu"]) == ("MemoryError", "OSError", "CpuTimeSpent")


def _alone(code: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """What code does in a process of its own, with the folder as its argument."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(folder)}
    command = [sys.executable, "-c", code, str(folder)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60, check=False)


def test_torch_and_our_models_work_behind_the_walls(tmp_path: Path) -> None:
    code = (
        "import importlib, sys\nfrom pathlib import Path\nfrom worker.runner import sandbox\n"
        "sandbox.close_doors(Path(sys.argv[1]))\nimportlib.invalidate_caches()\n"
        "import torch, models.convert, worker.runner.imports\n"
        "print(float((torch.ones(64, 64) @ torch.ones(64, 64)).sum()))"
    )

    done = _alone(code, tmp_path)

    assert done.stdout.strip() == "262144.0", done.stderr


def test_walls_are_not_raised_beside_a_thread_that_they_would_not_hold(tmp_path: Path) -> None:
    code = (
        "import sys, threading\nfrom pathlib import Path\nfrom worker.runner import sandbox\n"
        "threading.Thread(target=threading.Event().wait, daemon=True).start()\n"
        "sandbox.close_doors(Path(sys.argv[1]))"
    )

    done = _alone(code, tmp_path)

    assert done.returncode == 1
    assert "RuntimeError: walls are raised in a process of one thread, and this one has 2" in done.stderr
