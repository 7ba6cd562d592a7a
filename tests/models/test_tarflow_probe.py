"""The probe on flows over noisy images: noise beyond the range of images is sound, noise of another strength is not."""

from __future__ import annotations

import math

import pytest
import torch

from models.probe import UnusableFlowError, probe
from models.tarflow import TarFlow
from tests.models.flow_table import generator


def black(noise_std: float, stated: float | None = None) -> TarFlow:
    """A flow of black images with noise, which is all that they differ by."""
    flow = TarFlow(
        (1, 8, 8), 8, patch_size=2, width=8, n_block=2, n_layer=1, noise_std=noise_std, generator=generator()
    )
    first, second = flow.chain()
    size = 4
    with torch.no_grad():
        for block in (first, second):
            # each of the two takes half of the log-scale, so that the first token, which a block leaves, has some too
            block.proj_out.bias[:size] = 0.5 * math.log(2 * noise_std)
        first.proj_out.bias[size:] = -1.0
    flow.var.fill_(1.0)
    flow.noise_std = noise_std if stated is None else stated
    return flow.eval()


def test_dark_images_with_noise_beyond_the_range_are_no_reason_to_warn() -> None:
    flow = black(0.1)

    samples = flow.sample(8, generator=generator(0))

    assert float((samples < -0.5).float().mean()) > 0.3
    assert probe(flow) == []


def test_noise_that_is_stated_far_too_strong_is_refused() -> None:
    with pytest.raises(UnusableFlowError, match=r"noise_std = 0\.4 is implausible"):
        probe(black(0.1, stated=0.4))


def test_a_fresh_flow_is_called_hardly_trained() -> None:
    fresh = TarFlow((1, 8, 8), 8, width=8, n_block=2, n_layer=1, noise_std=0.1, generator=generator())

    assert any("hardly trained" in warning for warning in probe(fresh))


def test_a_flow_of_images_of_another_scale_is_refused() -> None:
    flow = TarFlow((1, 8, 8), 8, width=8, n_block=2, n_layer=1, noise_std=0.1, generator=generator())
    flow.var.fill_(50.0)

    with pytest.raises(UnusableFlowError, match="another scale"):
        probe(flow)


def test_a_flow_that_does_not_return_its_own_latents_is_refused() -> None:
    flow = TarFlow((1, 8, 8), 8, width=8, n_block=2, n_layer=2, noise_std=0.1, generator=generator())
    with torch.no_grad():
        for block in flow.chain():
            block.proj_out.bias[:4] = -12.0  # log-scales: tokens become a point, whose place float32 cannot hold
            block.proj_out.weight[4:].normal_(generator=generator(1))

    with pytest.raises(UnusableFlowError):
        probe(flow)
