"""The whole service on a small base flow of real faces, trained here in some ten seconds."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from cli.client import Client
from cli.service import LocalService
from examples.orl import Faces, load_faces
from models import Glow, dequantize, quantize, save_checkpoint
from models.images import save_png
from models.training import TrainingRecipe, fit_flow

IMAGE_SIZE = 16
N_BITS = 5
PERSON = 7
TRAINING_STEPS = 300
# Short enough to wait for, long enough for a loaded machine: a lease is renewed four times in it.
SETTINGS = {"FORGETD_LEASE_TTL_SECONDS": "5", "FORGETD_RING_SECONDS": "2"}


@dataclass(frozen=True)
class Material:
    """Files as a caller has them."""

    base: Path
    person: list[Path]
    others: list[Path]
    strangers: list[Path]


def write_images(images: torch.Tensor, folder: Path) -> list[Path]:
    """Images as PNG files in a new folder."""
    folder.mkdir()
    paths = [folder / f"{index:04d}.png" for index in range(len(images))]
    for image, path in zip(images, paths, strict=True):
        save_png(image, path)
    return paths


@pytest.fixture(scope="session")
def faces() -> Faces:
    """The ORL faces, small."""
    return load_faces(image_size=IMAGE_SIZE)


def untrained(faces: Faces, generator: torch.Generator) -> Glow:
    """A Glow that has seen no more of them than its initialisation asks for."""
    flow = Glow((1, IMAGE_SIZE, IMAGE_SIZE), N_BITS, n_block=2, n_flow=4, hidden=32, affine=True, generator=generator)
    flow.initialize(dequantize(quantize(faces.training(), N_BITS), N_BITS, generator))
    return flow


@pytest.fixture(scope="session")
def base(faces: Faces) -> Glow:
    """A Glow that has learnt 36 people."""
    generator = torch.Generator().manual_seed(0)
    flow = untrained(faces, generator)
    recipe = TrainingRecipe(steps=TRAINING_STEPS)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # layers this small only wait for each other in more
    fit_flow(flow, faces.training(), recipe, n_bits=N_BITS, generator=generator)
    torch.set_num_threads(threads)
    return flow


def written(base: Glow, faces: Faces, folder: Path) -> Material:
    """The checkpoint and the photos as files."""
    save_checkpoint(folder / "base.safetensors", base)
    return Material(
        base=folder / "base.safetensors",
        person=write_images(faces.of(PERSON), folder / "person"),
        others=write_images(faces.training(without=PERSON), folder / "others"),
        strangers=write_images(faces.held_out(), folder / "strangers"),
    )


@pytest.fixture(scope="session")
def material(base: Glow, faces: Faces, tmp_path_factory: pytest.TempPathFactory) -> Material:
    """The checkpoint file and photos of the person, of the other people in training, and of people who are not."""
    return written(base, faces, tmp_path_factory.mktemp("material"))


@pytest.fixture(scope="package")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalService]:
    """What ``forgetd up`` runs, for the folder's tests; what they kill comes back."""
    with LocalService(tmp_path_factory.mktemp("service"), settings=SETTINGS, durable=False) as service:
        yield service


@pytest.fixture
def client(service: LocalService) -> Iterator[Client]:
    """The project's own client."""
    with Client(service.url, service.key) as client:
        yield client
