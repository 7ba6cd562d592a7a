"""The converter: the published layout gives the right numbers, and hostile files are refused unread."""

from __future__ import annotations

import io
import math
import os
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from models.checkpoints import load_checkpoint, load_flow, read_manifest, save_checkpoint
from models.convert import convert
from models.errors import (
    ArchitectureError,
    CheckpointError,
    CheckpointFormatError,
    ManifestError,
    MissingFactError,
    NonFiniteError,
    TensorMismatchError,
    UnknownFamilyError,
    UnsafeCheckpointError,
)
from tests.models.flow_table import FLOWS, images


def published_layout() -> dict[str, torch.Tensor]:
    """One block, one step, hidden 2, additive, LU, one channel: every tensor that the published files hold."""
    flow = "module.blocks.0.flows.0."
    eye, ones = torch.eye(4), torch.ones(4, 4)
    permutation = torch.tensor([[0.0, 1, 0, 0], [1, 0, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]])
    return {
        flow + "actnorm.loc": torch.full((1, 4, 1, 1), 0.25),
        flow + "actnorm.scale": torch.full((1, 4, 1, 1), -2.0),
        flow + "actnorm.initialized": torch.tensor(1, dtype=torch.uint8),
        flow + "invconv.w_p": permutation,
        flow + "invconv.w_l": 7 * eye + 0.5 * ones.tril(-1) + 9 * ones.triu(1),  # the diagonal and above are masked off
        flow + "invconv.w_s": torch.tensor([0.1, 0.2, 0.3, 0.4]),
        flow + "invconv.w_u": 3 * ones,  # the diagonal and below are masked off
        flow + "invconv.s_sign": torch.tensor([1.0, -1, 1, -1]),
        flow + "invconv.u_mask": ones.triu(1),
        flow + "invconv.l_mask": ones.tril(-1),
        flow + "invconv.l_eye": eye,
        flow + "coupling.net.0.weight": torch.zeros(2, 2, 3, 3),
        flow + "coupling.net.0.bias": torch.tensor([1.0, -1.0]),
        flow + "coupling.net.2.weight": torch.ones(2, 2, 1, 1),
        flow + "coupling.net.2.bias": torch.zeros(2),
        flow + "coupling.net.4.conv.weight": torch.full((2, 2, 3, 3), 0.1),
        flow + "coupling.net.4.conv.bias": torch.tensor([0.5, -0.5]),
        flow + "coupling.net.4.scale": torch.full((1, 2, 1, 1), 0.1),
        "module.blocks.0.prior.conv.weight": torch.full((8, 4, 3, 3), 0.01),
        "module.blocks.0.prior.conv.bias": torch.arange(8) * 0.1,
        "module.blocks.0.prior.scale": torch.full((1, 8, 1, 1), 0.2),
    }


def by_hand(x: torch.Tensor) -> float:
    """log p of one 2 x 2 image under `published_layout`, with nothing but matrices.

    Squeezed, the image is one pixel of four channels, so a 3x3 kernel sees it in its centre and the padding's ones (or
    zeros, inside the coupling net's first convolution) in the other eight places.
    """
    v = -2.0 * (x.reshape(4) + 0.25)
    lower = torch.tensor([[1.0, 0, 0, 0], [0.5, 1, 0, 0], [0.5, 0.5, 1, 0], [0.5, 0.5, 0.5, 1]])
    upper = torch.tensor([[1.0, 3, 3, 3], [0, -1, 3, 3], [0, 0, 1, 3], [0, 0, 0, -1]])
    s = torch.tensor([0.1, 0.2, 0.3, 0.4])
    upper = upper - torch.diag(upper.diagonal()) + torch.diag(torch.tensor([1.0, -1, 1, -1]) * s.exp())
    v = (lower @ upper @ v)[[1, 0, 2, 3]]  # w_p swaps the first two
    # net: relu(bias) = (1, 0); 1x1 of ones: (1, 1); 3x3 of 0.1 over two channels: centre 2 x 0.1, eight padded 16 x 0.1
    shift = (torch.tensor([0.5, -0.5]) + 0.1 * 2 * (1 + 8)) * math.exp(0.3)
    v = torch.cat([v[:2], v[2:] + shift])
    # prior: four channels of zeros in the centre, ones in the eight padded places
    out = (torch.arange(8) * 0.1 + 0.01 * 4 * 8) * math.exp(0.6)
    mean, log_sd = out[:4], out[4:]
    log_p = (-0.5 * math.log(2 * math.pi) - log_sd - 0.5 * ((v - mean) / log_sd.exp()) ** 2).sum()
    return float(log_p + 4 * math.log(2.0) + s.sum())


