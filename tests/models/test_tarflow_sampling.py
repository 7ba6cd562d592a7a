"""The samplers of a TarFlow invert its forward map, guided or not, and agree with each other."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from models.errors import ArchitectureError, ImageError
from models.tarflow import TarFlow
from models.tarflow_decoder import GuidanceError, guided_coefficients
from models.tarflow_sampling import Guidance, Inverted, fastest, free_tokens, parallel, sequential
from tests.models.flow_table import generator
from tests.models.tarflow_cases import latents, small

GUIDANCES = {
    "none": None,
    "class": Guidance(0.7),
    "attention": Guidance(0.7, temperature=0.4),
    "annealed": Guidance(1.5, temperature=2.0, annealed=True),
}
every_guidance = pytest.mark.parametrize("name", sorted(GUIDANCES))
Sampler = Callable[..., Inverted]


def plainly(flow: TarFlow, z: Tensor, label: Tensor | None, guidance: Guidance | None) -> Tensor:
    """The guided inverse with no cache: the whole transformer runs again for every token."""
    h = z
    for block in reversed(flow.chain()):
        z = block.ordered(h)
        x = z.clone()
        for i in range(1, z.shape[1]):
            a, b = block.coefficients(x, label)
            if guidance is not None:
                weak_a, weak_b = block.coefficients(x, None, temperature=guidance.temperature)
                weight = guidance.weight * (i / 15 if guidance.annealed else 1.0)
                a, b = a + weight * (a - weak_a), b + weight * (b - weak_b)
            x[:, i] = z[:, i] * torch.exp(a[:, i]) + b[:, i]
        h = block.ordered(x)
    return flow.images(h) / 2


@every_guidance
@pytest.mark.parametrize("sampler", [sequential, parallel, fastest])
@torch.no_grad()
def test_every_sampler_gives_the_uncached_inverse(sampler: Sampler, name: str) -> None:
    flow, z = small(n_classes=3).double(), latents(4).double()
    label = torch.tensor([0, 1, 2, -1])

    found = sampler(flow, z, label=label, guidance=GUIDANCES[name])

    expected = plainly(flow, z, label, GUIDANCES[name])
    torch.testing.assert_close(found.images, expected, rtol=0, atol=1e-9 if sampler is sequential else 1e-4)


@pytest.mark.parametrize("window", [1, 2, 5, 15, 1000])
def test_the_parallel_sampler_keeps_its_certificate_and_needs_no_more_reads_than_tokens(window: int) -> None:
    flow, z = small(), latents(3)

    found = parallel(flow, z, window=window)

    assert found.fallbacks == 0
    assert found.residual is not None
    assert found.residual <= 1e-4
    assert found.reads <= 3 * 15
    torch.testing.assert_close(flow(found.images)[0], z, rtol=0, atol=3e-4)  # three blocks, each within 1e-4


@pytest.mark.parametrize("window", [None, 15])
@pytest.mark.parametrize("variance", [1e-4, 1.0, 30.0])
def test_the_certificate_is_in_standard_deviations_of_the_latents(variance: float, window: int | None) -> None:
    flow, z = small(), latents(3)
    spread = torch.linspace(0.5, 1.5, z[0].numel()).view_as(z[0])
    flow.var.copy_(variance * spread)
    largest = 0.0

    with torch.no_grad():
        for block in flow.chain():  # as in flows of a variance: blocks that shift and do not scale
            half = block.proj_out.weight.shape[0] // 2
            block.proj_out.weight[:half], block.proj_out.bias[:half] = 0, 0
        found = parallel(flow, z, window=window)
        largest = float((flow(found.images)[0] - z).abs().max())

    assert found.residual is not None
    assert found.residual <= 1e-4 or found.fallbacks
    assert largest <= 3e-4 + 2e-6 / variance**0.5  # three blocks, each within 1e-4; and float32 of images of about 1
    assert largest <= 3 * found.residual + 2e-6 / variance**0.5


def test_a_wide_window_saves_reads() -> None:
    flow, z = small(), latents(1)

    assert parallel(flow, z, window=15).reads < 0.8 * sequential(flow, z).reads


def test_a_block_that_misses_the_tolerance_is_done_again_one_token_at_a_time() -> None:
    flow, z = small(), latents(2)

    found = parallel(flow, z, tolerance=1e-12)  # below what float32 can hold

    assert found.fallbacks == 3
    assert torch.equal(found.images, sequential(flow, z).images)


def test_a_window_that_costs_more_than_it_saves_is_given_up() -> None:
    flow = small()
    crowd = latents(round(free_tokens(flow, 1) / 6))  # six tokens double the cost of a read: too few for a window

    found, insisted = parallel(flow, crowd), parallel(flow, crowd, window=18)

    assert found.residual is not None
    assert found.residual <= 1e-4
    assert insisted.reads < found.reads <= sequential(flow, crowd).reads


def test_the_default_is_sequential_where_windows_do_not_pay() -> None:
    flow = small()

    alone, crowd = latents(1), latents(1).expand(4000, -1, -1)

    assert fastest(flow, alone).residual is not None  # went in parallel, and was certified
    assert fastest(flow, crowd[:, :, :]).residual is None
    assert torch.equal(fastest(flow, alone).images, fastest(flow, alone).images)


def test_guidance_of_no_weight_or_no_difference_is_the_flow_itself() -> None:
    flow, z = small(n_classes=2), latents(2)
    own = sequential(flow, z, label=1).images

    torch.testing.assert_close(sequential(flow, z, label=1, guidance=Guidance(0.0, 0.3)).images, own)
    unlabelled = sequential(flow, z).images
    torch.testing.assert_close(sequential(flow, z, guidance=Guidance(3.0)).images, unlabelled)
    assert not torch.allclose(sequential(flow, z, label=1, guidance=Guidance(0.5)).images, own)


def test_guided_coefficients_are_an_extrapolation_of_two_predictions() -> None:
    block, x = small(n_classes=2).chain()[0], latents(2)
    label = torch.tensor([0, 1])

    a, b = guided_coefficients(block, x, label, Guidance(0.5, temperature=0.7))

    for found, strong, weak in zip(
        (a, b), block.coefficients(x, label), block.coefficients(x, None, temperature=0.7), strict=True
    ):
        torch.testing.assert_close(found, 1.5 * strong - 0.5 * weak)


def test_samplers_run_side_by_side_on_one_flow() -> None:
    flow = small(n_classes=2)
    draws = [latents(2, seed) for seed in range(4)]
    alone = [sequential(flow, z, label=1).images for z in draws]
    together: dict[int, Tensor] = {}

    def work(place: int) -> None:
        together[place] = sequential(flow, draws[place], label=1).images

    threads = [threading.Thread(target=work, args=(place,)) for place in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert all(torch.equal(together[place], alone[place]) for place in range(4))


def test_autocast_does_not_reach_the_samplers() -> None:
    flow, z = small(), latents(2)
    plain = sequential(flow, z).images

    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = sequential(flow, z).images

    assert torch.equal(found, plain)


def test_bad_latents_and_guidance_are_refused() -> None:
    flow, z = small(), latents(2)

    with pytest.raises(ArchitectureError, match=r"\(b, 16, 4\)|\(b, \*\(16, 4\)\)"):
        sequential(flow, z[:, :5])
    for sampler in (sequential, parallel, fastest):
        with pytest.raises(ImageError, match="NaN"):
            sampler(flow, z.log())
    with pytest.raises(GuidanceError, match="finite"):
        Guidance(float("nan"))
    with pytest.raises(GuidanceError, match="above 0"):
        Guidance(1.0, temperature=0.0)


@pytest.mark.parametrize("sampler", [sequential, parallel, fastest])
@pytest.mark.parametrize("share", [1.0, 0.25])
def test_weights_that_are_no_numbers_end_every_sampler_with_no_numbers(sampler: Sampler, share: float) -> None:
    flow, z = small(), latents(3)
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter[torch.rand(parameter.shape, generator=generator(1)) <= share] = torch.nan

    found = sampler(flow, z)

    most = 3 * (2 * 15)  # of three blocks, each read once in windows and once token by token
    assert not bool(found.images.isfinite().flatten(1).all(1).any())
    assert found.reads <= most
    assert sampler is not parallel or (found.fallbacks == 3 and math.isnan(found.residual or 0.0))


def test_nothing_is_drawn_of_nothing() -> None:
    flow = small()

    assert sequential(flow, latents(0)).images.shape == (0, 1, 8, 8)
    assert parallel(flow, latents(0)).images.shape == (0, 1, 8, 8)
