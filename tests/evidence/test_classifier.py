"""Judges of pictures: those trained from labelled sets, those from ONNX files, and flows of classes."""

import math

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor

from evidence.classifier import Classifier, FlowClassifier, train_classifier
from evidence.errors import (
    ClassifierFileError,
    ClassifierOutputError,
    ClassifierShapeError,
    InsufficientEvidenceError,
    TargetError,
)
from evidence.onnx_classifier import OnnxClassifier, OnnxSpec
from evidence.onnx_file import check_onnx

SHAPE = (1, 8, 8)


def stripes(n: int, upright: bool, seed: int, shape: tuple[int, int, int] = (1, 16, 16)) -> Tensor:
    """Noisy stripes in one of two directions, at any phase and contrast, so that no single pixel tells them apart."""
    generator = torch.Generator().manual_seed(seed)
    axis = torch.arange(shape[2], dtype=torch.float32)
    phase, strength = (torch.rand(n, 1, 1, 1, generator=generator) for _ in range(2))
    wave = torch.sin(axis * 1.5 + phase * 2 * math.pi).expand(n, shape[0], shape[1], shape[2])
    if not upright:
        wave = wave.transpose(2, 3)
    noise = torch.randn(n, *shape, generator=generator)
    return (128 + (30 + 50 * strength) * wave + 12 * noise).clamp(0, 255).to(torch.uint8)


def grey(n: int, level: int, seed: int = 0, shape: tuple[int, int, int] = SHAPE) -> Tensor:
    noise = torch.randint(-6, 7, (n, *shape), generator=torch.Generator().manual_seed(seed))
    return (level + noise).clamp(0, 255).to(torch.uint8)


@pytest.fixture(scope="module")
def judge():
    return train_classifier({"flat": stripes(30, False, 1), "upright": stripes(30, True, 2)}, seed=3, name="stripes")


def test_a_judge_from_thirty_images_a_class_tells_unseen_ones(judge):
    assert (judge(stripes(100, False, 11)) == 0).float().mean() > 0.95
    assert (judge(stripes(100, True, 12)) == 1).float().mean() > 0.95
    assert judge.accuracy.low > 0.8


def test_brightness_alone_can_be_told():
    dark = train_classifier({"dark": grey(20, 60, 1), "light": grey(20, 90, 2)}, seed=1)

    assert dark(torch.cat([grey(5, 60, 3), grey(5, 90, 4)])).tolist() == [0] * 5 + [1] * 5


def test_measured_accuracy_is_that_on_unseen_images():
    def levels(n, centre, seed):
        level = centre + 20 * torch.randn(n, 1, 1, 1, generator=torch.Generator().manual_seed(seed))
        return (level + grey(n, 0, seed).float()).clamp(0, 255).to(torch.uint8)

    judge = train_classifier({"darker": levels(80, 110, 1), "lighter": levels(80, 140, 2)}, seed=2)

    right = [(judge(levels(500, centre, 9 + i)) == i).double().mean() for i, centre in enumerate((110, 140))]

    # Two normals, 1.5 deviations apart: Phi(.75) = .77 is the best that can be done.
    assert judge.accuracy.low <= sum(right) / 2 <= judge.accuracy.high
    assert judge.accuracy.low <= 0.77 <= judge.accuracy.high + 0.05


def test_the_same_seed_gives_the_same_judge(judge):
    again = train_classifier({"flat": stripes(30, False, 1), "upright": stripes(30, True, 2)}, seed=3)
    unseen = stripes(5, True, 5)

    assert torch.equal(again.features(unseen), judge.features(unseen))
    assert again.accuracy == judge.accuracy


def test_labels_do_not_depend_on_batch_mates(judge):
    unseen = torch.cat([stripes(3, True, 5), stripes(3, False, 6)])

    assert judge(unseen).tolist() == [int(judge(unseen[i : i + 1])) for i in range(6)]


def test_chance_is_the_same_whatever_the_sizes():
    generator = torch.Generator().manual_seed(4)
    noise = torch.randint(0, 256, (330, *SHAPE), generator=generator).to(torch.uint8)

    with pytest.raises(InsufficientEvidenceError, match="chance, 50%"):
        train_classifier({"few": noise[:30], "many": noise[30:]}, seed=1)


def test_no_images_give_no_labels(judge):
    none = torch.zeros(0, 1, 16, 16, dtype=torch.uint8)

    assert judge(none).shape == (0,)
    assert len(judge.features(none)) == 0


def test_too_few_images_name_the_number_that_would_do():
    with pytest.raises(InsufficientEvidenceError, match="insufficient evidence") as refusal:
        train_classifier({"a": grey(9, 10), "b": grey(50, 200)}, seed=1)

    assert (refusal.value.given, refusal.value.needed) == (9, 10)


def test_labelled_sets_of_different_shapes_are_refused():
    with pytest.raises(ClassifierShapeError, match="16"):
        train_classifier({"a": grey(12, 10), "b": stripes(12, True, 1)}, seed=1)


