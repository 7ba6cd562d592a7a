"""Training of a model on uint8 images, small, seeded, bounded by steps or by time.

A flow is trained by maximum likelihood, a conditional model by the bound of it or the loss that it offers.
"""

import contextlib
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, cast, runtime_checkable

import torch
from torch import Tensor, nn

from models.augmentation import augment, distort
from models.conditional import ClassConditional, Draws
from models.errors import ModelError
from models.images import flow_input
from models.protocol import Flow
from models.training_recipes import AutoencoderRecipe, TrainingRecipe, TransformerRecipe

__all__ = [
    "INITIAL_IMAGES",
    "MOST_SKIPPED",
    "UNLABELLED",
    "AutoencoderRecipe",
    "LabelledFlow",
    "Startable",
    "Training",
    "TrainingError",
    "TrainingProgress",
    "TrainingRecipe",
    "TransformerRecipe",
    "bits_per_dim",
    "fit_flow",
    "image_losses",
    "set_memory_format",
    "start",
]

UNLABELLED = -1
"""The label of an image whose class a conditional flow is not told."""
MOST_SKIPPED = 10
"""Steps running whose loss may be not finite before the training is given up."""
INITIAL_IMAGES = 256
"""Most images that a data-dependent start looks at."""


class TrainingError(ModelError):
    """A training cannot begin as asked, or its loss was lost: lower the learning rate."""


@dataclass(frozen=True)
class TrainingProgress:
    """One report of a running training."""

    step: int
    seconds: float
    total_seconds: float | None
    """The time budget, or an extrapolation from the steps done."""
    bits_per_dim: float
    """Running mean over the last reports' batches. Of a model without a likelihood: its loss over d log 2, in no unit
    that another family's could be held against."""
    loss: float
    """The same in nats an image, as the training minimises it."""


@runtime_checkable
class LabelledFlow(Protocol):
    """A flow of classes: its likelihood is asked for beside a label."""

    n_classes: int

    def log_prob(self, x: Tensor, label: Tensor | None = None) -> Tensor:
        """log p(x | label), (b,) nats; labels (b,), -1 where there is none."""
        ...


@runtime_checkable
class Startable(Protocol):
    """A flow with a data-dependent start."""

    def initialize(self, x: Tensor) -> None:
        """Set what depends on the data from a batch x, (b, c, h, w), of the flow's input."""
        ...


@runtime_checkable
class TwoParts(Protocol):
    """A conditional model whose loss is a reconstruction and a divergence, so that these can be weighted."""

    def parts(self, x: Tensor, condition: Tensor, draws: Draws) -> tuple[Tensor, Tensor]:
        """What `losses` adds up, (n,) nats each."""
        ...


