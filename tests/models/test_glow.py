"""What is Glow's alone; the laws that it shares with every flow are in `tests/models/test_laws.py`."""

import pytest
import torch

from models.errors import ArchitectureError
from models.glow import Glow
from models.protocol import SplitFlow
from tests.models.flow_table import FLOWS, generator, images


def test_initialize_normalises_every_channel_that_enters_a_convolution() -> None:
    flow = Glow((1, 8, 8), 5, n_block=1, n_flow=1, hidden=8, generator=generator())
    x = images(flow, 64) * 3 + 1

    flow.initialize(x)

    norm = flow.blocks[0].flows[0].actnorm
    y = norm.scale * (torch.nn.functional.pixel_unshuffle(x, 2) + norm.loc)
    torch.testing.assert_close(y.mean(dim=(0, 2, 3)), torch.zeros(4), rtol=0, atol=1e-5)
    torch.testing.assert_close(y.std(dim=(0, 2, 3)), torch.ones(4), rtol=0, atol=1e-4)
    assert int(norm.initialized) == 1


def test_temperature_scales_the_spread_of_samples() -> None:
    flow = Glow((1, 8, 8), 5, n_block=2, n_flow=2, hidden=8, generator=generator())

    hot, cold = (flow.sample(64, generator=generator(), temperature=t).std() for t in (1.0, 0.5))

    torch.testing.assert_close(cold, hot * 0.5)


def test_glow_is_cut_above_its_last_scale() -> None:
    flow = FLOWS["affine-lu"]()

    assert isinstance(flow, SplitFlow)
    assert {id(p) for p in flow.suffix_parameters()} == {id(p) for p in flow.blocks[-1].parameters()}
    assert FLOWS["one-block"]().suffix_parameters() == []


@pytest.mark.parametrize(
    ("shape", "changes"),
    [
        ((1, 12, 12), {"n_block": 3}),
        ((1, 8), {}),
        ((0, 8, 8), {}),
        ((1, 8, 8), {"n_flow": 0}),
        ((1, 8, 8), {"hidden": 10**9}),
        ((1, 8, 8), {"n_block": 2, "lu": [True]}),
        ((1, 8, 8), {"n_block": True}),
    ],
)
def test_an_architecture_that_cannot_be_built_is_refused(shape: tuple[int, ...], changes: dict[str, object]) -> None:
    with pytest.raises(ArchitectureError):
        Glow(shape, 5, **changes)  # type: ignore[arg-type]  # values of the wrong type, on purpose


def test_images_of_another_shape_are_refused() -> None:
    with pytest.raises(ArchitectureError, match="takes images of shape"):
        FLOWS["rgb"]().log_prob(torch.zeros(1, 1, 8, 8))
