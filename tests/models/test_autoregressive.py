"""What is MAF's and IAF's alone: masks, the slow direction and its gradient, agreement with zuko."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import pytest
import torch
import zuko
from torch import Tensor
from zuko.transforms import MonotonicAffineTransform

from models.autoregressive import IAF, LOG_SCALE_BOUND, MAF, MaskedAffine, MaskedNet
from models.errors import ArchitectureError
from models.protocol import SplitFlow
from tests.models.flow_table import FLOWS, VECTORS, generator, images


def moved(module: Any, seed: int = 1, scale: float = 0.3) -> Any:
    """The module in float64 with every parameter moved far."""
    draws = generator(seed)
    with torch.no_grad():
        for parameter in module.double().parameters():
            parameter.add_(torch.randn(parameter.shape, generator=draws, dtype=torch.float64) * scale)
    return module


def normal(*shape: int, seed: int = 0) -> Tensor:
    """Standard normal draws in float64."""
    return torch.randn(shape, generator=generator(seed), dtype=torch.float64)


@pytest.mark.parametrize(("hidden", "depth"), [(12, 1), (12, 3), (5, 2), (40, 2)])
def test_scale_and_shift_read_every_dimension_before_their_own_and_no_other(hidden: int, depth: int) -> None:
    net = moved(MaskedNet(7, hidden, depth))
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.abs_()  # with positive inputs every unit is at work

    jacobian = torch.autograd.functional.jacobian(lambda u: torch.stack(net(u)), normal(1, 7).abs())
    seen = jacobian[:, 0, :, 0] > 0  # (s and t, 7, 7)

    below = torch.ones(7, 7, dtype=torch.bool).tril(-1)
    assert torch.equal(seen[1], below)
    assert not bool((seen[0] & ~below).any())
    if hidden >= 6:  # fewer units than dimensions share: a scale may then miss its nearest neighbour
        assert torch.equal(seen[0], below)


def test_an_image_is_read_pixel_by_pixel_in_turn_from_both_ends() -> None:
    flow = moved(MAF((2, 2, 2), 5, n_flow=2, hidden=14))
    first, second = flow.layers

    x = normal(1, 2, 2, 2)
    order = [x[0, channel, row, column] for row in (0, 1) for column in (0, 1) for channel in (0, 1)]
    assert torch.equal(flow._flat(x)[0], torch.stack(order))
    for layer, triangle in ((first, torch.tril), (second, torch.triu)):
        jacobian = torch.autograd.functional.jacobian(lambda u, layer=layer: layer(u)[0], normal(1, 8))[0, :, 0]
        assert torch.equal(jacobian, triangle(jacobian))
        assert bool((jacobian.diagonal() > 0).all())


def test_no_log_scale_leaves_its_bound() -> None:
    net = moved(MaskedNet(6, 10, 1), scale=5.0)

    s, _ = net(normal(64, 6) * 1e6)

    assert float(s.detach().abs().max()) <= LOG_SCALE_BOUND
    assert float(s.detach().abs().max()) > 0.99 * LOG_SCALE_BOUND


@pytest.mark.parametrize(("hidden", "depth"), [(12, 1), (12, 3), (5, 2)])
def test_the_transposed_solution_is_that_of_the_dense_jacobian(hidden: int, depth: int) -> None:
    net = moved(MaskedNet(7, hidden, depth))
    u, g = normal(3, 7), normal(3, 7, seed=1)

    def value(row: Tensor) -> Tensor:
        s, t = net(row[None])
        return (row * s[0].exp() + t[0]).reshape(-1)

    dense = [torch.autograd.functional.jacobian(value, row) for row in u]
    expected = torch.stack([torch.linalg.solve(j.T, row) for j, row in zip(dense, g, strict=True)])

    torch.testing.assert_close(net.solve_transposed(u, g), expected)


@pytest.mark.parametrize("flip", [False, True])
def test_gradients_through_the_slow_direction_are_those_of_an_unrolled_graph(flip: bool) -> None:
    layer = moved(MaskedAffine(6, 10, 2, flip=flip))
    v, weights = normal(4, 6), normal(4, 6, seed=3)

    def gradients(solved: Any) -> list[Tensor]:
        leaf = v.clone().requires_grad_()
        u, log_det = solved(leaf)
        return list(torch.autograd.grad((u.sin() * weights).sum() + log_det.sum(), [leaf, *layer.parameters()]))

    def unrolled(x: Tensor) -> tuple[Tensor, Tensor]:
        x = x.flip(1) if flip else x
        u = torch.zeros_like(x)
        for _ in range(6):  # each pass gets one more dimension right
            s, t = layer.net(u)
            u = (x - t) * torch.exp(-s)
        s, _ = layer.net(u)
        return u.flip(1) if flip else u, -s.sum(dim=1)

    for mine, theirs in zip(gradients(layer.inverse), gradients(unrolled), strict=True):
        torch.testing.assert_close(mine, theirs)


def test_the_value_of_a_likelihood_does_not_depend_on_whether_a_gradient_is_asked_for() -> None:
    flow = FLOWS["iaf"]()
    x = images(flow, 4)

    with torch.no_grad():
        without = flow.log_prob(x)

    assert torch.equal(flow.log_prob(x).detach(), without)


def test_one_layer_of_an_iaf_is_the_inverse_of_that_of_a_maf() -> None:
    maf, iaf = (moved(family((6,), 5, n_flow=1, hidden=10)) for family in (MAF, IAF))
    with torch.no_grad():
        for flow in (maf, iaf):
            flow.norm.loc.zero_()
            flow.norm.log_scale.zero_()
    x = normal(3, 6)

    z, log_det = maf(x)
    back, reverse = iaf(z)

    torch.testing.assert_close(back, x)
    torch.testing.assert_close(reverse, -log_det)


@pytest.mark.parametrize("family", [MAF, IAF])
def test_a_density_in_two_dimensions_integrates_to_one(family: Any) -> None:
    flow = moved(family((2,), 5, n_flow=3, hidden=8), scale=0.4)
    axis = torch.linspace(-40, 40, 801, dtype=torch.float64)  # a step of 0.1
    grid = torch.cartesian_prod(axis, axis)

    with torch.no_grad():
        mass = flow.log_prob(grid).exp().sum() * (axis[1] - axis[0]) ** 2

    assert float(mass) == pytest.approx(1.0, abs=2e-3)


@torch.no_grad()
def copied(flow: MAF | IAF, transforms: list[Any]) -> None:
    """Take the weights of zuko's masked networks; its units are sorted by how many dimensions they see."""
    for layer, transform in zip(flow.layers, transforms, strict=True):
        first, second, last = (module for module in transform.hyper if hasattr(module, "mask"))
        back = (lambda rows: rows.flip(0)) if layer.flip else (lambda rows: rows)
        order = first.mask.sum(dim=1).argsort(stable=True)  # units of both hidden layers have the same degrees
        one, two = layer.net.layers
        one.weight.copy_(back(first.weight[order].T).T)
        two.weight.copy_(second.weight[order][:, order])
        one.bias.copy_(first.bias[order])
        two.bias.copy_(second.bias[order])
        weight, bias = last.weight[:, order].unflatten(0, (-1, 2)), last.bias.unflatten(0, (-1, 2))
        for row, part in enumerate((layer.net.shift, layer.net.log_scale)):
            part.weight.copy_(back(weight[:, row]))
            part.bias.copy_(back(bias[:, row]))


