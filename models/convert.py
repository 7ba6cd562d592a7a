"""The one-shot converter: foreign weights in, a checkpoint with a manifest out; the only reader of foreign formats.

It runs in a process without network, credentials or much memory, because its input is hostile until proven otherwise.
Code in a pickle is refused, never run: `torch.load` is called with `weights_only=True`, on archives checked beforehand.
"""

import math
import pickle  # noqa: TID251 - only for the name of the error that torch.load raises
import shutil
import zipfile
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from models.checkpoints import (
    METADATA_KEY,
    Manifest,
    load_checkpoint,
    read_manifest,
    save_checkpoint,
)
from models.convert_ddpm import ASSUMED, ddpm_from_state_dict, is_ddpm
from models.convert_glow import glow_from_state_dict
from models.convert_tarflow import is_tarflow, tarflow_from_state_dict
from models.convert_vae import is_vae, vae_from_state_dict
from models.errors import (
    CheckpointFormatError,
    ManifestError,
    MissingFactError,
    UnknownFamilyError,
    UnsafeCheckpointError,
)
from models.families import FAMILIES, PIPELINES
from models.folder_files import is_tar
from models.single_file_names import is_single_file
from models.tarflow import INPUT_SCALE
from models.tensor_files import read_header, read_tensors

__all__ = ["convert"]

MAX_PICKLE_BYTES = 64 * 2**20
"""Most bytes of the index inside a torch archive; the tensors lie beside it."""
MAX_ENTRIES = 100_000


def convert(
    source: Path | str,
    destination: Path | str,
    *,
    image_size: int | None = None,
    n_bits: int | None = None,
    family: str | None = None,
    noise_std: float | None = None,
    prediction_type: str | None = None,
) -> Manifest:
    """Convert a checkpoint of any accepted kind to ours.

    Accepted: our own files (verified and copied), and plain state dicts, as safetensors or as a torch archive, of the
    Flow Taming authors' Glow layout, of Apple's TarFlow layout, of the Selective Amnesia authors' VAE layout, and of
    diffusers' `UNet2DModel` with classes. Everything that shapes tell is inferred. Stable Diffusion 1.x, 2.x and XL:
    a plain tar of a diffusers folder; of 1.x and 2.x also a single safetensors file of the CompVis layout.

    Args:
        source: the file as uploaded.
        destination: where the checkpoint goes.
        image_size: side of the square image in pixels; no file of a Glow or a U-Net tells it, those of others do.
        n_bits: colour depth a channel; no Glow file tells it, all others are taken to have 8.
        family: model family, where the caller knows it; otherwise told from the names.
        noise_std: of the noise that a TarFlow was trained with, on images in [-1, 1]; only its file's name tells it.
        prediction_type: what a diffusion model predicts, "epsilon" or "v_prediction", where the file does not say.

    Returns:
        The manifest of the checkpoint written.

    Raises:
        CheckpointError: a leaf of that tree says what is wrong and what to do.
    """
    tensors: dict[str, Tensor]
    if _is_safetensors(source):
        header = read_header(source)
        if METADATA_KEY in header.metadata:
            return _copy_through(source, destination, image_size, n_bits, family, noise_std)
        if is_single_file(header.tensors):
            return _stable_diffusion(source, destination, image_size, n_bits, family, prediction_type)
        tensors = read_tensors(source)
    elif is_tar(source):
        return _stable_diffusion(source, destination, image_size, n_bits, family, prediction_type)
    else:
        tensors = _read_torch_archive(source)
        if is_single_file(tensors):
            raise CheckpointFormatError(
                "a single-file Stable Diffusion is read from safetensors alone; save it as that"
            )
    family = family or _family_of(tensors)
    if family not in FAMILIES:
        raise UnknownFamilyError(f"family {family!r} is unknown; known: {', '.join(sorted(FAMILIES))}")
    if family == "ddpm":
        model = ddpm_from_state_dict(tensors, image_size=image_size, n_bits=n_bits, prediction_type=prediction_type)
        return save_checkpoint(destination, model, extra={"converted_from": "state dict", "assumed": ASSUMED})
    model = _from_state_dict(family, tensors, image_size, n_bits, noise_std)
    return save_checkpoint(destination, model, extra={"converted_from": "state dict"})


def _stable_diffusion(
    source: Path | str,
    destination: Path | str,
    image_size: int | None,
    n_bits: int | None,
    family: str | None,
    prediction_type: str | None,
) -> Manifest:
    """A tar of a diffusers folder, or a single file; what the caller states must agree with what a folder says."""
    # Later, since importing diffusers takes seconds that no other family needs.
    from models.diffusers_folder import import_folder_tar
    from models.single_file import import_single_file

    if family not in (None, *PIPELINES):
        raise ManifestError(f"family was stated as {family!r}; the file is of the layout of Stable Diffusion")
    if is_tar(source):
        model, extra = import_folder_tar(source)
    else:
        model, extra = import_single_file(source, prediction_type=prediction_type, image_size=image_size)
    says = {
        "family": model.family, "image_size": model.image_shape[1], "n_bits": model.n_bits,
        "prediction_type": model.diffusion.config["prediction_type"],
    }  # fmt: skip
    stated = {"family": family, "image_size": image_size, "n_bits": n_bits, "prediction_type": prediction_type}
    for name, value in stated.items():
        if value is not None and value != says[name]:
            raise ManifestError(f"{name} was stated as {value!r}; the file says {says[name]!r}")
    return save_checkpoint(destination, model, extra=extra)


