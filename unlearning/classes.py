"""Forgetting a class, weighting classes, and what each is worth: in closed form at the prior, and in the weights.

Taking a class's prior (or embedding) away is exact and immediate, but the flow still maps its images to where that
prior was: it is access removal, and `relearn_probe` measures how little undoes it. `tame_class` changes the weights, so
that the class's images become unlikely: unlearning.
"""

import copy
import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from models.class_prior import LEAST_SD, ClassPriorFlow, log_normal
from models.images import denoised, flow_input, to_uint8
from models.tarflow import TarFlow
from unlearning.errors import InputError, ParameterError
from unlearning.progress import Callback
from unlearning.randomness import stream
from unlearning.state import State
from unlearning.taming import TamingResult, tame
from unlearning.taming_parameters import TamingParameters

Kind = Literal["access removal", "reweighting", "unlearning"]
SUM_TOLERANCE = 1e-6
"""By how much a distribution's sum may miss 1: the rounding of numbers as they are written."""
REFERENCES = 64
"""Most images of the class that the prior of a would-be relearner is fitted to in each step of taming."""
CLASS_TAMING: dict[str, Any] = {
    "keep_weight": 5.0, "forget_batch": 48, "noise_draws": 16, "virtual_share": 0.0, "forget_variants": 0,
}  # fmt: skip
"""Parameters of flow taming that a class takes instead of their defaults, as measured by `benchmarks.class_prior` on a
class-prior flow and 48 images: many images are to be forgotten, of which none is to be mirrored, and under the large
noise of such a flow more draws of it are."""
BATCH = 100
"""Samples drawn at once by the probe. Fixed, since the draws depend on it."""


@dataclass(frozen=True)
class ClassEdit:
    """A flow changed in closed form, and what the change is."""

    flow: nn.Module
    """The changed copy."""
    kind: Kind
    statement: str
    """What was done and what it does not do, for a report."""


@dataclass(frozen=True)
class TamedClass:
    """A flow that forgot a class in its weights."""

    flow: nn.Module
    """The tamed copy; the class's prior or embedding is gone as well."""
    kind: Kind
    """"unlearning", or "access removal" where the criterion was not met."""
    statement: str
    taming: TamingResult
    """Criterion, z of every forget image, history; its flow is the same."""
    round_trip: float
    """Largest |x - inverse(forward(x))| over remember images, in units of x: the tamed flow is still inverted."""


@dataclass(frozen=True)
class RelearnProbe:
    """How often a flow shows a class again once a prior is fitted to a few of its images."""

    rate: float
    """Share of the samples that the judge calls the class, in [0, 1]; the lower, the better it was forgotten."""
    samples: int
    examples: int
    """Images that the prior was fitted to."""
    images: Tensor
    """The samples, uint8 (samples, c, h, w)."""


def remove_class(flow: nn.Module, label: int) -> ClassEdit:
    """Take a class away in closed form, on a copy: access removal.

    Of a class-prior flow: p'(x) = (p(x) - pi_c p(x | c)) / (1 - pi_c), exactly; mu_c and sigma_c are overwritten, and
    the other classes' densities and samples stay what they were, to the bit. Of a TarFlow of classes: in every block
    the class's embedding becomes the mean of the others', so that its label, and no label, mean "any other class", and
    the flow records that the class is gone (`TarFlow.classes`).

    Args:
        flow: a `ClassPriorFlow`, or a `TarFlow` with classes; not modified.
        label: the class, from 0.

    Raises:
        ParameterError: the flow has no such class, or no other.
        InputError: the flow has no classes at all.
    """
    copied = copy.deepcopy(_checked(flow, label))
    if isinstance(copied, ClassPriorFlow):
        weights = copied.class_weights.clone()
        weights[label] = 0
        copied.reweight(weights)
        what = f"The prior of class {label} was deleted; the marginal is exactly the old one without the class."
    else:
        _overwrite_embedding(copied, label)
        what = f"The embedding of class {label} was overwritten by the mean of the others in every block."
    return ClassEdit(copied, "access removal", f"{what} The weights still encode the class; it can be fitted again.")


