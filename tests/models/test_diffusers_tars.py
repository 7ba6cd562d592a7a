"""Tars of a folder that reach out, never end or are cut short are refused."""

import io
import tarfile
from pathlib import Path

import pytest

from models.convert import convert
from models.diffusers_folder import member_header, read_folder_tar, write_folder_tar
from models.errors import CheckpointFormatError, UnsafeCheckpointError
from tests.models.sd_cases import tiny
from tests.models.sd_folders import packed


def member(name: str, type_: bytes = tarfile.REGTYPE, size: int = 0, link: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.size, info.linkname = type_, size, link
    return info


@pytest.mark.parametrize("size", [0, 5, 8**11 - 1, 8**11, 10_270_000_000])
def test_a_header_tells_any_size(size: int) -> None:
    header = member_header("unet/diffusion_pytorch_model.safetensors", size)

    told = tarfile.TarInfo.frombuf(header, "utf-8", "strict")

    assert (len(header), told.name, told.size) == (512, "unet/diffusion_pytorch_model.safetensors", size)


@pytest.mark.parametrize(
    ("info", "says"),
    [
        (member("unet/config.json", tarfile.SYMTYPE, link="/etc/passwd"), "link"),
        (member("unet/config.json", tarfile.LNKTYPE, link="model_index.json"), "link"),
        (member("unet/null", tarfile.CHRTYPE), "device"),
        (member("pipe", tarfile.FIFOTYPE), "device"),
        (member("../outside"), "leads out"),
        (member("unet/../../outside"), "leads out"),
        (member("/etc/passwd"), "leads out"),
        (member("unet\\config.json"), "leads out"),
        (member("unet/config.json"), "twice"),
    ],
    ids=lambda value: getattr(value, "name", value),
)
def test_a_tar_that_reaches_out_is_refused(info: tarfile.TarInfo, says: str, folder: Path, tmp_path: Path) -> None:
    path = packed(folder, tmp_path / "a.tar")
    with tarfile.open(path, "a") as tar:
        tar.addfile(info, io.BytesIO(b""))

    with pytest.raises(UnsafeCheckpointError, match=says):
        read_folder_tar(path)


def test_a_tar_with_countless_members_is_refused(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for number in range(10_001):
            tar.addfile(member(str(number)))

    with pytest.raises(UnsafeCheckpointError, match="more than 10,000 members"):
        read_folder_tar(tmp_path / "a.tar")


def test_a_member_that_claims_more_than_the_file_has_is_refused_unread(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(
        member("model_index.json", size=8 * 2**30 - 1).tobuf(tarfile.USTAR_FORMAT) + bytes(1024)
    )

    with pytest.raises(CheckpointFormatError, match=r"ends within|cut short"):
        read_folder_tar(tmp_path / "a.tar")


@pytest.mark.parametrize("kind", [tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE, tarfile.XGLTYPE])
def test_a_tar_whose_headers_chain_without_end_is_refused(kind: bytes, tmp_path: Path) -> None:
    first, link = member("model_index.json"), member("long", kind)
    (tmp_path / "a.tar").write_bytes(
        first.tobuf(tarfile.USTAR_FORMAT) + 3000 * link.tobuf(tarfile.USTAR_FORMAT) + bytes(1024)
    )

    with pytest.raises(UnsafeCheckpointError, match="hundreds of headers"):
        convert(tmp_path / "a.tar", tmp_path / "a.safetensors")


def test_a_member_of_negative_size_is_refused(tmp_path: Path) -> None:
    info = member("model_index.json")
    info.pax_headers = {"size": "-512"}
    (tmp_path / "a.tar").write_bytes(info.tobuf(tarfile.PAX_FORMAT) + bytes(1024))

    with pytest.raises(CheckpointFormatError):
        convert(tmp_path / "a.tar", tmp_path / "a.safetensors")


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_a_tar_that_was_cut_short_is_refused(share: float, tmp_path: Path) -> None:
    write_folder_tar(tiny(), tmp_path / "a.tar")
    data = (tmp_path / "a.tar").read_bytes()
    (tmp_path / "a.tar").write_bytes(data[: int(len(data) * share)])

    with pytest.raises(CheckpointFormatError):
        convert(tmp_path / "a.tar", tmp_path / "a.safetensors")


def test_a_compressed_tar_is_refused_with_what_to_do(folder: Path, tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar.gz", "w:gz") as tar:
        tar.add(folder, ".")

    with pytest.raises(CheckpointFormatError, match="plain tar"):
        convert(tmp_path / "a.tar.gz", tmp_path / "a.safetensors")
