"""What a job learned of its checkpoint, such as a Fisher information: kept beside it, and there for the next job.

What it worked out and may not leave to others, or has not finished, is kept until the job ends, so that it survives a
worker. Neither needs a fence. A stale attempt that writes late does no harm: what the runner reads has to say of itself
that it is what is looked for (its name is a digest of all that it depends on, and it holds the digests of its content
and of what it was made from), so that the worst is an older state of the same work; and what is written behind a job's
end goes with the second sweep (``worker.janitor``).
"""

from __future__ import annotations

import logging
import re
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from services import object_keys
from services.leases import Claim
from services.storage import ObjectStorage, StoredObject, file_sha256
from worker import publication
from worker.patience import GaveUp, patiently, store_away
from worker.process import Malformed

__all__ = ["Asset", "AssetKeeper", "fetch", "offered"]

logger = logging.getLogger(__name__)

NAME = re.compile(r"[a-z0-9-]{1,120}")
OWN_PATH = re.compile(r"assets/([a-z0-9-]{1,120})\.[0-9]{1,9}\.safetensors")
FOLDER = "inputs/fisher"
FETCHED_BYTES = 8 * 2**30  # of the newest: what scratch has room for
FETCHES_AT_ONCE = 8
LEAVE_SECONDS = 5.0


@dataclass(frozen=True)
class Asset:
    """A file that the runner offers. One of the job's own is taken over; any other stays as it is, and where it is."""

    path: Path
    name: str
    own: bool


class AssetKeeper:
    """Uploads assets in a thread of its own, in their turn.

    Of the checkpoint's, the first writer of a name wins. Of the job's own the newest does: one that is overtaken before
    its turn is skipped. A failure costs the next job or attempt the reuse, and this one nothing.
    """

    def __init__(self, storage: ObjectStorage, claim: Claim, *, going_on: Callable[[], bool]) -> None:
        self._storage, self._claim, self._going_on = storage, claim, going_on
        self._waiting: list[Asset] = []
        self._busy = self._closed = False
        self._changed = threading.Condition()
        self._left = threading.Event()
        self._thread = threading.Thread(target=self._work, name=f"assets-{claim.job_id}", daemon=True)

    def __enter__(self) -> AssetKeeper:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._thread.join(LEAVE_SECONDS)
        self._left.set()
        if self._thread.is_alive():
            logger.warning("%s attempt %d: it ended before its assets were kept", *self._name())

    def add(self, asset: Asset) -> None:
        """Have a file uploaded under its name."""
        with self._changed:
            overtaken = [one for one in self._waiting if asset.own and one.own and one.name == asset.name]
            self._waiting = [one for one in self._waiting if one not in overtaken] + [asset]
            self._changed.notify_all()
        for one in overtaken:
            if one.path != asset.path:
                one.path.unlink(missing_ok=True)

    def wait(self, timeout: float) -> bool:
        """Wait until nothing is on its way; False after the timeout."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._waiting and not self._busy, timeout)

    def _work(self) -> None:
        while (asset := self._next()) is not None:
            try:
                if self._worth_it(asset):
                    self._save(asset)
            except FileExistsError:
                continue  # another job was first
            except GaveUp:
                logger.warning("%s attempt %d: an asset was not kept", *self._name())
            except Exception:
                logger.exception("%s attempt %d: an asset was not kept", *self._name())
            finally:
                if asset.own:
                    asset.path.unlink(missing_ok=True)

    def _next(self) -> Asset | None:
        """The one whose turn it is, once there is one; None at the end."""
        with self._changed:
            self._busy = False
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._waiting or self._closed)
            if not self._waiting:
                return None
            self._busy = True
            return self._waiting.pop(0)

    def _save(self, asset: Asset) -> None:
        stored = patiently(
            lambda: self._put(asset),
            away=store_away,
            going_on=lambda: self._worth_it(asset),
            what=f"{self._claim.job_id}: asset upload",
        )
        logger.info("%s attempt %d: kept %s, %d bytes", *self._name(), asset.name, stored.bytes)

    def _put(self, asset: Asset) -> StoredObject:
        claim = self._claim
        if asset.own:
            return self._storage.put_file(object_keys.work(claim.tenant_id, claim.job_id, asset.name), asset.path)
        return self._storage.put_file_once(
            object_keys.asset(claim.tenant_id, claim.checkpoint_id, asset.name), asset.path
        )

    def _worth_it(self, asset: Asset) -> bool:
        """As long as the attempt may save, and nothing newer of the job's own waits under the same name."""
        with self._changed:
            overtaken = asset.own and any(one.own and one.name == asset.name for one in self._waiting)
        return not overtaken and self._going_on() and not self._left.is_set()

    def _name(self) -> tuple[str, int]:
        return self._claim.job_id, self._claim.attempt


