"""What the examples train once and keep: in which file, which is named after all that it depends on."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from examples.orl import default_cache
from models.checkpoints import load_checkpoint
from models.errors import ModelError

__all__ = ["cached", "kept_checkpoint", "kept_weights", "opened"]

M = TypeVar("M", bound=nn.Module)


def cached(name: str, facts: list[Any], cache_dir: Path | None) -> Path:
    """Where what these facts make is kept; other facts have another file."""
    key = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:12]
    return (cache_dir or default_cache()) / f"{name}-{key}.safetensors"


def kept_weights(path: Path, train: Callable[[], nn.Module]) -> dict[str, Tensor]:
    """The weights in this file, or those of what is trained now and then kept there."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(".part")
        save_file(train().state_dict(), part)
        part.replace(path)
    return load_file(path)


def kept_checkpoint(path: Path, kind: type[M], save: Callable[[Path], object]) -> M:
    """The model in this checkpoint, which `save` writes where there is none.

    Raises:
        ModelError: it holds another kind of model.
    """
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        save(path)
    return opened(path, kind)


def opened(path: Path, kind: type[M]) -> M:
    """The model in this checkpoint, of this kind.

    Raises:
        ModelError: it is of another.
    """
    model = load_checkpoint(path)
    if not isinstance(model, kind):
        raise ModelError(f"{path} holds no {kind.__name__}; delete it and run again")
    return model