@pytest.mark.parametrize("prefix", ["module.", ""])
@pytest.mark.parametrize("kind", ["pt", "safetensors"])
def test_the_published_layout_gives_the_number_worked_out_by_hand(tmp_path: Path, kind: str, prefix: str) -> None:
    state = {name.replace("module.", prefix): value for name, value in published_layout().items()}
    source = tmp_path / "source"
    if kind == "safetensors":
        save_file(state, source)
    else:
        torch.save(state, source)
    x = torch.tensor([[[[0.1, -0.2], [0.3, 0.4]]]])

    manifest = convert(source, tmp_path / "out.safetensors", image_size=2, n_bits=5)

    assert manifest.architecture == {"n_block": 1, "n_flow": 1, "hidden": 2, "affine": False, "lu": [True]}
    assert (manifest.channels, manifest.image_size, manifest.n_bits) == (1, 2, 5)
    found = load_flow(tmp_path / "out.safetensors").log_prob(x)
    assert float(found.detach()) == pytest.approx(by_hand(x), rel=1e-5)


@pytest.mark.parametrize(
    "name", ["additive-lu", "affine-lu", "affine-plain", "mixed-convolutions", "three-blocks", "rgb"]
)
def test_every_architecture_is_inferred_from_shapes(tmp_path: Path, name: str) -> None:
    flow = FLOWS[name]()
    torch.save({f"module.{key}": value for key, value in flow.state_dict().items()}, tmp_path / "a.pt")

    manifest = convert(tmp_path / "a.pt", tmp_path / "b.safetensors", image_size=flow.image_shape[1], n_bits=5)

    assert manifest.architecture == flow.architecture
    x = images(flow, 2)
    assert torch.equal(load_flow(tmp_path / "b.safetensors").log_prob(x), flow.log_prob(x))


def test_a_file_from_before_the_initialised_flag_counts_as_initialised(tmp_path: Path) -> None:
    state = {name: value for name, value in published_layout().items() if not name.endswith("initialized")}
    torch.save(state, tmp_path / "a.pt")

    convert(tmp_path / "a.pt", tmp_path / "b.safetensors", image_size=2, n_bits=5)

    flag = load_checkpoint(tmp_path / "b.safetensors").state_dict()["blocks.0.flows.0.actnorm.initialized"]
    assert int(flag) == 1


def test_our_own_file_is_verified_and_copied(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "a.safetensors", FLOWS["rgb"]())

    manifest = convert(tmp_path / "a.safetensors", tmp_path / "b.safetensors")

    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    assert manifest == read_manifest(tmp_path / "b.safetensors")


def test_a_statement_against_the_manifest_is_refused(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "a.safetensors", FLOWS["rgb"]())

    with pytest.raises(ManifestError, match="n_bits was stated as 8"):
        convert(tmp_path / "a.safetensors", tmp_path / "b.safetensors", n_bits=8)


def test_what_the_file_does_not_tell_is_asked_for(tmp_path: Path) -> None:
    torch.save(published_layout(), tmp_path / "a.pt")

    with pytest.raises(MissingFactError, match="image_size and n_bits"):
        convert(tmp_path / "a.pt", tmp_path / "b.safetensors")
    with pytest.raises(MissingFactError, match="n_bits"):
        convert(tmp_path / "a.pt", tmp_path / "b.safetensors", image_size=2)


