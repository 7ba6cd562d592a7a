"""A tiny class-conditional DDPM of the same three classes of pictures as the tiny VAE draws."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from models.checkpoints import save_checkpoint
from models.conditional import NO_CONDITION
from models.ddpm import ClassDDPM
from tests.unlearning.tiny_conditional import CLASSES, SHAPE, stripes
from tests.worker.runs import one_thread


def trained_ddpm(steps: int = 150) -> ClassDDPM:
    """A DDPM that draws them in a few steps of its sampler."""
    generator = torch.Generator().manual_seed(0)
    model = ClassDDPM(
        SHAPE,
        channels=[16, 24],
        layers=1,
        attention=[False, False],
        middle_attention=False,
        n_classes=CLASSES,
        sampling={"steps": 8, "guidance_scale": 1.5},
        generator=generator,
    )
    images, labels = stripes(600, 1)
    x = model.encode(images, generator=generator)
    optimiser = torch.optim.AdamW(model.parameters(), lr=4e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    for _ in range(steps):
        rows = torch.randint(len(x), (64,), generator=generator)
        condition = torch.where(torch.rand(64, generator=generator) < 0.1, NO_CONDITION, labels[rows])
        optimiser.zero_grad()
        torch.autograd.backward(model.losses(x[rows], condition, model.draw(64, generator=generator)).mean())
        optimiser.step()
        schedule.step()
    return model.eval()


def trained_file(factory: pytest.TempPathFactory) -> Path:
    """Its checkpoint, trained once for all workers of a run: it takes seven seconds of a core."""
    folder = factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent  # of this run too
    path, half = folder / "tiny-ddpm.safetensors", folder / f"tiny-ddpm-{os.getpid()}.safetensors"
    if not path.exists():
        with one_thread():
            save_checkpoint(half, trained_ddpm())
        half.replace(path)
    return path
