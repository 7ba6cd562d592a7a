"""Folders of diffusers as tests change and pack them."""

import tarfile
from pathlib import Path

from safetensors.torch import load_file, save_file

UNET, VAE, TEXT = (
    "unet/diffusion_pytorch_model.safetensors", "vae/diffusion_pytorch_model.safetensors",
    "text_encoder/model.safetensors",
)  # fmt: skip


def packed(folder: Path, path: Path, under: str = ".") -> Path:
    """A plain tar of the folder, whose files are below `under`."""
    with tarfile.open(path, "w") as tar:
        tar.add(folder, under)
    return path


def sharded(folder: Path) -> None:
    """Cut the U-Net's weights in two files."""
    tensors = sorted(load_file(folder / UNET).items())
    for number in (1, 2):
        save_file(
            dict(tensors[number - 1 :: 2]), folder / f"unet/diffusion_pytorch_model-0000{number}-of-00002.safetensors"
        )
    (folder / UNET).unlink()
