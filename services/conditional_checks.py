"""Whether a conditional model can do what a job asks of it: its conditions, what stays, what stands in, who judges."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from services.condition_parts import Remember, Replacement, Shown
from services.errors import InvalidRequest
from services.method_options import AmnesiaOptions
from services.request_names import escaped, plain
from services.requests import AMNESIA, REPLACED_AT_LEAST, DebiasRequest, ForgetRequest

__all__ = [
    "CONDITIONAL",
    "LABELLED",
    "PROMPTED",
    "SCOPES",
    "check_conditions",
    "check_label",
    "check_replacements",
    "n_classes",
    "named",
    "refused",
    "with_what_the_judge_shows",
]

LABELLED = ("vae", "ddpm")  # families whose conditions are classes
PROMPTED = ("stable-diffusion", "stable-diffusion-xl")  # families whose conditions are prompts
CONDITIONAL = (*LABELLED, *PROMPTED)
SCOPES = {
    "vae": ("all", "decoder"),
    "ddpm": ("all",),
    **dict.fromkeys(PROMPTED, ("all", "cross-attention", "all-but-cross-attention")),
}
GUIDED_ALONE = ("null_share", "guidance_scale", "sampling_steps", "gradient_checkpointing")  # parameters
NAMED_AT_MOST = 5  # classes in a sentence
A_CLASS, A_CONCEPT = '{"class_label": 0}', '{"concept": "a dog"}'


def check_conditions(request: ForgetRequest | DebiasRequest, manifest: Mapping[str, Any]) -> None:
    """Raise unless the job's conditions are such as the model has, and go together; of a conditional family alone."""
    family = manifest["family"]
    _check_parameters(request, family)
    _check_remember(request.remember, family)
    if isinstance(request, ForgetRequest):
        _check_forget(request, manifest)
        names = {"/target/concept": request.target.concept} | _by_place("/target", request.target.aliases)
    else:
        _check_debias(request, manifest)
        condition = request.condition
        names = {"/condition/concept": condition.concept if condition else None}
        names |= _by_place("/condition", condition.aliases if condition else None)
    _check_stays(names, request.remember)


def _by_place(of: str, aliases: Sequence[str] | None) -> dict[str, str | None]:
    return {f"{of}/aliases/{number}": alias for number, alias in enumerate(aliases or [])}


def _check_parameters(request: ForgetRequest | DebiasRequest, family: str) -> None:
    options = request.parameters
    if not isinstance(options, AmnesiaOptions):
        return
    if options.scope is not None and options.scope not in SCOPES[family]:
        raise refused(
            f"A model of family {family} has no scope {options.scope}; it has: {', '.join(SCOPES[family])}.",
            "/parameters/scope",
            "not a scope of this family",
        )
    for name in GUIDED_ALONE if family == "vae" else ():
        if getattr(options, name) is not None:
            raise refused(
                f"{name} is no parameter of {AMNESIA} on a checkpoint of family {family}: its samples are drawn in one "
                "step, without guidance. Leave it out.",
                f"/parameters/{name}",
                "not of this family",
            )


def _check_remember(remember: Remember, family: str) -> None:
    if remember.images:
        instead = (
            'Send sets by the concept that they show: {"sets": {"a dog": "imgs_..."}}.'
            if family in PROMPTED
            else 'Leave "remember" out, or send {"generated": 5000}: then samples of the model stand in, each with its '
            "class."
        )
        raise refused(
            f"The model needs to know the condition of every image that must stay, and an image set does not say it. "
            f"{instead}",
            "/remember/images",
            "images without their conditions",
        )
    if remember.named and family not in PROMPTED:
        raise refused(
            f'A checkpoint of family {family} takes no prompts. Leave "remember" out, or send {{"generated": 5000}}: '
            "samples of all its other classes stand in.",
            "/remember/concepts" if remember.concepts else "/remember/sets",
            "not with this family",
        )


