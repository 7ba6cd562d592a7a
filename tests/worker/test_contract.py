"""The runner's side of its contract, without a job: the dead man's switch, SIGTERM, standard output."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.worker.helpers import PATIENCE_SECONDS, ROOT, eventually
from worker.inputs import write_job

Run = Callable[..., "subprocess.Popen[bytes]"]

HEAD = "import os, sys, time\nfrom worker.runner.contract import *\n"


@pytest.fixture
def run() -> Iterator[Run]:
    """Runs a piece of a runner in a session of its own."""
    started: list[subprocess.Popen[bytes]] = []

    def run(code: str) -> subprocess.Popen[bytes]:
        process = subprocess.Popen(
            [sys.executable, "-c", HEAD + code],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            start_new_session=True,
        )
        started.append(process)
        return process

    yield run
    for process in started:
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout, process.stderr):
            if pipe is not None:
                pipe.close()


def test_the_end_of_the_pipe_ends_the_runner(run: Run) -> None:
    process = run("DeadMansSwitch(600).start()\nprint('up', flush=True)\ntime.sleep(600)")
    assert process.stdout is not None
    assert process.stdin is not None
    process.stdout.readline()

    process.stdin.close()

    assert process.wait(PATIENCE_SECONDS) == -signal.SIGKILL


def test_silence_ends_the_runner_and_beats_keep_it(run: Run) -> None:
    process = run("DeadMansSwitch(1.0).start()\nprint('up', flush=True)\ntime.sleep(600)")
    assert process.stdout is not None
    assert process.stdin is not None
    stdin = process.stdin
    process.stdout.readline()
    began = time.monotonic()

    def beaten_for_two_leases() -> bool:
        os.write(stdin.fileno(), b".")
        return time.monotonic() > began + 2.4

    eventually(beaten_for_two_leases)
    assert process.poll() is None
    silent_since = time.monotonic()
    assert process.wait(PATIENCE_SECONDS) == -signal.SIGKILL
    assert time.monotonic() - silent_since > 1.0


WAITING = "from pathlib import Path\nprint('up', flush=True)\nprint(wait_for_job(Path({!r}))['seed'], flush=True)"


def test_a_runner_started_ahead_waits_for_its_job_and_takes_beats_meanwhile(run: Run, tmp_path: Path) -> None:
    process = run(WAITING.format(str(tmp_path)))
    assert process.stdout is not None
    assert process.stdin is not None
    process.stdout.readline()
    os.write(process.stdin.fileno(), b".")

    write_job(tmp_path, {"seed": 7})

    assert process.stdout.readline() == b"7\n"
    assert process.wait(PATIENCE_SECONDS) == 0


def test_a_runner_started_ahead_ends_with_its_supervisor(run: Run, tmp_path: Path) -> None:
    process = run(WAITING.format(str(tmp_path)))
    assert process.stdout is not None
    assert process.stdin is not None
    process.stdout.readline()

    process.stdin.close()

    assert process.wait(PATIENCE_SECONDS) != 0


def test_the_runner_takes_its_children_along(run: Run) -> None:
    process = run(
        "import subprocess\nchild = subprocess.Popen(['sleep', '600'])\nDeadMansSwitch(600).start()\n"
        "print(child.pid, flush=True)\ntime.sleep(600)"
    )
    assert process.stdout is not None
    assert process.stdin is not None
    child = int(process.stdout.readline())

    process.stdin.close()
    process.wait(PATIENCE_SECONDS)

    eventually(lambda: not Path(f"/proc/{child}").exists() or " Z " in Path(f"/proc/{child}/stat").read_text())


def test_stray_prints_do_not_reach_the_messages(run: Run) -> None:
    process = run("r = Reporter()\nprint('stray')\nos.write(1, b'stray too\\n')\nr.phase('unlearning')")

    out, err = process.communicate(timeout=PATIENCE_SECONDS)

    assert [json.loads(line) for line in out.splitlines()] == [{"type": "phase", "phase": "unlearning"}]
    assert b"stray" in err
    assert b"stray too" in err


def test_figures_that_json_does_not_know_are_left_out(run: Run) -> None:
    process = run(
        "r = Reporter()\nr.progress(step=1, total=1, eta_seconds=None, losses={'a': float('nan'), 'b': 1.0}, "
        "metrics={'c': float('-inf')})"
    )

    out, _ = process.communicate(timeout=PATIENCE_SECONDS)

    message = json.loads(out)
    assert (message["losses"], message["metrics"]) == ({"b": 1.0}, {})


def test_sigterm_waits_for_a_step_and_interrupts_what_has_none(run: Run) -> None:
    process = run(
        "stop = Stop()\nprint('up', flush=True)\n"
        "while not stop.requested:\n    time.sleep(0.01)\n"
        "print('at a step', flush=True)\n"
        "try:\n    with stop.at_once():\n        time.sleep(600)\n"
        "except Interrupted:\n    print('interrupted', flush=True)"
    )
    assert process.stdout is not None
    process.stdout.readline()

    process.terminate()

    out, _ = process.communicate(timeout=PATIENCE_SECONDS)
    assert out.split(b"\n")[:2] == [b"at a step", b"interrupted"]


@pytest.mark.parametrize("made_of_it", ["RuntimeError('a library failed')", "UserError('slug', 'Title', 'Detail')"])
def test_who_is_told_to_stop_ends_as_told_whatever_is_made_of_it(run: Run, tmp_path: Path, made_of_it: str) -> None:
    (tmp_path / "turning.py").write_text(
        "import signal\nfrom worker.runner.problems import UserError\n"
        "def run(job, folder, reporter, stop):\n"
        "    try:\n        with stop.at_once():\n            signal.raise_signal(signal.SIGTERM)\n"
        f"    except Exception as error:\n        raise {made_of_it} from error\n"
    )
    write_job(tmp_path, {"kind": "forget", "method": "turning", "lease_ttl_seconds": 600})
    process = run(
        f"sys.path.append({str(tmp_path)!r})\nfrom worker.runner.__main__ import METHODS, main\n"
        f"METHODS['turning'] = 'turning'\nos._exit(main([{str(tmp_path)!r}]))"
    )

    assert process.stdout is not None  # its input stays open: the end of it would be the end of the runner
    said = [json.loads(line)["type"] for line in process.stdout]

    assert (process.wait(PATIENCE_SECONDS), said) == (75, ["phase"])


def test_sigterm_waits_for_what_is_held_and_cuts_what_is_released_of_it(run: Run) -> None:
    process = run(
        "import signal\nstop = Stop()\n"
        "def told():\n    signal.raise_signal(signal.SIGTERM)\n    print('went on', flush=True)\n"
        "try:\n    with stop.at_once():\n        with stop.held():\n            told()\n        print('never')\n"
        "except Interrupted:\n    print('cut behind', flush=True)\n"
        "stop.requested = False\n"
        "try:\n    with stop.at_once(), stop.held(), stop.released():\n        told()\n"
        "except Interrupted:\n    print('cut within', flush=True)\n"
        "stop.requested = False\n"
        "with stop.held(), stop.released():\n    told()\n"
    )

    out, _ = process.communicate(timeout=PATIENCE_SECONDS)

    assert out.split(b"\n")[:-1] == [b"went on", b"cut behind", b"cut within", b"went on"]