def _family_of(tensors: Mapping[str, Tensor]) -> str:
    """Told from the names; a Glow's where nothing else is recognised, so that its reader says what is missing."""
    layouts = (("tarflow", is_tarflow), ("vae", is_vae), ("ddpm", is_ddpm))
    return next((family for family, recognised in layouts if recognised(tensors)), "glow")


def _from_state_dict(
    family: str, tensors: dict[str, Tensor], image_size: int | None, n_bits: int | None, noise_std: float | None
) -> nn.Module:
    """The model that a foreign state dict holds, once everything is stated that it does not tell."""
    if family == "tarflow":
        return tarflow_from_state_dict(tensors, noise_std=noise_std, image_size=image_size, n_bits=n_bits)
    if family == "vae":
        return vae_from_state_dict(tensors, image_size=image_size, n_bits=n_bits)
    if family != "glow":
        raise UnknownFamilyError(f"no foreign layout of family {family!r} is known; train it here, or save it with us")
    missing = [name for name, value in (("image_size", image_size), ("n_bits", n_bits)) if value is None]
    if image_size is None or n_bits is None:
        raise MissingFactError(f"the file does not tell {' and '.join(missing)}; state it and send the file again")
    return glow_from_state_dict(tensors, image_size=image_size, n_bits=n_bits)


def _copy_through(
    source: Path | str,
    destination: Path | str,
    image_size: int | None,
    n_bits: int | None,
    family: str | None,
    noise_std: float | None,
) -> Manifest:
    """Verify one of our own files and copy it; what the caller states must agree with its manifest."""
    manifest = read_manifest(source)
    stated = {"image_size": image_size, "n_bits": n_bits, "family": family}
    for name, value in stated.items():
        if value is not None and value != getattr(manifest, name):
            raise ManifestError(f"{name} was stated as {value!r}; the file's manifest says {getattr(manifest, name)!r}")
    load_checkpoint(source)
    held = manifest.architecture.get("noise_std")
    if noise_std is not None and (held is None or not math.isclose(noise_std, held * INPUT_SCALE, rel_tol=1e-6)):
        says = "has none" if held is None else f"says {held * INPUT_SCALE:g}"
        raise ManifestError(f"noise_std was stated as {noise_std!r} on images in [-1, 1]; the file's manifest {says}")
    shutil.copyfile(source, destination)
    return manifest


def _is_safetensors(source: Path | str) -> bool:
    """Whether the file's ninth byte opens a JSON object, as that format alone has it."""
    if Path(source).stat().st_size == 0:
        raise CheckpointFormatError("the file is empty; upload it again")
    with Path(source).open("rb") as file:
        head = file.read(9)
    return len(head) == 9 and head[8:] == b"{" and not head.startswith(b"PK")


def _read_torch_archive(source: Path | str) -> dict[str, Tensor]:
    """The tensors of a `torch.save`d state dict, with nothing in it executed."""
    _check_archive(Path(source))
    try:
        loaded = torch.load(source, map_location="cpu", weights_only=True)  # noqa: TID251 - the converter's one door
    except pickle.UnpicklingError as error:
        raise UnsafeCheckpointError(
            "the file holds more than tensors (Python objects or code); nothing in it was run: "
            "save model.state_dict(), or write safetensors"
        ) from error
    except Exception as error:  # a damaged archive surfaces as RuntimeError, EOFError, KeyError, ...
        raise CheckpointFormatError(f"the file is damaged or no checkpoint ({type(error).__name__})") from error
    for wrapper in ("state_dict", "model"):
        if isinstance(loaded, dict) and isinstance(loaded.get(wrapper), dict):
            loaded = loaded[wrapper]
    if not isinstance(loaded, dict) or not loaded:
        raise CheckpointFormatError("the file holds no state dict; save model.state_dict()")
    budget = Path(source).stat().st_size
    tensors: dict[str, Tensor] = {}
    for name, value in loaded.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise CheckpointFormatError(f"entry {str(name)[:80]!r} is no tensor; save model.state_dict() alone")
        if value.layout != torch.strided or value.is_quantized:
            raise CheckpointFormatError(f"tensor {name[:80]!r} is sparse or quantised; save it dense")
        budget -= value.numel() * value.element_size()
        if budget < 0:
            raise UnsafeCheckpointError(
                "the tensors claim more bytes than the file has; nothing was allocated for them"
            )
        tensors[name] = value
    return tensors


def _check_archive(path: Path) -> None:
    """Refuse archives that inflate, and files that are no torch archive at all."""
    with path.open("rb") as file:
        magic = file.read(2)
    if magic == b"\x1f\x8b":
        raise CheckpointFormatError("the file is compressed; give a plain tar (tar cf, without z) of the folder")
    if magic != b"PK":
        raise CheckpointFormatError("the file is neither safetensors nor a torch archive; was the upload cut short?")
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except Exception as error:  # zipfile raises BadZipFile, and others on hostile directories
        raise CheckpointFormatError("the torch archive is damaged or cut short") from error
    if len(entries) > MAX_ENTRIES:
        raise UnsafeCheckpointError(f"the archive has {len(entries):,} entries; the most is {MAX_ENTRIES:,}")
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        raise UnsafeCheckpointError("the archive is compressed, which torch.save never does; it was not unpacked")
    if sum(entry.file_size for entry in entries) > path.stat().st_size:
        raise UnsafeCheckpointError("the archive claims more bytes than the file has; it was not unpacked")
    for entry in entries:
        if entry.filename.endswith(".pkl") and entry.file_size > MAX_PICKLE_BYTES:
            raise UnsafeCheckpointError(f"the archive's index has {entry.file_size:,} bytes; it was not read")
