"""Whether what a job asks for can be done at all: with this checkpoint, these images and these judges."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sqlalchemy.orm import Session

from services import classifiers, conditional_checks, image_sets
from services.conditional_checks import CONDITIONAL, LABELLED, PROMPTED, check_label, n_classes, named, refused
from services.request_parts import Attribute, Judge, OwnClassesJudge
from services.requests import AMNESIA, DebiasRequest, ForgetRequest
from services.tables import Classifier
from services.tenancy import Caller

__all__ = ["METHODS_OF_FAMILY", "SMALLEST_REMEMBER", "check"]

SMALLEST_REMEMBER = 16  # images; fewer say nothing about what must stay (the runner counts again, without copies)
_OF_ALL = ("flow-taming", "steering")
_OF_CLASSES = (*_OF_ALL, "class-taming", "class-removal")
METHODS_OF_FAMILY: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("glow", "realnvp", "maf", "iaf"), _OF_ALL),
    **dict.fromkeys(("tarflow", "class-prior"), _OF_CLASSES),
    **dict.fromkeys(CONDITIONAL, (AMNESIA,)),
}
WITH_PRIORS = ("class-prior",)  # families whose classes can be weighted


def check(
    session: Session, caller: Caller, request: ForgetRequest | DebiasRequest, manifest: Mapping[str, Any]
) -> ForgetRequest | DebiasRequest:
    """Raise unless the job can be done; what it needs is locked against erasure until the transaction ends.

    Returns:
        The request, with what follows from the classes of its judge spelled out.

    Raises:
        NotFound: an image set or a classifier is not the caller's.
        ImageSetErased: its images are gone.
        ClassifierErased: its file is gone.
        InvalidRequest: it does not fit the checkpoint, or its parts do not fit each other.
    """
    _check_family(request, manifest)
    _check_sets(session, caller, request)
    found = {
        pointer: classifiers.live(session, caller.tenant_id, judge.classifier, pointer=f"{pointer}/classifier")
        for pointer, judge in request.judges().items()
        if judge.classifier is not None
    }
    for pointer, classifier in found.items():
        _check_images_of(classifier, manifest, pointer=f"{pointer}/classifier")
    if isinstance(request, DebiasRequest):
        classes = _classes(request.attribute, found.get("/attribute"), manifest)
        _check_distribution(request, classes)
        if request.condition is not None:
            conditional_checks.check_replacements(request, classes)
        return request
    for pointer, judge in request.judges().items():
        if isinstance(judge, Attribute):
            _check_class(judge, _classes(judge, found.get(pointer), manifest), pointer=f"{pointer}/class")
    if request.target.concept is not None:
        known = _classes(request.judge, found.get("/judge"), manifest) if request.judge else []
        return conditional_checks.with_what_the_judge_shows(request, known)
    if request.judge is not None:
        _check_judge(request.judge, found.get("/judge"), n_classes(manifest))
    return request


def _check_family(request: ForgetRequest | DebiasRequest, manifest: Mapping[str, Any]) -> None:
    family = manifest["family"]
    known = METHODS_OF_FAMILY[family]
    if isinstance(request, ForgetRequest):
        _check_target(request, manifest)
    else:
        _check_condition(request, family)
    if request.method not in known:
        raise refused(
            f"{request.method} does not work on a checkpoint of family {family}, which has: {', '.join(known)}.",
            "/method",
            "wrong method for this family",
        )
    if family in CONDITIONAL:
        conditional_checks.check_conditions(request, manifest)
    else:
        _check_no_amnesia(request)


def _check_target(request: ForgetRequest, manifest: Mapping[str, Any]) -> None:
    """A family can forget some kinds of things; the others are refused with what would do."""
    target, family = request.target, manifest["family"]
    if target.concept is not None and family not in PROMPTED:
        takes = (
            'it forgets a class: {"class_label": 0}'
            if family in LABELLED
            else "it forgets what images show, attributes" + (", or a class" if n_classes(manifest) else "")
        )
        raise refused(
            f"A checkpoint of family {family} takes no prompts, and knows no concepts; {takes}. Concepts are of "
            f"checkpoints of family {', '.join(PROMPTED)}.",
            "/target/concept",
            "not with this family",
        )
    if target.class_label is not None and family in PROMPTED:
        raise refused(
            f"A checkpoint of family {family} has no classes, it takes prompts: name a concept, "
            '{"concept": "a dog", "aliases": ["a puppy"]}.',
            "/target/class_label",
            "not with this family",
        )
    if target.class_label is not None:
        check_label(target.class_label, manifest, pointer="/target/class_label")
    if family not in CONDITIONAL:
        return
    if target.at_prior:
        raise refused(
            f"class-removal does not work on a checkpoint of family {family}, which has: {AMNESIA}. Leave "
            '"where" out: the class is unlearned in the weights.',
            "/target/where",
            "wrong method for this family",
        )
    if target.class_label is None and target.concept is None:
        given = "images" if target.images else "attributes"
        name = (
            'the concept that they show: {"concept": "a dog"}'
            if family in PROMPTED
            else 'a class that it makes: {"class_label": 0}'
        )
        raise refused(
            f"A checkpoint of family {family} makes what it is asked for, and {AMNESIA} remaps one condition of it to "
            f"something else. In place of the {given}, name {name}.",
            f"/target/{given}",
            "wrong method for this family",
        )


def _check_condition(request: DebiasRequest, family: str) -> None:
    """A conditional model is debiased where it is asked for one thing; a flow as a whole."""
    if family in CONDITIONAL and request.condition is None:
        example = '{"concept": "a doctor"}' if family in PROMPTED else '{"class_label": 0}'
        raise refused(
            f"A checkpoint of family {family} makes what it is asked for, so that a condition is debiased: send "
            f'"condition": {example}, and "replacements", by class of the judge the condition whose samples show it.',
            "/condition",
            "needed for this family",
        )
    if family not in CONDITIONAL and request.condition is not None:
        raise refused(
            f"A checkpoint of family {family} is asked for nothing: its samples are spread as a whole. Leave "
            '"condition" and "replacements" out.',
            "/condition",
            "not with this family",
        )
    if request.attribute.classes and family not in WITH_PRIORS:
        steered = ", and it is steered" if family not in CONDITIONAL else ""
        raise refused(
            f"The classes of a checkpoint of family {family} have no priors that could be weighted; name a classifier "
            f"or sets{steered}.",
            "/attribute/classes",
            "no class priors",
        )


def _check_no_amnesia(request: ForgetRequest | DebiasRequest) -> None:
    """What Selective Amnesia alone understands is not passed over in silence."""
    criteria = request.criteria.model_dump(exclude_none=True, exclude={"release_weights"})
    given = [f"/{name}" for name in ("replace_with", "judge") if getattr(request, name, None) is not None]
    given += [f"/remember/{name}" for name in ("concepts", "sets") if getattr(request.remember, name) is not None]
    for pointer in (*given, *(f"/criteria/{name}" for name in criteria)):
        raise refused(
            f"{request.method} does not know this member; leave it out. It is for {AMNESIA}, on a condition of a "
            f"checkpoint of family {', '.join(CONDITIONAL)}.",
            pointer,
            "not with this method",
        )


def _check_judge(judge: Judge, classifier: Classifier | None, count: int) -> None:
    """A judge of a model of classes tells them apart as the model does: by label."""
    pointer = "/judge/sets" if classifier is None else "/judge/classifier"
    classes = list(judge.sets or {}) if classifier is None else classifier.classes
    if len(classes) < count:
        raise refused(
            f"The judge tells {len(classes)} classes apart, and the checkpoint has {count}: it needs one for every "
            "label, in the order of the labels; further ones may follow.",
            pointer,
            f"{len(classes)} classes against the checkpoint's {count}",
        )
    if judge.sets is not None and set(classes) != {str(label) for label in range(count)}:
        raise refused(
            f"The sets of this judge are named by the labels of the checkpoint, 0 to {count - 1}: members of a JSON "
            'object have no order. Send {"0": "imgs_...", "1": "imgs_..."} and so on.',
            pointer,
            "not the labels of the checkpoint",
        )


def _check_sets(session: Session, caller: Caller, request: ForgetRequest | DebiasRequest) -> None:
    subjects = request.subjects()
    counts: dict[str, int] = {}
    standing_in = {image_set_id: pointer for pointer, image_set_id in reversed(subjects.items())}
    for pointer, image_set_id in request.image_sets().items():
        if pointer not in subjects and image_set_id in standing_in:
            raise refused(
                "The images to forget, to replace it with, or that show what is to be changed, cannot also be "
                "remembered or be the measure; use another image set.",
                pointer,
                f"the same image set as {standing_in[image_set_id]}",
            )
        counts[pointer] = image_sets.live(session, caller.tenant_id, image_set_id, pointer=pointer).count
    remembered = [count for pointer, count in counts.items() if pointer.startswith("/remember/")]
    if remembered and sum(remembered) < SMALLEST_REMEMBER:
        count, member = sum(remembered), "images" if request.remember.images else "sets"
        held = f"set to remember holds {count} image" if member == "images" else f"sets to remember hold {count} image"
        raise refused(
            f"The {held}{'s' if count > 1 else ''}; at least {SMALLEST_REMEMBER} are needed. Send more, or leave "
            f"{'it' if member == 'images' else 'them'} out: then samples of the model stand in.",
            f"/remember/{member}",
            f"fewer than {SMALLEST_REMEMBER} images",
        )


def _check_images_of(classifier: Classifier, manifest: Mapping[str, Any], *, pointer: str) -> None:
    """The samples of the checkpoint must be what the classifier takes."""
    for taken, made, what in (
        (classifier.channels, manifest.get("channels"), "channels"),
        (classifier.size, manifest.get("image_size"), "pixels a side"),
    ):
        if taken is not None and made is not None and taken != made:
            raise refused(
                f"Classifier {classifier.id} takes images of {taken} {what}; the checkpoint makes images of {made}: "
                "use a classifier of such images, or one that was exported for any size.",
                pointer,
                f"{taken} {what} against the checkpoint's {made}",
            )
    given = len(classifier.scale["mean"]) if classifier.scale else 1
    if given > 1 and manifest.get("channels") not in (None, given):
        raise refused(
            f"Classifier {classifier.id} scales images of {given} channels, and the checkpoint makes images of "
            f"{manifest['channels']}.",
            pointer,
            "scales another number of channels",
        )


def _classes(judge: Judge, classifier: Classifier | None, manifest: Mapping[str, Any]) -> list[str]:
    """The classes that a judge tells apart, by name."""
    if classifier is not None:
        return classifier.classes
    if isinstance(judge, OwnClassesJudge) and judge.classes:
        return [str(label) for label in range(n_classes(manifest))]
    return list(judge.sets or {})


def _check_class(attribute: Attribute, classes: list[str], *, pointer: str) -> None:
    if attribute.name not in classes:
        raise refused(
            f"The classifier has no class {attribute.name}; it has: {named(classes)}.", pointer, "unknown class"
        )


def _check_distribution(request: DebiasRequest, classes: list[str]) -> None:
    given = request.target_distribution
    unknown = [name for name in given if name not in classes]
    missing = [name for name in classes if name not in given]
    faults = []
    if unknown:
        faults.append(f"{named(unknown)} {'is no class' if len(unknown) == 1 else 'are no classes'} of the judge")
    if missing:
        faults.append(f"{named(missing)} {'is' if len(missing) == 1 else 'are'} left out")
    if faults:
        raise refused(
            f"The distribution names other classes than the judge has ({named(classes)}): {'; '.join(faults)}. Give 0 "
            "to a class that must not appear.",
            "/target_distribution",
            "; ".join(faults),
        )
