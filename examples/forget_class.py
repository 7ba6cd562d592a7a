"""Forget a class in two ways: at the prior, which takes access to it away, and in the weights, which unlearns it.

    forgetd up                                                    # in another terminal
    python -m examples.forget_class [--digit 3] [--picture removed.svg]

The flow is a class-prior flow of digits, trained the first time (some ten minutes) and kept. Each report also says how
often the digit is back once a prior is fitted to five images of it: all that undoing the first takes. Exit code 0: both
jobs met their criteria.
"""

import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from examples.digits import CLASSES, IMAGE_SIZE, SEED, load_digits
from examples.orl import default_cache
from examples.pictures import save_removal
from examples.service import connect, options, report_of, script
from models import save_checkpoint, save_png
from models.class_prior import ClassPriorFlow, HybridObjective
from models.training import TrainingProgress, TransformerRecipe, fit_flow

N_BITS = 8
ARCHITECTURE: dict[str, Any] = {"patch_size": 4, "width": 128, "n_block": 4, "head_width": 32, "noise_std": 0.1}
RECIPE = TransformerRecipe(steps=1500, batch=64, learning_rate=2e-3, flip=False, shift=1, label_drop=0.0)
PARAMETERS = {"delta": 3.0, "max_steps": 400}
"""Of the job in the weights."""
IMAGES = 128
"""Of the digit, sent with the job in the weights."""


def train(path: Path, recipe: TransformerRecipe = RECIPE) -> None:
    """Train the flow on the likelihood of the digits and, tempered, on telling them apart; write its checkpoint."""
    digits, generator = load_digits(), torch.Generator().manual_seed(SEED)
    shape = (1, IMAGE_SIZE, IMAGE_SIZE)
    flow = ClassPriorFlow(shape, N_BITS, n_classes=len(CLASSES), generator=generator, **ARCHITECTURE)

    def show(now: TrainingProgress) -> None:
        print(f"training: step {now.step} of {recipe.steps}", flush=True)

    objective = HybridObjective(flow, weight=1.0, temperature=10.0)
    labels = digits.training_labels
    fit_flow(objective, digits.training, recipe, n_bits=N_BITS, generator=generator, labels=labels, callback=show)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_checkpoint(path, flow, extra={"data": "MNIST digits"})


def images_of(digit: int, folder: Path) -> list[Path]:
    """Training images of a digit as PNG files."""
    digits = load_digits()
    paths = []
    for number, image in enumerate(digits.training[digits.training_labels == digit][:IMAGES]):
        paths.append(folder / f"{number:03d}.png")
        save_png(image, paths[-1])
    return paths


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line: see the module's docstring."""
    parser = options("forget_class", __doc__.split("\n")[0])
    parser.add_argument("--digit", type=int, default=3, choices=range(len(CLASSES)))
    given = parser.parse_args(arguments)
    base = given.base or default_cache() / "digit-class-prior-example.safetensors"
    if not base.exists():
        train(base)
    with connect() as client, tempfile.TemporaryDirectory() as folder:
        checkpoint = client.push_checkpoint(base, name="digits with classes")
        forget = {"class_label": given.digit, "seed": given.seed}
        at_prior = client.forget(checkpoint.id, where="prior", **forget)
        images = client.push_images(images_of(given.digit, Path(folder)))
        in_weights = client.forget(checkpoint.id, images.id, where="weights", parameters=PARAMETERS, **forget)
        reports = {}
        for name, job in (("at the prior: access removal", at_prior), ("in the weights: unlearning", in_weights)):
            print(f"\n{name}")
            reports[name] = report_of(client, job)
            back = reports[name]["relearn"]
            print(f"with a prior fitted to {back['images']} images of it: {100 * back['after']:.1f} % of samples")
    if given.picture:
        save_removal(reports, given.picture)
    return 0 if all(one["verdict"]["outcome"] == "succeeded" for one in reports.values()) else 1


if __name__ == "__main__":
    sys.exit(script(main))
