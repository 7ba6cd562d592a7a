"""Judges and bounds as words on a command line: what the service calls an attribute."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import typer

__all__ = ["attribute_of", "distribution_of", "judge_of"]

BOUND = re.compile(r"^(?P<judge>.+?):(?P<name>[^:]+?)\s*(?P<way><=|>=)\s*(?P<share>[0-9.eE+-]+)$")
WAYS = {"<=": "at_most", ">=": "at_least"}


def judge_of(text: str) -> dict[str, Any]:
    """``clf_...``, or image sets by what they show: ``smiling=imgs_...,other=imgs_...``."""
    if "=" not in text:
        return {"classifier": text}
    pairs = [part.partition("=") for part in text.split(",")]
    if not all(name.strip() and images.strip() for name, _, images in pairs) or len(pairs) < 2:
        raise typer.BadParameter(f"{text!r} is neither clf_... nor NAME=imgs_...,NAME=imgs_...")
    return {"sets": {name.strip(): images.strip() for name, _, images in pairs}}


def attribute_of(text: str) -> dict[str, Any]:
    """A bound on how often samples show a class: ``JUDGE:CLASS<=0.1`` or ``JUDGE:CLASS>=0.5``."""
    found = BOUND.match(text)
    if found is None:
        raise typer.BadParameter(f"{text!r} is not JUDGE:CLASS<=FRACTION or JUDGE:CLASS>=FRACTION.")
    return judge_of(found["judge"]) | {"class": found["name"].strip(), WAYS[found["way"]]: _share(found["share"])}


def distribution_of(texts: Sequence[str]) -> dict[str, float]:
    """``CLASS=FRACTION`` words as a distribution."""
    shares: dict[str, float] = {}
    for text in texts:
        name, equals, share = text.rpartition("=")
        if not (name and equals):
            raise typer.BadParameter(f"{text!r} is not CLASS=FRACTION.")
        shares[name] = _share(share)
    return shares


def _share(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise typer.BadParameter(f"{text!r} is no fraction.") from None
