"""A caller's classifier in a process of its own: the same answers, refusals that arrive, and walls that stand."""

from __future__ import annotations

import gc
import os
import sys
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
import pytest
from onnx import TensorProto, helper

from evidence.errors import ClassifierFileError, ClassifierOutputError, ClassifierShapeError
from evidence.onnx_model import OnnxModel, OnnxSpec
from tests.worker.judges import SIDE, write_brightness
from worker.runner.judge_process import IMAGES_AT_ONCE, WalledModel

SHAPE = (1, SIDE, SIDE)
SPEC = OnnxSpec(("dark", "bright"), channels=1, size=SIDE, output="score", name="brightness")


def images(n: int) -> npt.NDArray[np.uint8]:
    return np.random.default_rng(1).integers(0, 256, (n, 1, 1, 1), dtype=np.uint8) * np.ones((1, *SHAPE), np.uint8)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A judge of brightness."""
    found = tmp_path / "classifiers" / "0.onnx"
    write_brightness(found)
    return found


def greedy(path: Path) -> Path:
    """A judge of brightness that asks for as much memory as the lightest image is light, and for none of dark ones."""
    inputs = helper.make_tensor_value_info("images", TensorProto.FLOAT, ["N", *SHAPE])
    score = helper.make_tensor_value_info("score", TensorProto.FLOAT, ["N"])
    nodes = [
        helper.make_node("ReduceMean", ["images"], ["mean"], axes=[1, 2, 3], keepdims=0),
        helper.make_node("ReduceMax", ["mean"], ["most"], axes=[0], keepdims=1),
        helper.make_node("Mul", ["most", "large"], ["wide"]),
        helper.make_node("Cast", ["wide"], ["shape"], to=TensorProto.INT64),
        helper.make_node("ConstantOfShape", ["shape"], ["space"]),
        helper.make_node("ReduceSum", ["space"], ["sum"], keepdims=0),
        helper.make_node("Add", ["mean", "sum"], ["score"]),
    ]
    large = helper.make_tensor("large", TensorProto.FLOAT, [1], [2.0**40])
    graph = helper.make_graph(nodes, "greedy", [inputs], [score], [large])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8), path)
    return path


def test_answers_are_those_of_the_model_itself_at_any_number(path: Path) -> None:
    walled, bare = WalledModel(path, SPEC, SHAPE), OnnxModel(path, SPEC, SHAPE)

    for n in (0, 1, IMAGES_AT_ONCE + 3):
        assert np.array_equal(walled.labels(images(n)), bare.labels(images(n)))


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the walls are Linux's")
def test_the_walls_are_those_of_the_reader_of_checkpoints(path: Path) -> None:
    assert "no_new_privs" in WalledModel(path, SPEC, SHAPE).walls


def test_a_file_that_is_no_model_is_refused_as_ever(path: Path) -> None:
    path.write_bytes(b"no model")

    with pytest.raises(ClassifierFileError, match="no ONNX model"):
        WalledModel(path, SPEC, SHAPE)


def test_a_model_of_other_images_is_refused_as_ever(path: Path) -> None:
    write_brightness(path, side=16)

    with pytest.raises(ClassifierShapeError, match="has to read"):
        WalledModel(path, SPEC, SHAPE)


def test_a_model_that_takes_all_memory_for_some_images_is_refused_and_the_runner_goes_on(path: Path) -> None:
    model = WalledModel(greedy(path), SPEC, SHAPE)
    assert model.labels(0 * images(2)).tolist() == [0, 0]  # as at the door

    with pytest.raises(ClassifierOutputError, match="brightness"):
        model.labels(images(2))


def test_the_process_ends_with_its_object(path: Path) -> None:
    model = WalledModel(path, SPEC, SHAPE)
    pid = model.pid

    del model
    gc.collect()

    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_a_process_that_is_gone_is_told(path: Path) -> None:
    model = WalledModel(path, SPEC, SHAPE)
    model.close()

    with pytest.raises(ClassifierOutputError, match="could not be run"):
        model.labels(images(1))
