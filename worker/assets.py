"""What a job learned of its checkpoint, such as a Fisher information: kept beside it, and there for the next job.

What it worked out and may not leave to others, or has not finished, is kept until the job ends, so that it survives a
worker. Neither needs a fence. A stale attempt that writes late does no harm: what the runner reads has to say of itself
that it is what is looked for (its name is a digest of all that it depends on, and it holds the digests of its content
and of what it was made from), so that the worst is an older state of the same work; and what lands behind a job's end
is erased by the attempt that wrote it or, should that be gone, by the next sweep (``worker.janitor``).
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

from services import leases, object_keys
from services.database import Database
from services.jobs import TERMINAL
from services.leases import Claim
from services.logs import inheriting
from services.storage import ObjectStorage, Stopped, StoredObject, file_sha256
from worker import publication
from worker.patience import GaveUp, Headway, patiently, store_away
from worker.process import Malformed

__all__ = ["Asset", "AssetKeeper", "fetch", "offered"]

logger = logging.getLogger(__name__)

NAME = re.compile(r"[a-z0-9-]{1,120}")
OWN_PATH = re.compile(r"assets/([a-z0-9-]{1,120})\.[0-9]{1,9}\.safetensors")
FOLDER = "inputs/fisher"
PARTIAL = "partial-"  # begins the name of one of the job's own that is a beginning
FETCHED_BYTES = 16 * 2**30  # of what is finished, the newest first; F of all of an SDXL's U-Net is 9.6 GiB
PARTIAL_BYTES = 12 * 2**30  # of beginnings, beside it: of one part of F, and of samples, which take less than one
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

    Once the worker is leaving, what nobody else will work out goes first: the job's own before the checkpoint's, the
    rest of a file that is on its way included, and one that is overtaken then is given up. Before that neither: what
    takes longer to upload than until it is saved again would never be there, nor would what waits behind it.

    Args:
        database: asked whether the job has ended, where something lands after the attempt has.
        storage: where to.
        claim: whose.
        going_on: whether the attempt may still save.
        leaving: whether the worker is.
    """

    def __init__(
        self,
        database: Database,
        storage: ObjectStorage,
        claim: Claim,
        *,
        going_on: Callable[[], bool],
        leaving: Callable[[], bool],
    ) -> None:
        self._database, self._storage, self._claim = database, storage, claim
        self._going_on, self._leaving = going_on, leaving
        self._waiting: list[Asset] = []
        self._busy = self._closed = False
        self._changed = threading.Condition()
        self._left = threading.Event()
        self._thread = threading.Thread(target=inheriting(self._work), name=f"assets-{claim.job_id}", daemon=True)

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
        while True:
            with self._changed:
                self._busy = False
                self._changed.notify_all()
                self._changed.wait_for(lambda: self._waiting or self._closed)
                if not self._waiting:
                    return
                self._busy = True
                asset = (self._leaving() and self._take_own()) or self._waiting.pop(0)
            self._keep(asset)

    def _take_own(self) -> Asset | None:
        """The first of the job's own that waits, which then waits no more."""
        with self._changed:
            asset = next((one for one in self._waiting if one.own), None)
            if asset is not None:
                self._waiting.remove(asset)
            return asset

    def _own_first(self) -> None:
        """Between two parts of a file that can wait, or be given up where the worker has to go.

        Raises:
            GaveUp: it has to.
        """
        if self._left.is_set() or (self._leaving() and not self._going_on()):
            raise GaveUp
        while self._leaving() and (asset := self._take_own()) is not None:
            self._keep(asset)

    def _keep(self, asset: Asset) -> None:
        try:
            if self._worth_waiting(asset):
                self._save(asset)
        except FileExistsError:
            return  # another job was first
        except (GaveUp, Stopped):
            if not self._overtaken(asset):
                logger.warning("%s attempt %d: an asset was not kept", *self._name())
        except Exception:
            logger.exception("%s attempt %d: an asset was not kept", *self._name())
        finally:
            if asset.own:
                asset.path.unlink(missing_ok=True)

    def _save(self, asset: Asset) -> None:
        try:
            stored = patiently(
                lambda: self._put(asset),
                away=store_away,
                going_on=lambda: self._worth_waiting(asset),
                what=f"{self._claim.job_id}: asset upload",
            )
        finally:
            if asset.own and not self._may_save() and self._job_ended():
                self._storage.erase(self._key(asset))  # the sweep of the job's states may have been before it
        logger.info("%s attempt %d: kept %s, %d bytes", *self._name(), asset.name, stored.bytes)

    def _put(self, asset: Asset) -> StoredObject:
        if asset.own:
            return self._storage.put_file(self._key(asset), asset.path, going_on=lambda: self._worth_sending(asset))
        return self._storage.put_file_once(self._key(asset), asset.path, self._own_first)

    def _key(self, asset: Asset) -> str:
        if asset.own:
            return object_keys.own(self._claim.tenant_id, self._claim.job_id, asset.name)
        return object_keys.asset(self._claim.tenant_id, self._claim.checkpoint_id, asset.name)

    def _worth_sending(self, asset: Asset) -> bool:
        """What is on its way to the store goes on: until the attempt may not save, or something newer is in a hurry."""
        return self._may_save() and not (self._leaving() and self._overtaken(asset))

    def _worth_waiting(self, asset: Asset) -> bool:
        """What is not may as well be replaced by something newer."""
        return self._may_save() and not self._overtaken(asset)

    def _overtaken(self, asset: Asset) -> bool:
        with self._changed:
            return asset.own and any(one.own and one.name == asset.name for one in self._waiting)

    def _may_save(self) -> bool:
        return self._going_on() and not self._left.is_set()

    def _job_ended(self) -> bool:
        """Whether no attempt will follow, of which this may be the newest work."""
        with self._database.transaction() as session:
            now = leases.standing(session, self._claim.job_id)
        return now is None or now.status in TERMINAL

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


