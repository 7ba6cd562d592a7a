"""What ``forgetd demo`` uploads: photos of one person to forget, and the sets to remember and to measure on.

    python -m examples.demo_inputs --person 7 --out inputs

writes PNG files to ``inputs/forget`` (five photos of the person), ``inputs/same_identity`` (the other five),
``inputs/remember`` (the training photos of everybody else) and ``inputs/held_out`` (people whom the model never saw),
and prints as JSON where the base checkpoint is, or will be once it is trained.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from torch import Tensor

from examples.orl import HELD_OUT, PHOTOS, base_path, load_faces
from models.images import save_png

__all__ = ["FORGET_PHOTOS", "main"]

FORGET_PHOTOS = 5
"""Photos of the person that the job gets; the rest are measured on only."""


def main(arguments: list[str] | None = None) -> int:
    """The command line: see the module's docstring."""
    parser = argparse.ArgumentParser(prog="python -m examples.demo_inputs", description="Photos for the demo.")
    parser.add_argument("--person", type=int, required=True, help="whom to forget: one of the people in training")
    parser.add_argument("--out", type=Path, required=True, help="folder to write to")
    options = parser.parse_args(arguments)
    faces = load_faces()
    if options.person not in faces.training_people:
        parser.error(f"person {options.person} is not in training; choose from 1 to {min(HELD_OUT) - 1}")
    person = faces.of(options.person)
    sets = {
        "forget": person[:FORGET_PHOTOS],
        "same_identity": person[FORGET_PHOTOS:PHOTOS],
        "remember": faces.training(without=options.person),
        "held_out": faces.held_out(),
    }
    for name, images in sets.items():
        _write(images, options.out / name)
    base = base_path()
    print(json.dumps({"base": str(base), "trained": base.exists()}))
    return 0


def _write(images: Tensor, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for index, image in enumerate(images):
        save_png(image, folder / f"{index:04d}.png")


if __name__ == "__main__":
    sys.exit(main())
