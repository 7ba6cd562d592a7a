"""The probe: sound flows pass, trained or not, and each way of being useless is refused with its own words."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from models.glow import Glow, InvConv
from models.probe import UnusableFlowError, probe
from tests.models.flow_table import FLOWS, generator


def smooth_images(n: int, channels: int, side: int) -> Tensor:
    """Dequantised images, (n, channels, side, side), whose neighbouring pixels are alike, as in photos."""
    draws = generator(7)
    coarse = torch.rand(n, channels, 4, 4, generator=draws) - 0.5
    x = F.interpolate(coarse, size=(side, side), mode="bilinear") * 0.9
    return x + torch.rand(x.shape, generator=draws) / 32 - 1 / 64


def fresh(channels: int = 1, *, affine: bool = True, lu: bool = True, start: Tensor | None = None) -> Glow:
    """A Glow as training finds it: after its actnorm start."""
    flow = Glow((channels, 16, 16), 5, n_block=2, n_flow=4, hidden=16, affine=affine, lu=lu, generator=generator())
    flow.initialize(smooth_images(64, channels, 16) if start is None else start)
    return flow.eval()


def rescaled(flow: Glow, factor: float, shift: float) -> Glow:
    """The same flow over images factor * x + shift: its first actnorm undoes that."""
    first = flow.blocks[0].flows[0].actnorm
    with torch.no_grad():
        first.loc.mul_(factor).sub_(shift)
        first.scale.div_(factor)
    return flow


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("lu", [False, True])
def test_a_flow_that_has_but_seen_images_passes_without_a_warning(channels: int, affine: bool, lu: bool) -> None:
    assert probe(fresh(channels, affine=affine, lu=lu)) == []


@pytest.mark.parametrize("name", sorted(FLOWS))
def test_every_flow_of_the_table_passes(name: str) -> None:
    probe(FLOWS[name]().eval())


def test_the_verdict_is_the_same_each_time_and_leaves_the_flow_as_it_was() -> None:
    flow = rescaled(fresh(), 1.0, 0.5)
    before = {name: value.clone() for name, value in flow.state_dict().items()}

    assert probe(flow) == probe(flow) != []
    assert all(torch.equal(value, before[name]) for name, value in flow.state_dict().items())


def zero_scale(flow: Glow) -> None:
    flow.blocks[0].flows[1].actnorm.scale[0, 0] = 0.0


def every_scale_zero(flow: Glow) -> None:
    flow.blocks[1].flows[2].actnorm.scale.zero_()


def diagonal_that_overflows(flow: Glow) -> None:
    flow.blocks[0].flows[0].invconv.w_s[1] = 200.0


def diagonal_that_underflows(flow: Glow) -> None:
    flow.blocks[0].flows[0].invconv.w_s.fill_(-200.0)


def scale_that_overflows(flow: Glow) -> None:
    flow.blocks[0].flows[0].actnorm.scale.fill_(1e30)


def squeezed(flow: Glow) -> None:
    flow.blocks[0].flows[0].actnorm.scale.mul_(1e-12)


def cancellation(flow: Glow) -> None:
    """One step adds a million, the next takes it away: exact in the reals, and not in 24 bits."""
    first, second = flow.blocks[0].flows[:2]
    moved = first.coupling.net[4].conv.bias
    moved.add_(1e6)
    second.actnorm.loc[:, -len(moved) :].sub_(1e6)


def bytes_for_pixels(flow: Glow) -> None:
    rescaled(flow, 255.0, 127.5)


def sharper_than_its_depth(flow: Glow) -> None:
    rescaled(flow, 1e-3, 0.0)


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (zero_scale, "samples of the flow hold NaN or infinity"),
        (every_scale_zero, "samples of the flow hold NaN or infinity"),
        (diagonal_that_overflows, "samples of the flow hold NaN or infinity"),
        (diagonal_that_underflows, "cannot be sampled: a 1x1 convolution is singular"),
        (scale_that_overflows, "log-likelihood of the flow's own samples is not finite"),
        (squeezed, r"only 0% of the pixels of the flow's samples lie in \[-0.75, 0.75\]"),
        (bytes_for_pixels, r"trained on images of another scale"),
        (cancellation, r"comes back 0\.\d+ off, the most is 0.0039"),
        (sharper_than_its_depth, r"n_bits = 5 is implausible: .* 0 or more: state the n_bits"),
    ],
)
def test_each_breakage_is_refused_with_its_own_words(damage: Callable[[Glow], None], says: str) -> None:
    flow = fresh(affine=False)
    with torch.no_grad():
        damage(flow)

    with pytest.raises(UnusableFlowError, match=says):
        probe(flow)


def test_a_singular_free_convolution_is_refused() -> None:
    flow = fresh(lu=False)
    convolution = flow.blocks[1].flows[0].invconv
    assert isinstance(convolution, InvConv)
    with torch.no_grad():
        convolution.weight[0] = 0.0

    with pytest.raises(UnusableFlowError, match="singular"):
        probe(flow)


@pytest.mark.parametrize("affine", [False, True])
def test_weights_that_never_saw_an_image_are_refused(affine: bool) -> None:
    flow = Glow((1, 16, 16), 5, n_block=2, n_flow=4, hidden=16, affine=affine, generator=generator())

    with pytest.raises(UnusableFlowError, match="untrained"):
        probe(flow)


def test_only_a_depth_that_is_too_low_can_be_told() -> None:
    flow = rescaled(fresh(), 0.125, 0.0)  # so that 2 bits are too few for what it knows
    for n_bits in (1, 2):
        flow.n_bits = n_bits
        with pytest.raises(UnusableFlowError, match=f"n_bits = {n_bits} is implausible"):
            probe(flow)
    for n_bits in (6, 7, 8):
        flow.n_bits = n_bits
        assert probe(flow) == []


def test_what_may_be_right_is_a_warning() -> None:
    (scale,) = probe(rescaled(fresh(), 1.0, 0.5))
    (depth,) = probe(fresh(3, start=torch.rand(64, 3, 16, 16, generator=generator()) - 0.5))

    assert "images of this scale" in scale
    assert "hardly trained" in depth


class Grey:
    """A stand-in that counts what it is asked for; its first samples are as broken as it is told."""

    family = "grey"
    n_bits = 5
    architecture: dict[str, object] = {}  # noqa: RUF012 - the protocol's attribute, never written

    def __init__(self, side: int = 8, broken: int = 0) -> None:
        self.image_shape = (3, side, side)
        self.broken = broken
        self.asked = 0

    def sample(self, n: int, *, generator: torch.Generator, temperature: float = 1.0) -> Tensor:
        self.asked = n
        x = torch.zeros(n, *self.image_shape)
        x[: self.broken, 0, 0, 0] = torch.inf
        return x

    def log_prob(self, x: Tensor) -> Tensor:
        return torch.ones(len(x))


def test_some_samples_that_are_not_finite_are_a_warning_and_all_are_a_refusal() -> None:
    (warning,) = probe(Grey(broken=3))

    assert "3 of 8 samples hold NaN or infinity" in warning
    with pytest.raises(UnusableFlowError, match="NaN or infinity"):
        probe(Grey(broken=8))


@pytest.mark.parametrize(("side", "images"), [(8, 8), (64, 8), (128, 5), (256, 3), (1024, 3)])
def test_the_cost_is_bounded_whatever_the_size(side: int, images: int) -> None:
    flow = Grey(side)

    probe(flow)

    assert flow.asked == images
