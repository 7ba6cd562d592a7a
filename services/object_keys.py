"""Every key in the object store is built here, from identifiers alone, never from a caller's text."""

from __future__ import annotations

__all__ = [
    "asset",
    "assets_prefix",
    "attempt_prefix",
    "checkpoint_prefix",
    "checkpoint_source",
    "checkpoints_prefix",
    "classifier",
    "classifier_prefix",
    "image",
    "image_set_prefix",
    "is_source",
    "job_prefix",
    "own",
    "own_prefix",
    "state",
    "states_prefix",
    "tenant_prefix",
    "upload_record",
]


def tenant_prefix(tenant_id: str) -> str:
    return f"tenants/{tenant_id}/"


def checkpoints_prefix(tenant_id: str) -> str:
    return f"{tenant_prefix(tenant_id)}checkpoints/"


def checkpoint_prefix(tenant_id: str, checkpoint_id: str) -> str:
    return f"{checkpoints_prefix(tenant_id)}{checkpoint_id}/"


def checkpoint_source(tenant_id: str, checkpoint_id: str) -> str:
    """The file as uploaded; deleted once it has been converted."""
    return f"{checkpoint_prefix(tenant_id, checkpoint_id)}source"


def is_source(key: str) -> bool:
    """Whether ``checkpoint_source`` built this key, of those under ``checkpoints_prefix``."""
    return key.endswith("/source")


def upload_record(tenant_id: str, checkpoint_id: str) -> str:
    """What is known of an upload in parts; its key begins as the source's, so that it goes with that."""
    return f"{checkpoint_source(tenant_id, checkpoint_id)}.upload"


def assets_prefix(tenant_id: str, checkpoint_id: str) -> str:
    """What jobs learned of a checkpoint and later ones can use; it goes with the checkpoint."""
    return f"{checkpoint_prefix(tenant_id, checkpoint_id)}assets/"


def asset(tenant_id: str, checkpoint_id: str, name: str) -> str:
    """One of these; the runner names it, in the form that the supervisor lets pass."""
    return f"{assets_prefix(tenant_id, checkpoint_id)}{name}.safetensors"


def classifier_prefix(tenant_id: str, classifier_id: str) -> str:
    return f"{tenant_prefix(tenant_id)}classifiers/{classifier_id}/"


def classifier(tenant_id: str, classifier_id: str) -> str:
    """The ONNX file as uploaded."""
    return f"{classifier_prefix(tenant_id, classifier_id)}model.onnx"


def image_set_prefix(tenant_id: str, image_set_id: str) -> str:
    return f"{tenant_prefix(tenant_id)}image-sets/{image_set_id}/"


def image(tenant_id: str, image_set_id: str, index: int) -> str:
    """One image of a set, re-encoded as PNG."""
    return f"{image_set_prefix(tenant_id, image_set_id)}{index:06d}.png"


def job_prefix(tenant_id: str, job_id: str) -> str:
    return f"{tenant_prefix(tenant_id)}jobs/{job_id}/"


def attempt_prefix(tenant_id: str, job_id: str, token: int) -> str:
    """Where one attempt, and no other, writes its artifacts."""
    return f"{job_prefix(tenant_id, job_id)}attempts/{token}/"


def states_prefix(tenant_id: str, job_id: str) -> str:
    return f"{job_prefix(tenant_id, job_id)}state/"


def state(tenant_id: str, job_id: str, token: int, step: int) -> str:
    """A resumable state, written by the attempt that holds the token."""
    return f"{states_prefix(tenant_id, job_id)}{token}/{step:08d}.safetensors"


def own_prefix(tenant_id: str, job_id: str) -> str:
    """What a job works out before it trains, for its next attempt; among its states, it goes with them."""
    return f"{states_prefix(tenant_id, job_id)}own/"


def own(tenant_id: str, job_id: str, name: str) -> str:
    """One of these, the newest of its name; the runner names it, in the form that the supervisor lets pass."""
    return f"{own_prefix(tenant_id, job_id)}{name}.safetensors"
