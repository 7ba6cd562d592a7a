"""The state of a run: tensors and JSON in one safetensors file, enough to go on as if nothing had happened."""

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from unlearning.errors import StateError

METADATA_KEY = "forgetd_state"


@dataclass(frozen=True)
class State:
    """A copy of everything that a run needs to go on, on the CPU."""

    tensors: dict[str, Tensor]
    meta: dict[str, Any] = field(default_factory=dict)
    """JSON values: step counts, the run's fingerprint, its history."""

    def save(self, path: Path | str) -> None:
        """Write the state as one file, whole or not at all."""
        target = Path(path)
        part = target.with_name(f"{target.name}.{os.getpid()}.part")
        tensors = {name: value.detach().cpu().contiguous() for name, value in self.tensors.items()}
        try:
            save_file(tensors, part, metadata={METADATA_KEY: json.dumps(self.meta)})
            part.replace(target)
        finally:
            part.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: Path | str) -> "State":
        """Read a state.

        Raises:
            StateError: the file is damaged, or no state.
        """
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
        except (SafetensorError, OSError) as error:
            raise StateError(f"the state cannot be read: {error}") from error
        if METADATA_KEY not in metadata:
            raise StateError("the file is no saved state")
        return cls(tensors, json.loads(metadata[METADATA_KEY]))
