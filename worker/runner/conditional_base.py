"""The conditional model that a job starts from: loaded, tried before any work is done, and what is drawn from it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from evidence.amnesia_evaluation import labels_in_turn, samples_of
from evidence.likelihood import derive_seed
from models.checkpoints import Manifest, load_conditional, read_manifest
from models.conditional import (
    CheckpointedConditional,
    ClassConditional,
    ConditionalModel,
    GuidedConditional,
    LabelledSampler,
    PromptConditional,
    Sampling,
)
from models.errors import ArchitectureError, ModelError
from unlearning import Examples, Noise, Pool
from worker.runner.base import Origin, exact_device, micro_batch_of
from worker.runner.conditions import Conditions, classes_of, concepts_of, picked
from worker.runner.problems import UserError

__all__ = ["ConditionalBase", "check_losses", "load_conditional_base"]

SAMPLING = {"steps": "sampling_steps", "guidance_scale": "guidance_scale"}
"""Fields of `models.conditional.Sampling` by the parameters that set them."""
LOOKED_AT = 64
"""Samples whose loss is asked for before the work."""
LOOKED_AT_SLOW = 8
"""Likewise, of a model that draws by many steps."""


@dataclass(frozen=True)
class ConditionalBase(Origin):
    """The base of a job that changes a conditional model."""

    checkpointed: CheckpointedConditional
    weights: str
    """`models.checkpoints.tensor_digest` of them."""
    conditions: Conditions
    """What the job's labels stand for."""
    sampling: Sampling | None
    """How the checkpoint draws, if not asked otherwise; None: it has no way to choose."""
    recompute: bool = False
    """Whether the job asks for activations to be computed twice: less memory for more time."""
    divisor: int = 1
    """How many times fewer rows a pass takes than at first, since an attempt ran out of memory."""

    @property
    def model(self) -> ConditionalModel:
        """As methods take it."""
        return cast(ConditionalModel, self.checkpointed)

    @property
    def sampler(self) -> LabelledSampler:
        """As judges ask it, by label."""
        return self.conditions.sampler(self.model)

    @property
    def labels(self) -> range:
        """All of the job's."""
        return range(len(self.conditions.names))

    @contextmanager
    def drawing_as_stored(self, model: object) -> Iterator[None]:
        """A changed model draws here as its checkpoint does, and not as this job asked: so it is written."""
        asked = self.model.sampling if isinstance(self.model, GuidedConditional) else None
        if not isinstance(model, GuidedConditional) or self.sampling is None or asked is None:
            yield
            return
        model.sampling = self.sampling
        try:
            yield
        finally:
            model.sampling = asked

    def encoded(self, images: Tensor, seed: int) -> Tensor:
        """What the loss takes of images (n, c, h, w) uint8, on the CPU; `seed` where the encoding is random."""
        generator = torch.Generator().manual_seed(derive_seed(seed, "encode"))
        with torch.no_grad():
            return self.checkpointed.encode(images, generator=generator).cpu()

    def drawn(self, labels: Tensor, seed: int) -> Examples:
        """Samples of the model under labels (n,), as examples for its loss."""
        rows = [self.conditions.trained(label) for label in self.labels]
        condition = picked(rows, labels, torch.Generator().manual_seed(derive_seed(seed, "phrasings")))
        if isinstance(self.model, GuidedConditional):  # what it draws is what its loss takes
            with torch.no_grad():
                generator = torch.Generator().manual_seed(seed)
                return Examples(self.model.generate(condition, generator=generator).cpu(), condition)
        return Examples(self.encoded(samples_of(self.sampler, labels, seed=seed), seed), condition)

    def noise(self, n: int) -> Noise | Pool:
        """Uniform noise over the range of what the loss takes, as black and white images show it.

        A latent diffusion model's loss takes no pixels, and uniform latents are no picture: n noisy images stand in.
        """
        if isinstance(self.model, PromptConditional):
            generator = torch.Generator().manual_seed(derive_seed(0, "noise"))
            images = torch.randint(256, (n, *self.image_shape), generator=generator).to(torch.uint8)
            return Pool(self.encoded(images, 0))
        black = torch.zeros(1, *self.image_shape, dtype=torch.uint8)
        ends = self.encoded(torch.cat([black, black + 255]), 0)
        return Noise(tuple(ends.shape[1:]), float(ends.min()), float(ends.max()))


