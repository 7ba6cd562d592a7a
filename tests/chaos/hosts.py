"""Workers on hosts of their own: each reaches the servers over one cable, which can be pulled.

A host is three relays on loopback, or, where the tests may make one, a network namespace whose only way out is a pair
of virtual interfaces. Pulled, either loses packets without a word, as a switch that died.
"""

from __future__ import annotations

import itertools
import os
import shutil
import subprocess
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress

from sqlalchemy import make_url

from tests.relays import Relay, RelayThread

__all__ = ["Host", "RelayHost", "namespace_host", "namespaces_allowed", "relay_host"]

DATABASE, BROKER, STORE = "FORGETD_DATABASE_URL", "FORGETD_BROKER_URL", "FORGETD_S3_ENDPOINT_URL"
_numbers = itertools.count(1)


class Host(ABC):
    """Where a worker runs: what is put before its command, and how it reaches the servers."""

    def __init__(self, environment: Mapping[str, str], prefix: list[str]) -> None:
        self.environment, self.prefix = dict(environment), prefix

    @abstractmethod
    def cut(self) -> None:
        """Pull the cable."""

    @abstractmethod
    def mend(self) -> None:
        """Put it back."""


class RelayHost(Host):
    """Behind relays on loopback."""

    def __init__(self, environment: Mapping[str, str], relays: list[Relay]) -> None:
        super().__init__(environment, [])
        self._relays = relays

    def cut(self) -> None:
        for relay in self._relays:
            relay.cut()

    def mend(self) -> None:
        for relay in self._relays:
            relay.mend()

    def mute(self) -> None:
        """All that it talks to lives and does not answer any more."""
        for relay in self._relays:
            relay.mute()


class _NamespaceHost(Host):
    def __init__(self, environment: Mapping[str, str], name: str, near: str) -> None:
        super().__init__(environment, ["ip", "netns", "exec", name])
        self._near = near

    def cut(self) -> None:
        _ip("link", "set", self._near, "down")

    def mend(self) -> None:
        _ip("link", "set", self._near, "up")


@contextmanager
def relay_host(environment: Mapping[str, str]) -> Iterator[RelayHost]:
    """A host behind relays on loopback; needs no privilege."""
    with RelayThread() as thread:
        relays, addressed = _relayed(thread, environment, "127.0.0.1")
        try:
            yield RelayHost(addressed, relays)
        finally:
            for relay in relays:
                relay.close()


@contextmanager
def namespace_host(environment: Mapping[str, str]) -> Iterator[Host]:
    """A network namespace of its own, behind a pair of interfaces; relays at our end of it reach the servers."""
    number = f"{os.getpid() % 2**16:x}{next(_numbers):x}"
    name, near, far = f"forgetd-{number}", f"fgn{number}", f"fgf{number}"
    block = f"10.{203 + next(_numbers) % 20}.{os.getpid() % 256}"
    _ip("netns", "add", name)
    try:
        _ip("link", "add", near, "type", "veth", "peer", "name", far, "netns", name)
        _ip("addr", "add", f"{block}.1/30", "dev", near)
        _ip("link", "set", near, "up")
        for command in (
            ["addr", "add", f"{block}.2/30", "dev", far],
            ["link", "set", far, "up"],
            ["link", "set", "lo", "up"],
        ):
            _ip("-n", name, *command)
        with RelayThread() as thread:
            relays, addressed = _relayed(thread, environment, f"{block}.1")
            try:
                yield _NamespaceHost(addressed, name, near)
            finally:
                for relay in relays:
                    relay.close()
    finally:
        with suppress(subprocess.CalledProcessError):
            _ip("netns", "del", name)


def namespaces_allowed() -> bool:
    """Whether this process may make network namespaces."""
    if shutil.which("ip") is None or os.geteuid() != 0:
        return False
    try:
        with namespace_host({DATABASE: "postgresql://h:1/d", BROKER: "redis://h:1/0", STORE: "http://h:1"}):
            return True
    except (OSError, subprocess.CalledProcessError):
        return False


def _relayed(thread: RelayThread, environment: Mapping[str, str], address: str) -> tuple[list[Relay], dict[str, str]]:
    """Relays at the address to each of the servers, and the environment of who reaches them there."""
    relays, addressed = [], dict(environment)
    for name in (DATABASE, BROKER, STORE):
        url = make_url(environment[name]) if name == DATABASE else None
        port = url.port if url else int(environment[name].rpartition(":")[2].partition("/")[0])
        relay = Relay(thread, port or 0, listen=address)
        relays.append(relay)
        addressed[name] = (
            url.set(host=address, port=relay.port).render_as_string(hide_password=False)
            if url
            else environment[name].replace("127.0.0.1", address).replace(f":{port}", f":{relay.port}")
        )
    return relays, addressed


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)
