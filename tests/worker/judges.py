"""A classifier as a caller has it: the mean brightness of an image, written as ONNX by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

SIDE = 8


def write_brightness(path: Path, *, side: int = SIDE, channels: int = 1) -> dict[str, Any]:
    """Write a judge whose score is the mean of an image's values in [0, 1]; the judge as a job names it.

    Args:
        path: of the file, in the inputs of a runner's folder.
        side: pixels a side of the images that it reads.
        channels: of them.
    """
    images = helper.make_tensor_value_info("images", TensorProto.FLOAT, ["N", channels, side, side])
    score = helper.make_tensor_value_info("score", TensorProto.FLOAT, ["N"])
    mean = helper.make_node("ReduceMean", ["images"], ["score"], axes=[1, 2, 3], keepdims=0)
    graph = helper.make_graph([mean], "brightness", [images], [score])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    onnx.save(model, path)
    return {
        "onnx": f"inputs/{path.parent.name}/{path.name}",
        "classes": ["dark", "bright"],
        "output": "score",
        "threshold": 0.5,
        "scale": "unit",
        "name": "brightness",
        "sha256": "0" * 64,
    }


def write_bands(
    path: Path, *, side: int = 6, classes: int = 3, blind: int | None = None, nothing: bool = True
) -> dict[str, Any]:
    """Write a judge of `tests.unlearning.tiny_conditional`'s stripes: which third is lightest, or that none is.

    Its logits are each third's mean above that of all, times 30, and for a last class "nothing" a constant.

    Args:
        path: of the file, in the inputs of a runner's folder.
        side: pixels a side of the images that it reads.
        classes: into which their height is cut.
        blind: a class that it never sees.
        nothing: whether it tells that none is.
    """
    height = side // classes
    weights = np.full((side, side, classes + 1), -30.0 / side**2, dtype=np.float32)
    weights[..., classes] = 0
    for band in range(classes):
        weights[band * height : (band + 1) * height, :, band] += 30.0 / (height * side)
    offset = np.array([0.0] * classes + [5.0], dtype=np.float32)
    if blind is not None:
        offset[blind] = -100.0
    told = classes + nothing
    weights, offset = weights[..., :told], offset[:told]
    images = helper.make_tensor_value_info("images", TensorProto.FLOAT, ["N", 1, side, side])
    logits = helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["N", told])
    held = [
        numpy_helper.from_array(weights.reshape(side * side, told), "weights"),
        numpy_helper.from_array(offset, "offset"),
    ]
    nodes = [
        helper.make_node("Flatten", ["images"], ["rows"], axis=1),
        helper.make_node("Gemm", ["rows", "weights", "offset"], ["logits"]),
    ]
    graph = helper.make_graph(nodes, "bands", [images], [logits], held)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    onnx.save(model, path)
    return {
        "onnx": f"inputs/{path.parent.name}/{path.name}",
        "classes": ["top", "middle", "bottom", "nothing"][:told],
        "output": "logits",
        "threshold": 0.5,
        "scale": "unit",
        "name": "bands",
        "sha256": "0" * 64,
    }
