"""The classifier process: what it lets in, what it finds, and what a hostile file comes to."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from onnx import TensorProto

from services.errors import ClassifierRefused
from services.sandbox import classifiers, try_classifier
from services.sandbox.process import WalledProcess
from tests.onnx_files import classifier, outside, unlike

ROOT = Path(__file__).resolve().parents[3]
LINUX = pytest.mark.skipif(sys.platform != "linux", reason="namespaces are Linux's")

# What a process that has imported nothing gets of this host.
BARE = """
import json, sys
sys.path.append(sys.argv[1])
from services.sandbox.walls import isolate
print(json.dumps(isolate(sys.argv[2], 2**32)))
"""

# The walls as the real process raises them; then it tries what it has no use for.
INSIDE = """
import json, os, socket, sys
sys.path.append(sys.argv[1])
from services.sandbox import classifier_process
def attempt(act):
    try:
        act()
        return "allowed"
    except OSError as error:
        return type(error).__name__
def deeds():
    return {
        "network": attempt(lambda: socket.create_connection(("127.0.0.1", int(sys.argv[3])), 2).close()),
        "files": attempt(lambda: os.listdir("/etc")),
    }
free = deeds()
isolation, _ = classifier_process.raise_walls(sys.argv[2], 2**32)
print(json.dumps({"isolation": isolation, "free": free, "walled": deeds()}))
"""

LATE = """
import sys, threading
sys.path.append(sys.argv[1])
from services.sandbox.walls import cut_off
threading.Thread(target=threading.Event().wait, daemon=True).start()
try:
    cut_off()
except RuntimeError as error:
    print(error)
