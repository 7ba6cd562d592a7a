"""Whether what a job asks for can be done at all: with this checkpoint, these images and these judges."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from sqlalchemy.orm import Session

from services import classifiers, image_sets
from services.errors import InvalidRequest
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
    "vae": (AMNESIA,),
}
WITH_PRIORS = ("class-prior",)  # families whose classes can be weighted
NAMED_AT_MOST = 5  # classes in a sentence


def check(
    session: Session, caller: Caller, request: ForgetRequest | DebiasRequest, manifest: Mapping[str, Any]
) -> None:
    """Raise unless the job can be done; what it needs is locked against erasure until the transaction ends.

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
    if isinstance(request, ForgetRequest) and request.judge is not None:
        _check_judge(request.judge, found.get("/judge"), _n_classes(manifest))
    if isinstance(request, DebiasRequest):
        _check_distribution(request, _classes(request.attribute, found.get("/attribute"), manifest))
        return
    for pointer, judge in request.judges().items():
        if isinstance(judge, Attribute):
            _check_class(judge, _classes(judge, found.get(pointer), manifest), pointer=f"{pointer}/class")


def _check_family(request: ForgetRequest | DebiasRequest, manifest: Mapping[str, Any]) -> None:
    family = manifest["family"]
    known = METHODS_OF_FAMILY[family]
    own_classes = isinstance(request, DebiasRequest) and request.attribute.classes
    if own_classes and family not in WITH_PRIORS and "steering" in known:
        raise _refused(
            f"The classes of a checkpoint of family {family} have no priors that could be weighted; name a classifier "
            "or sets, and it is steered.",
            "/attribute/classes",
            "no class priors",
        )
    if isinstance(request, ForgetRequest) and request.target.class_label is not None:
        _check_label(request.target.class_label, manifest, pointer="/target/class_label")
    if request.method not in known:
        pointer, instead = _instead(request) if AMNESIA in known else ("/method", "")
        raise _refused(
            f"{request.method} does not work on a checkpoint of family {family}, which has: {', '.join(known)}."
            + instead,
            pointer,
            "wrong method for this family",
        )
    if isinstance(request, ForgetRequest):
        if request.method == AMNESIA:
            _check_amnesia(request, manifest)
        else:
            _check_no_amnesia(request)


def _instead(request: ForgetRequest | DebiasRequest) -> tuple[str, str]:
    """What stands in the way of a method for a model of classes, and what would do."""
    if isinstance(request, DebiasRequest):
        return "/method", ""
    target = request.target
    if target.at_prior:
        return "/target/where", ' Leave "where" out: the class is unlearned in the weights.'
    if target.class_label is None:
        given = "images" if target.images else "attributes"
        return f"/target/{given}", f' Name a class that it makes in place of the {given}: {{"class_label": 0}}.'
    return "/method", ""


def _check_amnesia(request: ForgetRequest, manifest: Mapping[str, Any]) -> None:
    """Selective Amnesia maps a class of a model to something else; nothing but the model says what its classes are."""
    if request.target.images:
        raise _refused(
            f"{AMNESIA} takes no images of the class: the model itself says what it makes of the label. Leave "
            'them out; what the class is to become can be images: "replace_with".',
            "/target/images",
            "not with this method",
        )
    if request.remember.images:
        raise _refused(
            "The model needs to know the class of every image that must stay, and an image set does not say it. Leave "
            '"remember" out, or send {"generated": 5000}: then samples of the model stand in, each with its class.',
            "/remember/images",
            "images without their classes",
        )
    if request.evaluation.same_identity is not None:
        raise _refused(
            "evaluation.same_identity is about images to forget, and here a class is forgotten; leave it out.",
            "/evaluation/same_identity",
            "not with this method",
        )
    replacing = request.replacing_class
    if replacing is None:
        if request.criteria.replaced_at_least is not None:
            raise _refused(
                '"replaced_at_least" asks how often a class stands in; leave it out, or name that class: '
                '"replace_with": {"class_label": 1}.',
                "/criteria/replaced_at_least",
                "no class replaces the forgotten one",
            )
        return
    _check_label(replacing, manifest, pointer="/replace_with/class_label")
    if replacing == request.target.class_label:
        raise _refused(
            f'Class {replacing} cannot replace itself: name another class, or "noise".',
            "/replace_with/class_label",
            "the class that is to be forgotten",
        )


def _check_no_amnesia(request: ForgetRequest) -> None:
    """What Selective Amnesia alone understands is not passed over in silence."""
    criteria = request.criteria.model_dump(exclude_none=True, exclude={"release_weights"})
    given = ["/replace_with"] * (request.replace_with is not None) + ["/judge"] * (request.judge is not None)
    for pointer in (*given, *(f"/criteria/{name}" for name in criteria)):
        families = ", ".join(family for family, methods in METHODS_OF_FAMILY.items() if AMNESIA in methods)
        raise _refused(
            f"{request.method} does not know this member; leave it out. It is for {AMNESIA}, on a class of a "
            f"checkpoint of family {families}.",
            pointer,
            "not with this method",
        )