def test_one_class_is_no_question():
    with pytest.raises(TargetError, match="two classes"):
        train_classifier({"a": grey(12, 10)}, seed=1)


def test_a_judge_of_another_size_is_refused(judge):
    with pytest.raises(ClassifierShapeError, match=r"\(1, 16, 16\).*\(1, 8, 8\)"):
        judge(grey(2, 10))


def brightness_model(path, *, shape=("N", 1, 8, 8), k=2, slope=1.0, domain="", softmax=False):
    """An ONNX file that answers with multiples of an image's mean: (0, 1, .., k - 1) * slope * mean."""
    weights = (slope * np.arange(k, dtype=np.float32)[None]) if k > 1 else np.full((1, 1), slope, dtype=np.float32)
    nodes = [
        helper.make_node("ReduceMean", ["x", "axes"], ["mean"], keepdims=0),
        helper.make_node("Unsqueeze", ["mean", "one"], ["column"]),
        helper.make_node("MatMul", ["column", "weights"], ["y0"]),
        helper.make_node("Softmax" if softmax else "Identity", ["y0"], ["y"], domain=domain),
    ]
    graph = helper.make_graph(
        nodes,
        "brightness",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, (shape[0], k))],
        [
            numpy_helper.from_array(np.array([1, 2, 3]), "axes"),
            numpy_helper.from_array(np.array([1]), "one"),
            numpy_helper.from_array(weights, "weights"),
        ],
    )
    opsets = [helper.make_opsetid("", 18)] + ([helper.make_opsetid(domain, 1)] if domain else [])
    onnx.save_model(helper.make_model(graph, opset_imports=opsets, ir_version=10), path)
    return path


def spec(**overrides):
    values = {"classes": ("dark", "light"), "channels": 1, "size": 8, "output": "score", "threshold": 0.5}
    return OnnxSpec(**{**values, **overrides})


@pytest.fixture
def path(tmp_path):
    return tmp_path / "model.onnx"


MIXED = torch.cat([grey(3, 60), grey(2, 200)])


def test_a_score_is_held_against_its_threshold(path):
    classifier = OnnxClassifier(brightness_model(path, k=1), spec(), SHAPE)

    assert isinstance(classifier, Classifier)
    assert classifier(MIXED).tolist() == [0, 0, 0, 1, 1]
    assert OnnxClassifier(path, spec(threshold=0.9), SHAPE)(MIXED).tolist() == [0] * 5


def test_logits_of_three_classes_go_to_the_largest(path):
    classifier = OnnxClassifier(
        brightness_model(path, k=3), spec(classes=("a", "b", "c"), output="logits"), SHAPE
    )  # fmt: skip

    assert classifier(MIXED).tolist() == [2] * 5


@pytest.mark.parametrize(("threshold", "labels"), [(0.5, [1] * 5), (0.6, [0, 0, 0, 1, 1]), (0.9, [0] * 5)])
def test_logits_of_two_classes_are_read_as_a_probability(path, threshold, labels):
    # sigmoid(60 / 255) = .56 and sigmoid(200 / 255) = .69
    logits = OnnxClassifier(brightness_model(path), spec(output="logits", threshold=threshold), SHAPE)

    assert logits(MIXED).tolist() == labels

    given = OnnxClassifier(
        brightness_model(path, softmax=True), spec(output="probabilities", threshold=threshold), SHAPE
    )
    assert given(MIXED).tolist() == labels


def test_a_fixed_batch_size_is_kept_to(path):
    fixed = OnnxClassifier(brightness_model(path, shape=(2, 1, 8, 8), k=1), spec(), SHAPE)

    assert fixed(MIXED).tolist() == [0, 0, 0, 1, 1]


def test_images_are_scaled_as_stated(path):
    scaled = spec(scale=((0.5,), (0.25,)), threshold=0.0)

    assert OnnxClassifier(brightness_model(path, k=1), scaled, SHAPE)(MIXED).tolist() == [0, 0, 0, 1, 1]


def test_no_images_pass_without_the_runtime(path):
    assert OnnxClassifier(brightness_model(path, k=1), spec(), SHAPE)(MIXED[:0]).shape == (0,)


def test_another_input_shape_is_told_with_both_shapes(path):
    with pytest.raises(ClassifierShapeError, match=r"'N', 8, 8, 1.*'N', 1, 8, 8"):
        OnnxClassifier(brightness_model(path, shape=("N", 8, 8, 1), k=1), spec(), SHAPE)


def test_a_flow_of_another_size_is_told_with_both_shapes(path):
    with pytest.raises(ClassifierShapeError, match=r"\(1, 8, 8\).*\(3, 32, 32\)"):
        OnnxClassifier(brightness_model(path, k=1), spec(), (3, 32, 32))


def test_another_number_of_answers_is_refused(path):
    with pytest.raises(ClassifierShapeError, match="3 values"):
        OnnxClassifier(brightness_model(path, k=3), spec(output="logits"), SHAPE)


