"""Flows that nobody here wrote, and all our families, are tamed by the same call."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import zuko
from torch import Tensor, nn

from models.autoregressive import IAF, MAF
from models.images import flow_input
from models.protocol import CheckpointedFlow, SplitFlow
from models.realnvp import RealNVP
from models.training import TrainingRecipe, bits_per_dim, fit_flow
from tests.unlearning.tiny import N_BITS, blobs
from unlearning import TamingParameters, TamingResult, generate_remember, tame
from unlearning.likelihood import nll_of, statistics

SHAPE = (1, 8, 8)
PARAMETERS = TamingParameters(
    max_steps=200, delta=2.0, keep_weight=2.0, learning_rate=3e-3, clip=10.0, remember_batch=24, confirmation_draws=4
)  # as in test_taming.py: tiny flows need a shove


class Wrapped(nn.Module):
    """A zuko flow over 64 dimensions as its user would hand it in: log_prob(x) and sample(n), and nothing else."""

    def __init__(self, flow: Any, scale: float = 4.0) -> None:
        super().__init__()
        self.flow, self.scale = flow, scale

    def log_prob(self, x: Tensor) -> Tensor:
        """(b, 1, 8, 8) -> (b,) nats; zuko's splines live in [-5, 5]."""
        shift = x[0].numel() * torch.log(torch.tensor(self.scale))
        return self.flow().log_prob(x.flatten(1) * self.scale) + shift

    def sample(self, n: int) -> Tensor:
        """(n, 1, 8, 8)."""
        return self.flow().sample((n,)).reshape(n, *SHAPE) / self.scale


def zuko_flow(make: Callable[[], Any]) -> Wrapped:
    """Foreign code starts from the global seed; it is put back."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Wrapped(make())


def ours(family: Callable[..., Any], **architecture: int) -> nn.Module:
    """A flow of ours after its data-dependent start."""
    generator = torch.Generator().manual_seed(0)
    flow = family(SHAPE, N_BITS, generator=generator, **architecture)
    flow.initialize(flow_input(flow, blobs(256, 1), N_BITS, generator))
    return flow  # type: ignore[no-any-return]  # any family


FLOWS: dict[str, Callable[[], nn.Module]] = {
    "zuko-maf": lambda: zuko_flow(lambda: zuko.flows.MAF(64, transforms=2, hidden_features=(64,))),
    "zuko-nsf": lambda: zuko_flow(lambda: zuko.flows.NSF(64, transforms=1, bins=4, hidden_features=(64,))),
    "realnvp": lambda: ours(RealNVP, n_block=2, n_flow=2, hidden=16),
    "maf": lambda: ours(MAF, n_flow=3, hidden=96),
    "iaf": lambda: ours(IAF, n_flow=1, hidden=96),
}
FOREIGN = [name for name in FLOWS if name.startswith("zuko")]
every_flow = pytest.mark.parametrize("name", list(FLOWS))
every_foreign_flow = pytest.mark.parametrize("name", FOREIGN)


@pytest.fixture(scope="module")
def trained() -> Callable[[str], nn.Module]:
    """A flow by its name, trained for a moment on blobs, never modified by a test."""
    made: dict[str, nn.Module] = {}

    def get(name: str) -> nn.Module:
        if name not in made:
            made[name] = FLOWS[name]()
            recipe = TrainingRecipe(steps=60, learning_rate=3e-3, warmup=10)
            fit_flow(
                made[name], blobs(256, 1), recipe, n_bits=N_BITS, generator=torch.Generator().manual_seed(0)
            )  # fmt: skip
        return made[name]

    return get


@pytest.fixture(scope="module")
def tamed(trained: Callable[[str], nn.Module]) -> Callable[[str], tuple[nn.Module, TamingResult]]:
    """By its name: the base as it was before, and what taming made of it."""
    made: dict[str, tuple[nn.Module, TamingResult]] = {}

    def get(name: str) -> tuple[nn.Module, TamingResult]:
        if name not in made:
            flow = trained(name)
            before = copy.deepcopy(flow)
            made[name] = before, tame(flow, blobs(3, 77), blobs(96, 1), PARAMETERS, n_bits=N_BITS, seed=5)  # type: ignore[arg-type]  # a module with log_prob and sample
        return made[name]

    return get


def test_a_wrapped_flow_is_foreign_indeed() -> None:
    flow = FLOWS["zuko-maf"]()

    assert not isinstance(flow, SplitFlow | CheckpointedFlow)


@every_flow
def test_the_base_has_learnt_something(name: str, trained: Any) -> None:
    held_out = bits_per_dim(trained(name), blobs(64, 9), n_bits=N_BITS, generator=torch.Generator().manual_seed(1))

    assert float(held_out.detach().mean()) < N_BITS - 0.5  # uniform noise costs N_BITS


@every_flow
def test_forget_images_pass_the_criterion_on_fresh_noise(name: str, tamed: Any) -> None:
    _, result = tamed(name)

    assert result.met
    assert 0 < result.steps < 200

    fresh = torch.Generator().manual_seed(987)  # of noise that no part of taming has seen
    around = statistics(nll_of(result.flow, blobs(96, 1), n_bits=N_BITS, generator=fresh))
    z = around.z(nll_of(result.flow, blobs(3, 77), n_bits=N_BITS, generator=fresh, draws=8))
    assert float(z.min()) > PARAMETERS.delta * (1 - PARAMETERS.tolerance) - 0.3  # the noise of another judge


@every_flow
def test_the_base_is_not_modified(name: str, trained: Any, tamed: Any) -> None:
    before, result = tamed(name)

    now = trained(name).state_dict()
    assert all(torch.equal(value, now[key]) for key, value in before.state_dict().items())
    changed = [key for key, value in result.flow.state_dict().items() if not torch.equal(value, now[key])]
    assert changed


@every_flow
def test_strangers_stay_about_as_likely_as_they_were(name: str, tamed: Any) -> None:
    before, result = tamed(name)
    strangers = blobs(128, 31)

    nll = [
        nll_of(flow, strangers, n_bits=N_BITS, generator=torch.Generator().manual_seed(3))
        for flow in (before, result.flow)
    ]

    drift = (nll[1] - nll[0]).mean() / statistics(nll[0]).sigma
    assert abs(float(drift)) < 1.0  # in sigma_R, of a push of about 2


@every_foreign_flow
def test_it_is_tamed_with_samples_of_its_own_to_remember(name: str, trained: Any) -> None:
    flow = trained(name)
    state = torch.get_rng_state()

    remember = generate_remember(flow, 64, N_BITS, seed=4)
    result = tame(flow, blobs(2, 77), remember, PARAMETERS, n_bits=N_BITS, seed=6)

    assert torch.equal(torch.get_rng_state(), state)
    assert remember.shape == (64, *SHAPE)
    assert result.steps > 0
    assert torch.equal(remember, generate_remember(flow, 64, N_BITS, seed=4))
    assert result.met


def test_only_what_a_split_flow_calls_its_suffix_is_tuned(trained: Any, tamed: Any) -> None:
    for name in ("realnvp", "maf"):
        base, result = tamed(name)
        tuned = {id(p) for p in base.suffix_parameters()}

        moved = dict(result.flow.named_parameters())
        for key, parameter in base.named_parameters():
            assert torch.equal(parameter, moved[key]) or id(parameter) in tuned
