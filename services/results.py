"""What a finished job hands out: its published artifacts, and the rule that withholds weights."""

from __future__ import annotations

from typing import Any

from services.errors import NotFound, ResultNotAvailable, ResultWithheld
from services.lookups import JobView
from services.tables import Job

__all__ = ["REPORT_HTML", "REPORT_JSON", "TAMED", "artifact", "is_weights", "key", "published", "weights"]

TAMED = "tamed.safetensors"
WEIGHTS = (".safetensors", ".tar")  # TAMED, and what other programs open, such as a diffusers folder: pipeline.tar
REPORT_JSON = "report.json"
REPORT_HTML = "report.html"


def is_weights(name: str) -> bool:
    """Whether an artifact of that name is what a missed criterion withholds."""
    return name.endswith(WEIGHTS)


def weights_released(job: Job | JobView) -> bool:
    """Whether the weights may leave: the criteria were met, or the job said that they may anyway."""
    return job.status == "succeeded" or job.request.get("criteria", {}).get("release_weights") == "always"


def published(job: Job | JobView) -> list[dict[str, Any]]:
    """The artifacts of a job that its owner may have: ``[{name, media_type, bytes, sha256}]``, empty before its end."""
    return [item for item in job.artifacts or [] if not is_weights(item["name"]) or weights_released(job)]


def artifact(job: Job, name: str) -> dict[str, Any]:
    """One published artifact.

    Raises:
        NotFound: the job published nothing of that name.
        ResultNotAvailable: it has not ended, or ended without results.
        ResultWithheld: these are weights of a run that missed its criteria.
    """
    if job.finished_at is None:
        raise ResultNotAvailable(
            f"Job {job.id} is {job.status}; wait for its end: GET /jobs/{job.id}?wait=30.", state=job.status
        )
    if not job.artifacts:
        raise ResultNotAvailable(f"Job {job.id} is {job.status} and published nothing.", state=job.status)
    if is_weights(name) and not weights_released(job):
        raise ResultWithheld(
            "Read the report; submit again with other parameters, or with criteria.release_weights set to always.",
            state=job.status,
        )
    for item in job.artifacts:
        if item["name"] == name:
            return item
    raise NotFound(f"Job {job.id} published nothing of that name; see GET /jobs/{job.id}/artifacts.")


def weights(job: Job) -> dict[str, Any]:
    """The tamed checkpoint as an artifact; raises as ``artifact`` does."""
    return artifact(job, TAMED)


def key(job: Job, item: dict[str, Any]) -> str:
    """Where a published artifact lies in the store."""
    return f"{job.published_prefix}{item['name']}"
