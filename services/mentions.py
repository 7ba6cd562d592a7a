"""Which jobs name something in their requests: what a job that has not ended needs may not be erased under it."""

from __future__ import annotations

from sqlalchemy import ColumnElement, Text, cast, func, literal, or_
from sqlalchemy.dialects.postgresql import JSONPATH
from sqlalchemy.orm import InstrumentedAttribute

from services.tables import Job

__all__ = ["CLASSIFIERS", "LABELLED_SETS", "mentions"]

# Places in a request, as jsonpath; ``$id`` is what is looked for.
_JUDGES = ("$.target.attributes[*]", "$.attribute", "$.judge")
CLASSIFIERS = tuple(f"{judge}.classifier ? (@ == $id)" for judge in _JUDGES)
LABELLED_SETS = tuple(f"{holder}.sets.* ? (@ == $id)" for holder in (*_JUDGES, "$.remember"))


def mentions(places: tuple[str, ...], name: InstrumentedAttribute[str] | str) -> ColumnElement[bool]:
    """Whether a job's request names it in one of the places."""
    wanted = func.jsonb_build_object(literal("id", Text), literal(name, Text) if isinstance(name, str) else name)
    return or_(*(func.jsonb_path_exists(Job.request, cast(place, JSONPATH), wanted) for place in places))