class Training:
    """A training that can be left and taken up again between two steps: one `step` after the other, then `finish`.

    Args:
        flow: a module that is a `models.protocol.Flow`, started by the caller (see `start`), or a
            `models.conditional.ClassConditional`; trained in place.
        images: uint8 (n, c, h, w), on any device; batches go to the flow's device.
        recipe: how.
        n_bits: colour depth.
        generator: draws batches, augmentation, noise and dropped labels; on the CPU.
        labels: the class of each image, (n,) from 0, for a flow of classes; a conditional model must have them.

    Raises:
        TrainingError: the flow is none, the recipe has no bound, or the labels do not fit or are missing.
    """

    def __init__(
        self,
        flow: nn.Module,
        images: Tensor,
        recipe: TrainingRecipe,
        *,
        n_bits: int,
        generator: torch.Generator,
        labels: Tensor | None = None,
    ) -> None:
        self._bounded = flow if isinstance(flow, ClassConditional) else None
        if self._bounded is None and not isinstance(flow, Flow):
            raise TrainingError(f"{type(flow).__name__} has no log_prob and sample; it is no flow")
        if self._bounded is not None and labels is None:
            raise TrainingError(f"{type(flow).__name__} is trained on images of classes; give the label of each")
        if recipe.steps is None and recipe.seconds is None:
            raise TrainingError("the recipe must bound steps or seconds")
        _check_labels(flow, labels, len(images))
        self._module, self._flow, self._images = flow, cast(Flow, flow), images
        self._labels = labels.cpu() if labels is not None else None
        self._recipe, self._n_bits, self._generator = recipe, n_bits, generator
        self._own = recipe if isinstance(recipe, TransformerRecipe) else None
        self._depth = 0 if self._bounded is not None else n_bits
        """What turns a density over [-0.5, 0.5) into the probability of a level; a bound is over levels already."""
        self._device = next(flow.parameters()).device
        self._parameters = dict(flow.named_parameters())
        self._optimiser = self._make_optimiser()
        self._mean = [p.detach().clone() for p in flow.parameters()] if recipe.average else []
        self._began, self._running, self._skipped = time.monotonic(), math.nan, 0
        self.steps = 0
        """Steps taken."""
        set_memory_format(flow.train(), torch.channels_last)  # convolutions run faster so

    def share(self) -> float:
        """How much of the training is done; 1 or more: all of it."""
        recipe = self._recipe
        return max(
            self.steps / recipe.steps if recipe.steps is not None else 0.0,
            self.elapsed() / recipe.seconds if recipe.seconds is not None else 0.0,
        )

    def step(self, share: float) -> None:
        """One optimiser step on a batch, at the learning rate of that share of the training."""
        recipe = self._recipe
        for group in self._optimiser.param_groups:
            cosine = 0.5 * (1 + math.cos(math.pi * share))
            decay = recipe.final_share + (1 - recipe.final_share) * cosine
            group["lr"] = recipe.learning_rate * min(1.0, (self.steps + 1) / recipe.warmup) * decay
        loss = self._loss(share)
        self._optimiser.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]  # torch does not annotate it
        norm = torch.nn.utils.clip_grad_norm_(self._module.parameters(), recipe.clip)
        self.steps += 1
        if not bool(torch.isfinite(norm)) or not bool(torch.isfinite(loss)):
            self._skipped += 1
            if self._skipped == MOST_SKIPPED:
                raise TrainingError(
                    f"the loss was not finite ten times running at step {self.steps}; lower the learning rate"
                )
            return
        self._skipped = 0
        self._optimiser.step()
        self._follow_mean()
        dims = math.prod(self._images.shape[1:])
        bits = float(loss.detach()) / (dims * math.log(2)) + self._depth
        self._running = bits if math.isnan(self._running) else 0.95 * self._running + 0.05 * bits

    def elapsed(self) -> float:
        """Seconds since the beginning, over all attempts of a resumed training."""
        return time.monotonic() - self._began

    def progress(self, share: float) -> TrainingProgress:
        """Where the training is, given the share at the last step's start."""
        elapsed = self.elapsed()
        total = self._recipe.seconds if self._recipe.seconds is not None else elapsed / max(share, 1e-6)
        nats = (self._running - self._depth) * math.prod(self._images.shape[1:]) * math.log(2)
        return TrainingProgress(self.steps, elapsed, total, self._running, nats)

    def finish(self) -> float:
        """Put the result's weights in place; returns the last running mean of the loss in bits per dimension."""
        if self._mean:
            with torch.no_grad():
                for kept, now in zip(self._mean, self._module.parameters(), strict=True):
                    now.copy_(kept)
        set_memory_format(self._module.eval(), torch.contiguous_format)
        return self._running

    def tensors(self) -> dict[str, Tensor]:
        """All that the next step depends on, on the CPU."""
        counters = [float(self.steps), self.elapsed(), self._running, float(self._skipped)]
        state = {"counters": torch.tensor(counters, dtype=torch.float64), "generator": self._generator.get_state()}
        for name, value in self._module.state_dict().items():
            state[f"flow/{name}"] = value
        for name, p in self._parameters.items():
            for kind, value in self._optimiser.state.get(p, {}).items():
                state[f"optimiser/{kind}/{name}"] = value
        for index, value in enumerate(self._mean):
            state[f"mean/{index}"] = value
        return {name: value.detach().cpu().contiguous() for name, value in state.items()}

    @torch.no_grad()
    def restore(self, tensors: dict[str, Tensor]) -> None:
        """The reverse of `tensors`, on a training that was built in the same way."""
        steps, elapsed, self._running, skipped = (float(value) for value in tensors["counters"])
        self.steps, self._skipped, self._began = int(steps), int(skipped), time.monotonic() - elapsed
        self._generator.set_state(tensors["generator"])
        for name, value in self._module.state_dict().items():
            value.copy_(tensors[f"flow/{name}"])
        for name, value in tensors.items():
            if name.startswith("optimiser/"):
                _, kind, owner = name.split("/", 2)
                p = self._parameters[owner]
                like = torch.zeros_like(p) if value.ndim else torch.zeros((), device=p.device)
                self._optimiser.state[p][kind] = like.copy_(value)
        for index, kept in enumerate(self._mean):
            kept.copy_(tensors[f"mean/{index}"])

    def _loss(self, share: float) -> Tensor:
        """Mean loss, in nats, of a batch that is drawn here."""
        recipe, generator = self._recipe, self._generator
        rows = torch.randint(len(self._images), (recipe.batch,), generator=generator)
        batch = augment(self._images[rows.to(self._images.device)], generator, flip=recipe.flip, shift=recipe.shift)
        own = recipe if isinstance(recipe, AutoencoderRecipe) else None
        if own is not None and own.distorted:
            batch = distort(
                batch, generator, turn=own.turn, zoom=own.zoom, shear=own.shear, move=own.move, share=own.distorted
            )
        if self._bounded is not None and self._labels is not None:
            x = self._bounded.encode(batch.to(self._device), generator=generator)
            draws = tuple(part.to(self._device) for part in self._bounded.draw(len(x), generator=generator))
            labels = self._told(rows)
            if own is None or not isinstance(self._bounded, TwoParts):
                with self._precision():
                    return self._bounded.losses(x, labels, draws).mean()
            reconstruction, divergence = self._bounded.parts(x, labels, draws)
            return (reconstruction + own.kl(share) * divergence).mean()
        x = flow_input(self._flow, batch.cpu(), self._n_bits, generator).to(self._device)
        with self._precision():
            if self._labels is None:
                return -self._flow.log_prob(x).mean()
            return -cast(LabelledFlow, self._flow).log_prob(x, self._told(rows)).mean()

    def _told(self, rows: Tensor) -> Tensor:
        """The labels of a batch, on the model's device, but for the share that the recipe drops."""
        labels = cast(Tensor, self._labels)[rows]
        if self._own is not None and self._own.label_drop:
            dropped = torch.rand(len(labels), generator=self._generator) < self._own.label_drop
            labels = labels.masked_fill(dropped, UNLABELLED)
        return labels.to(self._device)

    def _precision(self) -> contextlib.AbstractContextManager[object]:
        able = self._device.type == "cuda" and torch.cuda.is_bf16_supported()
        if self._own is None or not self._own.bf16 or not able:
            return contextlib.nullcontext()
        return torch.autocast(self._device.type, dtype=torch.bfloat16)

    def _make_optimiser(self) -> torch.optim.Optimizer:
        parameters, rate = self._parameters.values(), self._recipe.learning_rate
        if self._own is None:
            return torch.optim.Adam(parameters, lr=rate, betas=(0.9, 0.99), fused=True)
        own = self._own
        return torch.optim.AdamW(parameters, lr=rate, betas=own.betas, weight_decay=own.weight_decay, fused=True)

    def _follow_mean(self) -> None:
        if not self._mean:
            return
        decay = min(self._recipe.average, (1 + self.steps) / (10 + self.steps))
        with torch.no_grad():
            for kept, now in zip(self._mean, self._module.parameters(), strict=True):
                kept.lerp_(now, 1 - decay)


