"""Judges and bounds as words on a command line: what the service calls an attribute."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import typer

__all__ = ["attribute_of", "condition_of", "distribution_of", "judge_of", "pairs_of", "replacements_of"]

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


def pairs_of(texts: Sequence[str], form: str) -> dict[str, str]:
    """``NAME=VALUE`` words, the last ``=`` between them; ``form`` is what to call them."""
    pairs: dict[str, str] = {}
    for text in texts:
        name, _, value = (part.strip() for part in text.rpartition("="))
        if not (name and value):
            raise typer.BadParameter(f"{text!r} is not {form}.")
        if name in pairs:
            raise typer.BadParameter(f"{name!r} is given twice.")
        pairs[name] = value
    return pairs


def condition_of(label: int | None, concept: str | None, aliases: Sequence[str] | None) -> dict[str, Any] | None:
    """What a conditional model is asked for, where it is said."""
    if label is not None and concept is not None:
        raise typer.BadParameter("Give either --condition-class or --condition-concept.")
    if aliases and concept is None:
        raise typer.BadParameter("--alias goes with --condition-concept.")
    if concept is not None:
        return {"concept": concept} | ({"aliases": list(aliases)} if aliases else {})
    return None if label is None else {"class_label": label}


def replacements_of(texts: Sequence[str] | None, *, words: bool) -> dict[str, dict[str, Any]] | None:
    """``CLASS=CONDITION``: a class from 0, or ``words`` where the model takes prompts."""
    if not texts:
        return None
    pairs = pairs_of(texts, "CLASS=CONDITION")
    if words:
        return {name: {"concept": condition} for name, condition in pairs.items()}
    for name, condition in pairs.items():
        if not (condition.isascii() and condition.isdecimal()):
            raise typer.BadParameter(f"{name}={condition}: {condition!r} is no class from 0, as --condition-class is.")
    return {name: {"class_label": int(condition)} for name, condition in pairs.items()}


def _share(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise typer.BadParameter(f"{text!r} is no fraction.") from None
