"""What conditional models of digits have in common: how one is trained, kept, and described by its command."""

import argparse
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar, cast

import torch
from torch import nn

from examples.cache import cached, kept_checkpoint, opened
from examples.digits import SEED, Digits
from models.checkpoints import Manifest, save_checkpoint
from models.conditional import ClassConditional
from models.training import TrainingProgress, fit_flow, image_losses
from models.training_recipes import TrainingRecipe

__all__ = ["DigitModel", "Loss", "Report"]

M = TypeVar("M", bound=nn.Module)
Report = Callable[[TrainingProgress], None]


@dataclass(frozen=True)
class Loss:
    """What training makes small, as the command and the checkpoint name it."""

    name: str
    places: int
    """After the point, where it is printed."""
    sentence: str
    """With a place for the value."""


@dataclass(frozen=True)
class DigitModel(Generic[M]):
    """A conditional model of digits: from a recipe and a fixed seed always the same one, in a file named after both."""

    name: str
    """Of its file; the module that has it is called the same, with underscores."""
    description: str
    """Of the command."""
    kind: type[M]
    shape: tuple[int, int, int]
    n_bits: int
    architecture: dict[str, Any]
    digits: Callable[[], Digits]
    facts: tuple[Any, ...]
    """What the file's name follows from beside architecture and recipe."""
    loss: Loss

    def trained(self, digits: Digits, recipe: TrainingRecipe, callback: Report | None = None) -> M:
        """Train it on these digits."""
        generator = torch.Generator().manual_seed(SEED)
        model = self.kind(self.shape, self.n_bits, generator=generator, **self.architecture)
        fit_flow(
            model, digits.training, recipe, n_bits=self.n_bits, generator=generator, labels=digits.training_labels,
            callback=callback,
        )  # fmt: skip
        return model

    def path(self, cache_dir: Path | None, recipe: TrainingRecipe) -> Path:
        """The file of what this recipe trains; another recipe has another name."""
        return cached(self.name, [self.architecture, asdict(recipe), *self.facts], cache_dir)

    def kept(self, cache_dir: Path | None, recipe: TrainingRecipe, callback: Report | None = None) -> M:
        """The trained model, from the cache or trained now (minutes) and kept there."""
        return kept_checkpoint(
            self.path(cache_dir, recipe), self.kind, lambda path: self.save(path, recipe, callback)
        )  # fmt: skip

    def save(self, path: Path, recipe: TrainingRecipe, callback: Report | None = None) -> Manifest:
        """Train it and write its checkpoint, with its loss on both parts of the data."""
        digits = self.digits()
        model = self.trained(digits, recipe, callback)
        generator, conditional = torch.Generator().manual_seed(SEED), cast(ClassConditional, model)
        figures = {
            f"{self.loss.name}_per_image_{name}": float(
                image_losses(conditional, images, labels, generator=generator).mean()
            )
            for name, images, labels in (
                ("training", digits.training, digits.training_labels),
                ("held_out", digits.held_out, digits.held_out_labels),
            )
        }
        return save_checkpoint(path, model, extra={"data": "MNIST digits", "recipe": asdict(recipe), **figures})

    def command(
        self, arguments: list[str] | None, recipe: TrainingRecipe, figures: Callable[[M], dict[str, Any]]
    ) -> int:
        """The command line that trains it, and prints its loss and further figures of it."""
        module = self.name.replace("-", "_")
        parser = argparse.ArgumentParser(prog=f"python -m examples.{module}", description=self.description)
        parser.add_argument("--out", type=Path, help="checkpoint to write (default: the cache)")
        parser.add_argument("--json", action="store_true", help="print progress as JSON lines")
        options = parser.parse_args(arguments)
        loss = self.loss

        def show(progress: TrainingProgress) -> None:
            value = round(progress.loss, loss.places)
            line = {"step": progress.step, "seconds": round(progress.seconds, 2), loss.name: value}
            print(json.dumps(line) if options.json else f"step {progress.step:5d}  {loss.sentence.format(value)}")

        path = options.out or self.path(None, recipe)
        path.parent.mkdir(parents=True, exist_ok=True)
        manifest = self.save(path, recipe, show)
        losses = {key: round(value, loss.places) for key, value in manifest.extra.items() if key.startswith(loss.name)}
        print(json.dumps({"path": str(path), **losses, **figures(opened(path, self.kind))}))
        return 0
