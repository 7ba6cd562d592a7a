"""The models of a chaos run: a Glow that has seen some faces, and a flow with classes; pushed before any fault."""

from __future__ import annotations

import time
from pathlib import Path
from typing import cast

import torch
from torch import nn

from cli.client import Client
from examples.orl import load_faces
from models import Glow, dequantize, quantize, save_checkpoint
from models.images import save_png
from models.training import TrainingRecipe, fit_flow
from tests.chaos.callers import Material
from tests.chaos.fleet import Fleet
from tests.worker.runs import one_thread, tiny

__all__ = ["upload"]

IMAGE_SIZE, N_BITS, PERSON, STEPS = 16, 5, 7, 120
READY_SECONDS = 120.0


def upload(fleet: Fleet, folder: Path) -> Material:
    """Make the files, and push the checkpoints through the gateway and their real validation."""
    folder.mkdir()
    faces = load_faces(image_size=IMAGE_SIZE)
    save_checkpoint(folder / "classes.safetensors", cast(nn.Module, tiny("class-prior")))
    with one_thread():  # layers this small only wait for each other in more
        save_checkpoint(folder / "faces.safetensors", _faces(faces.training()))
    images = [folder / f"{number}.png" for number in range(2)]
    for image, path in zip(faces.of(PERSON), images, strict=False):
        save_png(image, path)
    with Client(fleet.urls[0], fleet.key.secret) as client:
        ids = [client.push_checkpoint(folder / f"{name}.safetensors").id for name in ("classes", "faces")]
        limit = time.monotonic() + READY_SECONDS
        while not all(client.checkpoint(checkpoint).status == "ready" for checkpoint in ids):
            if time.monotonic() > limit:
                raise TimeoutError("the checkpoints are not validated")
            time.sleep(0.1)
    return Material(with_classes=ids[0], real=ids[1], images=images, pushed=folder / "classes.safetensors")


def _faces(images: torch.Tensor) -> Glow:
    generator = torch.Generator().manual_seed(0)
    flow = Glow((1, IMAGE_SIZE, IMAGE_SIZE), N_BITS, n_block=2, n_flow=4, hidden=32, affine=True, generator=generator)
    flow.initialize(dequantize(quantize(images, N_BITS), N_BITS, generator))
    fit_flow(flow, images, TrainingRecipe(steps=STEPS), n_bits=N_BITS, generator=generator)
    return flow