def fit_flow(
    flow: nn.Module,
    images: Tensor,
    recipe: TrainingRecipe,
    *,
    n_bits: int,
    generator: torch.Generator,
    labels: Tensor | None = None,
    callback: Callable[[TrainingProgress], None] | None = None,
    report_every: int = 20,
) -> float:
    """Train in place; returns the last running mean of the loss in bits per dimension.

    Args:
        flow: a module that is a `models.protocol.Flow`, started by the caller (see `start`).
        images: uint8 (n, c, h, w), on any device; batches go to the flow's device.
        recipe: how.
        n_bits: colour depth.
        generator: draws batches, augmentation, noise and dropped labels; on the CPU.
        labels: the class of each image, (n,) from 0, for a flow of classes; a share of them is dropped if the recipe
            says so.
        callback: gets a report every `report_every` steps.
        report_every: in steps.

    Raises:
        TrainingError: the loss was not finite ten times running, the recipe has no bound, or the labels do not fit.
    """
    training = Training(flow, images, recipe, n_bits=n_bits, generator=generator, labels=labels)
    while (share := training.share()) < 1.0:
        training.step(share)
        if callback is not None and training.steps % report_every == 0:
            callback(training.progress(share))
    return training.finish()


def start(flow: nn.Module, images: Tensor, *, n_bits: int, generator: torch.Generator) -> None:
    """The data-dependent start of a flow that has one, on its input made of up to 256 uint8 images (n, c, h, w)."""
    if isinstance(flow, Startable):
        x = flow_input(flow, images[:INITIAL_IMAGES].cpu(), n_bits, generator)
        flow.initialize(x.to(next(flow.parameters()).device))


