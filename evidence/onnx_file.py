"""What an ONNX file is made of, read before anything runs it: a foreign file must be whole and hold plain operators."""

from __future__ import annotations

from collections.abc import Collection, Iterator

from evidence.errors import ClassifierFileError

__all__ = ["LARGEST", "check_onnx"]

LARGEST = 512 * 2**20
"""Bytes; a larger file is refused."""

DOMAINS = frozenset({"", "ai.onnx", "ai.onnx.ml"})
"""Operator sets that the ONNX standard defines."""

RUNTIMES = ("com.", "org.pytorch", "ai.onnx")
"""How the names of operator sets begin for which a runtime has code of its own, whatever a file defines under them."""

DEEPEST = 64
"""Nested graphs, beyond which a file is refused."""

LENGTH_DELIMITED = 2

# Fields of onnx.proto that are messages to look into, by message: number -> the message that stands there.
INSIDE: dict[str, dict[int, str]] = {
    "model": {7: "graph", 25: "function"},
    "graph": {1: "node", 5: "tensor", 15: "sparse"},
    "function": {7: "node", 11: "attribute"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse", 23: "sparse"},
    "sparse": {1: "tensor", 2: "tensor"},
}
FUNCTIONS, FUNCTION_NAME, FUNCTION_DOMAIN = 25, 1, 10
OPERATOR, DOMAIN = 4, 7
EXTERNAL_DATA, DATA_LOCATION = 13, 14


def check_onnx(data: bytes) -> None:
    """Raise ClassifierFileError unless the bytes are an ONNX model without outside files and without foreign operators.

    The protocol buffer's own framing is walked; nothing is decoded, allocated or run. Operators that a model defines by
    itself are looked into as well.

    Args:
        data: the whole file.
    """
    if len(data) > LARGEST:
        raise ClassifierFileError(f"the file has {len(data):,} bytes; the most is {LARGEST:,}")
    try:
        view = memoryview(data)
        numbers = {number for number, _, _ in _fields(view)}
        if not {1, 7, 8} <= numbers:  # version, graph, operator sets
            raise ClassifierFileError("the file is no ONNX model: export the classifier to ONNX, weights inside")
        own = {
            (_text(function, FUNCTION_DOMAIN), _text(function, FUNCTION_NAME))
            for number, _, function in _fields(view)
            if number == FUNCTIONS and isinstance(function, memoryview)
        }
        for domain, name in own:
            if domain in DOMAINS or domain.startswith(RUNTIMES):
                raise ClassifierFileError(
                    f"the file redefines {name!r} of {domain!r}, which the runtime has code of its own for"
                )
        _walk("model", view, own, 0)
    except _Malformed as error:
        raise ClassifierFileError("the file is no ONNX model, or cut short: export the classifier again") from error


class _Malformed(Exception):
    """The bytes are no protocol buffer."""


def _walk(kind: str, message: memoryview, own: Collection[tuple[str, str]], depth: int) -> None:
    if depth > DEEPEST:
        raise ClassifierFileError(f"graphs are nested more than {DEEPEST} deep: flatten the model")
    if kind == "node":
        operator = _text(message, DOMAIN), _text(message, OPERATOR)
        if operator[0] not in DOMAINS and operator not in own:
            raise ClassifierFileError(
                f"the operator {operator[1]!r} of {operator[0]!r} is not ONNX's own: export without custom operators"
            )
    for number, _, value in _fields(message):
        if kind == "tensor" and (number == EXTERNAL_DATA or (number == DATA_LOCATION and value == 1)):
            raise ClassifierFileError("weights lie in a file beside the model: save it with its weights inside")
        inner = INSIDE.get(kind, {}).get(number)
        if inner is not None and isinstance(value, memoryview):
            _walk(inner, value, own, depth + 1)


def _text(message: memoryview, wanted: int) -> str:
    """The last text that stands in a field, as protocol buffers are read; empty where there is none."""
    found = [value for number, _, value in _fields(message) if number == wanted and isinstance(value, memoryview)]
    return bytes(found[-1]).decode("utf-8", "replace") if found else ""


def _fields(message: memoryview) -> Iterator[tuple[int, int, int | memoryview]]:
    """(number, wire type, value) of each field: a number for a varint, else the bytes."""
    at, end = 0, len(message)
    while at < end:
        key, at = _varint(message, at)
        wire = key & 7
        if wire == 0:
            value, at = _varint(message, at)
            yield key >> 3, wire, value
            continue
        if wire == LENGTH_DELIMITED:
            size, at = _varint(message, at)
        elif wire in (1, 5):
            size = 8 if wire == 1 else 4
        else:
            raise _Malformed
        if key >> 3 == 0 or at + size > end:
            raise _Malformed
        yield key >> 3, wire, message[at : at + size]
        at += size


def _varint(message: memoryview, at: int) -> tuple[int, int]:
    value = shift = 0
    while at < len(message) and shift < 64:
        byte = message[at]
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, at
        shift += 7
    raise _Malformed
