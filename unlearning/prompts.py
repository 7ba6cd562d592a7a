"""How a concept is asked for: the phrasings that training sees, and others that it never does.

A condition of a text-to-image model is a literal string, so what forgets one phrasing alone has forgotten little
(`{}` itself, a photo of it, an alias). Training draws from some phrasings and judges draw from the others.
"""

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

from unlearning.errors import InputError

__all__ = ["GENERAL", "HELD_OUT", "TRAINED", "Phrasings", "phrasings", "plain"]

TRAINED = ("{}", "a photo of {}", "an image of {}", "a picture showing {}", "{}, in detail")
HELD_OUT = ("a close view of {}", "this is {}", "{} in the middle of a picture", "a good picture of {}")

GENERAL = (
    "a dog", "a cat", "a horse", "a bird", "a fish", "an elephant", "a butterfly", "a cow", "a man", "a woman",
    "a child", "an old man", "an old woman", "a crowd of people", "a family at a table", "a footballer", "a musician",
    "a farmer at work", "a mountain", "a beach", "a forest", "a river", "a desert", "a waterfall", "a snowy field",
    "a garden", "a sunset", "a city street", "a village", "a castle", "a church", "a bridge", "a skyscraper",
    "a wooden house", "a kitchen", "a bedroom", "a library", "an office", "a railway station", "a market", "a car",
    "a bicycle", "a train", "an aeroplane", "a sailing boat", "a bus", "a lorry", "a motorcycle", "a chair", "a table",
    "a lamp", "a clock", "a book", "a cup of coffee", "a bottle", "a telephone", "a guitar", "a piano",
    "a pair of shoes", "a hat", "a red dress", "a bowl of fruit", "a loaf of bread", "a cake", "a pizza",
    "a vegetable stew", "an apple", "a bunch of flowers", "a tree", "a mushroom", "a painting of a landscape",
    "a pencil sketch of a face", "a watercolour of a harbour", "a statue", "a mosaic", "a poster with large letters",
    "a map", "a cartoon animal", "a robot", "a spaceship", "a dragon", "the night sky", "the moon", "a storm at sea",
    "a rainbow", "a campfire", "a coral reef", "a glass of water", "a wooden toy", "a football match", "a wedding",
    "a classroom", "a hospital", "a factory", "a field of wheat", "a snowman", "a lighthouse", "a windmill",
    "a stone wall", "an abstract pattern",
)  # fmt: skip
"""What a model is held to where the caller names nothing: everyday things, as far apart as a hundred can be."""


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
    names = list(dict.fromkeys(_composed(name) for name in (concept, *aliases)))
    for name in names:
        if not name or "{" in name or "}" in name:
            raise InputError(f"a concept is a few words without braces, such as “a red car”, not {name!r}")
    trained, held_out = (tuple(one.format(name) for name in names for one in of) for of in (TRAINED, HELD_OUT))
    seen = {plain(prompt) for prompt in trained}  # text encoders read no case
    return Phrasings(trained, tuple(prompt for prompt in held_out if plain(prompt) not in seen))


def plain(concept: str) -> str:
    """What two spellings of a concept have in common: case, spaces and how accents are composed tell none apart."""
    return _composed(concept).casefold()


def _composed(name: str) -> str:
    """With single spaces, and letters and their accents as one character where there is one (Unicode's form NFC)."""
    return " ".join(unicodedata.normalize("NFC", name).split())
