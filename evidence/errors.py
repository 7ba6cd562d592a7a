"""The refusals of this room: a judge that cannot judge, and too little to judge from."""

from __future__ import annotations


class EvidenceError(ValueError):
    """Something cannot be measured from what was given."""


class InsufficientEvidenceError(EvidenceError):
    """There are too few images to say anything.

    Attributes:
        given: how many there are.
        needed: how many would do; None where no number is known to.
    """

    def __init__(self, message: str, *, given: int, needed: int | None) -> None:
        super().__init__(message)
        self.given = given
        self.needed = needed


class UnknownClassError(EvidenceError):
    """A class that the classifier does not tell: name one of its own."""


class TargetError(EvidenceError):
    """A fraction, a bound, a tolerance or a distribution makes no sense: correct the request."""


class ClassifierError(EvidenceError):
    """A classifier cannot judge the samples of this flow."""


class ClassifierFileError(ClassifierError):
    """The file is no self-contained ONNX model of plain operators: export it again, weights inside."""


class ClassifierShapeError(ClassifierError):
    """The classifier reads or answers another shape than it has to."""


class ClassifierOutputError(ClassifierError):
    """The classifier's answers are not what its description says, or no numbers."""
