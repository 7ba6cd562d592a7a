"""Parameters of steering: each with its range and where its default comes from."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from unlearning.ranges import Parameters, Range


@dataclass(frozen=True)
class SteeringParameters(Parameters):
    """How the fractions of classes among a flow's samples are changed. "Measured" is on digits, `benchmarks.debias`."""

    max_steps: int = 600
    """Most optimiser steps; [1, 100000]."""
    learning_rate: float = 1e-3
    """Adam's; (0, 1]. Measured: four times as much doubles the drift."""
    batch: int = 128
    """Images in a step; [2, 4096]."""
    pool: int = 4096
    """Samples of the base that the steps learn from; [64, 100000]."""
    samples: int | None = None
    """Fresh samples that decide whether the bounds hold; null: as many as the bounds ask for; [100, 1000000]."""
    confidence: float = 0.95
    """Of all intervals of one constraint together; [0.5, 0.9999]."""
    measure_every: int = 10
    """Steps between looks at fresh samples; [1, 10000]."""
    probe: int = 500
    """Fresh samples of such a look, which corrects the weights and tells when to decide; [50, 100000]."""
    gain: float = 1.0
    """Share of a measured error, in the logarithm of a fraction, that corrects the weights; [0, 2]."""
    average: float = 0.95
    """Decay of the running mean of the tuned weights that is the result; [0, 0.9999]."""
    huber: float = 2.0
    """Nats beyond which an image's error in likelihood counts linearly; (0, 1000]. Measured."""
    clip: float = 50.0
    """Largest norm of a step's gradient, in nats; (0, 1000000]."""

    METHOD: ClassVar[str] = "steering"
    OPTIONAL: ClassVar[tuple[str, ...]] = ("samples",)
    RANGES: ClassVar[Mapping[str, Range]] = {
        "max_steps": Range(int, 1, 100_000),
        "learning_rate": Range(float, 0, 1, closed=False),
        "batch": Range(int, 2, 4096),
        "pool": Range(int, 64, 100_000),
        "samples": Range(int, 100, 1_000_000),
        "confidence": Range(float, 0.5, 0.9999),
        "measure_every": Range(int, 1, 10_000),
        "probe": Range(int, 50, 100_000),
        "gain": Range(float, 0, 2),
        "average": Range(float, 0, 0.9999),
        "huber": Range(float, 0, 1000, closed=False),
        "clip": Range(float, 0, 1_000_000, closed=False),
    }