def fetch(
    storage: ObjectStorage,
    claim: Claim,
    folder: Path,
    *,
    going_on: Callable[[], bool],
    headway: Headway | None = None,
    refused_too: bool = False,
) -> dict[str, str]:
    """Fetch what earlier attempts at a job left, and the newest assets of its checkpoint, each checked.

    One that cannot be had is left out. A damaged one of the checkpoint is erased too, so that it can be written anew;
    one of the job's own may just have been replaced while it was read, and will be in any case. Safe to repeat. Errors
    of a store that is away rise (``worker.patience.store_away``), and ``Stopped`` in the middle of one, and no others.
    With ``refused_too`` the former do not rise either: what they are about is left out.

    Returns:
        Their paths in the folder, by name.
    """
    (folder / FOLDER).mkdir(mode=0o700, parents=True, exist_ok=True)
    headway = headway or Headway()
    try:
        found = _found(storage, claim)
    except Exception as error:
        if not (refused_too and store_away(error)):
            raise
        logger.warning("%s attempt %d: no assets (%s)", claim.job_id, claim.attempt, type(error).__name__)
        return {}
    paths = {name: f"{FOLDER}/{name}.safetensors" for name in found}

    def here(name: str) -> bool:
        if not going_on():
            return False
        try:
            return _fetch_one(storage, claim, found[name], folder / paths[name], going_on, headway.along(name))
        except Exception as error:
            if not (refused_too and store_away(error)):
                raise
            return _left_out(claim, type(error).__name__)

    with ThreadPoolExecutor(FETCHES_AT_ONCE, thread_name_prefix="fetch") as pool:
        return {
            name: paths[name] for name, is_here in zip(paths, pool.map(inheriting(here), paths), strict=True) if is_here
        }


@dataclass(frozen=True)
class _Found:
    """An asset in the store."""

    key: str
    own: bool


def _found(storage: ObjectStorage, claim: Claim) -> dict[str, _Found]:
    """By name, as many as there is room for: first what is this job's own, then the newest of its checkpoint.

    Beginnings have room of their own. Some are of what has been finished since, and are not to keep that out; nor is
    what other jobs left to keep out the one that this job goes on from.
    """
    room, found = {True: PARTIAL_BYTES, False: FETCHED_BYTES}, dict[str, _Found]()
    for prefix, own in (
        (object_keys.own_prefix(claim.tenant_id, claim.job_id), True),
        (object_keys.assets_prefix(claim.tenant_id, claim.checkpoint_id), False),
    ):
        for key, size in storage.newest(prefix):
            name = key.removeprefix(prefix).removesuffix(".safetensors")
            partial = own and name.startswith(PARTIAL)
            if size <= room[partial] and NAME.fullmatch(name) and name not in found and key.endswith(".safetensors"):
                room[partial] -= size
                found[name] = _Found(key, own)
    return found


def _fetch_one(
    storage: ObjectStorage,
    claim: Claim,
    asset: _Found,
    path: Path,
    going_on: Callable[[], bool],
    arrived: Callable[[int], None],
) -> bool:
    why = "damaged"
    try:
        if storage.fetch(asset.key, path, going_on=going_on, arrived=arrived) == file_sha256(path):
            return True
        path.unlink()
        if not asset.own:
            storage.erase(asset.key)
    except Exception as error:
        if store_away(error) or isinstance(error, Stopped):
            raise
        path.unlink(missing_ok=True)
        why = type(error).__name__
    return _left_out(claim, why)


def _left_out(claim: Claim, why: str) -> bool:
    logger.warning("%s attempt %d: an asset is left out (%s)", claim.job_id, claim.attempt, why)
    return False
