"""A caller's classifiers in a process of their own: same answers, refusals that arrive, walls that stand, deadlines."""

from __future__ import annotations

import gc
import json
import math
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import psutil
import pytest
from onnx import TensorProto, helper

from evidence.errors import ClassifierFileError, ClassifierOutputError, ClassifierShapeError
from evidence.onnx_model import OnnxModel, OnnxSpec
from tests.worker.helpers import PATIENCE_SECONDS, ROOT
from tests.worker.judges import SIDE, write_bands, write_brightness
from tests.worker.runs import Bench, tiny
from worker.runner.base import load_base
from worker.runner.contract import ExitCode
from worker.runner.judges import refused_by_judge, wanted_of
from worker.runner.problems import OutOfMemory, UserError
from worker.runner.sets import reader_of
from worker.runner.walled_model import IMAGES_AT_ONCE, Deadlines, JudgeProcess, WalledModel

LINUX = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the walls are Linux's")
SHAPE = (1, SIDE, SIDE)
SPEC = OnnxSpec(("dark", "bright"), channels=1, size=SIDE, output="score", name="brightness")
BOOL = TensorProto.BOOL
SOON = Deadlines(batch=2.0, image=0.0)

# What a process that has imported nothing gets of this host.
BARE = """
import json, sys
from pathlib import Path
from worker.runner import sandbox
print(json.dumps(sandbox.close_doors(Path(sys.argv[1]))))
"""

# The process of classifiers up to its first word; then it tries what it has no use for, from two threads.
INSIDE = """
import json, os, socket, sys, threading
from pathlib import Path
from worker.runner import judge_process
walls, _ = judge_process.raise_walls(Path(sys.argv[1]))
def attempt(act):
    try:
        act()
        return "done"
    except OSError as error:
        return type(error).__name__
def deeds():
    seen.append({
        "network": attempt(lambda: socket.create_connection(("127.0.0.1", int(sys.argv[2])), 2)),
        "files": attempt(lambda: Path(sys.argv[3]).read_text()),
    })
    tasks = Path("/proc/self/task")
    for name in os.listdir(tasks):
        threads[name] = [os.readlink(tasks / name / "ns" / "net"), (tasks / name / "status").read_text()]
seen, threads = [], {}
deeds()
other = threading.Thread(target=deeds)
other.start()
other.join()
print(json.dumps({"walls": walls, "seen": seen, "threads": threads}))
"""

PARENT = """
import sys
from pathlib import Path
import numpy as np
from evidence.onnx_model import OnnxSpec
from worker.runner.sets import reader_of
from worker.runner.walled_model import JudgeProcess
path = Path(sys.argv[1])
process = JudgeProcess(path.parent)
model = process.open(path, OnnxSpec(("dark", "bright"), channels=1, size=8, output="score"), (1, 8, 8))
print(process.pid, flush=True)
model.labels(np.ones((2, 1, 8, 8), dtype=np.uint8))
"""


def images(n: int) -> npt.NDArray[np.uint8]:
    return np.random.default_rng(1).integers(0, 256, (n, 1, 1, 1), dtype=np.uint8) * np.ones((1, *SHAPE), np.uint8)


def walled(path: Path, deadlines: Deadlines | None = None) -> WalledModel:
    return JudgeProcess(path.parent, deadlines).open(path, SPEC, SHAPE)


