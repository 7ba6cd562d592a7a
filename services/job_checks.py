"""Whether what a job asks for can be done at all: with this checkpoint, these images and these judges."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from sqlalchemy.orm import Session

from services import classifiers, image_sets
from services.errors import InvalidRequest
from services.request_parts import Attribute, Judge, OwnClassesJudge
from services.requests import DebiasRequest, ForgetRequest
from services.tables import Classifier
from services.tenancy import Caller

__all__ = ["METHODS_OF_FAMILY", "SMALLEST_REMEMBER", "check"]

SMALLEST_REMEMBER = 16  # images; fewer say nothing about what must stay (the runner counts again, without copies)
_OF_ALL = ("flow-taming", "steering")
_OF_CLASSES = (*_OF_ALL, "class-taming", "class-removal")
METHODS_OF_FAMILY: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("glow", "realnvp", "maf", "iaf"), _OF_ALL),
    **dict.fromkeys(("tarflow", "class-prior"), _OF_CLASSES),
    "vae": (),
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
    if isinstance(request, DebiasRequest):
        _check_distribution(request, _classes(request.attribute, found.get("/attribute"), manifest))
        return
    for pointer, judge in request.judges().items():
        if isinstance(judge, Attribute):
            _check_class(judge, _classes(judge, found.get(pointer), manifest), pointer=f"{pointer}/class")


def _check_family(request: ForgetRequest | DebiasRequest, manifest: Mapping[str, Any]) -> None:
    family = manifest["family"]
    known = METHODS_OF_FAMILY[family]
    if isinstance(request, DebiasRequest) and request.attribute.classes and family not in WITH_PRIORS:
        raise _refused(
            f"The classes of a checkpoint of family {family} have no priors that could be weighted; name a classifier "
            "or sets, and it is steered.",
            "/attribute/classes",
            "no class priors",
        )
    if isinstance(request, ForgetRequest) and request.target.class_label is not None:
        _check_label(request.target.class_label, manifest)
    if request.method not in known:
        raise _refused(
            f"{request.method} does not work on a checkpoint of family {family}, "
            + (f"which has: {', '.join(known)}." if known else "which no method here changes yet."),
            "/method",
            "wrong method for this family",
        )


def _check_sets(session: Session, caller: Caller, request: ForgetRequest | DebiasRequest) -> None:
    subjects = request.subjects()
    standing_in = {image_set_id: pointer for pointer, image_set_id in reversed(subjects.items())}
    for pointer, image_set_id in request.image_sets().items():
        if pointer not in subjects and image_set_id in standing_in:
            raise _refused(
                "The images to forget, or that show what is to be changed, cannot also be remembered or be the "
                "measure; use another image set.",
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


def _check_label(label: int, manifest: Mapping[str, Any]) -> None:
    count = _n_classes(manifest)
    if label >= count:
        has = f"its classes are 0 to {count - 1}" if count else "its flow has no classes"
        raise _refused(f"The checkpoint has no class {label}: {has}.", "/target/class_label", "unknown class")


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
