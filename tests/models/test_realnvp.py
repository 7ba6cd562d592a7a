"""RealNVP's own claims, and the two exercises of a primer on flows; the laws are in `tests/models/test_laws.py`."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from models.errors import ArchitectureError
from models.flow_layers import log_normal
from models.protocol import SplitFlow
from models.realnvp import PATTERNS, Coupling, RealNVP, join, split
from tests.models.flow_table import FLOWS, VECTORS, generator, images


def test_the_density_of_the_cube_of_a_normal_variable_by_the_change_of_variables() -> None:
    """First exercise: x = z^3 with z ~ N(0, 1) has p(x) = N(x^(1/3)) |x|^(-2/3) / 3."""

    def to_latent(x: Tensor) -> Tensor:
        return x.sign() * x.abs() ** (1 / 3)

    # Neither 0, where the density is infinite, nor far tails.
    x = torch.cat([-torch.logspace(1, -3, 2001), torch.logspace(-3, 1, 2001)]).double()[:, None]  # (n, 1)
    jacobian = torch.autograd.functional.jacobian(lambda v: to_latent(v).sum(0), x)[0, :, 0]  # dz/dx, (n,)
    density = torch.exp(log_normal([to_latent(x)]) + jacobian.log())

    by_hand = torch.exp(-(x[:, 0].abs() ** (2 / 3)) / 2) / (3 * math.sqrt(2 * math.pi)) * x[:, 0].abs() ** (-2 / 3)
    torch.testing.assert_close(density, by_hand)
    right = slice(2001, None)
    mass = torch.trapezoid(density[right], x[right, 0])
    normal = torch.distributions.Normal(0.0, 1.0)
    expected = normal.cdf(torch.tensor(10.0 ** (1 / 3))) - normal.cdf(torch.tensor(0.1))
    assert float(mass) == pytest.approx(float(expected), rel=1e-4)  # the trapezoid rule on 2,001 points


def test_a_coupling_of_four_dimensions_computed_by_hand() -> None:
    """Second exercise: z = (1, 2, 3, 4), s(z_a) = (1, -1/2), t(z_a) = (0.3, 0.7)."""
    coupling = Coupling(4, 3, 0, pattern="halves", flip=False).double()
    with torch.no_grad():
        coupling.bound.fill_(2.0)  # s = 2 tanh(s')
        raw = [math.atanh(0.5), math.atanh(-0.25), 0.3, 0.7]
        coupling.net.leave.bias.copy_(torch.tensor(raw, dtype=torch.float64))
    z = torch.tensor([[1.0, 2.0, 3.0, 4.0]], dtype=torch.float64)

    x, log_det = coupling(z)

    by_hand = [1.0, 2.0, 3 * math.e + 0.3, 4 * math.exp(-0.5) + 0.7]  # (1, 2, 8.455, 3.126)
    torch.testing.assert_close(x, torch.tensor([by_hand], dtype=torch.float64))
    assert float(log_det.detach()) == pytest.approx(0.5)
    torch.testing.assert_close(coupling.inverse(x), z)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_join_undoes_split(pattern: Any) -> None:
    x = torch.randn(2, 7 if pattern == "parity" else 8, generator=generator())
    x = x if pattern in ("parity", "halves") else x[:, :, None, None].expand(2, 8, 3, 5)

    assert torch.equal(join(*split(x, pattern), pattern), x)


def test_the_checkerboard_of_a_squeezed_image_is_that_of_its_pixels() -> None:
    rows, columns = torch.meshgrid(torch.arange(6), torch.arange(4), indexing="ij")
    parity = ((rows + columns) % 2).float().expand(1, 3, 6, 4)

    even, odd = split(F.pixel_unshuffle(parity, 2), "checkerboard")

    assert even.shape == odd.shape
    assert not bool(even.any())
    assert bool(odd.all())


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("flip", [False, True])
def test_a_coupling_moves_one_half_and_keeps_the_other(pattern: Any, flip: bool) -> None:
    vector = pattern in ("parity", "halves")
    coupling = Coupling(8, 6, 1, pattern=pattern, flip=flip)
    with torch.no_grad():
        for parameter in coupling.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator()))
    x = torch.randn((2, 8) if vector else (2, 8, 2, 2), generator=generator(1))

    parts = zip(split(x, pattern), split(coupling(x)[0], pattern), strict=True)

    same = [torch.equal(before, after) for before, after in parts]
    assert same == [flip is False, flip is True]


def test_no_log_scale_leaves_its_bound() -> None:
    coupling = Coupling(4, 16, 1, pattern="halves", flip=False)
    coupling.net.reset(generator())
    with torch.no_grad():
        coupling.bound.copy_(torch.tensor([[0.25, 0.5]]))
        coupling.net.leave.reset(generator(1))

    _, log_det = coupling(torch.randn(64, 4, generator=generator(2)) * 1e6)

    assert float(log_det.detach().abs().max()) <= 0.75
    assert float(log_det.detach().abs().max()) > 0.7  # as far as it may go


@pytest.mark.parametrize("name", ["realnvp", "realnvp-rgb", "realnvp-oblong"])
def test_half_of_what_a_scale_sees_leaves_it(name: str) -> None:
    flow = FLOWS[name]()
    x = images(flow, 2)

    latents, _ = flow(x)

    assert [tuple(z.shape[1:]) for z in latents] == flow.latent_shapes()
    seen = x[0].numel()
    for z in latents[:-1]:
        assert z[0].numel() * 2 == seen
        seen //= 2
    assert latents[-1][0].numel() == seen


def test_initialize_normalises_what_enters_every_coupling() -> None:
    flow = RealNVP((1, 8, 8), 5, n_block=2, n_flow=2, hidden=8, generator=generator())
    x = images(flow, 64) * 3 + 1

    flow.initialize(x)

    h = flow.blocks[0].enter(x)
    for step in flow.blocks[0].steps():
        y, _ = step.norm(h)
        torch.testing.assert_close(y.mean(dim=(0, 2, 3)), torch.zeros(4), rtol=0, atol=1e-4)
        torch.testing.assert_close(y.std(dim=(0, 2, 3)), torch.ones(4), rtol=0, atol=1e-4)
        h, _ = step(h)


def test_it_is_cut_above_its_last_block() -> None:
    flow = FLOWS["realnvp"]()

    assert isinstance(flow, SplitFlow)
    assert {id(p) for p in flow.suffix_parameters()} == {id(p) for p in flow.blocks[-1].parameters()}
    assert VECTORS["vector-realnvp-one-block"]().suffix_parameters() == []


@pytest.mark.parametrize(
    ("shape", "changes"),
    [
        ((1, 12, 12), {"n_block": 3}),
        ((1, 8), {}),
        ((1,), {}),
        ((0, 8, 8), {}),
        ((1, 8, 8), {"n_flow": 1}),
        ((1, 8, 8), {"hidden": 10**9}),
        ((1, 8, 8), {"depth": -1}),
        ((1, 8, 8), {"n_block": True}),
        ((10**6,), {}),
    ],
)
def test_an_architecture_that_cannot_be_built_is_refused(shape: tuple[int, ...], changes: dict[str, Any]) -> None:
    with pytest.raises(ArchitectureError):
        RealNVP(shape, 5, **changes)


def test_too_few_latents_are_refused() -> None:
    flow = FLOWS["realnvp"]()
    latents, _ = flow(images(flow, 2))

    for wrong in (latents[1:], [*latents, latents[-1]]):
        with pytest.raises(ArchitectureError, match="one latent a scale"):
            flow.inverse(wrong)
