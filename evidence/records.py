"""What an evaluation of flow taming found: frozen records that say what each figure means."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np

from evidence.drift import Drift, KlEstimate, SampleHealth
from evidence.likelihood import FloatArray
from evidence.quantiles import Normality, PrimaryQuantile, QuantileDrop, Reference

__all__ = [
    "FlowEvaluation",
    "ForgetImage",
    "Outcome",
    "QuantileChange",
    "RememberSource",
    "SetEvaluation",
    "SetKey",
    "finite",
]

SetKey = Literal["forget", "same_identity", "remember", "held_out", "neighbours"]
RememberSource = Literal["images", "generated"]
Outcome = Literal["succeeded", "criteria_not_met"]


@dataclass(frozen=True)
class QuantileChange:
    """Mean likelihood quantile of a set before and after, each among the images to remember of its own model.

    Attributes:
        before: mean q under the base model, in [0, 1].
        after: mean q under the tamed model, in [0, 1]; low means forgotten.
        drop: before - after, with its interval.
    """

    before: float
    after: float
    drop: QuantileDrop


@dataclass(frozen=True, eq=False)
class SetEvaluation:
    """One set of images under both models, on common noise.

    Attributes:
        key: which set: forget D_F, same_identity D'_F, remember D_R, held_out D_R^id, neighbours D_R^NN.
        n: images.
        draws: noise draws an image.
        nll_base: (n,) nats, lower is more likely.
        nll_tamed: (n,) nats.
        bpd_base: mean bits per dimension; NaN without images.
        bpd_tamed: likewise.
        gaussian: change of the Gaussian quantile (Eq. 13).
        empirical: change of the empirical quantile.
    """

    key: SetKey
    n: int
    draws: int
    nll_base: FloatArray
    nll_tamed: FloatArray
    bpd_base: float
    bpd_tamed: float
    gaussian: QuantileChange
    empirical: QuantileChange


@dataclass(frozen=True)
class ForgetImage:
    """One image to forget and its verdict. Images are known by their position only.

    Attributes:
        index: position in the forget set, from 0.
        z_before: (nll - mu_R) / sigma_R, all under the base model; higher is less likely.
        z_after: the same, all under the tamed model; what the verdict reads.
        z_after_base: nll under the tamed model, mu_R and sigma_R of the base model: forgetting that owes nothing to
            a shift of the images to remember.
        q_gaussian_before: Gaussian quantile under the base model.
        q_gaussian_after: Gaussian quantile under the tamed model.
        q_empirical_before: empirical quantile under the base model.
        q_empirical_after: empirical quantile under the tamed model.
        no_more_likely: images to remember that the tamed model finds no more likely than this one; 0 is the most
            that they can show.
        forgotten: whether the criterion holds; never for a z that is not finite.
    """

    index: int
    z_before: float
    z_after: float
    z_after_base: float
    q_gaussian_before: float
    q_gaussian_after: float
    q_empirical_before: float
    q_empirical_after: float
    no_more_likely: int
    forgotten: bool


@dataclass(frozen=True, eq=False)
class FlowEvaluation:
    """What taming did, as measured; `evidence.report` turns it into a document.

    Likelihoods judge density at given pictures. They do not show what the model samples, nor that other pictures of
    the person are gone, nor that a short re-training would not bring them back.

    Attributes:
        image_shape: (c, h, w).
        n_bits: bits a channel.
        delta: threshold of the method, in units of sigma_R.
        tolerance: share of delta by which an image may miss it.
        two_sided: whether overshooting by more than the tolerance fails too.
        seed: all noise and samples derive from it.
        remember_source: "images", or "generated" for samples of the base flow.
        sets: the evaluated sets, D_F first; absent sets are left out.
        forget_images: one verdict each.
        reference_base: likelihoods to remember under the base model: mu_R, sigma_R, n.
        reference_tamed: the same under the tamed model.
        normality_base: test of `reference_base`.
        normality_tamed: test of `reference_tamed`.
        primary: which quantile leads, and why.
        neighbours_method: how D_R^NN was found.
        drift_remember: drift on D_R, which the method may have trained on.
        drift_held_out: drift on D_R^id; None without that set.
        kl: divergence of the models on base samples; None where no samples were asked for.
        health_base: samples of the base model, likewise.
        health_tamed: samples of the tamed model, likewise.
        notes: limits of this very evaluation, in sentences.
    """

    image_shape: tuple[int, int, int]
    n_bits: int
    delta: float
    tolerance: float
    two_sided: bool
    seed: int
    remember_source: RememberSource
    sets: tuple[SetEvaluation, ...]
    forget_images: tuple[ForgetImage, ...]
    reference_base: Reference
    reference_tamed: Reference
    normality_base: Normality
    normality_tamed: Normality
    primary: PrimaryQuantile
    neighbours_method: str
    drift_remember: Drift
    drift_held_out: Drift | None
    kl: KlEstimate | None
    health_base: SampleHealth | None
    health_tamed: SampleHealth | None
    notes: tuple[str, ...]

    @property
    def threshold_z(self) -> float:
        """The z that every forget image must reach: delta (1 - tolerance)."""
        return self.delta * (1 - self.tolerance)

    @property
    def forgotten(self) -> bool:
        """Whether the criterion holds for every forget image; False without any."""
        return bool(self.forget_images) and all(image.forgotten for image in self.forget_images)

    @property
    def smallest_z(self) -> float:
        """z of the least forgotten image under the tamed model; NaN without images or where one is not finite."""
        return float(np.min([image.z_after for image in self.forget_images] or [math.nan]))

    @property
    def healthy(self) -> bool:
        """Whether the tamed model's samples are as sound as the base model's; True where none were drawn."""
        if self.health_base is None or self.health_tamed is None:
            return True
        return self.health_tamed.as_good_as(self.health_base)

    @property
    def outcome(self) -> Outcome:
        """`succeeded` when every image is forgotten and the samples are sound."""
        return "succeeded" if self.forgotten and self.healthy else "criteria_not_met"

    @property
    def sigma_ratio(self) -> float:
        """sigma_R tamed over base; 1 is unchanged."""
        return self.reference_tamed.std / self.reference_base.std if self.reference_base.std > 0 else math.nan

    def set(self, key: SetKey) -> SetEvaluation | None:
        """The set of that name; None where it was not given."""
        return next((one for one in self.sets if one.key == key), None)

    def quantiles(self, key: SetKey) -> QuantileChange | None:
        """The set's change in the primary quantile; None where it was not given."""
        found = self.set(key)
        return None if found is None else getattr(found, self.primary.kind)

    def summary(self) -> dict[str, float | int | str | bool | None]:
        """The figures that a caller prints or stores, as JSON values: null for what is missing or not finite."""
        flat: dict[str, float | int | str | bool | None] = {
            "outcome": self.outcome,
            "forgotten": sum(image.forgotten for image in self.forget_images),
            "forget_images": len(self.forget_images),
            "smallest_z": finite(self.smallest_z),
            "threshold_z": self.threshold_z,
            "primary_quantile": self.primary.kind,
            "sigma_ratio": finite(self.sigma_ratio),
            "drift_remember": finite(self.drift_remember.value),
            "drift_held_out": None if self.drift_held_out is None else finite(self.drift_held_out.value),
            "kl_per_dim": None if self.kl is None else finite(self.kl.value),
            "healthy": self.healthy,
        }
        for one in self.sets:
            change: QuantileChange = getattr(one, self.primary.kind)
            flat[f"n_{one.key}"] = one.n
            flat[f"q_before_{one.key}"] = finite(change.before)
            flat[f"q_after_{one.key}"] = finite(change.after)
            flat[f"quantile_drop_{one.key}"] = finite(change.drop.value)
        return flat


def finite(value: float) -> float | None:
    """The value as JSON can hold it: None for NaN and infinity."""
    return value if math.isfinite(value) else None