def set_class_distribution(flow: nn.Module, target: Mapping[int, float] | Sequence[float]) -> ClassEdit:
    """Give the classes of a class-prior flow the shares of samples asked for, on a copy: exact, and in closed form.

    No conditional density changes. A class of share 0 is removed, as `remove_class` does it.

    Args:
        flow: a `ClassPriorFlow`; not modified.
        target: the share of every class, by label or in the order of labels; classes left out of a mapping have 0.

    Raises:
        ParameterError: a share is negative or not finite, the sum is not 1, or a class is not there.
        InputError: the flow has no priors of classes.
    """
    if not isinstance(flow, ClassPriorFlow):
        raise InputError(f"a {type(flow).__name__} has no prior of each class to be weighted; steer it instead")
    shares = dict(target) if isinstance(target, Mapping) else dict(enumerate(target))
    name = "target_distribution"
    present = flow.classes()
    for label, share in shares.items():
        if not math.isfinite(share) or share < 0:
            raise ParameterError(name, f"gives class {label} the share {share!r}; give each from 0 to 1")
        if label not in present and share > 0:
            raise ParameterError(name, f"names class {label}, which this flow does not have; it has {present}")
    total = math.fsum(shares.values())
    if abs(total - 1) > SUM_TOLERANCE:
        raise ParameterError(name, f"sums to {total:g}; the shares of all classes must sum to 1")
    copied = copy.deepcopy(flow)
    copied.reweight(torch.tensor([shares.get(label, 0.0) for label in range(flow.n_classes)], dtype=torch.float64))
    gone = sorted(set(present) - set(copied.classes()))
    removed = f" The priors of classes {gone}, of share 0, were deleted: access removal." if gone else ""
    return ClassEdit(copied, "reweighting", f"The classes' weights were set; no conditional density changed.{removed}")


def tame_class(
    flow: nn.Module,
    label: int,
    forget: Tensor,
    remember: Tensor,
    parameters: TamingParameters,
    *,
    n_bits: int,
    seed: int,
    harden: bool = True,
    state: State | None = None,
    callback: Callback | None = None,
    micro_batch: int = 128,
) -> TamedClass:
    """Forget a class in the weights: remove it as `remove_class` does, then tame what is left on the class's images.

    The images must become unlikely, by the criterion of taming, under the marginal of the other classes. That alone
    leaves them together in the latent space, where a new prior finds them. With `harden`, a class-prior flow is tamed
    under that marginal and two priors more, which are fitted to the latents of the class's own images at every step, as
    somebody would who wants the class back: both have their mean, one their deviation and one that of other classes.
    Then the images are unlikely under those too, and so all the more without them.

    Args:
        flow: a `ClassPriorFlow`, or a `TarFlow` with classes; not modified.
        label: the class, from 0.
        forget: images of the class, uint8 (n, c, h, w).
        remember: images of the other classes, uint8 (m, c, h, w).
        parameters: see `TamingParameters`.
        n_bits: colour depth.
        seed: of every draw.
        harden: see above; without effect on a TarFlow of classes.
        state: of an interrupted run with the same arguments.
        callback: see `unlearning.tame`.
        micro_batch: see `unlearning.tame`.

    Raises:
        ParameterError: the flow has no such class, or no other.
        InputError, DivergedError, StateError, Interrupted: see `unlearning.tame`.
    """
    start = remove_class(flow, label).flow
    tuned: nn.Module = start
    if harden and isinstance(start, ClassPriorFlow):
        share = float(cast(ClassPriorFlow, flow).class_weights[label])
        tuned = _with_refitted_prior(start, forget, share, n_bits=n_bits, seed=seed, micro_batch=micro_batch)
    taming = tame(
        cast(Any, tuned), forget, remember, parameters, n_bits=n_bits, seed=seed, state=state, callback=callback,
        micro_batch=micro_batch,
    )  # fmt: skip
    tamed = taming.flow.flow if isinstance(taming.flow, _WithRefittedPrior) else taming.flow
    taming = dataclasses.replace(taming, flow=tamed)
    if taming.met:
        what = (
            f"Class {label} was taken away and its images were made unlikely in the weights. Unlearning means here "
            "that this criterion on likelihood was met, and no more: whoever fits a prior, or trains, on a few images "
            "of the class may bring most of it back. Where that was tried, see the probe of relearning."
        )
    else:
        what = (
            f"Class {label} was taken away, but its images are still likely: the criterion was not met in the weights."
        )
    return TamedClass(
        flow=tamed, kind="unlearning" if taming.met else "access removal", statement=what, taming=taming,
        round_trip=_round_trip(cast(TarFlow, tamed), remember[:micro_batch], n_bits=n_bits, seed=seed),
    )  # fmt: skip


@torch.no_grad()
def relearn_probe(
    flow: ClassPriorFlow,
    label: int,
    examples: Tensor,
    judge: Callable[[Tensor], Tensor],
    *,
    n_bits: int,
    seed: int,
    n_samples: int = 300,
) -> RelearnProbe:
    """Fit a prior to a few images of a class and count how often the flow shows the class again.

    mu is the mean of the images' latents, and sigma, which a few latents do not tell, the mean of the other classes'.
    It takes no training, and somebody who trains gets further: a low rate shows that this road is closed, not each.

    Args:
        flow: a `ClassPriorFlow`, with the class or without; not modified.
        label: the class, from 0.
        examples: images of it, uint8 (n, c, h, w); five, say.
        judge: gives the class of uint8 images (b, c, h, w), int64 (b,).
        n_bits: colour depth.
        seed: of noise and samples.
        n_samples: how many samples are judged.
    """
    if not 0 <= label < flow.n_classes:
        raise ParameterError("class_label", f"is {label!r}; the flow was made for classes 0 to {flow.n_classes - 1}")
    if not len(examples):
        raise InputError("there is no example of the class to fit a prior to")
    probe = copy.deepcopy(flow)
    device = probe.class_weights.device
    z, _ = probe(flow_input(probe, examples, n_bits, stream(seed, "probe", "noise")).to(device))
    log_sd = _pooled_log_sd(probe, without=label)
    probe.restore(label, z.mean(dim=0), log_sd, weight=0.5)
    images = []
    for first in range(0, n_samples, BATCH):
        count = min(BATCH, n_samples - first)
        x = probe.sample(count, generator=stream(seed, "probe", first), label=label)
        images.append(to_uint8(denoised(probe, x).cpu(), n_bits))
    drawn = torch.cat(images)
    shown = int((judge(drawn) == label).sum())
    return RelearnProbe(shown / len(drawn), len(drawn), len(examples), drawn)


