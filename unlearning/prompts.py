"""How a concept is asked for: the phrasings that training sees, and others that it never does.

A condition of a text-to-image model is a literal string, so what forgets one phrasing alone has forgotten little
(`{}` itself, a photo of it, an alias). Training draws from some phrasings and judges draw from the others.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from unlearning.errors import InputError

__all__ = ["HELD_OUT", "TRAINED", "Phrasings", "phrasings", "plain"]

TRAINED = ("{}", "a photo of {}", "an image of {}", "a picture showing {}", "{}, in detail")
HELD_OUT = ("a close view of {}", "this is {}", "{} in the middle of a picture", "a good picture of {}")


@dataclass(frozen=True)
class Phrasings:
    """The prompts that stand for one concept."""

    trained: tuple[str, ...]
    held_out: tuple[str, ...]
    """None of them is among `trained`."""


def phrasings(concept: str, aliases: Sequence[str] = ()) -> Phrasings:
    """Put a concept and its other names into every template, the concept itself first.

    Raises:
        InputError: a name is empty, or has braces.
    """
    names = list(dict.fromkeys(" ".join(name.split()) for name in (concept, *aliases)))
    for name in names:
        if not name or "{" in name or "}" in name:
            raise InputError(f"a concept is a few words without braces, such as “a red car”, not {name!r}")
    trained, held_out = (tuple(one.format(name) for name in names for one in of) for of in (TRAINED, HELD_OUT))
    return Phrasings(trained, tuple(prompt for prompt in held_out if prompt not in trained))


def plain(concept: str) -> str:
    """What two spellings of a concept have in common: case and spaces tell none apart."""
    return " ".join(concept.split()).casefold()