def _check_forget(request: ForgetRequest, manifest: Mapping[str, Any]) -> None:
    target, replacement = request.target, request.replacement
    if target.images:
        raise refused(
            f"{AMNESIA} takes no images of the class: the model itself says what it makes of the label. Leave "
            'them out; what the class is to become can be images: "replace_with".',
            "/target/images",
            "not with this method",
        )
    if request.evaluation.same_identity is not None:
        raise refused(
            "evaluation.same_identity is about images to forget, and here a condition is forgotten; leave it out.",
            "/evaluation/same_identity",
            "not with this method",
        )
    if request.judge is not None and request.judge.shows is not None and target.concept is None:
        raise refused(
            '"shows" says which class of the judge shows a concept; a class of the model is judged by its label. '
            "Leave it out.",
            "/judge/shows",
            "of a concept alone",
        )
    if replacement is None or replacement.images is not None:
        if request.criteria.replaced_at_least is not None:
            instead = '{"class_label": 1}' if target.concept is None else A_CONCEPT
            raise refused(
                '"replaced_at_least" asks how often another condition stands in; leave it out, or name it: '
                f'"replace_with": {instead}.',
                "/criteria/replaced_at_least",
                "nothing that could be told replaces the forgotten",
            )
        return
    check_condition(replacement, manifest, pointer="/replace_with")
    if target.class_label is not None and replacement.class_label == target.class_label:
        raise refused(
            f'Class {target.class_label} cannot replace itself: name another class, or "noise".',
            "/replace_with/class_label",
            "the class that is to be forgotten",
        )
    if replacement.concept is not None and plain(replacement.concept) in _own(target.concept, target.aliases):
        raise refused(
            f"{replacement.concept} is what is to be forgotten, and cannot replace itself: name another concept, or "
            '"others" or "noise".',
            "/replace_with/concept",
            "the concept that is to be forgotten",
        )


def _check_debias(request: DebiasRequest, manifest: Mapping[str, Any]) -> None:
    if request.condition is None:  # said before, with what to do
        return
    check_condition(request.condition, manifest, pointer="/condition")
    own: set[int | str] = {request.condition.identity} | _own(request.condition.concept, request.condition.aliases)
    seen: dict[int | str, str] = {}
    for name, shown in (request.replacements or {}).items():
        pointer = f"/replacements/{escaped(name)}"
        check_condition(shown, manifest, pointer=pointer)
        if shown.identity in own:
            raise refused(
                f"What is to show {name} is the condition itself, whose samples are what is to change: name another "
                "one whose samples show it.",
                pointer,
                "the condition that is to be changed",
            )
        if shown.identity in seen:
            raise refused(
                f"{seen[shown.identity]} and {name} have the same replacement, whose samples would show one of them: "
                "name a condition of its own for each.",
                pointer,
                f"the replacement of {seen[shown.identity]}",
            )
        seen[shown.identity] = name


def check_condition(condition: Shown | Replacement, manifest: Mapping[str, Any], *, pointer: str) -> None:
    """Raise unless the model has that condition: a class by its label, or a concept where it takes prompts."""
    family = manifest["family"]
    if condition.concept is not None and family not in PROMPTED:
        raise refused(
            f"A checkpoint of family {family} takes no prompts: name a class in place of the concept, {A_CLASS}.",
            f"{pointer}/concept",
            "not with this family",
        )
    if condition.class_label is not None:
        if family in PROMPTED:
            raise refused(
                f"A checkpoint of family {family} has no classes, it takes prompts: name a concept, {A_CONCEPT}.",
                f"{pointer}/class_label",
                "not with this family",
            )
        check_label(condition.class_label, manifest, pointer=f"{pointer}/class_label")


def _check_stays(names: Mapping[str, str | None], remember: Remember) -> None:
    """What is changed cannot stay, under none of its names."""
    stays = {plain(name): pointer for pointer, name in remember.named.items()}
    for pointer, name in names.items():
        if name is not None and plain(name) in stays:
            raise refused(
                f"{name} is to change and to stay at once. Take it out of one of both.",
                pointer if "/aliases/" in pointer else stays[plain(name)],
                f"the same as {stays[plain(name)] if '/aliases/' in pointer else pointer}",
            )


def _own(concept: str | None, aliases: Sequence[str] | None) -> set[str]:
    return {plain(name) for name in (concept, *(aliases or [])) if name is not None}


# The judge, once its classes are known.


