"""The tree of refusals: each leaf is one RFC 9457 problem, and its docstring is its title.

ForgetdError
├── Unauthenticated       401  missing-key, wrong-key
├── NotFound              404  not-found, unknown-path
├── MethodNotAllowed      405
├── Conflict              409  checkpoint-not-ready, result-not-available, ...
├── TooLarge              413
├── UnsupportedMediaType  415
├── Unprocessable         422  invalid-request and what is wrong with content
├── TooMany               429  quota-exceeded
├── Internal              500  a defect of ours; the log has more under the reference
└── Unavailable           503  a server behind us does not answer
"""

from __future__ import annotations

from typing import Any, ClassVar

__all__ = [
    "CheckpointNotReady",
    "ClassifierErased",
    "ClassifierInUse",
    "ClassifierRefused",
    "Conflict",
    "DigestMismatch",
    "EmptyUpload",
    "ForgetdError",
    "IdempotencyKeyReused",
    "ImageRefused",
    "ImageSetErased",
    "ImageSetInUse",
    "Internal",
    "InvalidRequest",
    "JobEnded",
    "MethodNotAllowed",
    "MissingKey",
    "NotACheckpoint",
    "NotAClassifier",
    "NotFound",
    "QuotaExceeded",
    "ResultNotAvailable",
    "ResultWithheld",
    "TooLarge",
    "TooMany",
    "Unauthenticated",
    "Unavailable",
    "UnknownPath",
    "Unprocessable",
    "UnsupportedMediaType",
    "UploadIncomplete",
    "WrongKey",
]


class ForgetdError(Exception):
    """Something went wrong that the caller can read about."""

    status: ClassVar[int] = 500
    slug: ClassVar[str] = "internal"
    headers: ClassVar[dict[str, str]] = {}

    def __init__(self, detail: str, **members: Any) -> None:
        super().__init__(detail)
        self.detail = detail
        self.members = members

    @property
    def type_uri(self) -> str:
        """The stable URI of this kind of problem."""
        return f"urn:forgetd:problem:{self.slug}"

    @property
    def title(self) -> str:
        """The first line of the class's docstring."""
        return (type(self).__doc__ or "").strip().splitlines()[0]

    def problem(self) -> dict[str, Any]:
        """The RFC 9457 members, extension members included."""
        return {
            "type": self.type_uri,
            "title": self.title,
            "status": self.status,
            "detail": self.detail,
            **self.members,
        }


class Unauthenticated(ForgetdError):
    """This call needs an API key."""

    status = 401
    slug = "unauthenticated"
    headers: ClassVar[dict[str, str]] = {"WWW-Authenticate": "Bearer"}


class MissingKey(Unauthenticated):
    """No API key was sent."""

    slug = "missing-key"


class WrongKey(Unauthenticated):
    """The API key is unknown, revoked or expired."""

    slug = "wrong-key"


class NotFound(ForgetdError):
    """Nothing of that name is yours."""

    status = 404
    slug = "not-found"


class UnknownPath(NotFound):
    """There is nothing at this path."""

    slug = "unknown-path"


class MethodNotAllowed(ForgetdError):
    """This path does not answer to this method."""

    status = 405
    slug = "method-not-allowed"


class Conflict(ForgetdError):
    """The resource is in a state that does not allow this."""

    status = 409
    slug = "conflict"


class CheckpointNotReady(Conflict):
    """The checkpoint has not passed validation."""

    slug = "checkpoint-not-ready"


class ClassifierErased(Conflict):
    """This classifier has been erased."""

    slug = "classifier-erased"


class ClassifierInUse(Conflict):
    """A job that has not ended needs this classifier."""

    slug = "classifier-in-use"


class ImageSetErased(Conflict):
    """The images of this set have been erased."""

    slug = "image-set-erased"


class ImageSetInUse(Conflict):
    """A job that has not ended reads these images."""

    slug = "image-set-in-use"


class JobEnded(Conflict):
    """The job has already ended."""

    slug = "job-ended"


class ResultNotAvailable(Conflict):
    """The job has not produced this."""

    slug = "result-not-available"


class ResultWithheld(Conflict):
    """The weights are withheld because the job's criteria were not met."""

    slug = "result-withheld"


class UploadIncomplete(Conflict):
    """Parts of this upload have not arrived."""

    slug = "upload-incomplete"


class TooLarge(ForgetdError):
    """The body is larger than this service accepts."""

    status = 413
    slug = "too-large"


class UnsupportedMediaType(ForgetdError):
    """The body is of a media type that this path does not take."""

    status = 415
    slug = "unsupported-media-type"


class Unprocessable(ForgetdError):
    """The content cannot be used."""

    status = 422
    slug = "unprocessable"


class InvalidRequest(Unprocessable):
    """The request does not have the expected form."""

    slug = "invalid-request"


class EmptyUpload(Unprocessable):
    """The upload is empty."""

    slug = "empty-upload"


class DigestMismatch(Unprocessable):
    """The bytes received are not the bytes announced."""

    slug = "digest-mismatch"


class NotACheckpoint(Unprocessable):
    """The file is not a checkpoint of a known format."""

    slug = "not-a-checkpoint"


class NotAClassifier(Unprocessable):
    """The file is not an ONNX file."""

    slug = "not-a-classifier"


class ClassifierRefused(Unprocessable):
    """The file is not a classifier that jobs can use."""

    slug = "classifier-refused"


class ImageRefused(Unprocessable):
    """An image was refused."""

    slug = "image-refused"


class IdempotencyKeyReused(Unprocessable):
    """This Idempotency-Key was used for a different request."""

    slug = "idempotency-key-reused"


class TooMany(ForgetdError):
    """You have more of this than you may at once."""

    status = 429
    slug = "too-many"
    headers: ClassVar[dict[str, str]] = {"Retry-After": "30"}


class QuotaExceeded(TooMany):
    """You have as many open jobs as you may."""

    slug = "quota-exceeded"


class Internal(ForgetdError):
    """Something went wrong on our side."""

    status = 500
    slug = "internal"


class Unavailable(ForgetdError):
    """A server that forgetd depends on does not answer."""

    status = 503
    slug = "unavailable"
    headers: ClassVar[dict[str, str]] = {"Retry-After": "5"}
