"""Parameters of Selective Amnesia: each with its symbol, its range and where its default comes from."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

from unlearning.errors import ParameterError
from unlearning.optimiser import Optimiser
from unlearning.ranges import Parameters, Range, check_choice, check_terms

Mode = Literal["default", "paper"]
LossTerm = Literal["surrogate", "replay", "penalty"]
"""The three terms of eq. 4."""
Reduction = Literal["sum", "mean"]
ReplayTarget = Literal["truth", "teacher"]


_DEFAULTS: dict[Mode, dict[str, Any]] = {
    "default": {
        "strength": 10.0, "max_steps": 2000, "learning_rate": 1e-3, "clip": 1.0, "null_share": 0.1, "reduction": "mean",
        "replay_target": "teacher",
    },
    "paper": {
        "strength": 100.0, "max_steps": 10_000, "learning_rate": 1e-4, "clip": 1e12, "null_share": 0.0,
        "reduction": "sum", "replay_target": "truth",
    },
}  # fmt: skip
_PIPELINE = {
    "strength": 50.0, "max_steps": 12_500, "learning_rate": 1e-5, "batch": 16, "replay_batch": 16, "reduction": "mean",
}  # fmt: skip
_PAPER: Mapping[str, Mapping[str, Any]] = {
    "vae": {},
    "ddpm": {
        "strength": 10.0, "max_steps": 20_000, "batch": 128, "replay_batch": 128, "clip": 1.0, "reduction": "mean",
    },
    "stable-diffusion": _PIPELINE,
    "stable-diffusion-xl": _PIPELINE,  # which the paper does not have: as its closest
}  # fmt: skip
"""What the paper sets for a family where it differs from its VAE (App. B; the released code where that is silent)."""


@dataclass(frozen=True)
class AmnesiaParameters(Parameters):
    """Parameters of both modes. "Paper" is Heng and Soh, NeurIPS 2023, with its released code where it is silent."""

    mode: Mode = "default"
    """"default": a dimensionless penalty. "paper": lambda / 2 times the raw Fisher information, as published."""
    strength: float | None = None
    """default: weight of the relative drift, in units of the replay loss at the start; null: 10 (measured). paper:
    lambda; null: 100, as for the VAE. [0, 1e9]."""
    max_steps: int | None = None
    """Most optimiser steps; null: 2,000, paper 10,000 (App. B.1); [1, 1000000]."""
    learning_rate: float | None = None
    """Adam's; null: 1e-3 (measured), paper 1e-4 (App. B.1); (0, 1]."""
    batch: int = 256
    """Surrogate examples in a step; [1, 4096]. Paper: 256 for a VAE, 128 for a DDPM, 16 for Stable Diffusion."""
    replay_batch: int = 256
    """Replay examples in a step; [1, 4096]. Paper: as many."""
    replay_weight: float = 1.0
    """Weight of the replay term; [0, 1000]. Paper: 1."""
    floor: float = 1e-3
    """default: least Fisher information of a weight against the mean, so that none is free to drift; [0, 1)."""
    ceiling: float = 1e3
    """default: most of it, so that a few weights do not hold all; (1, 1e9]."""
    clip: float | None = None
    """Largest norm of a step's gradient, in units of the replay loss at the start; null: 1, and for paper 1e12,
    which is none to speak of, as in the released code of a VAE; (0, 1e12]."""
    null_share: float | None = None
    """Share of replay examples whose condition is dropped, where the model is guided by its answer without one, which
    would drift along; null: .1, and none for paper; [0, .9]."""
    replay_target: ReplayTarget | None = None
    """What a diffusion model's answers to replay are held against: "truth", the noise that was added, or "teacher",
    what theta* answers there. Guided samples are sharper than what theta* knows, and training on their truth would
    sharpen it again. null: teacher, and truth for paper; of a VAE it is the truth in any case."""
    reduction: Reduction | None = None
    """paper: whether a step adds up its examples' losses or averages them; null: "sum", as for a VAE. The default mode
    averages."""
    check_every: int = 50
    """Steps between looks at fresh samples, each of which may end the run; [1, 100000]."""
    without: tuple[LossTerm, ...] = ()
    """Terms of the objective that are left out, as in the paper's ablations; none."""
    optimiser: Optimiser = "adam"
    """"adam-8bit" keeps Adam's moments in a byte each, with a scale for every 256 (bitsandbytes); paper: Adam."""

    METHOD: ClassVar[str] = "Selective Amnesia"
    OPTIONAL: ClassVar[tuple[str, ...]] = tuple(_DEFAULTS["default"])
    RANGES: ClassVar[Mapping[str, Range]] = {
        "strength": Range(float, 0, 1e9),
        "max_steps": Range(int, 1, 1_000_000),
        "learning_rate": Range(float, 0, 1, closed=False),
        "batch": Range(int, 1, 4096),
        "replay_batch": Range(int, 1, 4096),
        "replay_weight": Range(float, 0, 1000),
        "floor": Range(float, 0, 0.999),
        "ceiling": Range(float, 1, 1e9, closed=False),
        "clip": Range(float, 0, 1e12, closed=False),
        "null_share": Range(float, 0, 0.9),
        "check_every": Range(int, 1, 100_000),
    }

    def _defaults(self) -> Mapping[str, Any]:
        return _DEFAULTS[self.mode]

    def _check(self, name: str, value: object) -> None:
        if name == "mode":
            check_choice(name, value, get_args(Mode))
        elif name == "optimiser":
            check_choice(name, value, get_args(Optimiser))
        elif name == "replay_target":
            if value is not None:
                check_choice(name, value, get_args(ReplayTarget))
        elif name == "reduction":
            if value is not None:
                check_choice(name, value, get_args(Reduction))
            if value == "sum" and self.mode == "default":
                raise ParameterError(name, "is mean in the default mode, whose penalty is in units of a mean loss")
        elif name == "without":
            if "surrogate" in check_terms(name, value, get_args(LossTerm)):
                raise ParameterError(name, "leaves out the surrogate; nothing would be forgotten")
        else:
            super()._check(name, value)


def paper_settings(family: str) -> Mapping[str, Any]:
    """What the paper sets for a family of models where it differs from its VAE."""
    return _PAPER.get(family, {})
