"""What a job starts from, and the flow that most do: loaded, asked for a likelihood first, fitted to the memory."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from evidence.likelihood import derive_seed
from evidence.steering_evaluation import sampled_images
from models.checkpoints import load_flow
from models.errors import ModelError
from models.images import flow_input
from models.protocol import Checkpointed, CheckpointedFlow, Flow
from unlearning import ParameterError
from worker.runner.problems import UserError

__all__ = [
    "NOT_THE_METHODS",
    "Base",
    "Origin",
    "check_likelihoods",
    "exact_device",
    "first_samples",
    "load_base",
    "micro_batch_of",
    "parameters_of",
]

NOT_THE_METHODS = ("fit", "micro_batch")  # parameters of the job that the method does not know
MICRO_BATCH_PIXELS = 2**17  # 128 images of 32 x 32, 8 of 128 x 128
LOOKED_AT = 8  # images whose likelihood is asked for before the work

P = TypeVar("P")


@dataclass(frozen=True)
class Origin:
    """What a job starts from, whatever kind of model it is."""

    checkpointed: Checkpointed
    path: Path
    device: torch.device
    micro_batch: int
    """Images that may pass through the model at once. No part of the method: a state resumes under any other."""

    @property
    def module(self) -> nn.Module:
        """As torch takes it."""
        return cast(nn.Module, self.checkpointed)

    @property
    def n_bits(self) -> int:
        """Colour depth of its images, in bits a channel."""
        return self.checkpointed.n_bits

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(channels, height, width)."""
        return self.checkpointed.image_shape


@dataclass(frozen=True)
class Base(Origin):
    """The base of a job that changes a flow."""

    checkpointed: CheckpointedFlow

    @property
    def flow(self) -> Flow:
        """As the methods and the judges take it."""
        return cast(Flow, self.checkpointed)


def load_base(job: Mapping[str, Any], folder: Path) -> Base:
    """The job's checkpoint, on the accelerator where there is one.

    Raises:
        UserError: the file cannot be used.
    """
    device = exact_device()
    path = folder / job["inputs"]["checkpoint"]
    try:
        flow = load_flow(path, device)
    except ModelError as error:
        raise UserError("checkpoint-refused", "The checkpoint cannot be used", str(error)) from error
    return Base(flow, path, device, micro_batch_of(job, flow.image_shape))


def exact_device() -> torch.device:
    """The accelerator where there is one: without TF32, since likelihoods are differences of large numbers."""
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def micro_batch_of(job: Mapping[str, Any], image_shape: tuple[int, int, int]) -> int:
    """Images that may pass through the model at once: the caller may bound it, an out-of-memory retry halves it."""
    limit = job["parameters"].get("micro_batch") or max(1, MICRO_BATCH_PIXELS // math.prod(image_shape[1:]))
    return max(1, int(limit) // int(job.get("micro_batch_divisor", 1)))


def parameters_of(job: Mapping[str, Any], build: Callable[[dict[str, Any]], P]) -> P:
    """The method's parameters as the job gives them.

    Raises:
        UserError: one is unknown, of the wrong type or out of range.
    """
    given = {name: value for name, value in job["parameters"].items() if name not in NOT_THE_METHODS}
    try:
        return build(given)
    except ParameterError as error:
        raise UserError(
            "invalid-parameter",
            "A parameter of the method is wrong",
            str(error),
            errors=[{"pointer": f"/parameters/{error.name}", "detail": error.message}],
        ) from error


def first_samples(base: Base, seed: int) -> Tensor:
    """A few samples of the flow, uint8 (n, c, h, w).

    Raises:
        UserError: the flow cannot be sampled.
    """
    try:
        count = min(LOOKED_AT, base.micro_batch)
        return sampled_images(base.flow, count, n_bits=base.n_bits, seed=derive_seed(seed, "first samples"))[0]
    except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]  # public, yet missing from its __all__
        raise UserError(
            "checkpoint-refused",
            "The checkpoint cannot be used",
            "The flow cannot be sampled: a 1x1 convolution is singular and has no inverse. Use an earlier checkpoint.",
            pointer="/checkpoint",
        ) from error


def check_likelihoods(base: Base, images: Tensor, seed: int) -> None:
    """Ask the flow for the likelihood of a few images: one whose log-determinant is NaN can learn nothing.

    An infinite value may be an image that the flow finds impossible; a flow that finds all of them so is refused too.

    Args:
        base: the flow.
        images: uint8 (n, c, h, w); the first few are looked at.
        seed: of their noise.

    Raises:
        UserError: the flow gives no number.
    """
    generator = torch.Generator().manual_seed(derive_seed(seed, "likelihoods"))
    looked_at = images[: min(LOOKED_AT, base.micro_batch)]
    with torch.no_grad():
        values = base.flow.log_prob(flow_input(base.flow, looked_at, base.n_bits, generator).to(base.device))
    nan = int(values.isnan().sum())
    if nan or not bool(values.isfinite().any()):
        what = f"NaN as the log-likelihood of {nan} of {len(values)}" if nan else "an infinite log-likelihood for all"
        raise UserError(
            "checkpoint-refused",
            "The checkpoint cannot be used",
            f"The flow gives {what} images that the job reads: its log-determinant leaves the range of float32, most "
            "often by a scale of zero or one that overflows. Use an earlier checkpoint, or train it again with a "
            "smaller learning rate.",
            pointer="/checkpoint",
        )
