"""From the runner's folder to the store: artifacts under the attempt's own prefix, then the manifest, once."""

from __future__ import annotations

import json
import re
import stat
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from services import object_keys, results
from services.leases import Claim
from services.storage import ObjectStorage
from worker.process import Malformed

__all__ = ["MANIFEST", "Artifact", "artifacts_of", "upload"]

MANIFEST = "manifest.json"
NAME = re.compile(r"[a-z0-9][a-z0-9_.-]{0,99}")
MEDIA_TYPE = re.compile(r"[a-z]+/[a-z0-9.+-]{1,80}(; ?charset=utf-8)?")


@dataclass(frozen=True)
class Artifact:
    """A file that the runner offers."""

    name: str
    path: Path
    media_type: str

    @property
    def is_weights(self) -> bool:
        """Whether it is what a failed criterion withholds."""
        return results.is_weights(self.name)


def artifacts_of(result: dict[str, Any], folder: Path) -> list[Artifact]:
    """The files of a result message. The runner read hostile files: nothing it names is followed out of its folder.

    Raises:
        Malformed: a name, path or media type is odd, or the file is not a plain file under ``outputs``.
    """
    offered = result.get("artifacts")
    if not isinstance(offered, list) or not isinstance(result.get("summary"), dict):
        raise Malformed("the result has no artifacts or no summary")
    artifacts = []
    for item in offered:
        name, path, media_type = (item.get(key) for key in ("name", "path", "media_type"))
        if not all(isinstance(value, str) for value in (name, path, media_type)):
            raise Malformed("an artifact is incomplete")
        if not NAME.fullmatch(name) or name == MANIFEST or not MEDIA_TYPE.fullmatch(media_type):
            raise Malformed("an artifact's name or media type is odd")
        if path != f"outputs/{Path(path).name}":
            raise Malformed("an artifact lies outside of outputs")
        artifacts.append(Artifact(name, plain_file(folder, path), media_type))
    if len({artifact.name for artifact in artifacts}) != len(artifacts):
        raise Malformed("two artifacts have the same name")
    return artifacts


def plain_file(folder: Path, path: str) -> Path:
    """A file of the runner's by its relative path, which must be a plain file in a plain folder."""
    found = folder / path
    try:
        modes = [entry.lstat().st_mode for entry in (found.parent, found)]
    except OSError as error:
        raise Malformed("a file that the runner named is not there") from error
    if not stat.S_ISDIR(modes[0]) or not stat.S_ISREG(modes[1]) or found.parent.parent != folder:
        raise Malformed("a file that the runner named is not a plain file of its folder")
    return found


def upload(
    storage: ObjectStorage, claim: Claim, artifacts: list[Artifact], going_on: Callable[[], bool]
) -> tuple[str, list[dict[str, Any]]]:
    """Write the artifacts, and the manifest last. Safe to repeat. Returns the prefix and the artifacts' rows.

    Raises:
        Stopped: ``going_on`` said no in the middle.
    """
    prefix = object_keys.attempt_prefix(claim.tenant_id, claim.job_id, claim.token)
    rows: list[dict[str, Any]] = []
    for artifact in artifacts:
        key = prefix + artifact.name
        stored = storage.put_file(key, artifact.path, media_type=artifact.media_type, going_on=going_on)
        rows.append(
            {
                "name": artifact.name,
                "media_type": artifact.media_type,
                "bytes": stored.bytes,
                "sha256": stored.sha256,
            }
        )
    manifest = {"job": claim.job_id, "attempt": claim.attempt, "token": claim.token, "artifacts": rows}
    body = json.dumps(manifest, indent=1, sort_keys=True).encode()
    try:
        storage.put(prefix + MANIFEST, body, media_type="application/json", only_if_absent=True)
    except FileExistsError:
        # Our own earlier try, whose answer was lost: the prefix carries the token, so nobody else writes here.
        if storage.read(prefix + MANIFEST) != body:
            raise
    return prefix, rows