def offered(message: dict[str, Any], folder: Path) -> Asset:
    """The file of an ``asset`` message.

    Raises:
        Malformed: it is odd.
    """
    path, name, scope = (message.get(key) for key in ("path", "name", "scope"))
    if not isinstance(name, str) or not NAME.fullmatch(name) or not isinstance(path, str):
        raise Malformed("an odd asset")
    if scope == "checkpoint" and path == f"assets/{name}.safetensors":
        return Asset(publication.plain_file(folder, path), name, own=False)
    # One of the job's own may be written again while we read it: each write has a number, and so a file of its own.
    if scope == "job" and (numbered := OWN_PATH.fullmatch(path)) is not None and numbered[1] == name:
        return Asset(publication.plain_file(folder, path), name, own=True)
    raise Malformed("an odd asset")


def fetch(storage: ObjectStorage, claim: Claim, folder: Path, *, going_on: Callable[[], bool]) -> dict[str, str]:
    """Fetch what earlier attempts at a job left, and the newest assets of its checkpoint, each checked.

    One that cannot be had is left out; one that is damaged is erased too, so that it can be written anew. Safe to
    repeat. Errors of a store that is away rise (``worker.patience.store_away``), and no others.

    Returns:
        Their paths in the folder, by name.
    """
    (folder / FOLDER).mkdir(mode=0o700, parents=True, exist_ok=True)
    keys = _keys(storage, claim)
    paths = {name: f"{FOLDER}/{name}.safetensors" for name in keys}

    def here(name: str) -> bool:
        return going_on() and _fetch_one(storage, claim, keys[name], folder / paths[name])

    with ThreadPoolExecutor(FETCHES_AT_ONCE, thread_name_prefix="fetch") as pool:
        return {name: paths[name] for name, found in zip(paths, pool.map(here, paths), strict=True) if found}


def _keys(storage: ObjectStorage, claim: Claim) -> dict[str, str]:
    """By name, as many as there is room for: first what is this job's own, then the newest of its checkpoint.

    A job that was handed back has its first attempt before it again, so that the number of attempts tells nothing.
    """
    room, keys = FETCHED_BYTES, dict[str, str]()
    for prefix in (
        object_keys.work_prefix(claim.tenant_id, claim.job_id),
        object_keys.assets_prefix(claim.tenant_id, claim.checkpoint_id),
    ):
        for key, size in storage.newest(prefix):
            name = key.removeprefix(prefix).removesuffix(".safetensors")
            if size <= room and NAME.fullmatch(name) and name not in keys and key.endswith(".safetensors"):
                room -= size
                keys[name] = key
    return keys


def _fetch_one(storage: ObjectStorage, claim: Claim, key: str, path: Path) -> bool:
    why = "damaged"
    try:
        if storage.fetch(key, path) == file_sha256(path):
            return True
        path.unlink()
        storage.erase(key)
    except Exception as error:
        if store_away(error):
            raise
        path.unlink(missing_ok=True)
        why = type(error).__name__
    logger.warning("%s attempt %d: an asset is left out (%s)", claim.job_id, claim.attempt, why)
    return False
