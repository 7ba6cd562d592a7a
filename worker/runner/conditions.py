"""What a job's labels stand for: the classes of a model by themselves, or concepts by the prompts that ask for them.

Methods train on rows of conditions, several to a concept; judges ask by label, and get samples of other phrasings than
training saw. A job numbers its concepts: 0 is the one to be forgotten, the remembered ones follow.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
from torch import Tensor

from models.conditional import ClassConditional, ConditionalModel, LabelledSampler, PromptConditional
from models.errors import PromptError
from unlearning import UnlearningError
from unlearning.prompts import GENERAL, Phrasings, phrasings, plain
from worker.runner.problems import UserError, escaped

__all__ = ["Classes", "Concepts", "Conditions", "classes_of", "concepts_of"]


LITTLE_WORD = 3
"""Characters of "a", "of" and "the", which tell no concepts apart."""


class Conditions(Protocol):
    """The conditions of one job, by label from 0."""

    @property
    def names(self) -> tuple[str, ...]:
        """Of every label."""
        ...

    @property
    def private(self) -> tuple[int, ...]:
        """Labels of which nothing may outlive the job."""
        ...

    @property
    def added(self) -> tuple[int, ...]:
        """Labels that stay, and that the request names as replacements alone."""
        ...

    def trained(self, label: int) -> Tensor:
        """The conditions that training draws from for a label, (k, ...)."""
        ...

    def stored(self, label: int) -> Tensor:
        """Those that stored samples of a label are of, (k, ...): the same ones whatever a job does with the label."""
        ...

    def sampler(self, model: ConditionalModel) -> LabelledSampler:
        """A model as judges ask it: by label."""
        ...


@dataclass(frozen=True)
class Classes:
    """The classes of a model, each a condition of its own."""

    names: tuple[str, ...]

    @property
    def private(self) -> tuple[int, ...]:
        """None: a label tells nothing."""
        return ()

    @property
    def added(self) -> tuple[int, ...]:
        """None: a model has its classes, whatever is asked."""
        return ()

    def trained(self, label: int) -> Tensor:
        """The label itself, (1,)."""
        return torch.tensor([label], dtype=torch.int64)

    def stored(self, label: int) -> Tensor:
        """The label itself, (1,)."""
        return self.trained(label)

    def sampler(self, model: ConditionalModel) -> LabelledSampler:
        """The model as it is."""
        return cast(LabelledSampler, model)


@dataclass(frozen=True)
class Concepts:
    """Concepts of a model that reads prompts."""

    names: tuple[str, ...]
    rows: tuple[Tensor, ...]
    """Of each concept, the tokens of its phrasings for training, (k, tokens)."""
    unaliased: tuple[Tensor, ...]
    """Of these, those that have the concept by its own name."""
    held_out: tuple[Tensor, ...]
    """The tokens of its other phrasings."""
    prompts: tuple[Phrasings, ...]
    """What the tokens say."""
    added: tuple[int, ...] = ()
    """Labels that stay, and that the request names as replacements alone."""

    @property
    def private(self) -> tuple[int, ...]:
        """The concept that is to change: its name may be a person's, and so may what it shows."""
        return (0,)

    def trained(self, label: int) -> Tensor:
        """The tokens of its phrasings for training, (k, tokens)."""
        return self.rows[label]

    def stored(self, label: int) -> Tensor:
        """The tokens of those that have it by its own name: other names go with a request to forget it alone."""
        return self.unaliased[label]

    def sampler(self, model: ConditionalModel) -> LabelledSampler:
        """The model, asked in phrasings that training does not see."""
        return _Asked(cast(PromptConditional, model), self.held_out)


@dataclass(frozen=True)
class _Asked:
    """A model of prompts as a model of labels: each row is asked for in one of its concept's phrasings."""

    model: PromptConditional
    rows: tuple[Tensor, ...]

    @property
    def n_classes(self) -> int:
        """How many concepts there are."""
        return len(self.rows)

    def sample(self, condition: Tensor, *, generator: torch.Generator) -> Tensor:
        """An image of each label (n,), uint8 (n, c, h, w)."""
        return self.model.sample(picked(self.rows, condition, generator), generator=generator)


def picked(rows: Sequence[Tensor], labels: Tensor, generator: torch.Generator) -> Tensor:
    """A condition of each label, drawn from its rows, (n, ...)."""
    shares = torch.rand(len(labels), generator=generator)
    drawn = [
        rows[label][int(share * len(rows[label]))]
        for label, share in zip(labels.tolist(), shares.tolist(), strict=True)
    ]
    return torch.stack(drawn)


