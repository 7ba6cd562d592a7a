"""The image process: what it cannot do, and what a file can do to it."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest
from PIL import Image

from services.errors import ImageRefused
from services.sandbox import DECODERS, ImageDecoder, image_process

PROGRAM = Path(image_process.__file__)
MIB = 2**20
LINUX = pytest.mark.skipif(sys.platform != "linux", reason="namespaces and address space limits are Linux's")

# Isolated as the real one is, then trying what decoding never needs.
ATTEMPTS = """
import json, os, resource, socket, sys
sys.path.insert(0, sys.argv[1])
import image_process
def attempt(act):
    try:
        act()
        return "allowed"
    except BaseException as error:
        return type(error).__name__
def fork():
    if os.fork() == 0:
        os._exit(0)
def deeds():
    return {
        "connect": attempt(lambda: socket.socket().connect(("127.0.0.1", int(sys.argv[3])))),
        "read": attempt(lambda: os.listdir("/etc")),
        "write": attempt(lambda: open(sys.argv[2] + "/file", "w").close()),
        "fork": attempt(fork),
        "memory": attempt(lambda: bytearray(2**30)),
    }
free = deeds()
image_process.warm_up()
done = image_process.isolate(sys.argv[2], 512 * 2**20)
print(json.dumps({"free": free, "done": done, "walled": deeds()}))
"""


def picture(mode: str = "RGB", size: tuple[int, int] = (9, 7)) -> bytes:
    file = io.BytesIO()
    Image.new(mode, size).save(file, "PNG")
    return file.getvalue()


@pytest.fixture
def decoder() -> Iterator[ImageDecoder]:
    with ImageDecoder(max_pixels=10**6) as decoder:
        yield decoder


@LINUX
def test_isolated_process_can_do_nothing_but_compute(tmp_path: Path) -> None:
    import socket

    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        run = subprocess.run(
            [sys.executable, "-I", "-c", ATTEMPTS, str(PROGRAM.parent), str(tmp_path), str(port)],
            capture_output=True,
            text=True,
            check=True,
            env={},
        )

    told: dict[str, Any] = json.loads(run.stdout)
    walls = {"network": ["connect"], "files": ["read", "write"], "limits": ["memory"], "user": ["fork"]}
    for wall in told["done"]:
        for deed in walls.get(wall, []):
            assert told["walled"][deed] != "allowed", deed
    assert "limits" in told["done"]
    assert set(told["free"].values()) == {"allowed"}


def test_process_has_no_environment_of_ours(decoder: ImageDecoder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORGETD_S3_SECRET_KEY", "secret")

    with ImageDecoder(max_pixels=10**6) as other:
        environment = psutil.Process(other.pid).environ()

    assert not any(name.startswith(("FORGETD", "AWS", "HOME", "PATH")) for name in environment)


def test_process_reports_its_walls(decoder: ImageDecoder) -> None:
    assert "limits" in decoder.isolation


def test_decoder_goes_on_after_a_refused_image(decoder: ImageDecoder) -> None:
    with pytest.raises(ImageRefused):
        decoder.decode(b"nonsense", index=0)

    assert decoder.decode(picture(), index=1).width == 9


def test_same_pixels_have_the_same_digest(decoder: ImageDecoder) -> None:
    file = io.BytesIO()
    Image.new("RGB", (9, 7)).save(file, "WEBP", lossless=True)

    assert decoder.decode(picture(), index=0).sha256 == decoder.decode(file.getvalue(), index=1).sha256


@LINUX
def test_image_past_the_memory_limit_is_refused() -> None:
    with (
        ImageDecoder(max_pixels=10**9, memory_bytes=300 * MIB) as decoder,
        pytest.raises(ImageRefused, match="too much memory"),
    ):
        decoder.decode(picture("L", (14_000, 14_000)), index=0)


def test_image_that_takes_too_long_is_refused() -> None:
    with (
        ImageDecoder(max_pixels=10**9, wall_seconds=0.01) as decoder,
        pytest.raises(ImageRefused, match="within the limits"),
    ):
        decoder.decode(picture("RGB", (6_000, 6_000)), index=0)


def test_death_of_the_process_is_a_refusal(decoder: ImageDecoder) -> None:
    psutil.Process(decoder.pid).kill()

    with pytest.raises(ImageRefused) as refusal:
        decoder.decode(picture(), index=3)

    assert refusal.value.members == {"index": 3, "reason": "crashed"}


def test_closing_ends_the_process_and_takes_its_folder_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import tempfile

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    decoder = ImageDecoder(max_pixels=100)

    decoder.close()

    assert not psutil.pid_exists(decoder.pid)
    assert os.listdir(tmp_path) == []


def test_no_more_than_so_many_images_are_decoded_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    at_work, most, entered = 0, 0, threading.Lock()
    exchange = ImageDecoder._exchange

    def counted(decoder: ImageDecoder, data: bytes) -> Any:
        nonlocal at_work, most
        with entered:
            at_work += 1
            most = max(most, at_work)
        time.sleep(0.1)
        try:
            return exchange(decoder, data)
        finally:
            with entered:
                at_work -= 1

    monkeypatch.setattr(ImageDecoder, "_exchange", counted)

    def decode(index: int) -> int:
        with ImageDecoder(max_pixels=100) as decoder:
            return decoder.decode(picture(), index=index).width

    with ThreadPoolExecutor(5) as pool:
        widths = list(pool.map(decode, range(5)))

    assert widths == [9] * 5
    assert most == DECODERS
