"""In which precision a job's Fisher information is computed: the runner of it and its memory's estimate agree here."""

from __future__ import annotations

from models.conditional import GuidedConditional
from unlearning.passes import bfloat16_on
from worker.runner.conditional_base import ConditionalBase

__all__ = ["in_bfloat16"]


def in_bfloat16(base: ConditionalBase) -> bool:
    """Whether passes are in bfloat16: of models whose examples take long, where the device has it."""
    return isinstance(base.model, GuidedConditional) and bfloat16_on(base.device)