def _check_judge(judge: Judge, classifier: Classifier | None, count: int) -> None:
    """A judge of a model of classes tells them apart as the model does: by label."""
    pointer = "/judge/sets" if classifier is None else "/judge/classifier"
    classes = list(judge.sets or {}) if classifier is None else classifier.classes
    if len(classes) < count:
        raise _refused(
            f"The judge tells {len(classes)} classes apart, and the checkpoint has {count}: it needs one for every "
            "label, in the order of the labels; further ones may follow.",
            pointer,
            f"{len(classes)} classes against the checkpoint's {count}",
        )
    if judge.sets is not None and set(classes) != {str(label) for label in range(count)}:
        raise _refused(
            f"The sets of this judge are named by the labels of the checkpoint, 0 to {count - 1}: members of a JSON "
            'object have no order. Send {"0": "imgs_...", "1": "imgs_..."} and so on.',
            pointer,
            "not the labels of the checkpoint",
        )


def _check_sets(session: Session, caller: Caller, request: ForgetRequest | DebiasRequest) -> None:
    subjects = request.subjects()
    standing_in = {image_set_id: pointer for pointer, image_set_id in reversed(subjects.items())}
    for pointer, image_set_id in request.image_sets().items():
        if pointer not in subjects and image_set_id in standing_in:
            raise _refused(
                "The images to forget, to replace it with, or that show what is to be changed, cannot also be "
                "remembered or be the measure; use another image set.",
                pointer,
                f"the same image set as {standing_in[image_set_id]}",
            )
        row = image_sets.live(session, caller.tenant_id, image_set_id, pointer=pointer)
        if pointer == "/remember/images" and row.count < SMALLEST_REMEMBER:
            raise _refused(
                f"The set to remember holds {row.count} image{'s' if row.count > 1 else ''}; at least "
                f"{SMALLEST_REMEMBER} are needed. Send more, or leave it out: then samples of the model stand in.",
                pointer,
                f"fewer than {SMALLEST_REMEMBER} images",
            )


def _check_images_of(classifier: Classifier, manifest: Mapping[str, Any], *, pointer: str) -> None:
    """The samples of the checkpoint must be what the classifier takes."""
    for taken, made, what in (
        (classifier.channels, manifest.get("channels"), "channels"),
        (classifier.size, manifest.get("image_size"), "pixels a side"),
    ):
        if taken is not None and made is not None and taken != made:
            raise _refused(
                f"Classifier {classifier.id} takes images of {taken} {what}; the checkpoint makes images of {made}: "
                "use a classifier of such images, or one that was exported for any size.",
                pointer,
                f"{taken} {what} against the checkpoint's {made}",
            )
    given = len(classifier.scale["mean"]) if classifier.scale else 1
    if given > 1 and manifest.get("channels") not in (None, given):
        raise _refused(
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
        return [str(label) for label in range(_n_classes(manifest))]
    return list(judge.sets or {})


def _n_classes(manifest: Mapping[str, Any]) -> int:
    return int((manifest.get("architecture") or {}).get("n_classes") or 0)


def _check_class(attribute: Attribute, classes: list[str], *, pointer: str) -> None:
    if attribute.name not in classes:
        raise _refused(
            f"The classifier has no class {attribute.name}; it has: {_named(classes)}.", pointer, "unknown class"
        )


def _check_label(label: int, manifest: Mapping[str, Any], *, pointer: str) -> None:
    count = _n_classes(manifest)
    if label >= count:
        has = f"its classes are 0 to {count - 1}" if count else "its flow has no classes"
        raise _refused(f"The checkpoint has no class {label}: {has}.", pointer, "unknown class")


def _check_distribution(request: DebiasRequest, classes: list[str]) -> None:
    given = request.target_distribution
    unknown = [name for name in given if name not in classes]
    missing = [name for name in classes if name not in given]
    faults = []
    if unknown:
        faults.append(f"{_named(unknown)} {'is no class' if len(unknown) == 1 else 'are no classes'} of the judge")
    if missing:
        faults.append(f"{_named(missing)} {'is' if len(missing) == 1 else 'are'} left out")
    if faults:
        raise _refused(
            f"The distribution names other classes than the judge has ({_named(classes)}): {'; '.join(faults)}. Give 0 "
            "to a class that must not appear.",
            "/target_distribution",
            "; ".join(faults),
        )


def _named(classes: Iterable[str]) -> str:
    names = list(classes)
    more = f" and {len(names) - NAMED_AT_MOST} more" if len(names) > NAMED_AT_MOST else ""
    return ", ".join(names[:NAMED_AT_MOST]) + more


def _refused(detail: str, pointer: str, why: str) -> InvalidRequest:
    return InvalidRequest(detail, errors=[{"pointer": pointer, "detail": why}])
