"""Parameters of flow taming: each with its symbol, its range and where its default comes from."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

from unlearning.errors import ParameterError
from unlearning.ranges import Parameters, Range, check_choice, check_terms

Engine = Literal["fast", "paper"]
LossTerm = Literal["forget", "remember", "nll", "kl_forward", "kl_reverse"]
"""L_F; L_R; and the parts of L_R, eq. 11."""


_DEFAULTS: dict[Engine, dict[str, Any]] = {
    "fast": {"max_steps": 400, "learning_rate": 4e-3, "remember_batch": 96},
    "paper": {"max_steps": 800, "learning_rate": 5e-5, "remember_batch": 8},
}


@dataclass(frozen=True)
class TamingParameters(Parameters):
    """Parameters of both engines. "Paper" is Malnick, Avidan and Fried, WACV 2024, with its released recipe."""

    engine: Engine = "fast"
    """"fast": soonest to the same verdict with least damage. "paper": the published objective, term by term."""
    delta: float = 4.0
    """delta: how many sigma_R above mu_R the nll of a forgotten image shall lie, eq. 8; (0, 20]. Paper: 4."""
    tolerance: float = 0.15
    """epsilon / delta: z >= delta (1 - tolerance) counts as forgotten, eq. 10; [0, 1). Paper: 0.15."""
    max_steps: int | None = None
    """Most optimiser steps; null: 400 for "fast", 800 for "paper" (as released); [1, 100000]."""
    learning_rate: float | None = None
    """Adam's; null: 4e-3 for "fast" (measured), 5e-5 for "paper" (Sec. 4); (0, 1]."""
    forget_batch: int = 8
    """Images of D_F in a step; [1, 4096]. Paper: 8."""
    remember_batch: int | None = None
    """Images of D_R in a step; null: 96 for "fast" (measured), 8 for "paper" (Sec. 4); [2, 4096]."""
    confirmation_draws: int = 10
    """Fresh noise draws a forget image that decide whether the criterion is met; [1, 1000]. Paper: 10."""
    statistics_images: int = 1024
    """Most images of D_R that mu_R and sigma_R are taken over; [16, 100000]. Released recipe: 1,024."""
    near_duplicate_rms: float = 6.0
    """Images of D_R nearer to D_F than this, in levels of 255, leave it; [0, 255]."""
    alpha: float = 0.6
    """paper: weight of L_F against L_R, eq. 12; [0, 1]. Paper: 0.6."""
    gamma: float = 0.6
    """paper: weight of the KL terms within L_R, eq. 11; [0, 1]. Paper: 0.6."""
    refresh_every: int = 10
    """paper: steps between refreshes of mu_R and sigma_R; [1, 10000]. Paper: 10."""
    without: tuple[LossTerm, ...] = ()
    """paper: terms of the objective that are left out, as in the ablation of Table 2; none."""
    keep_weight: float = 80.0
    """fast: weight of the paired keep loss against the forget loss; [0, 100000]. Measured."""
    margin: float = 0.35
    """fast: the forget loss aims at delta (1 - tolerance) + margin, in sigma_R; [0, 10]. Measured."""
    noise_draws: int = 8
    """fast: noise draws of D_F that the steps take turns with; eight times as many for a flow so sensitive that its
    learning rate was shortened to less than a fifth; [1, 64]. Measured."""
    clip: float = 1.0
    """fast: largest norm of a step's gradient, in sigma_R; (0, 1000000]. Measured."""
    virtual_share: float = 0.75
    """fast: share of a step's remember images that are virtual (warped and moved images of D_R), to keep people whom
    D_R does not show; [0, 1]. Measured."""
    forget_variants: int = 4
    """fast: augmented copies of each forget image (mirrored, moved), beside the image itself; [0, 64]. Measured."""
    variant_target: float = 0.4
    """fast: share of the target that those copies are pushed to; [0, 1]. Measured: what eight photos do carries over to
    the person's others by QD .28 with 0, .36 with 0.4, .39 with 1; with 0.5 and more, people never seen move by over
    half of what they do under the released recipe."""
    forget_shift: int = 1
    """fast: how far, in pixels, those copies move each way; [0, 8]. Measured."""

    METHOD: ClassVar[str] = "flow taming"
    OPTIONAL: ClassVar[tuple[str, ...]] = tuple(_DEFAULTS["fast"])
    RANGES: ClassVar[Mapping[str, Range]] = {
        "delta": Range(float, 0, 20, closed=False),
        "tolerance": Range(float, 0, 0.999),
        "max_steps": Range(int, 1, 100_000),
        "learning_rate": Range(float, 0, 1, closed=False),
        "forget_batch": Range(int, 1, 4096),
        "remember_batch": Range(int, 2, 4096),
        "confirmation_draws": Range(int, 1, 1000),
        "statistics_images": Range(int, 16, 100_000),
        "near_duplicate_rms": Range(float, 0, 255),
        "alpha": Range(float, 0, 1),
        "gamma": Range(float, 0, 1),
        "refresh_every": Range(int, 1, 10_000),
        "keep_weight": Range(float, 0, 100_000),
        "margin": Range(float, 0, 10),
        "virtual_share": Range(float, 0, 1),
        "noise_draws": Range(int, 1, 64),
        "clip": Range(float, 0, 1_000_000, closed=False),
        "forget_variants": Range(int, 0, 64),
        "variant_target": Range(float, 0, 1),
        "forget_shift": Range(int, 0, 8),
    }

    def __post_init__(self) -> None:
        """Check every value; raises ParameterError for the first that is wrong."""
        super().__post_init__()
        if self.without and self.engine != "paper":
            raise ParameterError("without", 'leaves out terms of the published objective; it asks for engine "paper"')

    def _defaults(self) -> Mapping[str, Any]:
        return _DEFAULTS[self.engine]

    def _check(self, name: str, value: object) -> None:
        if name == "engine":
            check_choice(name, value, get_args(Engine))
        elif name == "without":
            terms = check_terms(name, value, get_args(LossTerm))
            if "forget" in terms and ("remember" in terms or {"nll", "kl_forward", "kl_reverse"} <= terms):
                raise ParameterError(name, "leaves out every loss; nothing would be learned")
        else:
            super()._check(name, value)
