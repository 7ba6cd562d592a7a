"""What reports on a forgotten and on a balanced condition share: what stayed, the run's facts, and a hostile name."""

import re
from dataclasses import replace
from typing import Any

from evidence.amnesia_records import Drop, Kept
from evidence.fractions import fraction_of
from evidence.kid import Kid
from evidence.report import RunFacts

HOSTILE = "<script>alert('x')</script>\"&$\\frac{--><img src=x onerror=alert(1)>"


def kept(*names: str) -> tuple[Kept, Kept]:
    """Two conditions that show nearly as often as before what they did."""
    first, second = names
    return (
        Kept(first, fraction_of(490, 500), fraction_of(489, 500)),
        Kept(second, fraction_of(480, 500), fraction_of(478, 500)),
    )


def alike() -> dict[str, Any]:
    """Fields that both evaluations have."""
    return {
        "accuracy": fraction_of(970, 1000),
        "drop": Drop(0.003, 0.0095, 5, 2, 1000, 0.95),
        "kid": Kid(1e-4, 2e-4, 3e-4, 1000, 1000, "pixels"),
        "n_bits": 8,
        "confidence": 0.95,
        "seed": 7,
    }


def of_amnesia(facts: RunFacts) -> dict[str, Any]:
    """What a report is told of its run, but for the history."""
    return {"run": replace(facts, method="selective-amnesia", steps=100), "drift": 1e-3}


def stays_offline(page: str) -> bool:
    """Whether a page runs nothing and asks nothing of the network."""
    return "<script" not in page and not re.search(r"""(?:src|href)=["'](?!data:|#)""", page)


def escapes(page: str) -> bool:
    """Whether `HOSTILE` is shown and not obeyed."""
    return "<script" not in page and "<img src=x" not in page
