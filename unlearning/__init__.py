"""Unlearning methods: tensors in, tensors out, resumable, with progress through one callback."""

from unlearning.amnesia import AmnesiaResult, Check, Criterion, forget_conditions
from unlearning.amnesia_parameters import AmnesiaParameters
from unlearning.constraints import Constraint, Fractions
from unlearning.errors import (
    DivergedError,
    FisherError,
    InputError,
    NotEnoughMemoryError,
    ParameterError,
    ProcessError,
    StateError,
    UnlearningError,
    UnreachableError,
)
from unlearning.fisher import fisher_information
from unlearning.fisher_files import load_fisher, save_fisher
from unlearning.fisher_result import Fisher, average_fisher, merge_fisher, normalise_fisher
from unlearning.near_duplicates import near_duplicates
from unlearning.processes import Processes, shared_fisher
from unlearning.progress import Callback, Interrupted, Step
from unlearning.replay import generate_remember
from unlearning.state import State
from unlearning.steering import SteeringResult, measure_fractions, steer
from unlearning.steering_parameters import SteeringParameters
from unlearning.surrogates import Examples, Mixture, Noise, Pool, Surrogate, mixing_fractions
from unlearning.taming import TamingResult, tame
from unlearning.taming_parameters import TamingParameters

__all__ = [
    "AmnesiaParameters",
    "AmnesiaResult",
    "Callback",
    "Check",
    "Constraint",
    "Criterion",
    "DivergedError",
    "Examples",
    "Fisher",
    "FisherError",
    "Fractions",
    "InputError",
    "Interrupted",
    "Mixture",
    "Noise",
    "NotEnoughMemoryError",
    "ParameterError",
    "Pool",
    "ProcessError",
    "Processes",
    "State",
    "StateError",
    "SteeringParameters",
    "SteeringResult",
    "Step",
    "Surrogate",
    "TamingParameters",
    "TamingResult",
    "UnlearningError",
    "UnreachableError",
    "average_fisher",
    "fisher_information",
    "forget_conditions",
    "generate_remember",
    "load_fisher",
    "measure_fractions",
    "merge_fisher",
    "mixing_fractions",
    "near_duplicates",
    "normalise_fisher",
    "save_fisher",
    "shared_fisher",
    "steer",
    "tame",
]
