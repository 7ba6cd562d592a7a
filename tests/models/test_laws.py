"""The laws of a flow, over every flow of the table."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from models.checkpoints import load_flow, save_checkpoint, tensor_digest
from models.errors import ArchitectureError
from models.protocol import CheckpointedFlow, Flow, SplitFlow
from tests.models.flow_table import FLOWS, VECTORS, generator

LAWFUL = FLOWS | VECTORS

every_flow = pytest.mark.parametrize("name", sorted(LAWFUL))
every_stored_flow = pytest.mark.parametrize("name", sorted(name for name in FLOWS if "oblong" not in name))
every_split_flow = pytest.mark.parametrize(
    "name", sorted(name for name in LAWFUL if isinstance(LAWFUL[name](), SplitFlow))
)


def made(name: str) -> Any:
    """The flow of this name."""
    return LAWFUL[name]()


def inputs(name: str, flow: Any, n: int, seed: int = 0) -> Tensor:
    """n inputs for it."""
    return LAWFUL[name].inputs(flow, n, seed)


def parts(latents: Tensor | list[Tensor]) -> list[Tensor]:
    """One latent or a list of them, as a list."""
    return [latents] if isinstance(latents, Tensor) else list(latents)


@every_flow
def test_it_meets_the_protocols(name: str) -> None:
    flow = made(name)

    assert isinstance(flow, nn.Module)
    assert isinstance(flow, Flow)
    assert isinstance(flow, CheckpointedFlow)


@every_flow
def test_log_prob_is_the_change_of_variables_with_the_autograd_jacobian(name: str) -> None:
    flow = made(name).double()
    x = inputs(name, flow, 1)

    def flat(image: Tensor) -> Tensor:
        latents, _ = flow(image.reshape(1, *flow.image_shape))
        return torch.cat([z.reshape(-1) for z in parts(latents)])

    for image, found in zip(x, flow.log_prob(x), strict=True):
        jacobian = torch.autograd.functional.jacobian(flat, image.reshape(-1))
        latents, log_det = flow(image[None])
        expected = torch.linalg.slogdet(jacobian)[1]
        # float64 on both sides; the determinant of a few hundred dimensions loses some digits
        torch.testing.assert_close(log_det[0], expected, rtol=1e-9, atol=1e-7)
        density = LAWFUL[name].base(flow, parts(latents))[0] + expected
        torch.testing.assert_close(found, density, rtol=1e-9, atol=1e-7)


@every_flow
def test_inverse_undoes_forward(name: str) -> None:
    flow = made(name)
    x = inputs(name, flow, 4)

    latents, _ = flow(x)

    torch.testing.assert_close(flow.inverse(latents), x, rtol=0, atol=2e-5)  # float32 through all steps twice


@every_flow
def test_forward_undoes_inverse(name: str) -> None:
    flow = made(name).double()
    like, _ = flow(inputs(name, flow, 3))
    draws = generator(4)
    latents = [torch.randn(z.shape, generator=draws, dtype=torch.float64) for z in parts(like)]

    found, log_det = flow(flow.inverse(latents[0] if isinstance(like, Tensor) else latents))

    assert log_det.shape == (3,)
    for mine, theirs in zip(parts(found), latents, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-9)


@every_flow
def test_gradients_reach_every_parameter(name: str) -> None:
    flow = made(name)

    flow.log_prob(inputs(name, flow, 4)).mean().backward()

    still = [key for key, p in flow.named_parameters() if p.grad is None or not bool(p.grad.abs().sum() > 0)]
    # where a net reads zeros, its padding's ones or its biases move it; nothing may stand still
    assert still == []
    assert all(bool(torch.isfinite(p.grad).all()) for p in flow.parameters())


@every_flow
def test_log_prob_of_an_image_does_not_depend_on_its_batch_mates(name: str) -> None:
    flow = made(name)
    x = inputs(name, flow, 6)

    together = flow.log_prob(x)
    alone = torch.cat([flow.log_prob(image[None]) for image in x])

    assert together.shape == (6,)
    # kernels differ by batch size, in the last digits
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-3)


@every_flow
def test_log_prob_is_float32_and_near_that_in_float64(name: str) -> None:
    flow = made(name)
    x = inputs(name, flow, 3)

    found = flow.log_prob(x)

    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), flow.double().log_prob(x.double()), rtol=1e-4, atol=1e-3)


@every_flow
def test_samples_are_finite_seeded_and_of_the_image_shape(name: str) -> None:
    flow = made(name)

    first, second = (flow.sample(3, generator=generator(5), temperature=0.7) for _ in range(2))
    other = flow.sample(3, generator=generator(6), temperature=0.7)

    assert first.shape == (3, *flow.image_shape)
    assert bool(torch.isfinite(first).all())
    assert torch.equal(first, second)
    assert not torch.equal(first, other)
    assert not first.requires_grad


@every_flow
def test_samples_are_likely(name: str) -> None:
    flow = made(name)

    samples = flow.sample(16, generator=generator(5))
    elsewhere = samples + 3.0  # far outside of where the flow lives

    assert bool((flow.log_prob(samples).median() > flow.log_prob(elsewhere).median()).item())


@every_split_flow
def test_prefix_and_suffix_add_up_to_log_prob(name: str) -> None:
    flow = made(name)
    x = inputs(name, flow, 3)

    h, share = flow.prefix(x)

    assert len(h) == 3
    assert share.shape == (3,)
    torch.testing.assert_close(share + flow.suffix_log_prob(h), flow.log_prob(x))


@every_split_flow
def test_the_suffix_parameters_are_those_that_prefix_does_not_read(name: str) -> None:
    flow = made(name)
    h, share = flow.prefix(inputs(name, flow, 3))
    suffix = {id(parameter) for parameter in flow.suffix_parameters()}
    if not suffix:  # too shallow to be cut: tamed whole
        return

    grads = torch.autograd.grad(h.sum() + share.sum(), list(flow.parameters()), allow_unused=True)

    unread = {id(p) for p, grad in zip(flow.parameters(), grads, strict=True) if grad is None}
    assert unread == suffix


@every_flow
def test_log_prob_changes_no_state(name: str) -> None:
    flow = made(name)
    for module in flow.modules():
        if hasattr(module, "initialized"):
            module.initialized.zero_()
    before = {key: value.clone() for key, value in flow.state_dict().items()}

    flow.train()
    flow.log_prob(inputs(name, flow, 4))

    assert all(torch.equal(before[key], value) for key, value in flow.state_dict().items())


@every_flow
def test_global_random_state_is_left_alone(name: str) -> None:
    before = torch.get_rng_state()

    flow = made(name)
    flow.sample(2, generator=generator())
    flow.log_prob(inputs(name, flow, 2))

    assert torch.equal(before, torch.get_rng_state())


@every_flow
def test_the_same_seed_makes_the_same_flow(name: str) -> None:
    assert tensor_digest(made(name).state_dict()) == tensor_digest(made(name).state_dict())


@every_stored_flow
def test_save_and_load_give_the_same_bits(name: str, tmp_path: Path) -> None:
    flow = made(name).eval()
    x = inputs(name, flow, 3)

    save_checkpoint(tmp_path / "a.safetensors", flow)
    loaded = load_flow(tmp_path / "a.safetensors")

    assert type(loaded) is type(flow)
    assert loaded.architecture == flow.architecture
    assert (loaded.image_shape, loaded.n_bits) == (flow.image_shape, flow.n_bits)
    assert tensor_digest(loaded.state_dict()) == tensor_digest(flow.state_dict())  # type: ignore[attr-defined]  # a module
    assert torch.equal(loaded.log_prob(x), flow.log_prob(x))


@every_flow
def test_inputs_of_another_shape_are_refused(name: str) -> None:
    flow = made(name)
    *others, last = flow.image_shape

    for shape in ((*others, last * 2), (*others, last, 1), (1, *others, last), (*others, 0)):
        with pytest.raises(ArchitectureError, match=re.escape(str(flow.image_shape))):
            flow.log_prob(torch.zeros(2, *shape))


@every_flow
@pytest.mark.parametrize("position", [0, -1])
def test_a_nan_in_an_image_shows_in_its_likelihood_and_in_no_other(name: str, position: int) -> None:
    flow = made(name)
    x = inputs(name, flow, 3)
    x[1].view(-1)[position] = torch.nan

    found = flow.log_prob(x)

    assert torch.isfinite(found).tolist() == [True, False, True]


@every_flow
def test_a_nan_in_a_parameter_shows_in_the_likelihood(name: str) -> None:
    flow = made(name)
    x = inputs(name, flow, 2)
    named = list(flow.named_parameters())
    hidden = []

    with torch.no_grad():
        for key, parameter in named[:: len(named) // 16 + 1]:  # some, from all over the flow
            kept = parameter.clone()
            parameter.fill_(torch.nan)
            if bool(torch.isfinite(flow.log_prob(x)).any()):
                hidden.append(key)
            parameter.copy_(kept)

    assert hidden == []