def until(condition: Callable[[], bool]) -> None:
    """Wait for it."""
    end = time.monotonic() + PATIENCE_SECONDS
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def python(code: str, *arguments: object, threads: int = 4) -> str:
    """What our code prints as a process of its own, which nothing else was imported into."""
    kept = {name: value for name, value in os.environ.items() if name != "ORT_DISABLE_TELEMETRY"}  # ours says it here
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        capture_output=True,
        text=True,
        env={**kept, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": str(threads)},
        timeout=PATIENCE_SECONDS,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A judge of brightness."""
    found = tmp_path / "classifiers" / "0.onnx"
    write_brightness(found)
    return found


def greedy(path: Path) -> Path:
    """A judge of brightness that asks for as much memory as the lightest image is light, and for none of dark ones."""
    inputs = helper.make_tensor_value_info("images", TensorProto.FLOAT, ["N", *SHAPE])
    score = helper.make_tensor_value_info("score", TensorProto.FLOAT, ["N"])
    nodes = [
        helper.make_node("ReduceMean", ["images"], ["mean"], axes=[1, 2, 3], keepdims=0),
        helper.make_node("ReduceMax", ["mean"], ["most"], axes=[0], keepdims=1),
        helper.make_node("Mul", ["most", "large"], ["wide"]),
        helper.make_node("Cast", ["wide"], ["shape"], to=TensorProto.INT64),
        helper.make_node("ConstantOfShape", ["shape"], ["space"]),
        helper.make_node("ReduceSum", ["space"], ["sum"], keepdims=0),
        helper.make_node("Add", ["mean", "sum"], ["score"]),
    ]
    large = helper.make_tensor("large", TensorProto.FLOAT, [1], [2.0**40])
    graph = helper.make_graph(nodes, "greedy", [inputs], [score], [large])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8), path)
    return path


def endless(path: Path) -> Path:
    """A judge of brightness that loops for as long as the lightest image is not black: at the door it ends."""
    inputs = helper.make_tensor_value_info("images", TensorProto.FLOAT, ["N", *SHAPE])
    score = helper.make_tensor_value_info("score", TensorProto.FLOAT, ["N"])
    turn, on = (helper.make_tensor_value_info(*one, []) for one in (("turn", TensorProto.INT64), ("on", BOOL)))
    again = helper.make_tensor_value_info("again", BOOL, [])
    carried, kept = (helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N"]) for name in ("carried", "kept"))
    inside = [
        helper.make_node("Greater", ["most", "zero"], ["again"]),
        helper.make_node("Identity", ["carried"], ["kept"]),
    ]
    body = helper.make_graph(inside, "body", [turn, on, carried], [again, kept])
    nodes = [
        helper.make_node("ReduceMean", ["images"], ["mean"], axes=[1, 2, 3], keepdims=0),
        helper.make_node("ReduceMax", ["mean"], ["most"], axes=[0], keepdims=0),
        helper.make_node("Loop", ["", "yes", "mean"], ["score"], body=body),
    ]
    values = [helper.make_tensor("zero", TensorProto.FLOAT, [], [0.0]), helper.make_tensor("yes", BOOL, [], [True])]
    graph = helper.make_graph(nodes, "endless", [inputs], [score], values)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8), path)
    return path


def test_answers_are_those_of_the_model_itself_at_any_number(path: Path) -> None:
    model, bare = walled(path), OnnxModel(path, SPEC, SHAPE)

    for n in (0, 1, IMAGES_AT_ONCE + 3):
        assert np.array_equal(model.labels(images(n)), bare.labels(images(n)))


def test_probabilities_are_those_of_the_model_itself_at_any_number(tmp_path: Path) -> None:
    told = write_bands(tmp_path / "classifiers" / "0.onnx", side=SIDE, classes=4)
    classes = ("a", "b", "c", "d", "nothing")
    spec = OnnxSpec(classes, channels=1, size=SIDE, name=told["name"])
    path = tmp_path / "classifiers" / "0.onnx"
    model, bare = JudgeProcess(path.parent).open(path, spec, SHAPE), OnnxModel(path, spec, SHAPE)

    for n in (0, 1, IMAGES_AT_ONCE + 3):
        found = model.probabilities(images(n))
        assert found.shape == (n, len(classes))
        assert np.array_equal(found, bare.probabilities(images(n)))
        assert np.array_equal(found.argmax(1), bare.labels(images(n)))


def test_a_score_has_no_probabilities(path: Path) -> None:
    model = walled(path)

    with pytest.raises(ClassifierOutputError, match="no probabilities"):
        model.probabilities(images(3))
    assert len(model.labels(images(3))) == 3  # and is asked on


@LINUX
def test_the_walls_are_those_that_a_bare_process_gets_here(path: Path) -> None:
    assert JudgeProcess(path.parent).walls == json.loads(python(BARE, path.parent))


@pytest.fixture(scope="module")
def inside(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the process could do before its first word."""
    secret = tmp_path_factory.mktemp("elsewhere") / "secret"
    secret.write_text("secret")
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        told: dict[str, Any] = json.loads(python(INSIDE, tmp_path_factory.mktemp("folder"), port, secret))
    return told


@LINUX
@pytest.mark.parametrize("wall", ["network", "files"])
def test_no_thread_gets_through_a_wall(inside: dict[str, Any], wall: str) -> None:
    if wall not in inside["walls"]:
        pytest.skip("this host does not allow it")

    assert [seen[wall] == "done" for seen in inside["seen"]] == [False, False]


@LINUX
def test_every_thread_of_ours_and_of_the_libraries_stands_behind_the_walls(inside: dict[str, Any]) -> None:
    networks = {network for network, _ in inside["threads"].values()}

    assert len(inside["threads"]) > 1
    assert len(networks) == 1
    assert (networks != {os.readlink("/proc/self/ns/net")}) == ("network" in inside["walls"])
    assert all("NoNewPrivs:\t1" in status for _, status in inside["threads"].values())


@LINUX
def test_the_runtime_starts_no_thread_that_reports_to_its_maker() -> None:
    code = "import os, evidence.onnx_model; print(len(os.listdir('/proc/self/task')))"

    assert python(code, threads=1).split() == ["1"]


def debias(folder: Path, judge: dict[str, Any]) -> Bench:
    """A job that spreads samples over the classes of a judge."""
    bench = Bench(folder, tiny("glow"))
    wanted = {"target_distribution": {"dark": 0.5, "bright": 0.5}, "tolerance": 0.2, "confidence": 0.95}
    bench.job.update(kind="debias", method="steering", attribute=judge, **wanted)
    return bench


def test_classifiers_of_a_job_share_a_process(tmp_path: Path) -> None:
    bench = Bench(tmp_path, tiny("glow"))
    judges = [write_brightness(tmp_path / "inputs" / "classifiers" / f"{number}.onnx") for number in range(2)]
    asked = [{"judge": one, "class": "dark", "at_most": 0.1, "at_least": None} for one in judges]
    bench.job["target"] = {"attributes": asked}
    base, before = load_base(bench.job, tmp_path), psutil.Process().children()

    wanted = wanted_of(bench.job, tmp_path, reader_of(bench.job, tmp_path, base), base)

    assert len(set(psutil.Process().children()) - set(before)) == 1
    assert [one.judge.name for one in wanted] == ["brightness", "brightness (2)"]


def test_classifiers_that_share_a_process_answer_for_themselves(path: Path) -> None:
    process, contrary = JudgeProcess(path.parent), OnnxSpec(**{**vars(SPEC), "threshold": 0.9})
    first, second = process.open(path, SPEC, SHAPE), process.open(path, contrary, SHAPE)

    for _ in range(2):
        assert first.labels(images(50)).sum() > second.labels(images(50)).sum() > 0


def test_a_file_that_is_no_model_is_refused_as_ever(path: Path) -> None:
    path.write_bytes(b"no model")

    with pytest.raises(ClassifierFileError, match="no ONNX model"):
        walled(path)


def test_a_model_of_other_images_is_refused_as_ever(path: Path) -> None:
    write_brightness(path, side=16)

    with pytest.raises(ClassifierShapeError, match="has to read"):
        walled(path)


def test_a_model_that_takes_all_memory_for_some_images_is_refused_and_the_runner_goes_on(path: Path) -> None:
    model = walled(greedy(path))
    assert model.labels(0 * images(2)).tolist() == [0, 0]  # as at the door

    with pytest.raises(ClassifierOutputError, match="brightness needs more memory than the 8 GiB"):
        model.labels(images(2))
    assert model.labels(0 * images(2)).tolist() == [0, 0]


def test_a_model_that_does_not_end_for_some_images_is_refused_with_the_time_it_had(path: Path) -> None:
    model = walled(endless(path), SOON)
    assert model.labels(0 * images(2)).tolist() == [0, 0]  # as at the door

    began = time.monotonic()
    told = r"brightness did not answer to 2 images within [2-9]"
    with pytest.raises(UserError, match=told) as refused, refused_by_judge("/attribute/classifier"):
        model.labels(images(2))

    assert refused.value.problem["type"].endswith(":classifier-refused")
    assert refused.value.problem["errors"][0]["pointer"] == "/attribute/classifier"
    assert time.monotonic() - began < PATIENCE_SECONDS


def test_a_deadline_is_of_one_batch_and_does_not_run_while_nothing_is_asked(path: Path) -> None:
    model = walled(endless(path), SOON)

    for _ in range(3):
        time.sleep(0.8)  # together longer than the deadline
        assert model.labels(0 * images(2)).tolist() == [0, 0]


def test_a_deadline_of_all_batches_together_ends_what_no_batch_is_late_for(path: Path) -> None:
    process = JudgeProcess(path.parent, Deadlines(batch=1.0, image=0.0), at_once=1)
    model = process.open(path, SPEC, SHAPE)
    assert model.labels(images(3)).shape == (3,)

    with pytest.raises(ClassifierOutputError, match="brightness did not answer to 100000 images within 1 s"):
        model.labels(images(100_000))  # thousands of them a second, at most


def test_each_batch_is_told_and_no_larger_than_it_may_be(path: Path) -> None:
    told: list[None] = []
    process = JudgeProcess(path.parent, at_once=2, on_batch=lambda: told.append(None))

    labels = process.open(path, SPEC, SHAPE).labels(images(5))

    assert len(told) == 3
    assert np.array_equal(labels, OnnxModel(path, SPEC, SHAPE).labels(images(5)))


@pytest.mark.parametrize("divisor", [1, 4])
def test_a_runner_says_that_it_lives_after_each_batch_in_every_phase(divisor: int, tmp_path: Path) -> None:
    bench = debias(tmp_path, write_brightness(tmp_path / "inputs" / "classifiers" / "0.onnx"))
    bench.job.update(micro_batch_divisor=divisor, parameters={"max_steps": 1, "pool": 512, "samples": 300})

    said = [message["type"] for message in bench.run_here().messages]

    validating, rest = said[: said.index("phase")], said[said.index("phase") :]
    batch = IMAGES_AT_ONCE // divisor
    assert validating.count("alive") == sum(math.ceil(n / batch) for n in (512, 300))  # the pool, and its first test
    assert "alive" in rest[len(rest) - rest[::-1].index("phase") :]


def test_a_process_that_is_killed_from_outside_is_no_classifier_s_fault(path: Path) -> None:
    process = JudgeProcess(path.parent)
    idle, at_work = process.open(path, SPEC, SHAPE), walled(endless(path.with_name("1.onnx")))
    os.kill(process.pid, signal.SIGKILL)
    killer = threading.Timer(0.5, os.kill, (at_work._process.pid, signal.SIGKILL))
    killer.start()

    for model in (idle, at_work):
        with pytest.raises(OutOfMemory), refused_by_judge("/attribute/classifier"):
            model.labels(images(2))
    killer.join()


def test_a_classifier_that_brings_its_process_down_is_refused_with_how_it_ended(path: Path) -> None:
    process = JudgeProcess(path.parent)
    model = process.open(path, SPEC, SHAPE)
    os.kill(process.pid, signal.SIGABRT)  # as the runtime's own libraries do on their way out

    with pytest.raises(ClassifierOutputError, match=r"brightness brought down .* \(signal 6\)"):
        model.labels(images(2))


def test_a_runner_whose_classifiers_are_killed_ends_as_one_that_is_out_of_memory(tmp_path: Path) -> None:
    bench = debias(tmp_path, write_brightness(tmp_path / "inputs" / "classifiers" / "0.onnx"))

    def kill(runner: subprocess.Popen[bytes], said: dict[str, Any]) -> None:
        if said == {"type": "phase", "phase": "validating"}:
            until(lambda: bool(psutil.Process(runner.pid).children()))
            psutil.Process(runner.pid).children()[0].kill()

    ended = bench.run(kill)

    assert ended.status == ExitCode.OUT_OF_MEMORY
    assert "error" not in [message["type"] for message in ended.messages]


@LINUX
def test_the_process_ends_with_a_runner_that_is_killed_while_it_waits(path: Path) -> None:
    command = [sys.executable, "-c", PARENT, str(endless(path))]
    with subprocess.Popen(command, stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": str(ROOT)}) as runner:
        assert runner.stdout is not None
        judge = psutil.Process(int(runner.stdout.readline()))
        at_first = judge.cpu_times().user
        until(lambda: judge.cpu_times().user > at_first + 0.2)  # it loops, and reads no pipe

        runner.send_signal(signal.SIGKILL)

    until(lambda: not judge.is_running() or judge.status() == psutil.STATUS_ZOMBIE)


def test_a_process_that_does_not_start_is_no_classifier_s_fault(path: Path) -> None:
    with pytest.raises(RuntimeError, match="did not start"):
        JudgeProcess(path.parent, Deadlines(start=0.0))


def test_the_process_ends_with_its_last_classifier(path: Path) -> None:
    process = JudgeProcess(path.parent)
    pid, model = process.pid, process.open(path, SPEC, SHAPE)
    del process
    gc.collect()
    assert model.labels(images(1)).shape == (1,)

    del model
    gc.collect()

    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_a_process_that_is_gone_is_told(path: Path) -> None:
    process = JudgeProcess(path.parent)
    model = process.open(path, SPEC, SHAPE)
    process.close()

    with pytest.raises(ClassifierOutputError, match="could not be run"):
        model.labels(images(1))
