"""Which service a command talks to: what was said, else the service that ``forgetd up`` runs here.

``forgetd up`` leaves a profile (address and key, mode 0600) in its data folder and holds a lock beside it. A profile
whose lock nobody holds belongs to a service that is gone: its key is sent nowhere.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import stat
from dataclasses import asdict, dataclass, field
from pathlib import Path

from cli.errors import ClientError, Unreachable

__all__ = ["Profile", "data_dir", "live_profile", "read_profile", "resolve", "service_environment", "write_profile"]

PROFILE = "profile.json"
LOCK = "up.lock"


@dataclass(frozen=True)
class Profile:
    """Where a local service is, and how to call it."""

    url: str
    key: str
    database_url: str
    pid: int
    environment: dict[str, str] = field(default_factory=dict)  # the settings of its processes; none in older profiles


def data_dir(given: Path | None = None) -> Path:
    """The local service's folder: as given, else FORGETD_DATA_DIR, else ``.forgetd`` in the current folder."""
    return (given or Path(os.environ.get("FORGETD_DATA_DIR") or ".forgetd")).expanduser().resolve()


def write_profile(folder: Path, profile: Profile) -> None:
    """Replace the profile in one step, readable by its owner alone."""
    fresh = folder / f"{PROFILE}.new"
    with open(os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
        json.dump(asdict(profile), file, indent=2)
    fresh.replace(folder / PROFILE)


def read_profile(folder: Path) -> Profile | None:
    """The profile left in a folder by the newest ``forgetd up``, running or not."""
    with contextlib.suppress(FileNotFoundError, NotADirectoryError, ValueError, KeyError):
        path = folder / PROFILE
        facts = path.stat()
        if facts.st_uid != os.getuid() or stat.S_IMODE(facts.st_mode) & 0o077:
            raise ClientError(f"{path} is not yours alone (mode 0600); it is not trusted with your images.")
        members = json.loads(path.read_text())
        return Profile(
            members["url"], members["key"], members["database_url"], members["pid"], members.get("environment", {})
        )
    return None


def live_profile(folder: Path) -> Profile | None:
    """The profile of the service that runs in a folder now."""
    try:
        with (folder / LOCK).open() as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
            return None  # nobody holds it
    except BlockingIOError:
        return read_profile(folder)
    except OSError:
        return None


def service_environment(folder: Path) -> dict[str, str]:
    """This process's variables, over the settings of the service that runs in a folder if no database is named."""
    here = dict(os.environ)
    profile = None if here.get("FORGETD_DATABASE_URL") else live_profile(folder)
    return here if profile is None else profile.environment | here


def resolve(url: str | None, key: str | None) -> tuple[str, str | None]:
    """The address and key to use; a key from a profile goes to that profile's address alone.

    Raises:
        Unreachable: No address was given and no service runs here.
    """
    if url and key:
        return url, key
    profile = live_profile(data_dir())
    if profile is not None and (url is None or url.rstrip("/") == profile.url):
        return profile.url, key or profile.key
    if url is None:
        raise Unreachable("No service is known here. Start one with: forgetd up. Or name one with --url and --key.")
    return url, key