def with_what_the_judge_shows(request: ForgetRequest, classes: Sequence[str]) -> ForgetRequest:
    """The request to forget a concept, with the judge's class of each concept and the criteria that follow spelled out.

    Args:
        request: of a concept.
        classes: that the judge tells apart; none without a judge.

    Raises:
        InvalidRequest: the judge cannot tell what the criteria ask for.
    """
    concept, replaced = request.target.concept or "", request.replacement and request.replacement.concept
    remembered = list(request.remember.named.values())
    if request.judge is None:
        _check_judge_can_be_trained(remembered)
        return _with_bound(request, shown=replaced is not None)
    asked = [concept, *([replaced] if replaced else []), *remembered]
    shows = _shown(asked, request.judge.shows or {}, classes)
    has = f"it tells apart: {named(classes)}"
    if concept not in shows:
        raise refused(
            f'Nothing says which class of the judge shows "{concept}": add it to "shows"; {has}.',
            "/judge/shows",
            "without the concept that is to be forgotten",
        )
    if remembered and not any(name in shows for name in remembered):
        raise refused(
            "The judge knows none of the concepts that must stay, so that nobody could tell whether they do: add one "
            f'of them to "shows"; {has}.',
            "/judge/shows",
            "without a concept that must stay",
        )
    for name, shown in shows.items():
        if name != concept and shown == shows[concept]:
            raise refused(
                f'The judge shows "{name}" and "{concept}" as the same class, {shown}: it cannot tell whether one is '
                f"gone and the other stays. Use a judge that tells them apart; {has}.",
                f"/judge/shows/{escaped(name)}",
                "the class of what is to be forgotten",
            )
    if replaced and replaced not in shows and request.criteria.replaced_at_least is not None:
        raise refused(
            f'"replaced_at_least" asks how often "{replaced}" is seen, and the judge has no class for it: add it to '
            f'"shows", or leave the criterion out; {has}.',
            "/criteria/replaced_at_least",
            "the judge does not know the replacement",
        )
    judge = request.judge.model_copy(update={"shows": shows})
    return _with_bound(request.model_copy(update={"judge": judge}), shown=replaced in shows)


def _check_judge_can_be_trained(remembered: Sequence[str]) -> None:
    if not remembered:
        raise refused(
            "Who tells whether the concept is gone? Without a judge one is trained on the model's own samples of the "
            'concepts that you name: send "remember": {"concepts": ["a dog", "a car"]}, or a classifier that knows the '
            'concept and what stays: "judge": {"classifier": "clf_...", "shows": {...}}.',
            "/judge",
            "neither a judge nor concepts to train one on",
        )


def _shown(asked: Sequence[str], said: Mapping[str, str], classes: Sequence[str]) -> dict[str, str]:
    """The judge's class of each concept: as said, or the class of the same name where there is one."""
    for name, shown in said.items():
        if shown not in classes:
            raise refused(
                f"The judge has no class {shown}; it has: {named(classes)}.",
                f"/judge/shows/{escaped(name)}",
                "unknown class",
            )
    spoken = {plain(name): shown for name, shown in said.items()}
    alike = {plain(one): one for one in reversed(classes)}
    shows: dict[str, str] = {}
    for name in asked:
        found = spoken.pop(plain(name), None) or (name if name in classes else alike.get(plain(name)))
        if found is not None and name not in shows:
            shows[name] = found
    return shows | {name: shown for name, shown in said.items() if plain(name) in spoken}


def _with_bound(request: ForgetRequest, *, shown: bool) -> ForgetRequest:
    """With the default of how often the replacement is to be seen, where it can be told."""
    if not shown or request.criteria.replaced_at_least is not None:
        return request
    criteria = request.criteria.model_copy(update={"replaced_at_least": REPLACED_AT_LEAST})
    return request.model_copy(update={"criteria": criteria})


def check_replacements(request: DebiasRequest, classes: Sequence[str]) -> None:
    """Raise unless every class that is to be seen has a condition that shows it, and no other thing has one."""
    given = request.replacements or {}
    for name in given:
        if name not in classes:
            raise refused(
                f"The judge has no class {name}; it has: {named(classes)}.",
                f"/replacements/{escaped(name)}",
                "unknown class",
            )
    missing = [name for name, share in request.target_distribution.items() if share > 0 and name not in given]
    if missing:
        raise refused(
            f"Samples are to show {named(missing)}, and nothing says which condition shows it: add "
            f'"{missing[0]}": {A_CLASS} or {A_CONCEPT}, or ask for a fraction of 0.',
            "/replacements",
            f"{named(missing)} left out",
        )


def n_classes(manifest: Mapping[str, Any]) -> int:
    """How many classes the checkpoint has; 0 for none."""
    return int((manifest.get("architecture") or {}).get("n_classes") or 0)


def check_label(label: int, manifest: Mapping[str, Any], *, pointer: str) -> None:
    """Raise unless the checkpoint has that class."""
    count = n_classes(manifest)
    if label >= count:
        has = f"its classes are 0 to {count - 1}" if count else "its flow has no classes"
        raise refused(f"The checkpoint has no class {label}: {has}.", pointer, "unknown class")


def named(classes: Sequence[str]) -> str:
    """The first few of them."""
    more = f" and {len(classes) - NAMED_AT_MOST} more" if len(classes) > NAMED_AT_MOST else ""
    return ", ".join(classes[:NAMED_AT_MOST]) + more


def refused(detail: str, pointer: str, why: str) -> InvalidRequest:
    """A request that cannot be met, with the place and what to do."""
    return InvalidRequest(detail, errors=[{"pointer": pointer, "detail": why}])
