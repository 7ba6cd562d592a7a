"""Models that show what a test says, and the judge that reads it off."""

from dataclasses import dataclass

import torch

SHAPE = (1, 6, 6)
CLASSES = ("a", "b", "c", "nothing")


@dataclass
class Painter:
    """Paints pictures whose brightness names the class that is shown: its own, or another for a share of the latents.

    Class k has level 60 k, nothing has 180.
    """

    instead: dict[int, tuple[int, float]]
    """By condition: what is shown in its place, and in which share of samples."""
    n_classes: int = 3

    def sample(self, condition, *, generator):
        latent = torch.rand(len(condition), generator=generator)
        shown = condition.clone()
        for label, (other, share) in self.instead.items():
            shown[(condition == label) & (latent < share)] = other
        noise = 4 * torch.randn(len(condition), *SHAPE, generator=generator)
        return (60 * shown[:, None, None, None] + 10 + noise).clamp(0, 255).to(torch.uint8)


class Levels:
    """The judge that reads it off, 90 % sure of what it says and undecided between the rest."""

    name, classes, threshold = "levels", CLASSES, 0.5

    def __call__(self, images):
        return self.probabilities(images).argmax(1)

    def probabilities(self, images):
        found = ((images.float().mean((1, 2, 3)) - 10) / 60).round().long().clamp(0, 3)
        answers = torch.full((len(images), 4), 0.1 / 3, dtype=torch.float64)
        answers[torch.arange(len(images)), found] = 0.9
        return answers
