"""Kind ``import``: a foreign checkpoint becomes one of ours that a job can use, or is refused with a reason."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, cast

from models.checkpoints import load_checkpoint
from models.convert import convert
from models.errors import ModelError
from models.probe import probe
from models.protocol import Checkpointed
from worker.runner import sandbox
from worker.runner.contract import Reporter, Stop
from worker.runner.problems import UserError

__all__ = ["run"]

WEIGHTS = "outputs/weights.safetensors"


def run(job: dict[str, Any], folder: Path, reporter: Reporter, stop: Stop) -> None:
    """Convert ``inputs/source``, and probe what it became; the manifest reported carries the probe's ``warnings``.

    Raises:
        UserError: the file is refused, or the flow in it cannot be used.
    """
    source = folder / job["inputs"]["source"]
    declared, limits = job["declared"], job["limits"]
    sandbox.limit_resources(
        memory_bytes=limits["memory_bytes"], cpu_seconds=limits["cpu_seconds"], source_bytes=source.stat().st_size
    )
    with stop.at_once():
        try:
            manifest = convert(
                source,
                folder / WEIGHTS,
                image_size=declared.get("image_size"),
                n_bits=declared.get("n_bits"),
                family=declared.get("family"),
                noise_std=declared.get("noise_std"),
                prediction_type=declared.get("prediction_type"),
            )
            warnings = probe(cast(Checkpointed, load_checkpoint(folder / WEIGHTS)))
        except ModelError as error:
            raise _refused(str(error), kind=type(error).__name__) from error
        except sandbox.CpuTimeSpent as error:
            raise _refused(f"Reading it took more than {limits['cpu_seconds']} s of CPU time.") from error
        except (MemoryError, RuntimeError) as error:
            if isinstance(error, RuntimeError) and "memory" not in str(error):
                raise
            gib = limits["memory_bytes"] / 2**30
            raise _refused(f"Reading it took more than {gib:.1f} GiB of memory.") from error
        except OSError as error:
            if error.errno is None or "too large" not in (error.strerror or "").lower():
                raise
            raise _refused("What it unpacks to is far larger than the file.") from error
    reporter.result(
        "succeeded",
        [{"name": "weights.safetensors", "path": WEIGHTS, "media_type": "application/octet-stream"}],
        {"manifest": {**dataclasses.asdict(manifest), "warnings": warnings}},
    )


def _refused(detail: str, **members: Any) -> UserError:
    return UserError("checkpoint-refused", "The checkpoint was refused", detail, **members)