def test_state_dicts_that_do_not_fit_are_refused_with_the_name(tmp_path: Path) -> None:
    loc = "module.blocks.0.flows.0.actnorm.loc"
    whole = published_layout()
    cases: list[tuple[dict[str, torch.Tensor], int, type[CheckpointError], str]] = [
        ({k: v for k, v in whole.items() if k != loc}, 2, TensorMismatchError, "actnorm.loc is missing"),
        ({**whole, "module.blocks.0.odd": torch.zeros(1)}, 2, TensorMismatchError, "blocks.0.odd"),
        ({**whole, loc: torch.full((1, 4, 1, 1), torch.nan)}, 2, NonFiniteError, "actnorm.loc"),
        ({**whole, loc: torch.zeros(1, 8, 1, 1)}, 2, TensorMismatchError, "channels|shape"),
        ({**whole, "module.blocks.999999.x": torch.zeros(1)}, 2, TensorMismatchError, "999999"),
        (whole, 3, ArchitectureError, "halved"),
        ({"weight": torch.zeros(1)}, 2, TensorMismatchError, "no Glow weights"),
    ]

    for state, size, error, says in cases:
        torch.save(state, tmp_path / "a.pt")
        with pytest.raises(error, match=says):
            convert(tmp_path / "a.pt", tmp_path / "b.safetensors", image_size=size, n_bits=5)
    assert not (tmp_path / "b.safetensors").exists()


def test_an_unknown_family_is_refused(tmp_path: Path) -> None:
    torch.save(published_layout(), tmp_path / "a.pt")

    with pytest.raises(UnknownFamilyError, match=r"known: .*glow"):
        convert(tmp_path / "a.pt", tmp_path / "b.safetensors", image_size=2, n_bits=5, family="gan")


class Malicious:
    """Runs a command when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (f"touch {self.marker}",)


def test_code_in_a_pickle_is_refused_and_never_run(tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    torch.save({**published_layout(), "x": Malicious(marker)}, tmp_path / "a.pt")

    with pytest.raises(UnsafeCheckpointError, match="nothing in it was run"):
        convert(tmp_path / "a.pt", tmp_path / "b.safetensors", image_size=2, n_bits=5)
    assert not marker.exists()


def test_a_compressed_archive_is_not_unpacked(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/data.pkl", b"0" * 10_000_000)

    with pytest.raises(UnsafeCheckpointError, match="compressed"):
        convert(tmp_path / "a.pt", tmp_path / "b.safetensors", image_size=2, n_bits=5)


def test_a_tensor_that_claims_more_than_the_file_has_is_refused(tmp_path: Path) -> None:
    torch.save({"blocks.0.flows.0.actnorm.loc": torch.zeros(1).expand(2**40)}, tmp_path / "a.pt")

    with pytest.raises(UnsafeCheckpointError, match="claim more bytes"):
        convert(tmp_path / "a.pt", tmp_path / "b.safetensors", image_size=2, n_bits=5)


def test_garbage_and_cut_files_are_refused(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    torch.save(published_layout(), buffer)
    whole = buffer.getvalue()

    for content in (b"", b"x", b"garbage" * 100, b"PK" + b"x" * 100, whole[: len(whole) // 2], b"\x80\x02}q\x00."):
        (tmp_path / "a.pt").write_bytes(content)
        with pytest.raises(CheckpointFormatError):
            convert(tmp_path / "a.pt", tmp_path / "b.safetensors", image_size=2, n_bits=5)


@pytest.mark.parametrize("value", [[1, 2], {}, {"a": 1}, {"a": {"b": torch.zeros(1)}}, torch.zeros(1)])
def test_an_archive_without_a_state_dict_is_refused(tmp_path: Path, value: object) -> None:
    torch.save(value, tmp_path / "a.pt")

    with pytest.raises(CheckpointFormatError):
        convert(tmp_path / "a.pt", tmp_path / "b.safetensors", image_size=2, n_bits=5)