def load_conditional_base(job: Mapping[str, Any], folder: Path) -> ConditionalBase:
    """The job's checkpoint, on the accelerator where there is one.

    Raises:
        UserError: the file cannot be used, or holds no model of classes.
    """
    device, path = exact_device(), folder / job["inputs"]["checkpoint"]
    try:
        model, manifest = load_conditional(path, device), read_manifest(path)
    except ModelError as error:
        raise _refused(str(error)) from error
    sampling = model.sampling if isinstance(model, GuidedConditional) else None
    _set_sampling(job, model)
    return ConditionalBase(
        model,
        path,
        device,
        micro_batch_of(job, getattr(model, "latent_shape", model.image_shape)),  # of what passes through the network
        manifest.tensor_digest,
        _conditions(job, model, manifest),
        sampling,
        recompute=bool(job["parameters"].get("gradient_checkpointing")),
        divisor=int(job.get("micro_batch_divisor", 1)),
    )


def _conditions(job: Mapping[str, Any], model: CheckpointedConditional, manifest: Manifest) -> Conditions:
    if isinstance(model, PromptConditional):
        return concepts_of(job, model)
    if not isinstance(model, ClassConditional):
        raise _refused(f"The conditions of a model of family {manifest.family!r} are neither classes nor prompts.")
    if model.n_classes < 2:
        raise _refused("The model has one class: without it, nothing is left to remember.")
    return classes_of(model)


def _set_sampling(job: Mapping[str, Any], model: CheckpointedConditional) -> None:
    """Let a diffusion model draw as the job asks: for its examples, for its judges, and for its grid."""
    given = {name: job["parameters"].get(ours) for name, ours in SAMPLING.items()}
    given = {name: value for name, value in given.items() if value is not None}
    if not isinstance(model, GuidedConditional):
        if given:
            raise UserError(
                "invalid-parameter",
                "A parameter of the method is wrong",
                f"A model of family {model.family!r} draws in one step and without guidance; leave it out.",
                pointer=f"/parameters/{SAMPLING[next(iter(given))]}",
            )
        return
    try:
        model.sampling = replace(model.sampling, **given)
    except ArchitectureError as error:
        raise UserError(
            "invalid-parameter", "A parameter of the method is wrong", f"{error}.", pointer="/parameters"
        ) from error


def check_losses(base: ConditionalBase, seed: int) -> None:
    """Ask the model for the loss of a few of its own samples: one that gives no number can learn nothing.

    Raises:
        UserError: it gives none, or cannot be sampled.
    """
    seed = derive_seed(seed, "losses")
    try:
        count = LOOKED_AT_SLOW if isinstance(base.model, GuidedConditional) else LOOKED_AT
        own = base.drawn(labels_in_turn(base.labels, count), seed)
        draws = base.model.draw(len(own), generator=torch.Generator().manual_seed(seed))
        with torch.no_grad():
            found = base.model.losses(
                own.x.to(base.device), own.condition.to(base.device), tuple(one.to(base.device) for one in draws)
            )
    except ModelError as error:
        raise _refused(f"The model cannot be sampled: {error}.") from error
    odd = int((~found.isfinite()).sum())
    if odd:
        raise _refused(
            f"The loss of {odd} of {len(own)} of the model's own samples is not finite. Use an earlier checkpoint, or "
            "train it again with a smaller learning rate."
        )


def _refused(detail: str) -> UserError:
    return UserError("checkpoint-refused", "The checkpoint cannot be used", detail, pointer="/checkpoint")
