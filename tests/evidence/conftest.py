"""Small flows with known densities, and images to judge them with."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from evidence.flow_evaluation import evaluate_taming
from evidence.records import FlowEvaluation
from evidence.report import Report, RunFacts, build_report

SHAPE = (1, 4, 4)
DIMS = 16


class GaussianFlow(nn.Module):
    """x = mean + std z with z ~ N(0, I): every likelihood and divergence has a closed form."""

    def __init__(self, mean: float = 0.0, std: float = 0.25, shape: tuple[int, int, int] = SHAPE) -> None:
        super().__init__()
        self.mean = nn.Parameter(torch.tensor(mean))
        self.std = nn.Parameter(torch.tensor(std))
        self.shape = shape

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        log_det = -math.prod(self.shape) * self.std.log()
        return (x - self.mean) / self.std, log_det.expand(len(x))

    def inverse(self, z: Tensor) -> Tensor:
        return self.mean + self.std * z

    def log_prob(self, x: Tensor) -> Tensor:
        z, log_det = self(x)
        return log_det - 0.5 * (z.flatten(1).square().sum(1) + math.prod(self.shape) * math.log(2 * math.pi))

    def sample(self, n: int, *, generator: torch.Generator, temperature: float = 1.0) -> Tensor:
        return self.inverse(temperature * torch.randn((n, *self.shape), generator=generator))


class TamedFlow(GaussianFlow):
    """A Gaussian flow that finds some given images less likely by some nats; not normalised, as no law needs it."""

    def __init__(self, targets: Tensor, drop: float) -> None:
        super().__init__()
        self.targets = targets
        self.drop = drop

    def log_prob(self, x: Tensor) -> Tensor:
        near = torch.cdist(x.flatten(1), self.targets.flatten(1)).amin(1) < 0.3
        return super().log_prob(x) - self.drop * near


def random_images(n: int, seed: int = 0) -> Tensor:
    """(n, 1, 4, 4) uint8 of which the Gaussian flow finds likelihoods near normal."""
    noise = torch.randn((n, *SHAPE), generator=torch.Generator().manual_seed(seed))
    return (128 + 48 * noise).clamp(0, 255).to(torch.uint8)


@pytest.fixture(scope="session")
def gaussian_flow() -> type[GaussianFlow]:
    return GaussianFlow


@pytest.fixture(scope="session")
def images() -> Callable[..., Tensor]:
    return random_images


@pytest.fixture(scope="session")
def evaluate() -> Callable[..., FlowEvaluation]:
    """Judge a flow that was tamed by `drop` nats on four images; keywords override the call's."""

    def run(drop: float = 60.0, **overrides: object) -> FlowEvaluation:
        forget = random_images(4, seed=1)
        tamed = TamedFlow(forget / 256 - 0.5, drop)
        arguments: dict[str, object] = {
            "forget": forget,
            "remember": random_images(120, seed=2),
            "remember_source": "images",
            "same_identity": random_images(3, seed=3),
            "held_out": random_images(30, seed=4),
            "n_bits": 5,
            "delta": 4.0,
            "tolerance": 0.15,
            "seed": 5,
            "draws": 3,
            "remember_draws": 1,
            "kl_samples": 40,
        }
        return evaluate_taming(GaussianFlow(), tamed, **{**arguments, **overrides})

    return run


@pytest.fixture(scope="session")
def evaluation(evaluate: Callable[..., FlowEvaluation]) -> FlowEvaluation:
    return evaluate()


@pytest.fixture(scope="session")
def run_facts() -> RunFacts:
    return RunFacts(
        job="job_01",
        created_at="2026-01-02T03:04:05Z",
        attempt=2,
        resumed_from_step=10,
        steps=24,
        parameters={"engine": "fast", "delta": 4.0, "learning_rate": 1e-3},
        defaults={"engine": "fast", "delta": 4.0, "learning_rate": 5e-4, "huber": 1.0},
        seeds={"taming": 11},
        digests={"base_checkpoint": "sha256:" + "a" * 64, "tamed_checkpoint": "sha256:" + "b" * 64},
        software={"python": "3.11", "torch": "2.13"},
        seconds={"unlearning": 8.25, "evaluating": 3.5},
        losses={"forget": [(0, 3.5), (10, 1.25), (20, 0.0)], "keep": [(0, 0.0), (10, 0.04), (20, 0.03)]},
        near_duplicates_removed=1,
    )


@pytest.fixture(scope="session")
def report(evaluation: FlowEvaluation, run_facts: RunFacts) -> Report:
    return build_report(evaluation, run_facts)