def classes_of(model: ClassConditional) -> Classes:
    """Every class of a model."""
    return Classes(tuple(str(label) for label in range(model.n_classes)))


def concepts_of(job: Mapping[str, Any], model: PromptConditional) -> Concepts:
    """The concepts that a job names: what is forgotten first, then what is remembered and what else replaces it.

    Where the request names none to remember, they are `unlearning.general_concepts.GENERAL`.

    Raises:
        UserError: the text encoder would cut a prompt short, cannot read it, or reads two concepts as the same.
    """
    target = job.get("target") or job["condition"]
    asked = [
        _Named(
            target["concept"],
            tuple(target.get("aliases") or ()),
            "/target/concept" if "target" in job else "/condition/concept",
        )
    ]
    remember = job["remember"]
    if remember.get("sets"):
        asked += [_Named(name, (), f"/remember/sets/{escaped(name)}") for name in remember["sets"]]
    elif remember.get("concepts"):
        asked += [_Named(name, (), f"/remember/concepts/{number}") for number, name in enumerate(remember["concepts"])]
    else:
        asked += [_Named(name, (), "/remember") for name in _general(target)]
    stay = {plain(one.concept) for one in asked}
    asked += _replacing(job)
    own = {plain(name) for name in (asked[0].concept, *asked[0].aliases)}
    seen: dict[str, _Named] = {}
    for one in asked:
        if one is asked[0] or plain(one.concept) not in own:
            seen.setdefault(plain(one.concept), one)
    _check_read(model, list(seen.values()))
    worded = [(one, phrasings(one.concept, one.aliases)) for one in seen.values()]
    return Concepts(
        names=tuple(one.concept for one, _ in worded),
        rows=tuple(_tokens(model, said.trained, one.pointer) for one, said in worded),
        unaliased=tuple(_tokens(model, phrasings(one.concept).trained, one.pointer) for one, _ in worded),
        held_out=tuple(_tokens(model, said.held_out, one.pointer) for one, said in worded),
        prompts=tuple(said for _, said in worded),
        added=tuple(label for label, (one, _) in enumerate(worded) if plain(one.concept) not in stay),
    )


def _general(target: Mapping[str, Any]) -> list[str]:
    """The general concepts that share no word with what is to be forgotten, but for the smallest."""
    own = {word for name in (target["concept"], *(target.get("aliases") or ())) for word in plain(name).split()}
    return [name for name in GENERAL if not own & {word for word in name.split() if len(word) > LITTLE_WORD}]


@dataclass(frozen=True)
class _Named:
    """A concept and where the request names it."""

    concept: str
    aliases: tuple[str, ...]
    pointer: str

    @property
    def by_place(self) -> dict[str, str]:
        """Each of its names by where the request has it, the concept itself first."""
        beside = self.pointer.removesuffix("/concept")
        return {self.pointer: self.concept} | {f"{beside}/aliases/{i}": name for i, name in enumerate(self.aliases)}


def _replacing(job: Mapping[str, Any]) -> list[_Named]:
    """The concepts that stand in for the forgotten one."""
    asked = job.get("replace_with")
    if isinstance(asked, Mapping) and asked.get("concept"):
        return [_Named(asked["concept"], (), "/replace_with/concept")]
    given = job.get("replacements") or {}
    return [
        _Named(one["concept"], (), f"/replacements/{escaped(name)}/concept")
        for name, one in given.items()
        if one.get("concept")
    ]


def _check_read(model: PromptConditional, concepts: Sequence[_Named]) -> None:
    """Raise at the name that cannot be phrased or read by itself, or is read as the same tokens as another concept."""
    read: dict[tuple[int, ...], _Named] = {}
    for one in concepts:
        for pointer, name in one.by_place.items():
            said = _phrased(name, pointer)
            rows = _tokens(model, (*said.trained, *said.held_out), pointer)
            other = read.setdefault(tuple(rows[0].tolist()), one)
            if other is not one:
                raise _refused(
                    f"The model reads “{name}” and “{other.concept}” as the same tokens, so that what changes one "
                    "changes the other. Leave one of them out, or name it otherwise",
                    pointer,
                )


def _phrased(name: str, pointer: str) -> Phrasings:
    try:
        return phrasings(name)
    except UnlearningError as error:
        raise _refused(str(error), pointer) from error


def _tokens(model: PromptConditional, prompts: Sequence[str], pointer: str) -> Tensor:
    try:
        return model.tokens(prompts)
    except PromptError as error:
        raise _refused(f"{error}. Name the concept in fewer words", pointer) from error


def _refused(detail: str, pointer: str) -> UserError:
    return UserError("invalid-request", "The request cannot be met as it stands", f"{detail}.", pointer=pointer)
