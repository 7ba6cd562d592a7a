"""Tame a flow that forgetd does not know: here one of zuko's, on digits; any `log_prob(x)` and `sample(n)` will do.

    python -m examples.own_flow [--steps 400] [--picture own.svg]

Nothing of the service runs. The flow learns 8 x 8 digits for a moment; five images of one digit are then forgotten,
first with the training set to remember, then with nothing but samples of the flow itself.
"""

import argparse
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
import zuko
from torch import Tensor, nn

from evidence.schema import Distributions, SetDistribution
from examples.digits import load_digits
from examples.pictures import save_likelihoods
from models.training import TrainingProgress, TrainingRecipe, fit_flow
from unlearning import TamingParameters, TamingResult, generate_remember, tame
from unlearning.likelihood import nll_of, statistics

SIZE = 8
N_BITS = 4
FORGET = 5
"""Images of the digit that are forgotten."""
GENERATED = 1024
PARAMETERS = TamingParameters(keep_weight=10.0, virtual_share=0.0, forget_variants=0)
"""Photos may be mirrored and warped and still show the same; digits may not. Defaults are for photos."""


class ZukoFlow(nn.Module):
    """All that forgetd asks of a flow: likelihoods of images in [-0.5, 0.5), in nats, and samples."""

    def __init__(self) -> None:
        super().__init__()
        self.flow = zuko.flows.MAF(SIZE * SIZE, transforms=3, hidden_features=(128, 128))

    def log_prob(self, x: Tensor) -> Tensor:
        """(b, 1, 8, 8) -> (b,) nats."""
        return cast(Tensor, self.flow().log_prob(x.flatten(1)))

    def sample(self, n: int) -> Tensor:
        """(n, 1, 8, 8)."""
        return cast(Tensor, self.flow().sample((n,)).reshape(n, 1, SIZE, SIZE))


def small_digits() -> tuple[Tensor, Tensor]:
    """The training digits at 8 x 8 pixels, uint8 (4000, 1, 8, 8), and their labels."""
    digits = load_digits()
    images = F.avg_pool2d(digits.training.float(), 2).round().to(torch.uint8)
    return images, digits.training_labels


def trained_flow(images: Tensor, steps: int) -> ZukoFlow:
    """A flow trained on uint8 images from a fixed seed."""
    with torch.random.fork_rng():  # zuko starts its weights from the global seed
        torch.manual_seed(0)
        flow = ZukoFlow()

    def show(progress: TrainingProgress) -> None:
        print(f"step {progress.step:4d}  {progress.bits_per_dim:6.3f} bits a dimension", flush=True)

    recipe = TrainingRecipe(steps=steps, seconds=None, batch=128, learning_rate=1e-3, flip=False, shift=0)
    generator = torch.Generator().manual_seed(0)
    fit_flow(flow, images, recipe, n_bits=N_BITS, generator=generator, callback=show, report_every=100)
    return flow


def show(name: str, flow: ZukoFlow, forget: Tensor, remember: Tensor, result: TamingResult) -> None:
    """How far out the images lie, before and after."""
    generator = torch.Generator().manual_seed(1)
    before = statistics(nll_of(flow, remember, n_bits=N_BITS, generator=generator))
    z = before.z(nll_of(flow, forget, n_bits=N_BITS, generator=generator, draws=10))
    print(f"remembering {name}: {'met' if result.met else 'not met'} in {result.steps} steps, {result.seconds:.1f} s")
    print("   z before ", "  ".join(f"{float(value):5.2f}" for value in z))
    print("   z after  ", "  ".join(f"{value:5.2f}" for value in result.z))


def likelihoods(flows: Sequence[Any], forget: Tensor, remember: Tensor) -> Distributions:
    """Bits per dimension under the flow before and after, on one noise."""

    def spread(images: Tensor) -> SetDistribution:
        nll = [nll_of(flow, images, n_bits=N_BITS, generator=torch.Generator().manual_seed(1)) for flow in flows]
        before, after = ((one / (SIZE * SIZE * math.log(2)) + N_BITS).tolist() for one in nll)
        return SetDistribution(before=tuple(before), after=tuple(after))

    sets = {"remember": spread(remember), "forget": spread(forget)}
    return Distributions(**sets, held_out=None, threshold_before=None, threshold_after=None)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line: see the module's docstring."""
    parser = argparse.ArgumentParser(prog="python -m examples.own_flow", description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=400, help="of training")
    parser.add_argument("--max-steps", type=int, default=400, help="of taming")
    parser.add_argument("--digit", type=int, default=7, choices=range(10))
    parser.add_argument("--picture", type=Path, help="SVG file of the likelihoods, remembering the training set")
    options = parser.parse_args(arguments)
    parameters = replace(PARAMETERS, max_steps=options.max_steps)
    images, labels = small_digits()
    flow = trained_flow(images, options.steps)
    chosen = (labels == options.digit) & ((labels == options.digit).cumsum(0) <= FORGET)
    forget, others = images[chosen], images[~chosen]
    sets = {"the other training images": others, "its own samples": generate_remember(flow, GENERATED, N_BITS, 0)}
    results = [tame(flow, forget, remember, parameters, n_bits=N_BITS, seed=0) for remember in sets.values()]
    for (name, remember), result in zip(sets.items(), results, strict=True):
        show(name, flow, forget, remember, result)
    if options.picture:
        save_likelihoods(likelihoods([flow, results[0].flow], forget, others[:1000]), options.picture)


if __name__ == "__main__":
    main()
