"""What a job learned of its checkpoint, such as a Fisher information: kept beside it, and there for the next job."""

from __future__ import annotations

import logging
import queue
import re
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from services import object_keys
from services.leases import Claim
from services.storage import ObjectStorage, file_sha256
from worker import publication
from worker.patience import GaveUp, patiently, store_away
from worker.process import Malformed

__all__ = ["AssetKeeper", "fetch", "offered"]

logger = logging.getLogger(__name__)

NAME = re.compile(r"[a-z0-9-]{1,120}")
FOLDER = "inputs/fisher"
FETCHED_BYTES = 8 * 2**30  # of the newest: what scratch has room for
FETCHES_AT_ONCE = 8
LEAVE_SECONDS = 5.0


class AssetKeeper:
    """Uploads assets in a thread of its own, each once: the first writer of a name wins.

    A failure costs the next job the reuse, and this one nothing.
    """

    def __init__(self, storage: ObjectStorage, claim: Claim, *, going_on: Callable[[], bool]) -> None:
        self._storage, self._claim, self._going_on = storage, claim, going_on
        self._waiting: queue.SimpleQueue[tuple[Path, str] | None] = queue.SimpleQueue()
        self._left = threading.Event()
        self._thread = threading.Thread(target=self._work, name=f"assets-{claim.job_id}", daemon=True)

    def __enter__(self) -> AssetKeeper:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._waiting.put(None)
        self._thread.join(LEAVE_SECONDS)
        self._left.set()
        if self._thread.is_alive():
            logger.warning("%s attempt %d: it ended before its assets were kept", *self._name())

    def add(self, path: Path, name: str) -> None:
        """Have a file uploaded under a name. It must stay as it is, and where it is."""
        self._waiting.put((path, name))

    def _work(self) -> None:
        while (waiting := self._waiting.get()) is not None and self._worth_it():
            try:
                self._save(*waiting)
            except FileExistsError:
                continue  # another job was first
            except GaveUp:
                logger.warning("%s attempt %d: an asset was not kept", *self._name())
            except Exception:
                logger.exception("%s attempt %d: an asset was not kept", *self._name())

    def _save(self, path: Path, name: str) -> None:
        key = object_keys.asset(self._claim.tenant_id, self._claim.checkpoint_id, name)
        stored = patiently(
            lambda: self._storage.put_file_once(key, path),
            away=store_away,
            going_on=self._worth_it,
            what=f"{self._claim.job_id}: asset upload",
        )
        logger.info("%s attempt %d: kept %s, %d bytes", *self._name(), name, stored.bytes)

    def _worth_it(self) -> bool:
        return self._going_on() and not self._left.is_set()

    def _name(self) -> tuple[str, int]:
        return self._claim.job_id, self._claim.attempt


def offered(message: dict[str, Any], folder: Path) -> tuple[Path, str]:
    """The file and the name of an ``asset`` message.

    Raises:
        Malformed: they are odd.
    """
    path, name = message.get("path"), message.get("name")
    if not isinstance(name, str) or not NAME.fullmatch(name) or path != f"assets/{name}.safetensors":
        raise Malformed("an odd asset")
    return publication.plain_file(folder, path), name


def fetch(storage: ObjectStorage, claim: Claim, folder: Path, *, going_on: Callable[[], bool]) -> dict[str, str]:
    """Fetch the newest assets of a job's checkpoint, each checked; their paths in the folder, by name.

    One that cannot be had is left out; one that is damaged is erased too, so that it can be written anew. Safe to
    repeat. Errors of a store that is away rise (``worker.patience.store_away``), and no others.
    """
    (folder / FOLDER).mkdir(mode=0o700, parents=True, exist_ok=True)
    paths = {name: f"{FOLDER}/{name}.safetensors" for name in _names(storage, claim)}

    def here(name: str) -> bool:
        return going_on() and _fetch_one(storage, claim, name, folder / paths[name])

    with ThreadPoolExecutor(FETCHES_AT_ONCE, thread_name_prefix="fetch") as pool:
        return {name: paths[name] for name, found in zip(paths, pool.map(here, paths), strict=True) if found}


def _names(storage: ObjectStorage, claim: Claim) -> Iterator[str]:
    """The newest assets, as many as there is room for."""
    prefix = object_keys.assets_prefix(claim.tenant_id, claim.checkpoint_id)
    room = FETCHED_BYTES
    for key, size in storage.newest(prefix):
        name = key.removeprefix(prefix).removesuffix(".safetensors")
        if size <= room and NAME.fullmatch(name) and key.endswith(".safetensors"):
            room -= size
            yield name


def _fetch_one(storage: ObjectStorage, claim: Claim, name: str, path: Path) -> bool:
    key = object_keys.asset(claim.tenant_id, claim.checkpoint_id, name)
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
    logger.warning("%s attempt %d: an asset of its checkpoint is left out (%s)", claim.job_id, claim.attempt, why)
    return False