def test_answers_that_are_no_numbers_are_refused(path):
    with pytest.raises(ClassifierOutputError, match="5 of 5"):
        OnnxClassifier(brightness_model(path, k=1, slope=math.nan), spec(), SHAPE)(MIXED)


def test_logits_are_no_probabilities(path):
    with pytest.raises(ClassifierOutputError, match="logits"):
        OnnxClassifier(brightness_model(path, slope=9.0), spec(output="probabilities"), SHAPE)(MIXED)


def test_a_custom_operator_is_refused(path):
    with pytest.raises(ClassifierFileError, match=r"com\.example"):
        OnnxClassifier(brightness_model(path, domain="com.example"), spec(), SHAPE)


def test_weights_beside_the_file_are_refused(path):
    model = onnx.load(brightness_model(path, k=1))
    onnx.save_model(model, path, save_as_external_data=True, size_threshold=0, location="weights.bin")

    with pytest.raises(ClassifierFileError, match="beside"):
        OnnxClassifier(path, spec(), SHAPE)


def test_weights_beside_the_file_are_found_inside_a_branch(path):
    outside = numpy_helper.from_array(np.zeros(4, dtype=np.float32), "outside")
    onnx.external_data_helper.set_external_data(outside, "secret.txt")
    branch = helper.make_graph([helper.make_node("Constant", [], ["z"], value=outside)], "branch", [], [])
    model = onnx.load(brightness_model(path, k=1))
    model.graph.node.append(helper.make_node("If", ["c"], ["w"], then_branch=branch, else_branch=branch))

    with pytest.raises(ClassifierFileError, match="beside"):
        check_onnx(model.SerializeToString())


def test_operators_that_the_file_defines_itself_are_its_own(path):
    model = onnx.load(brightness_model(path, k=1, domain="own"))
    copy = helper.make_node("Identity", ["a"], ["b"])
    model.functions.append(helper.make_function("own", "Identity", ["a"], ["b"], [copy], [helper.make_opsetid("", 18)]))
    onnx.save_model(model, path)

    assert OnnxClassifier(path, spec(), SHAPE)(MIXED).tolist() == [0, 0, 0, 1, 1]


@pytest.mark.parametrize("domain", ["", "ai.onnx.ml", "com.microsoft", "com.ms.internal.nhwc", "org.pytorch.aten"])
def test_a_file_may_not_define_what_the_runtime_has_code_of_its_own_for(path, domain):
    model = onnx.load(brightness_model(path, k=1))
    copy = helper.make_node("Identity", ["a"], ["b"])
    model.functions.append(helper.make_function(domain, "Gelu", ["a"], ["b"], [copy], [helper.make_opsetid("", 18)]))

    with pytest.raises(ClassifierFileError, match="redefines"):
        check_onnx(model.SerializeToString())


@pytest.mark.parametrize("data", [b"", b"not a model", b"\x80\x02}q\x00.", b"\xff" * 64])
def test_a_file_of_something_else_is_refused(path, data):
    path.write_bytes(data)

    with pytest.raises(ClassifierFileError, match="ONNX"):
        OnnxClassifier(path, spec(), SHAPE)


def test_every_shortened_file_is_refused(path):
    data = brightness_model(path, k=1).read_bytes()

    for size in range(0, len(data) - 1, 7):
        path.write_bytes(data[:size])
        with pytest.raises(ClassifierFileError):
            OnnxClassifier(path, spec(), SHAPE)


def test_a_missing_file_is_refused(path):
    with pytest.raises(ClassifierFileError, match="cannot be read"):
        OnnxClassifier(path, spec(), SHAPE)


@pytest.mark.parametrize(
    "nonsense",
    [
        {"classes": ("one",)},
        {"classes": ("same", "same")},
        {"classes": ("a", "b", "c")},
        {"output": "logits", "threshold": 1.0},
        {"output": "labels"},
        {"scale": ((0.5, 0.5, 0.5), (1.0, 1.0, 1.0))},
        {"scale": ((0.5,), (0.0,))},
    ],
)
def test_a_description_that_makes_no_sense_is_refused(nonsense):
    with pytest.raises(TargetError):
        spec(**nonsense)


class Shades:
    """A flow of two classes, as far as classification goes: dark pictures and light ones."""

    def __init__(self, scores: bool) -> None:
        self.scores = scores

    def classify(self, x: Tensor) -> Tensor:
        mean = x.flatten(1).mean(1)
        return torch.stack([-mean, mean], dim=1) if self.scores else (mean > 0).long()


@pytest.mark.parametrize("scores", [True, False])
def test_a_flow_of_classes_judges(scores):
    judge = FlowClassifier(Shades(scores), ("dark", "light"), n_bits=5, seed=1)

    assert isinstance(judge, Classifier)
    assert judge(MIXED).tolist() == [0, 0, 0, 1, 1]
    assert judge(MIXED[:0]).shape == (0,)


def test_a_flow_without_classes_is_no_judge():
    with pytest.raises(ClassifierShapeError, match="classify"):
        FlowClassifier(object(), ("a", "b"), n_bits=5, seed=1)
