"""What a trial of a foreign classifier does with one ONNX file: load it, run it on images of zeros, say what it is.

Imported by ``classifier_process`` alone, behind its first walls: what it imports may start threads at once.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnxruntime

BATCH = 2  # images of zeros that the classifier is tried on, where it leaves the number open
BATCH_AT_MOST = 256  # that it may insist on
SIDES = (32, 64, 128, 224)  # pixels; tried in turn where the file leaves the side open
CHANNELS = (3, 1)  # likewise
ROUNDING = 1e-2  # by which probabilities may miss, as much as half precision costs
QUIET = 4  # onnxruntime's log level for what is fatal alone
# onnxruntime reads an initializer that says so from a place in its own process's memory.
MEMORY_ADDRESS = b"_ORT_MEM_ADDR_"
# Operator sets that onnxruntime has beside the standard's, which alone jobs take.
FOREIGN_DOMAINS = (
    b"com.microsoft",
    b"com.microsoft.nchwc",
    b"com.microsoft.experimental",
    b"com.microsoft.dml",
    b"com.ms.internal.nhwc",
    b"org.pytorch.aten",
    b"ai.onnx.training",
    b"ai.onnx.preview.training",
)
NODE_DOMAIN = 0x3A  # the tag of an operator's domain (NodeProto, field 7); a length and the name follow


def _varint(value: int) -> bytes:
    """A pattern for a small number as protocol buffers write it, with any number of needless bytes."""
    return b"(?:%s|%s\x80*\x00)" % (re.escape(bytes((value,))), re.escape(bytes((value | 0x80,))))


FOREIGN_OPERATOR = re.compile(
    _varint(NODE_DOMAIN) + b"(?:%s)" % b"|".join(_varint(len(name)) + re.escape(name) for name in FOREIGN_DOMAINS)
)

Shape = Sequence[int | str | None]


class Refused(Exception):
    """A file that is not let in: the reason's code, and figures or shapes that explain it."""

    def __init__(self, code: str, **figures: Any) -> None:
        super().__init__(code)
        self.facts = {"refused": code, **figures}


def load(data: bytes) -> Any:
    """A session on the file, one thread, nothing rewritten; raises ``Refused``."""
    if MEMORY_ADDRESS in data:
        raise Refused("external_data")
    if FOREIGN_OPERATOR.search(data):
        raise Refused("foreign_operator")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = QUIET
    try:
        return onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    except MemoryError as error:
        raise Refused("too_much_memory") from error
    except Exception as error:
        text = str(error)
        if "xternal data" in text or "external_data" in text:
            raise Refused("external_data") from error
        if "No Op registered" in text or "opset" in text.lower() or "NOT_IMPLEMENTED" in text:
            raise Refused("unknown_operator", version=onnxruntime.__version__) from error
        raise Refused("too_much_memory" if "alloc" in text else "not_onnx") from error


def one_of_each(session: Any) -> tuple[Any, Any]:
    """The input and the output, of which there must be one each."""
    inputs, outputs = session.get_inputs(), session.get_outputs()
    if len(inputs) != 1 or len(outputs) != 1:
        raise Refused("several", inputs=len(inputs), outputs=len(outputs))
    return inputs[0], outputs[0]


def input_of(node: Any) -> tuple[int, int | None, int | None]:
    """How many images to try it on, their channels and side (None where it takes any); raises ``Refused``."""
    if node.type != "tensor(float)":
        raise Refused("input_type", type=short(node.type))
    shape: Shape = node.shape or ()
    if len(shape) != 4:
        raise Refused("input_shape", shape=shown(shape))
    batch, channels, height, width = (size if isinstance(size, int) and size > 0 else None for size in shape)
    if batch is not None and batch > BATCH_AT_MOST:
        raise Refused("large_batch", batch=batch, most=BATCH_AT_MOST)
    if channels not in (None, *CHANNELS) or (height is not None and width is not None and height != width):
        raise Refused("input_shape", shape=shown(shape))
    return batch or BATCH, channels, height or width


def tried(session: Any, name: str, batch: int, channels: int | None, side: int | None) -> Any:
    """What it answers to black images of the first kind that it takes; raises ``Refused``."""
    for count in CHANNELS if channels is None else (channels,):
        for pixels in SIDES if side is None else (side,):
            try:
                return session.run(None, {name: np.zeros((batch, count, pixels, pixels), np.float32)})[0]
            except MemoryError as error:
                raise Refused("too_much_memory") from error
            except Exception as error:
                if "alloc" in str(error):
                    raise Refused("too_much_memory") from error
    raise Refused("does_not_run")


def judge(answer: Any, batch: int, output: str, classes: int) -> None:
    """Raise ``Refused`` unless the answer has the announced form."""
    if not isinstance(answer, np.ndarray) or answer.dtype.kind != "f":
        raise Refused("output_type")
    single = answer.shape in ((batch,), (batch, 1))
    if output == "score" and not single:
        raise Refused("output_score", shape=shown(("N", *answer.shape[1:])))
    if not (single and classes == 2) and answer.shape != (batch, classes):
        raise Refused("output_classes", shape=shown(("N", *answer.shape[1:])), classes=classes)
    if not np.isfinite(answer).all():
        raise Refused("not_finite")
    inside = bool((answer >= -ROUNDING).all() and (answer <= 1 + ROUNDING).all())
    sums = single or bool((np.abs(answer.sum(axis=1) - 1) <= ROUNDING).all())
    if output == "probabilities" and not (inside and sums):
        raise Refused("no_probabilities")


def facts_of(data: bytes, output: str, classes: int) -> dict[str, Any]:
    """What is said about one file."""
    try:
        session = load(data)
        node, _ = one_of_each(session)
        batch, channels, side = input_of(node)
        judge(tried(session, node.name, batch, channels, side), batch, output, classes)
    except Refused as refusal:
        return refusal.facts
    except MemoryError:
        return {"refused": "too_much_memory"}
    return {"channels": channels, "size": side}


def shown(shape: Sequence[Any]) -> str:
    """A shape as figures, without the names that a file gives its axes."""
    return f"({', '.join(str(size) if isinstance(size, int) else 'N' if size == 'N' else '?' for size in shape[:8])})"


def short(kind: str) -> str:
    """The type of a tensor, which is onnxruntime's own word."""
    return str(kind)[:40]


def warm_up() -> None:
    """Make onnxruntime load what it loads late, before the files are out of reach."""
    facts_of(b"no model", "logits", 2)
