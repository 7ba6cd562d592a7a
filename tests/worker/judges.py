"""A classifier as a caller has it: the mean brightness of an image, written as ONNX by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
from onnx import TensorProto, helper

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