"""


def python(code: str, *arguments: object) -> str:
    """What our code prints as a process of its own, which nothing else was imported into."""
    command = [sys.executable, "-I", "-c", code, str(ROOT), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60, env={}).stdout


@pytest.fixture
def process() -> Iterator[WalledProcess]:
    """The process of one trial, before its file comes."""
    options = {"output": "logits", "classes": 2}
    with WalledProcess(
        classifiers.PROGRAM, options, memory_bytes=classifiers.MEMORY_BYTES, wall_seconds=60.0
    ) as process:
        yield process


@LINUX
def test_the_walls_are_those_that_a_bare_process_gets_here(process: WalledProcess, tmp_path: Path) -> None:
    assert set(process.isolation) == set(json.loads(python(BARE, tmp_path)))


@LINUX
def test_every_thread_stands_behind_the_walls(process: WalledProcess) -> None:
    tasks = [Path(f"/proc/{process.pid}/task/{name}") for name in os.listdir(f"/proc/{process.pid}/task")]
    networks = {os.readlink(task / "ns" / "net") for task in tasks}

    assert len(networks) == 1
    assert (networks != {os.readlink("/proc/self/ns/net")}) == ("network" in process.isolation)
    assert all("NoNewPrivs:\t1" in (task / "status").read_text() for task in tasks)


@LINUX
def test_the_runtime_starts_no_thread_that_reports_to_its_maker(process: WalledProcess) -> None:
    assert psutil.Process(process.pid).num_threads() == 1


@LINUX
@pytest.mark.parametrize("wall", ["network", "files"])
def test_nothing_goes_through_a_wall(tmp_path: Path, wall: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        told = json.loads(python(INSIDE, tmp_path, server.getsockname()[1]))
    if wall not in told["isolation"]:
        pytest.skip("this host does not allow it")

    assert (told["free"][wall], told["walled"][wall] != "allowed") == ("allowed", True)


@LINUX
def test_walls_are_not_raised_beside_a_thread_that_they_would_not_hold() -> None:
    assert python(LATE).startswith("walls are raised in a process of one thread, and this one has 2")


def tried(data: bytes, *, output: str = "logits", classes: int = 2) -> dict[str, int | None]:
    return try_classifier([data[:100], data[100:]], len(data), output=output, classes=classes)


def refusal(data: bytes, **said: Any) -> ClassifierRefused:
    with pytest.raises(ClassifierRefused) as refused:
        tried(data, **said)
    return refused.value


@pytest.mark.parametrize(
    ("data", "said", "takes"),
    [
        (classifier(), {}, (1, 8)),
        (classifier(10, shape=("n", 3, 32, 32)), {"classes": 10}, (3, 32)),
        (classifier(shape=("n", 3, "h", "w")), {}, (3, None)),
        (classifier(shape=("n", "c", 16, "w")), {}, (None, 16)),
        (classifier(shape=(4, 1, 8, 8)), {}, (1, 8)),
        (classifier(softmax=True), {"output": "probabilities"}, (1, 8)),
        (classifier(1), {"output": "score"}, (1, 8)),
        (classifier(1, flat=True), {"output": "score"}, (1, 8)),
        (classifier(1), {}, (1, 8)),
        (classifier(domains=("com.microsoft",)), {}, (1, 8)),
    ],
    ids=[
        "fixed",
        "ten classes",
        "any size",
        "any channels",
        "four at once",
        "softmax",
        "(n, 1)",
        "(n)",
        "one logit",
        "a set unused",
    ],
)
def test_what_a_classifier_takes_is_read_from_it(
    data: bytes, said: dict[str, Any], takes: tuple[int | None, int | None]
) -> None:
    assert tried(data, **said) == {"channels": takes[0], "size": takes[1]}


@pytest.mark.parametrize(
    ("data", "said", "reason"),
    [
        (b"\x08\x09 no model", {}, "not_onnx"),
        (classifier()[:-40], {}, "not_onnx"),
        (outside("weights.bin"), {}, "external_data"),
        (outside("/etc/passwd"), {}, "external_data"),
        (outside("*/_ORT_MEM_ADDR_/*"), {}, "external_data"),
        (unlike("Bogus"), {}, "unknown_operator"),
        (unlike("FusedMatMul", domain="com.microsoft"), {}, "foreign_operator"),
        (unlike(kind=TensorProto.FLOAT16), {}, "input_type"),
        (unlike(kind=TensorProto.UINT8), {}, "input_type"),
        (unlike(shape=("n", 64)), {}, "input_shape"),
        (classifier(shape=("n", 2, 8, 8)), {}, "input_shape"),
        (classifier(shape=("n", 1, 8, 9)), {}, "input_shape"),
        (classifier(shape=(4096, 1, 8, 8)), {}, "large_batch"),
        (unlike(), {}, "output_classes"),
        (classifier(3), {}, "output_classes"),
        (classifier(1), {"classes": 3}, "output_classes"),
        (classifier(2), {"output": "score"}, "output_score"),
        (classifier(bias=float("nan")), {}, "not_finite"),
        (classifier(), {"output": "probabilities"}, "no_probabilities"),
        (classifier(1, bias=7.0), {"output": "probabilities"}, "no_probabilities"),
    ],
)
def test_whatever_is_no_classifier_is_refused_with_its_reason(data: bytes, said: dict[str, Any], reason: str) -> None:
    refused = refusal(data, **said)

    assert refused.members["reason"] == reason
    assert "{" not in refused.detail.replace("{{", "").replace('{"input"', "").replace("{0:", "")


def test_wrong_number_of_classes_says_both_and_where(tmp_path: Path) -> None:
    refused = refusal(classifier(3))

    assert "(N, 3)" in refused.detail
    assert "2 classes were named" in refused.detail
    assert refused.members["errors"][0]["parameter"] == "classes"


def test_every_reason_can_be_said() -> None:
    source = (Path(classifiers.__file__).with_name("classifier_trial.py")).read_text()

    for reason in classifiers.REFUSALS.keys() - {"crashed"}:
        assert f'"{reason}"' in source


def test_file_that_takes_too_long_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(classifiers, "WALL_SECONDS", 0.0)
    data = classifier()

    def chunks() -> Iterator[bytes]:
        time.sleep(1)  # on a busy machine a trial can be over before the clock is looked at
        yield data

    with pytest.raises(ClassifierRefused) as refused:
        try_classifier(chunks(), len(data), output="logits", classes=2)

    assert refused.value.members["reason"] == "crashed"


def test_store_that_fails_on_the_way_is_no_refusal() -> None:
    def chunks() -> Iterator[bytes]:
        yield b"\x08"
        raise TimeoutError("the store")

    with pytest.raises(TimeoutError):
        try_classifier(chunks(), 100, output="logits", classes=2)


@pytest.mark.parametrize("tag", [b"\x3a", b"\xba\x00", b"\xba\x80\x00"])
@pytest.mark.parametrize("length", [b"\x0d", b"\x8d\x00", b"\x8d\x80\x80\x00"])
def test_a_foreign_operator_is_found_however_its_name_is_framed(tag: bytes, length: bytes) -> None:
    from services.sandbox.classifier_trial import FOREIGN_OPERATOR

    assert FOREIGN_OPERATOR.search(b"xx" + tag + length + b"com.microsoft" + b"xx")
    assert not FOREIGN_OPERATOR.search(b"\x12" + length + b"com.microsoft")
