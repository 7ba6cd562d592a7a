"""Checkpoints: the same bits come back, and what is wrong is refused with what to do."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from models.checkpoints import (
    METADATA_KEY,
    Manifest,
    load_checkpoint,
    load_flow,
    read_manifest,
    save_checkpoint,
    tensor_digest,
)
from models.errors import (
    ArchitectureError,
    CheckpointError,
    CheckpointFormatError,
    DigestError,
    ManifestError,
    NonFiniteError,
    TensorMismatchError,
    UnknownFamilyError,
)
from tests.models.flow_table import FLOWS, VECTORS, images

SQUARE = sorted(name for name in FLOWS if "oblong" not in name)


@pytest.mark.parametrize("name", SQUARE)
def test_save_and_load_give_the_same_bits(name: str, tmp_path: Path) -> None:
    flow = FLOWS[name]()
    x = images(flow, 3)

    manifest = save_checkpoint(tmp_path / "a.safetensors", flow, extra={"why": "test"})
    loaded = load_flow(tmp_path / "a.safetensors")

    assert torch.equal(loaded.log_prob(x), flow.log_prob(x))
    assert manifest == read_manifest(tmp_path / "a.safetensors")
    assert manifest.extra == {"why": "test"}
    assert manifest.image_shape == flow.image_shape


@pytest.mark.parametrize("name", ["two-channels-oblong", *VECTORS])
def test_what_is_no_square_image_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(ArchitectureError):
        save_checkpoint(tmp_path / "a.safetensors", {**FLOWS, **VECTORS}[name]())


def test_a_loaded_flow_can_be_trained_and_does_not_initialise_itself(tmp_path: Path) -> None:
    flow = FLOWS["affine-lu"]()
    for key, value in flow.named_buffers():
        if key.endswith("initialized"):
            value.zero_()
    save_checkpoint(tmp_path / "a.safetensors", flow)

    loaded = load_checkpoint(tmp_path / "a.safetensors").train()
    load_flow(tmp_path / "a.safetensors").log_prob(images(flow, 3))

    assert all(parameter.requires_grad for parameter in loaded.parameters())
    assert tensor_digest(loaded.state_dict()) == tensor_digest(flow.state_dict())


def test_a_checkpoint_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "a.safetensors", FLOWS["rgb"]())

    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]


def test_the_digest_does_not_depend_on_the_order_of_tensors() -> None:
    a, b = torch.zeros(2), torch.ones(3)

    assert tensor_digest({"a": a, "b": b}) == tensor_digest({"b": b, "a": a})
    assert tensor_digest({"a": a}) != tensor_digest({"a": a.reshape(1, 2)})


def test_weights_that_are_not_finite_are_not_saved(tmp_path: Path) -> None:
    flow = FLOWS["rgb"]()
    with torch.no_grad():
        next(flow.parameters()).fill_(torch.nan)

    with pytest.raises(NonFiniteError):
        save_checkpoint(tmp_path / "a.safetensors", flow)
    assert list(tmp_path.iterdir()) == []


def test_a_module_of_no_known_family_and_an_oblong_flow_are_not_saved(tmp_path: Path) -> None:
    with pytest.raises(UnknownFamilyError):
        save_checkpoint(tmp_path / "a.safetensors", nn.Linear(1, 1))
    with pytest.raises(ArchitectureError):
        save_checkpoint(tmp_path / "a.safetensors", FLOWS["two-channels-oblong"]())


def rewritten(
    path: Path, manifest: Callable[[dict[str, Any]], None] | None = None, tensors: Callable[[Any], None] | None = None
) -> Path:
    """A checkpoint whose manifest or tensors were changed behind its back."""
    save_checkpoint(path, FLOWS["affine-lu"]())
    with safe_open(path, framework="pt") as file:
        fields = json.loads(file.metadata()[METADATA_KEY])
        values = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 it is no dict
    if manifest is not None:
        manifest(fields)
    if tensors is not None:
        tensors(values)
    save_file(values, path, metadata={METADATA_KEY: json.dumps(fields)})
    return path


NAME = "blocks.0.flows.0.actnorm.loc"


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        (lambda m: m.update(family="gan"), UnknownFamilyError, "known: .*glow"),
        (lambda m: m.update(schema_version=99), ManifestError, "version 99"),
        (lambda m: m.pop("n_bits"), ManifestError, "n_bits"),
        (lambda m: m.update(n_bits="5"), ManifestError, "n_bits"),
        (lambda m: m.update(surprise=1), ManifestError, "surprise"),
        (lambda m: m.update(extra={"a": "\0"}), ManifestError, "NUL"),
        (lambda m: m.update(extra={"\ud800": 1}), ManifestError, "surrogate"),
        (lambda m: m.update(extra={"a": [float("nan")]}), ManifestError, "no JSON"),
        (lambda m: m.update(extra={"a": float("-inf")}), ManifestError, "no JSON"),
        (lambda m: m.update(extra={"a": "x" * 2**16}), ManifestError, "characters"),
        (lambda m: m.update(extra={"a": json.loads("[" * 40 + "]" * 40)}), ManifestError, "levels"),
        (lambda m: m.update(family="x" * 60_000), UnknownFamilyError, r"x\.\.\. is unknown"),
        (lambda m: m["architecture"].pop("hidden"), ManifestError, "hidden"),
        (lambda m: m["architecture"].update(hidden=10**8), ArchitectureError, "hidden"),
        (lambda m: m["architecture"].update(n_flow=3), TensorMismatchError, "missing"),
        (lambda m: m["architecture"].update(n_flow=1), TensorMismatchError, "do not belong"),
        (lambda m: m.update(image_size=6), ArchitectureError, "halved"),
        (lambda m: m.update(channels=3), TensorMismatchError, "shape"),
        (lambda m: m.update(tensor_digest="0" * 64), DigestError, "altered"),
    ],
)
def test_a_manifest_that_does_not_fit_is_refused(
    tmp_path: Path, change: Callable[[dict[str, Any]], None], error: type[CheckpointError], says: str
) -> None:
    path = rewritten(tmp_path / "a.safetensors", manifest=change)

    with pytest.raises(error, match=says):
        load_checkpoint(path)


def test_a_number_beyond_a_double_is_refused(tmp_path: Path) -> None:
    text = read_manifest(rewritten(tmp_path / "a.safetensors")).to_json()

    with pytest.raises(ManifestError, match="not finite"):
        Manifest.from_json(text.replace('"extra": {}', '"extra": {"a": 1e999}'))


def test_a_message_quotes_little_of_a_hostile_file(tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").write_bytes(header({"n" * 10_000: 1}))
    refusals: list[str] = []
    for path in (
        tmp_path / "a.safetensors",
        rewritten(tmp_path / "b.safetensors", manifest=lambda m: m.update(n_bits="5" * 10_000)),
        rewritten(tmp_path / "c.safetensors", manifest=lambda m: m.update({"o" * 10_000: 1})),
    ):
        with pytest.raises(CheckpointError) as refusal:
            load_checkpoint(path)
        refusals.append(str(refusal.value))

    assert max(len(refusal) for refusal in refusals) < 300


def test_what_could_not_be_read_again_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(ManifestError):
        save_checkpoint(tmp_path / "a.safetensors", FLOWS["rgb"](), extra={"a": "x" * 2**16})

    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        (lambda t: t.pop(NAME), TensorMismatchError, "missing: " + NAME),
        (lambda t: t.update(odd=torch.zeros(1)), TensorMismatchError, "odd"),
        (lambda t: t.update({NAME: torch.zeros(1)}), TensorMismatchError, "shape"),
        (lambda t: t.update({NAME: t[NAME].double()}), TensorMismatchError, "float64"),
        (lambda t: t.update({NAME: t[NAME] * torch.nan}), NonFiniteError, "NaN"),
        (lambda t: t.update({NAME: t[NAME] + 1}), DigestError, "altered"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(
    tmp_path: Path, change: Callable[[Any], None], error: type[CheckpointError], says: str
) -> None:
    path = rewritten(tmp_path / "a.safetensors", tensors=change)

    with pytest.raises(error, match=says):
        load_checkpoint(path)


def test_a_safetensors_file_without_manifest_asks_for_conversion(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(1)}, tmp_path / "a.safetensors")

    with pytest.raises(ManifestError, match="convert it first"):
        load_checkpoint(tmp_path / "a.safetensors")


def header(fields: object, body: bytes = b"") -> bytes:
    """A safetensors file with this header."""
    text = json.dumps(fields).encode()
    return struct.pack("<Q", len(text)) + text + body


ONE = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"short",
        struct.pack("<Q", 2**62) + b"{}",
        struct.pack("<Q", 20) + b"{}",
        struct.pack("<Q", 4) + b"nope",
        header([]),
        header({"a": 1}),
        header({"a": {**ONE, "dtype": "F99"}}, b"0000"),
        header({"a": {**ONE, "shape": [2]}}, b"0000"),
        header({"a": {**ONE, "shape": [-1]}}, b"0000"),
        header({"a": {**ONE, "shape": [2**40, 2**40]}}, b"0000"),
        header({"a": {**ONE, "data_offsets": [4, 8]}}, b"00000000"),
        header({"a": ONE, "b": ONE}, b"0000"),
        header({"a": ONE}, b"000"),
        header({"a": ONE}, b"00000"),
        header({"__metadata__": {"a": 1}}),
    ],
)
def test_a_header_that_does_not_add_up_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.safetensors").write_bytes(content)

    with pytest.raises(CheckpointFormatError):
        read_manifest(tmp_path / "a.safetensors")


def test_a_truncated_checkpoint_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_checkpoint(path, FLOWS["rgb"]())
    path.write_bytes(path.read_bytes()[:-100])

    with pytest.raises(CheckpointFormatError, match="promises"):
        load_checkpoint(path)
