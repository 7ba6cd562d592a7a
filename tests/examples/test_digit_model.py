"""A model of digits by its command: what it prints, what it writes, and what it does not take for its own."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from examples.cache import cached, opened
from examples.digit_vae import RECIPE, SHAPE, VAE
from examples.digits import Digits
from models.checkpoints import read_manifest, save_checkpoint
from models.errors import ModelError
from models.glow import Glow

MOMENT = replace(RECIPE, steps=20, batch=8)


def few() -> Digits:
    """Ten dark images, of which five are held out."""
    images, labels = torch.zeros(5, *SHAPE, dtype=torch.uint8), torch.arange(5)
    return Digits(images, labels, images, labels)


FEW = replace(VAE, digits=few)


@pytest.mark.parametrize("as_json", [False, True], ids=["text", "json"])
def test_the_command_writes_the_checkpoint_and_says_how_good_it_is(
    as_json: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "of its own" / "vae.safetensors"

    ended = FEW.command(
        ["--out", str(path), *["--json"] * as_json], MOMENT, lambda model: {"latent": model.architecture["latent"]}
    )

    progress, last = capsys.readouterr().out.splitlines()
    figures, extra = json.loads(last), read_manifest(path).extra
    assert ended == 0
    assert figures == {
        "path": str(path),
        **{key: round(extra[key], 2) for key in ("nats_per_image_training", "nats_per_image_held_out")},
        "latent": 8,
    }
    if as_json:
        assert json.loads(progress).keys() == {"step", "seconds", "nats"}
    else:
        assert progress.startswith("step    20  ")
        assert progress.endswith(" nats an image")


def test_a_checkpoint_of_another_family_is_not_taken_for_it(tmp_path: Path) -> None:
    path = VAE.path(tmp_path, MOMENT)
    save_checkpoint(path, Glow((1, 4, 4), 5, n_block=1, n_flow=1, hidden=4))

    with pytest.raises(ModelError, match="holds no ConditionalVAE; delete it"):
        VAE.kept(tmp_path, MOMENT)
    assert isinstance(opened(path, Glow), Glow)


def test_every_fact_is_part_of_a_files_name(tmp_path: Path) -> None:
    names = {cached(name, facts, tmp_path) for name in ("a", "b") for facts in ([1, 2], [2, 1], [1], [])}

    assert len(names) == 8
    assert all(path.parent == tmp_path for path in names)
