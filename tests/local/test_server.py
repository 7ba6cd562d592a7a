"""What counts as a living process: one whose ports and files are still held."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

from services.local.server import ProcessIdentity, is_free
from tests.local.helpers import wait_until

# The first thread ends alone, as it does for a moment when a program of many threads is killed; another holds a port.
FIRST_THREAD_ENDS = """
import ctypes, socket, sys, threading, time
server = socket.create_server(("127.0.0.1", 0))
threading.Thread(target=time.sleep, args=(600,)).start()
print(server.getsockname()[1], flush=True)
libc = ctypes.CDLL(None)
libc.syscall(ctypes.c_long(int(sys.argv[1])), ctypes.c_long(0))
"""
EXIT_THREAD = {"x86_64": 60, "aarch64": 93}


@pytest.mark.skipif(sys.platform != "linux", reason="zombies with threads are Linux's")
def test_a_process_lives_until_its_last_thread_lets_go_of_its_port() -> None:
    argv = [sys.executable, "-c", FIRST_THREAD_ENDS, str(EXIT_THREAD[platform.machine()])]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        port = int(process.stdout.readline())
        wait_until(lambda: _state(process.pid) == "Z")

        identity = ProcessIdentity.of(process.pid)

        process.kill()
        assert identity is not None
        wait_until(lambda: not identity.alive())
        assert is_free(port)


def _state(pid: int) -> str:
    with open(f"/proc/{pid}/stat") as file:
        return file.read().rpartition(")")[2].split()[0]