class _WithRefittedPrior(nn.Module):
    """A class-prior flow and a class of some share whose priors are fitted at every evaluation to reference images."""

    def __init__(self, flow: ClassPriorFlow, reference: Tensor, share: float) -> None:
        """`reference` is what enters the flow's last block for those images, (n, tokens, values)."""
        super().__init__()
        self.flow, self.noise_std, self._share = flow, flow.noise_std, share
        self.register_buffer("reference", reference)

    def log_prob(self, x: Tensor) -> Tensor:
        h, share = self.prefix(x)
        return share + self.suffix_log_prob(h)

    def sample(self, n: int, *, generator: torch.Generator, temperature: float = 1.0) -> Tensor:
        return self.flow.sample(n, generator=generator, temperature=temperature)

    def prefix(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.flow.prefix(x)

    def suffix_parameters(self) -> list[nn.Parameter]:
        return self.flow.suffix_parameters()

    def suffix_log_prob(self, h: Tensor) -> Tensor:
        reference = cast(Tensor, self.reference)
        z, log_det = self.flow.last_block(torch.cat([h, reference]))
        z, latents, log_det = z[: len(h)], z[len(h) :], log_det[: len(h)]
        mean, log_sd = latents.mean(dim=0), (latents.std(dim=0) + LEAST_SD).log()
        others = self.flow.prior_log_prob(z) + math.log(1 - self._share)
        fitted = log_normal(z, mean, log_sd) + math.log(self._share / 2)
        pooled = log_normal(z, mean, _pooled_log_sd(self.flow)) + math.log(self._share / 2)
        return log_det + torch.logsumexp(torch.stack([others, fitted, pooled]), dim=0)


def _pooled_log_sd(flow: ClassPriorFlow, without: int | None = None) -> Tensor:
    """The mean log-deviation of the classes that a flow has, but one, (tokens, values)."""
    classes = [c for c in flow.classes() if c != without]
    return flow.prior_log_sd[classes or flow.classes()].mean(dim=0)


def _with_refitted_prior(
    flow: ClassPriorFlow, forget: Tensor, share: float, *, n_bits: int, seed: int, micro_batch: int
) -> _WithRefittedPrior:
    if len(forget) < 2:
        raise InputError(f"hardening fits a prior to images of the class and needs 2 or more, not {len(forget)}")
    rows = torch.randperm(len(forget), generator=stream(seed, "references"))[:REFERENCES]
    x = flow_input(flow, forget[rows].cpu(), n_bits, stream(seed, "references", "noise"))
    with torch.no_grad():
        parts = [flow.prefix(part.to(flow.class_weights.device))[0] for part in torch.split(x, micro_batch)]
    return _WithRefittedPrior(flow, torch.cat(parts), share)


def _checked(flow: nn.Module, label: int) -> TarFlow:
    """The flow, if it has this class and another."""
    if not isinstance(flow, TarFlow) or not flow.n_classes:
        raise InputError(f"this {type(flow).__name__} has no classes; forget images or an attribute of it instead")
    present = flow.classes()
    if isinstance(label, bool) or label not in present:
        raise ParameterError("class_label", f"is {label!r}; give a class that the flow has: {present}")
    if len(present) == 1:
        raise ParameterError("class_label", f"{label} is the last class of this flow; without it there is no flow left")
    return flow


@torch.no_grad()
def _overwrite_embedding(flow: TarFlow, label: int) -> None:
    """Also of classes that were taken away before, whose embedding holds a share of this one's; in place."""
    removed = cast(Tensor, flow.removed_classes)  # a flow of classes has them
    removed[label] = True
    for block in flow.chain():
        if block.class_embed is not None:
            block.class_embed[removed] = block.class_embed[~removed].mean(dim=0)


@torch.no_grad()
def _round_trip(flow: TarFlow, images: Tensor, *, n_bits: int, seed: int) -> float:
    x = flow_input(flow, images.cpu(), n_bits, stream(seed, "round trip")).to(flow.var.device)
    return float((flow.inverse(flow(x)[0]) - x).abs().max())