@pytest.mark.parametrize("family", [MAF, IAF])
def test_it_agrees_with_zuko_on_the_same_weights(family: Any) -> None:
    theirs = zuko.flows.MAF(
        5, transforms=3, hidden_features=(8, 8),
        univariate=partial(MonotonicAffineTransform, slope=math.exp(-LOG_SCALE_BOUND)),
    )  # fmt: skip
    draws = generator(2)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=draws) * 0.5)
    mine = family((5,), 5, n_flow=3, hidden=8, depth=2)
    transforms = list(theirs.transform.transforms)
    if family is IAF:
        theirs = zuko.flows.Flow(theirs.transform.inv, theirs.base)
        transforms.reverse()
    copied(mine, transforms)
    x = torch.randn(16, 5, generator=draws)

    torch.testing.assert_close(mine.log_prob(x), theirs().log_prob(x), rtol=1e-5, atol=1e-5)
    z, _ = mine(x)
    torch.testing.assert_close(mine.inverse(z), theirs().transform.inv(z), rtol=1e-4, atol=1e-5)


def test_a_maf_is_cut_in_its_middle_and_an_iaf_is_not() -> None:
    maf = FLOWS["maf"]()

    assert {id(p) for p in maf.suffix_parameters()} == {id(p) for layer in maf.layers[1:] for p in layer.parameters()}
    assert FLOWS["maf-one-layer-oblong"]().suffix_parameters() == []
    assert not isinstance(VECTORS["vector-iaf"](), SplitFlow)


@pytest.mark.parametrize("family", [MAF, IAF])
def test_initialize_normalises_every_dimension_that_varies(family: Any) -> None:
    flow = family((1, 4, 4), 5, n_flow=1, hidden=16)
    x = torch.randn(256, 1, 4, 4, generator=generator()) * 0.2 + 0.1
    x[:, :, 0, 0] = 0.3  # a pixel that never changes is not blown up

    flow.initialize(x)

    y, _ = flow.norm(x.flatten(1))
    torch.testing.assert_close(y.mean(dim=0), torch.zeros(16), rtol=0, atol=1e-4)
    torch.testing.assert_close(y[:, 1:].std(dim=0), torch.ones(15), rtol=0, atol=1e-4)
    assert float(y[:, 0].detach().abs().max()) < 1e-4


@pytest.mark.parametrize("family", [MAF, IAF])
@pytest.mark.parametrize(
    ("shape", "changes"),
    [
        ((1, 8), {}),
        ((1,), {}),
        ((1, 8, 8), {"n_flow": 0}),
        ((1, 8, 8), {"hidden": 10**9}),
        ((1, 8, 8), {"depth": 0}),
        ((1, 8, 8), {"depth": True}),
        ((3, 64, 64), {}),
        ((10**6,), {}),
    ],
)
def test_an_architecture_that_cannot_be_built_is_refused(
    family: Any, shape: tuple[int, ...], changes: dict[str, Any]
) -> None:
    with pytest.raises(ArchitectureError):
        family(shape, 5, **changes)
