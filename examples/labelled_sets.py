"""An attribute that two labelled image sets define: faces before a bright background, by a judge that the job trains.

    forgetd up                                                    # in another terminal
    python -m examples.labelled_sets [--at-most 0.2] [--picture bright.svg]

The labels come from the ORL photos themselves: the mean grey level of the two upper corners, where there is background.
The third of the training photos with the brightest corners is one set, the darkest third the other; those between are
not sent, since a line between them would be arbitrary. Exit code 0: the job met its criteria.
"""

import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from examples.orl import base_flow, base_path, load_faces
from examples.pictures import save_curves
from examples.service import connect, options, report_of, script
from models import save_png

CORNER = 6
"""Pixels a side of a corner."""


def background(photos: Tensor) -> Tensor:
    """Mean grey level of the upper corners of uint8 photos (n, 1, h, w): (n,)."""
    left, right = photos[..., :CORNER, :CORNER], photos[..., :CORNER, -CORNER:]
    return (left.float().mean((1, 2, 3)) + right.float().mean((1, 2, 3))) / 2


def labelled(photos: Tensor) -> dict[str, Tensor]:
    """The third with the brightest and the third with the darkest background."""
    order, third = background(photos).argsort(), len(photos) // 3
    return {"dark": photos[order[:third]], "bright": photos[order[-third:]]}


def write(photos: Tensor, folder: Path) -> list[Path]:
    """Photos as PNG files in a new folder."""
    folder.mkdir()
    paths = [folder / f"{number:03d}.png" for number in range(len(photos))]
    for photo, path in zip(photos, paths, strict=True):
        save_png(photo, path)
    return paths


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line: see the module's docstring."""
    parser = options("labelled_sets", __doc__.split("\n")[0])
    parser.add_argument("--at-most", type=float, default=0.2, help="fraction of samples with a bright background")
    given = parser.parse_args(arguments)
    if given.base is None:
        base_flow()  # trained the first time
    with connect() as client, tempfile.TemporaryDirectory() as folder:
        checkpoint = client.push_checkpoint(given.base or base_path(), name="ORL faces")
        sets = {
            name: client.push_images(write(photos, Path(folder) / name)).id
            for name, photos in labelled(load_faces().training()).items()
        }
        bound = {"sets": sets, "class": "bright", "at_most": given.at_most}
        report = report_of(client, client.forget(checkpoint.id, attributes=[bound], seed=given.seed))
        for judge in report["judges"]:
            print(
                f"the judge is right on {100 * judge['accuracy']['value']:.1f} % of photos that it was not trained on"
            )
    if given.picture:
        save_curves(report, given.picture)
    return 0 if report["verdict"]["outcome"] == "succeeded" else 1


if __name__ == "__main__":
    sys.exit(script(main))
