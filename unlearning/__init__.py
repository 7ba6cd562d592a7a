"""Unlearning methods: tensors in, tensors out, resumable, with progress through one callback."""

from unlearning.errors import DivergedError, InputError, ParameterError, StateError, UnlearningError
from unlearning.near_duplicates import near_duplicates
from unlearning.progress import Callback, Interrupted, Step
from unlearning.replay import generate_remember
from unlearning.state import State
from unlearning.taming import TamingResult, tame
from unlearning.taming_parameters import TamingParameters

__all__ = [
    "Callback",
    "DivergedError",
    "InputError",
    "Interrupted",
    "ParameterError",
    "State",
    "StateError",
    "Step",
    "TamingParameters",
    "TamingResult",
    "UnlearningError",
    "generate_remember",
    "near_duplicates",
    "tame",
]