def set_memory_format(module: nn.Module, memory_format: torch.memory_format) -> None:
    """Lay the module's four-dimensional parameters and buffers out anew, in place; values do not change."""
    for tensor in [*module.parameters(), *module.buffers()]:
        if tensor.ndim == 4:
            tensor.data = tensor.data.contiguous(memory_format=memory_format)


@torch.no_grad()
def bits_per_dim(
    flow: Flow, images: Tensor, *, n_bits: int, generator: torch.Generator, labels: Tensor | None = None,
    batch: int = 128,
) -> Tensor:  # fmt: skip
    """-log2 of the probability of each uint8 image (n, c, h, w), per dimension, on one noise draw: (n,), on the CPU.

    The density over [-0.5, 0.5) becomes a probability of the 2^n_bits levels by adding n_bits. For a flow over images
    with Gaussian noise it is the noisy image's density in the same unit: to compare two such flows, not with others.
    """
    dims = math.prod(images.shape[1:])
    parts = []
    for rows in torch.split(torch.arange(len(images)), batch):
        x = flow_input(flow, images[rows], n_bits, generator).to(_device_of(flow))
        if labels is None:
            log_prob = flow.log_prob(x)
        else:
            log_prob = cast(LabelledFlow, flow).log_prob(x, labels[rows].to(x.device))
        parts.append(-log_prob.cpu() / (dims * math.log(2)) + n_bits)
    return torch.cat(parts)


@torch.no_grad()
def image_losses(
    model: ClassConditional, images: Tensor, labels: Tensor, *, generator: torch.Generator, batch: int = 128
) -> Tensor:
    """A conditional model's loss of each uint8 image (n, c, h, w), on one draw: (n,), on the CPU.

    Of a VAE it is the negative ELBO in nats an image: a bound, and over intensities read as probabilities of white, so
    that it is not to be compared with a flow's bits per dimension.
    """
    device, draws = _device_of(model), model.draw(len(images), generator=generator)
    parts = []
    for rows in torch.split(torch.arange(len(images)), batch):
        x = model.encode(images[rows].to(device), generator=generator)
        parts.append(model.losses(x, labels[rows].to(device), tuple(one[rows].to(device) for one in draws)).cpu())
    return torch.cat(parts)


def _device_of(flow: object) -> torch.device:
    first = next(flow.parameters(), None) if isinstance(flow, nn.Module) else None
    return first.device if first is not None else torch.device("cpu")


def _check_labels(flow: nn.Module, labels: Tensor | None, count: int) -> None:
    if labels is None:
        return
    classes = int(getattr(flow, "n_classes", 0) or 0)
    if not classes:
        raise TrainingError(f"{type(flow).__name__} has no classes, so it takes no labels")
    if labels.shape != (count,) or labels.dtype != torch.int64:
        raise TrainingError(f"labels are one whole number (int64) an image, ({count},), not {tuple(labels.shape)}")
    if int(labels.min()) < 0 or int(labels.max()) >= classes:
        raise TrainingError(
            f"labels run from 0 to {classes - 1} for this flow, not {int(labels.min())} to {int(labels.max())}"
        )
