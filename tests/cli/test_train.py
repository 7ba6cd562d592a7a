"""``forgetd train`` as its users run it: the real training in its own process."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from PIL import Image

from cli.exits import ExitCode
from tests.cli.processes import COMMAND, environment, eventually, forgetd

LONG = ["--size", "8", "--channels", "1", "--set=n_flow=2", "--set=hidden=8", "--set=batch=8", "--steps", "1000000"]
"""Runs until it is stopped."""


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Some noise to train on."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for number in range(6):
        Image.effect_noise((12, 12), 40 + number).save(folder / f"{number}.png")
    return folder


def files(folder: Path) -> list[str]:
    """What a training left beside its images."""
    return sorted(path.name for path in folder.iterdir() if path.name != "photos")


def test_help_teaches_with_an_example(tmp_path: Path) -> None:
    done = forgetd("train", "--help", cwd=tmp_path, env={"COLUMNS": "300"})

    assert done.code == ExitCode.OK
    assert "Example: forgetd train " in done.out


def test_a_script_gets_a_checkpoint_and_its_figures_and_no_progress(photos: Path, tmp_path: Path) -> None:
    done = forgetd("train", "photos", *LONG, "--steps", "3", "--out", "base.safetensors", "--json", cwd=tmp_path)

    result = json.loads(done.out)
    assert (done.code, done.err) == (ExitCode.OK, "")
    assert (result["path"], result["steps"], result["data"]["held_out"]) == ("base.safetensors", 3, 1)
    assert result["bits_per_dim_held_out"] > 0
    assert files(tmp_path) == ["base.safetensors"]


def test_a_vae_of_sub_folders_is_told_by_its_bound(photos: Path, tmp_path: Path) -> None:
    for number in range(6):
        folder = photos / ("even", "odd")[number % 2]
        folder.mkdir(exist_ok=True)
        (photos / f"{number}.png").rename(folder / f"{number}.png")
    tiny = ["--size", "8", "--channels", "1", "--set=hidden=8", "--steps", "3"]

    done = forgetd("train", "photos", "--family", "vae", *tiny, "--out", "vae.safetensors", cwd=tmp_path)

    assert done.code == ExitCode.OK
    assert "2 classes" in done.out
    assert "negative ELBO in nats an image: " in done.out
    assert "bits per dimension" not in done.out


@contextmanager
def running(command: list[str], folder: Path) -> Iterator[subprocess.Popen[str]]:
    """A command at work, stopped in the end whatever the test finds: a training would go on for days."""
    with subprocess.Popen(
        command, cwd=folder, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            yield process
        finally:
            process.kill()


@pytest.mark.parametrize("resume", [False, True])
def test_an_interrupt_ends_it_and_leaves_no_half_a_file(resume: bool, photos: Path, tmp_path: Path) -> None:
    state = tmp_path / "base.safetensors.state"
    command = [*COMMAND, "train", "photos", *LONG, "--out", "base.safetensors", *["--resume"] * resume]
    with running(command, tmp_path) as process:
        child = eventually(lambda: children_in_training(process.pid))

        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)

    assert (process.returncode, out) == (ExitCode.INTERRUPTED, "")
    assert err.startswith("Error: ")
    assert not Path(f"/proc/{child}").exists()
    assert files(tmp_path) == ([state.name] if resume else [])


def children_in_training(parent: int) -> int | None:
    """The training's process, once it has loaded its libraries and read its images."""
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rsplit(")", 1)[1].split()
            maps = Path(path.parent / "maps").read_text()
            threads = int(fields[17])
        except OSError:
            continue
        if int(fields[1]) == parent and "libtorch_cpu" in maps and threads > 1 and started(path.parent):
            return int(path.parent.name)
    return None


def started(process: Path) -> bool:
    """Whether it listens to SIGTERM itself, as a training does from its beginning to its end."""
    caught = next(line for line in (process / "status").read_text().splitlines() if line.startswith("SigCgt"))
    return bool(int(caught.split()[1], 16) >> (signal.SIGTERM - 1) & 1)


def test_the_training_ends_with_a_command_that_was_killed(photos: Path, tmp_path: Path) -> None:
    with running([*COMMAND, "train", "photos", *LONG], tmp_path) as process:
        child = eventually(lambda: children_in_training(process.pid))

        process.kill()
        process.wait()

    eventually(lambda: not os.path.exists(f"/proc/{child}"))
    assert files(tmp_path) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["photos", "--set", "colour=1"], "no setting 'colour'"),
        (["photos", "--size", "1"], "--size"),
        (["nowhere"], "nowhere"),
    ],
)
def test_wrong_usage(arguments: list[str], message: str, photos: Path, tmp_path: Path) -> None:
    done = forgetd("train", *arguments, "--out", "base.safetensors", cwd=tmp_path)

    assert (done.code, done.out) == (ExitCode.USAGE, "")
    assert message in done.err
    assert "Traceback" not in done.err


def test_a_file_that_cannot_be_read_is_named(photos: Path, tmp_path: Path) -> None:
    (photos / "broken.png").write_bytes(b"no picture")

    done = forgetd("train", "photos", cwd=tmp_path)

    assert done.code == ExitCode.FAILURE
    assert "broken.png is no JPEG, PNG or WEBP image" in done.err
    assert files(tmp_path) == []
