"""Unlearning methods: tensors in, tensors out, resumable, with progress through one callback."""

from unlearning.constraints import Constraint, Fractions
from unlearning.errors import (
    DivergedError,
    InputError,
    ParameterError,
    StateError,
    UnlearningError,
    UnreachableError,
)
from unlearning.near_duplicates import near_duplicates
from unlearning.progress import Callback, Interrupted, Step
from unlearning.replay import generate_remember
from unlearning.state import State
from unlearning.steering import SteeringResult, measure_fractions, steer
from unlearning.steering_parameters import SteeringParameters
from unlearning.taming import TamingResult, tame
from unlearning.taming_parameters import TamingParameters

__all__ = [
    "Callback",
    "Constraint",
    "DivergedError",
    "Fractions",
    "InputError",
    "Interrupted",
    "ParameterError",
    "State",
    "StateError",
    "SteeringParameters",
    "SteeringResult",
    "Step",
    "TamingParameters",
    "TamingResult",
    "UnlearningError",
    "UnreachableError",
    "generate_remember",
    "measure_fractions",
    "near_duplicates",
    "steer",
    "tame",
]
