"""The classifier process: what it lets in, what it finds, and what a hostile file comes to."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from onnx import TensorProto

from services.errors import ClassifierRefused
from services.sandbox import classifiers, try_classifier
from tests.onnx_files import classifier, outside, unlike


def tried(data: bytes, *, output: str = "logits", classes: int = 2) -> dict[str, int | None]:
    return try_classifier([data[:100], data[100:]], len(data), output=output, classes=classes)


def refusal(data: bytes, **said: Any) -> ClassifierRefused:
    with pytest.raises(ClassifierRefused) as refused:
        tried(data, **said)
    return refused.value


@pytest.mark.parametrize(
    ("data", "said", "takes"),
    [
        (classifier(), {}, (1, 8)),
        (classifier(10, shape=("n", 3, 32, 32)), {"classes": 10}, (3, 32)),
        (classifier(shape=("n", 3, "h", "w")), {}, (3, None)),
        (classifier(shape=("n", "c", 16, "w")), {}, (None, 16)),
        (classifier(shape=(4, 1, 8, 8)), {}, (1, 8)),
        (classifier(softmax=True), {"output": "probabilities"}, (1, 8)),
        (classifier(1), {"output": "score"}, (1, 8)),
        (classifier(1, flat=True), {"output": "score"}, (1, 8)),
        (classifier(1), {}, (1, 8)),
        (classifier(domains=("com.microsoft",)), {}, (1, 8)),
    ],
    ids=[
        "fixed",
        "ten classes",
        "any size",
        "any channels",
        "four at once",
        "softmax",
        "(n, 1)",
        "(n)",
        "one logit",
        "a set unused",
    ],
)
def test_what_a_classifier_takes_is_read_from_it(
    data: bytes, said: dict[str, Any], takes: tuple[int | None, int | None]
) -> None:
    assert tried(data, **said) == {"channels": takes[0], "size": takes[1]}


@pytest.mark.parametrize(
    ("data", "said", "reason"),
    [
        (b"\x08\x09 no model", {}, "not_onnx"),
        (classifier()[:-40], {}, "not_onnx"),
        (outside("weights.bin"), {}, "external_data"),
        (outside("/etc/passwd"), {}, "external_data"),
        (outside("*/_ORT_MEM_ADDR_/*"), {}, "external_data"),
        (unlike("Bogus"), {}, "unknown_operator"),
        (unlike("FusedMatMul", domain="com.microsoft"), {}, "foreign_operator"),
        (unlike(kind=TensorProto.FLOAT16), {}, "input_type"),
        (unlike(kind=TensorProto.UINT8), {}, "input_type"),
        (unlike(shape=("n", 64)), {}, "input_shape"),
        (classifier(shape=("n", 2, 8, 8)), {}, "input_shape"),
        (classifier(shape=("n", 1, 8, 9)), {}, "input_shape"),
        (classifier(shape=(4096, 1, 8, 8)), {}, "large_batch"),
        (unlike(), {}, "output_classes"),
        (classifier(3), {}, "output_classes"),
        (classifier(1), {"classes": 3}, "output_classes"),
        (classifier(2), {"output": "score"}, "output_score"),
        (classifier(bias=float("nan")), {}, "not_finite"),
        (classifier(), {"output": "probabilities"}, "no_probabilities"),
        (classifier(1, bias=7.0), {"output": "probabilities"}, "no_probabilities"),
    ],
)
def test_whatever_is_no_classifier_is_refused_with_its_reason(data: bytes, said: dict[str, Any], reason: str) -> None:
    refused = refusal(data, **said)

    assert refused.members["reason"] == reason
    assert "{" not in refused.detail.replace("{{", "").replace('{"input"', "").replace("{0:", "")


def test_wrong_number_of_classes_says_both_and_where(tmp_path: Path) -> None:
    refused = refusal(classifier(3))

    assert "(N, 3)" in refused.detail
    assert "2 classes were named" in refused.detail
    assert refused.members["errors"][0]["parameter"] == "classes"


def test_every_reason_can_be_said() -> None:
    source = (Path(classifiers.__file__).with_name("classifier_process.py")).read_text()

    for reason in classifiers.REFUSALS.keys() - {"crashed"}:
        assert f'"{reason}"' in source


def test_file_that_takes_too_long_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(classifiers, "WALL_SECONDS", 0.0)

    assert refusal(classifier()).members["reason"] == "crashed"


def test_store_that_fails_on_the_way_is_no_refusal() -> None:
    def chunks() -> Iterator[bytes]:
        yield b"\x08"
        raise TimeoutError("the store")

    with pytest.raises(TimeoutError):
        try_classifier(chunks(), 100, output="logits", classes=2)


@pytest.mark.parametrize("tag", [b"\x3a", b"\xba\x00", b"\xba\x80\x00"])
@pytest.mark.parametrize("length", [b"\x0d", b"\x8d\x00", b"\x8d\x80\x80\x00"])
def test_a_foreign_operator_is_found_however_its_name_is_framed(tag: bytes, length: bytes) -> None:
    from services.sandbox.classifier_process import FOREIGN_OPERATOR

    assert FOREIGN_OPERATOR.search(b"xx" + tag + length + b"com.microsoft" + b"xx")
    assert not FOREIGN_OPERATOR.search(b"\x12" + length + b"com.microsoft")
