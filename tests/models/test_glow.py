"""The laws of a flow, over every flow of the table."""

import math

import pytest
import torch

from models.errors import ArchitectureError
from models.glow import Glow
from models.protocol import CheckpointedFlow, Flow, SplitFlow
from tests.models.flow_table import FLOWS, generator, images

every_flow = pytest.mark.parametrize("name", sorted(FLOWS))


@every_flow
def test_log_prob_is_the_change_of_variables_with_the_autograd_jacobian(name: str) -> None:
    flow = FLOWS[name]().double()
    x = images(flow, 1)
    size = math.prod(flow.image_shape)

    def flat(image: torch.Tensor) -> torch.Tensor:
        latents, _ = flow(image.reshape(1, *flow.image_shape))
        return torch.cat([z.reshape(-1) for z in latents])

    for image, found in zip(x, flow.log_prob(x), strict=True):
        jacobian = torch.autograd.functional.jacobian(flat, image.reshape(-1))
        z = flat(image.reshape(-1))
        expected = -0.5 * (z.square().sum() + size * math.log(2 * math.pi)) + torch.linalg.slogdet(jacobian)[1]
        # float64 on both sides; the determinant of a few hundred dimensions loses some digits
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-7)


@every_flow
def test_inverse_undoes_forward(name: str) -> None:
    flow = FLOWS[name]()
    x = images(flow, 4)

    latents, _ = flow(x)

    torch.testing.assert_close(flow.inverse(latents), x, rtol=0, atol=2e-5)  # float32 through all steps twice


@every_flow
def test_forward_undoes_inverse(name: str) -> None:
    flow = FLOWS[name]().double()
    latents = [torch.randn(3, *s, generator=generator(), dtype=torch.float64) for s in flow.latent_shapes()]

    found, _ = flow(flow.inverse(latents))

    for mine, theirs in zip(found, latents, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-9)


@every_flow
def test_gradients_reach_every_parameter(name: str) -> None:
    flow = FLOWS[name]()

    flow.log_prob(images(flow, 4)).mean().backward()

    still = [key for key, p in flow.named_parameters() if p.grad is None or not bool(p.grad.abs().sum() > 0)]
    # at the last scale the prior reads zeros and the padding's ones, so its weights move; nothing may stand still
    assert still == []


@every_flow
def test_log_prob_of_an_image_does_not_depend_on_its_batch_mates(name: str) -> None:
    flow = FLOWS[name]()
    x = images(flow, 6)

    together = flow.log_prob(x)
    alone = torch.cat([flow.log_prob(image[None]) for image in x])

    assert together.shape == (6,)
    assert together.dtype == torch.float32
    torch.testing.assert_close(
        together, alone, rtol=1e-5, atol=1e-3
    )  # kernels differ by batch size, in the last digits


@every_flow
def test_samples_are_finite_seeded_and_of_the_image_shape(name: str) -> None:
    flow = FLOWS[name]()

    first, second = (flow.sample(3, generator=generator(5), temperature=0.7) for _ in range(2))

    assert first.shape == (3, *flow.image_shape)
    assert bool(torch.isfinite(first).all())
    assert torch.equal(first, second)


@every_flow
def test_prefix_and_suffix_add_up_to_log_prob(name: str) -> None:
    flow = FLOWS[name]()
    x = images(flow, 3)

    h, share = flow.prefix(x)

    torch.testing.assert_close(share + flow.suffix_log_prob(h), flow.log_prob(x))


@every_flow
def test_prefix_reads_no_suffix_parameter(name: str) -> None:
    flow = FLOWS[name]()
    h, share = flow.prefix(images(flow, 3))

    suffix = flow.suffix_parameters()
    grads = torch.autograd.grad(h.sum() + share.sum(), suffix, allow_unused=True) if suffix else ()

    assert all(grad is None for grad in grads)


@every_flow
def test_log_prob_changes_no_buffer(name: str) -> None:
    flow = FLOWS[name]()
    for module in flow.modules():
        if hasattr(module, "initialized"):
            module.initialized.zero_()
    before = {key: value.clone() for key, value in flow.state_dict().items()}

    flow.train()
    flow.log_prob(images(flow, 4))

    assert all(torch.equal(before[key], value) for key, value in flow.state_dict().items())


@every_flow
def test_global_random_state_is_left_alone(name: str) -> None:
    before = torch.get_rng_state()

    flow = FLOWS[name]()
    flow.sample(2, generator=generator())

    assert torch.equal(before, torch.get_rng_state())


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


def test_glow_meets_the_protocols() -> None:
    flow = FLOWS["affine-lu"]()

    assert isinstance(flow, Flow)
    assert isinstance(flow, SplitFlow)
    assert isinstance(flow, CheckpointedFlow)


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
        Glow(shape, 5, **changes)  # type: ignore[arg-type]


def test_images_of_another_shape_are_refused() -> None:
    with pytest.raises(ArchitectureError, match="takes images of shape"):
        FLOWS["rgb"]().log_prob(torch.zeros(1, 1, 8, 8))
