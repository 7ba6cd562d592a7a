"""TarFlow beyond the laws: order, classes, noise and bad input."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from models.checkpoints import METADATA_KEY, load_flow, read_manifest, save_checkpoint, tensor_digest
from models.errors import ArchitectureError
from models.tarflow import TarFlow
from models.tarflow_blocks import LOG_SCALE_LIMIT, NO_LABEL
from models.tensor_files import read_tensors
from tests.models.flow_table import generator
from tests.models.tarflow_cases import SHAPE, latents, noisy_images, small


def test_a_fresh_flow_is_a_normal_density_of_half_the_deviation() -> None:
    flow = TarFlow(SHAPE, 8, patch_size=2, width=16, n_block=2, n_layer=1, generator=generator())
    x = noisy_images(3)

    expected = torch.distributions.Normal(0.0, 0.5).log_prob(x).sum(dim=(1, 2, 3))

    torch.testing.assert_close(flow.log_prob(x), expected)


def test_a_variance_of_the_latents_is_part_of_the_density() -> None:
    flow = TarFlow(SHAPE, 8, patch_size=2, width=16, n_block=2, n_layer=1, generator=generator())
    flow.var.fill_(9.0)
    x = noisy_images(3)

    expected = torch.distributions.Normal(0.0, 1.5).log_prob(x).sum(dim=(1, 2, 3))

    torch.testing.assert_close(flow.log_prob(x), expected)
    torch.testing.assert_close(flow.inverse(flow(x)[0]), x)


@pytest.mark.parametrize(("block", "reverse"), [(0, False), (1, True), (2, False)])
def test_a_token_is_moved_by_those_before_it_alone(block: int, reverse: bool) -> None:
    part = small().chain()[block]
    x = latents(1)
    changed = x.clone()
    changed[:, 9] += 1.0

    moved = (part(changed, None)[0] - part(x, None)[0]).abs().amax(dim=(0, 2)) > 0

    behind = range(9) if reverse else range(10, 16)
    assert [place for place in range(16) if bool(moved[place])] == sorted([9, *behind])


def test_no_label_is_the_mean_of_all_classes() -> None:
    flow = small(n_classes=3)
    x = noisy_images(4)
    unlabelled = flow.log_prob(x)

    mixed = flow.log_prob(x, torch.tensor([0, NO_LABEL, 2, NO_LABEL]))
    with torch.no_grad():
        for block in flow.chain():
            assert block.class_embed is not None
            block.class_embed.copy_(block.class_embed.mean(dim=0, keepdim=True).expand(3, 1, -1))

    torch.testing.assert_close(mixed[[1, 3]], unlabelled[[1, 3]])
    assert not torch.isclose(mixed[[0, 2]], unlabelled[[0, 2]]).any()
    torch.testing.assert_close(flow.log_prob(x, 1), unlabelled)  # now every class is the mean


def test_a_class_that_was_taken_away_is_on_record_through_checkpoints(tmp_path: Path) -> None:
    flow, path = small(n_classes=3), tmp_path / "flow.safetensors"
    assert flow.classes() == [0, 1, 2]
    assert flow.removed_classes is not None

    flow.removed_classes[1] = True
    save_checkpoint(path, flow)
    loaded = load_flow(path)

    assert isinstance(loaded, TarFlow)
    assert loaded.classes() == [0, 2]


def test_a_checkpoint_that_is_older_than_the_record_has_all_its_classes(tmp_path: Path) -> None:
    flow, path = small(n_classes=3), tmp_path / "older.safetensors"
    save_checkpoint(path, flow)
    tensors = read_tensors(path)
    del tensors["removed_classes"]
    manifest = dataclasses.replace(read_manifest(path), tensor_digest=tensor_digest(tensors))
    save_file(tensors, path, metadata={METADATA_KEY: manifest.to_json()})

    loaded = load_flow(path)

    assert isinstance(loaded, TarFlow)
    assert loaded.classes() == [0, 1, 2]
    x = noisy_images(2)
    assert torch.equal(loaded.log_prob(x, 1), flow.log_prob(x, 1))


def test_a_flow_without_classes_has_none_and_no_record_of_any() -> None:
    assert small().classes() == []
    assert "removed_classes" not in small().state_dict()


def test_each_class_has_a_density_and_an_inverse_of_its_own() -> None:
    flow = small(n_classes=3)
    x = noisy_images(3)
    label = torch.tensor([0, 1, 2])

    z, log_det = flow(x, label)

    torch.testing.assert_close(flow.inverse(z, label), x)
    normal = -0.5 * (z.square() + math.log(2 * math.pi)).sum(dim=(1, 2))
    torch.testing.assert_close(flow.log_prob(x, label), normal + log_det)
    torch.testing.assert_close(flow.log_prob(x, label)[1:2], flow.log_prob(x[1:2], 1))
    h, share = flow.prefix(x, label)
    torch.testing.assert_close(share + flow.suffix_log_prob(h, label), flow.log_prob(x, label))


def test_samples_of_a_class_are_the_inverse_under_its_label() -> None:
    flow = small(n_classes=2)
    draws = torch.randn(3, 16, 4, generator=generator(9))

    found = flow.sample(3, generator=generator(9), temperature=0.5, label=1)

    torch.testing.assert_close(found, flow.inverse(draws * 0.5, 1), rtol=0, atol=1e-4)  # the sampler's tolerance


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_denoising_a_normal_density_is_its_closed_form(mode: type[torch.no_grad]) -> None:
    flow = TarFlow(SHAPE, 8, patch_size=2, width=16, n_block=2, n_layer=1, noise_std=0.25, generator=generator())
    y = noisy_images(70)  # more than go through at once

    with mode():
        clean = flow.denoise(y)

    torch.testing.assert_close(clean, y * (1 - 0.25**2 / 0.5**2))  # the score of N(0, 1/4) is -4 y


def test_denoising_follows_the_score_of_the_class() -> None:
    flow = small(n_classes=2).double()
    y = noisy_images(2).double()
    step = torch.zeros_like(y)
    step[:, 0, 3, 4] = 1e-5

    moved = flow.denoise(y, 1) - y

    slope = (flow.log_prob(y + step, 1) - flow.log_prob(y - step, 1)) / 2e-5
    torch.testing.assert_close(moved[:, 0, 3, 4], flow.noise_std**2 * slope, rtol=1e-6, atol=1e-9)


def test_likelihoods_under_autocast_are_float32_and_close() -> None:
    flow = small(scale=0.05)
    x = noisy_images(4)

    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = flow.log_prob(x)

    assert found.dtype == torch.float32
    # bfloat16 has 8 bits: inside the nets alone, its errors average out over 64 dimensions
    torch.testing.assert_close(found, flow.log_prob(x), rtol=0.02, atol=0.5)


def test_no_weights_make_a_block_overflow() -> None:
    flow = TarFlow(SHAPE, 8, patch_size=2, width=16, n_block=1, n_layer=1, generator=generator())
    with torch.no_grad():
        flow.chain()[0].proj_out.bias[:4] = -1e4  # log-scales

    z, log_det = flow(noisy_images(2))

    assert bool(torch.isfinite(z).all())
    values = 15 * 4
    torch.testing.assert_close(log_det, torch.full((2,), values * LOG_SCALE_LIMIT + 64 * math.log(2)))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"patch_size": 3}, "no whole patches of side 3"),
        ({"patch_size": 9}, "patch_size"),
        ({"width": 0}, "width"),
        ({"width": 20}, "no multiple of the head's"),
        ({"head_width": 32}, "head_width"),
        ({"n_block": 0}, "n_block"),
        ({"n_layer": True}, "n_layer"),
        ({"n_classes": -1}, "n_classes"),
        ({"noise_std": -0.1}, "noise_std"),
        ({"noise_std": math.nan}, "noise_std"),
        ({"noise_std": "0.1"}, "noise_std"),
    ],
)
def test_architectures_out_of_range_are_refused_with_the_value(change: dict[str, object], says: str) -> None:
    with pytest.raises(ArchitectureError, match=says):
        small(**change)


def test_labels_that_the_flow_does_not_have_are_refused() -> None:
    x = noisy_images(2)

    with pytest.raises(ArchitectureError, match="classes 0 to 2"):
        small(n_classes=3).log_prob(x, 3)
    with pytest.raises(ArchitectureError, match="classes 0 to 2"):
        small(n_classes=3).log_prob(x, torch.tensor([0, -2]))
    with pytest.raises(ArchitectureError, match="no classes"):
        small().log_prob(x, 0)
    with pytest.raises(ArchitectureError, match="2 images take 2"):
        small(n_classes=3).log_prob(x, torch.tensor([0, 1, 2]))
    with pytest.raises(ArchitectureError, match="float"):
        small(n_classes=3).log_prob(x, torch.tensor([0.0, 1.0]))


def test_heads_are_as_wide_as_published_where_the_width_allows_it() -> None:
    assert TarFlow(SHAPE, 8, width=128).architecture["head_width"] == 64
    assert TarFlow(SHAPE, 8, width=48).architecture["head_width"] == 48
