"""How much sooner is the Fisher information there than by the loops that everybody writes, and is it the same?

    python -m benchmarks.fisher [--threads N] [--rounds N] [--quick]

Both sides run in one process on the same weights and the same draws, alternating, each round a part of the loop and a
whole computation of ours; ratios are of the rounds' medians, and the spread is that of the single rounds.

    VAE    `models.vae.ConditionalVAE` at the sizes of Heng and Soh (2023), appendix B.1, 5,000 examples that it drew,
           one draw each. The loop is the reference's: decode a sample, forward, backward, square and add tensor by
           tensor. It is timed on a part and scaled, as its steps are alike. Ours includes drawing the samples, the
           digests of weights and samples, and the trial of the hooks against autograd.
    U-Net  a stand-in for the Stable Diffusion pipeline on digits, with the parts of `UNet2DConditionModel` (residual
           blocks, transformers with self- and cross-attention, 1.8 M parameters), latents 4 x 4 x 4 (`--latent` for
           others), prompts of 12 tokens, TIMESTEPS stratified timesteps an image. The loop passes one (image,
           timestep) at a time, adds gradients up over an image's timesteps and squares. Both have the same pairs.

Random weights: no time depends on them. The error is the largest |ours - loop| of a tensor over its largest entry, the
worst of all tensors, against the loop in float64, so that it is ours alone; the float32 loop's own stands beside it. So
does the largest |ours - loop| / loop of single entries, down to TINY of their tensor's mean: there, what is left of
summands of opposite signs carries the rounding of float32, in the loop as in ours.
Goals: VAE 50 (aim 100), U-Net 15 (aim 40), errors 1e-5. The last line is one JSON object.
"""

import argparse
import copy
import json
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.conditional import ConditionalModel, Draws
from models.vae import ConditionalVAE
from unlearning.fisher import draws_of, fisher_information
from unlearning.fisher_result import Fisher
from unlearning.randomness import stream

SEED = 0
EXAMPLES = 5000
LOOP_EXAMPLES = 250
"""Of the VAE's loop in a round; scaled to EXAMPLES."""
ERROR_EXAMPLES, ERROR_TIMESTEPS = 250, 100
IMAGES, TIMESTEPS = 2, 500
LOOP_TIMESTEPS = 100
TINY = 1e-6
TOKENS, TOKEN_WIDTH = 12, 64
GOALS = {"vae": 50.0, "unet": 15.0}
MOST_ERROR = 1e-5


class Error(NamedTuple):
    """Of an F against the float64 loop's."""

    scaled: float
    """Over the largest entry of the tensor, the worst of all tensors."""
    entrywise: float
    """Over the entry itself, the worst of all that are not tiny."""


@dataclass(frozen=True)
class Side:
    """Seconds of one computation of F, a value a round, both sides brought to the same work."""

    loop: Sequence[float]
    ours: Sequence[float]
    error: Error
    """Of ours."""
    loop_error: Error
    """Of the float32 loop."""
    estimator: str

    @property
    def speedup(self) -> float:
        """Of the medians."""
        return statistics.median(self.loop) / statistics.median(self.ours)


class Residual(nn.Module):
    """Two convolutions with the time between them, around a shortcut."""

    def __init__(self, inputs: int, outputs: int, time_width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(8, inputs), nn.GroupNorm(8, outputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1)
        self.time = nn.Linear(time_width, outputs)
        self.skip = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else nn.Identity()

    def forward(self, h: Tensor, t: Tensor) -> Tensor:
        """(b, inputs, s, s) and (b, time_width) -> (b, outputs, s, s)."""
        inner = self.conv1(F.silu(self.norm1(h))) + self.time(F.silu(t))[:, :, None, None]
        out: Tensor = self.skip(h) + self.conv2(F.silu(self.norm2(inner)))
        return out


class Attention(nn.Module):
    """Attention of rows to others; no biases on what they are compared by."""

    def __init__(self, width: int, other: int, heads: int = 4) -> None:
        super().__init__()
        self.heads, self.out = heads, nn.Linear(width, width)
        self.query, self.key, self.value = (nn.Linear(size, width, bias=False) for size in (width, other, other))

    def forward(self, rows: Tensor, other: Tensor) -> Tensor:
        """(b, n, width) and (b, m, other) -> (b, n, width)."""
        parts = (self.query(rows), self.key(other), self.value(other))
        q, k, v = (part.unflatten(2, (self.heads, -1)).transpose(1, 2) for part in parts)
        out: Tensor = self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return out


class Transformer(nn.Module):
    """Positions look at each other, then at the prompt, then each at itself."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(8, width)
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(width) for _ in range(3))
        self.enter, self.leave = nn.Linear(width, width), nn.Linear(width, width)
        self.own, self.cross = Attention(width, width), Attention(width, TOKEN_WIDTH)
        self.wide, self.narrow = nn.Linear(width, 8 * width), nn.Linear(4 * width, width)

    def forward(self, h: Tensor, prompt: Tensor) -> Tensor:
        """(b, width, s, s) -> the same."""
        rows = self.enter(self.norm(h).flatten(2).transpose(1, 2))  # (b, s s, width)
        inner = self.norm1(rows)
        rows = rows + self.own(inner, inner)
        rows = rows + self.cross(self.norm2(rows), prompt)
        value, gate = self.wide(self.norm3(rows)).chunk(2, -1)
        rows = rows + self.narrow(value * F.gelu(gate))
        out: Tensor = h + self.leave(rows).transpose(1, 2).reshape(h.shape)
        return out


class Block(nn.Module):
    """A residual block and a transformer."""

    def __init__(self, inputs: int, outputs: int, time_width: int) -> None:
        super().__init__()
        self.residual, self.transformer = Residual(inputs, outputs, time_width), Transformer(outputs)

    def forward(self, h: Tensor, t: Tensor, prompt: Tensor) -> Tensor:
        """(b, inputs, s, s) -> (b, outputs, s, s)."""
        out: Tensor = self.transformer(self.residual(h, t), prompt)
        return out


class SmallDiffusion(nn.Module):
    """A text-conditional diffusion U-Net of two resolutions with the loss of DDPM, by `models.conditional`."""

    def __init__(self, latent: int, width: int = 40, steps: int = 1000) -> None:
        super().__init__()
        wide, time_width = 2 * width, 4 * width
        self.latent, self.width, self.steps = latent, width, steps
        self.time1, self.time2 = nn.Linear(width, time_width), nn.Linear(time_width, time_width)
        self.first = nn.Conv2d(4, width, 3, padding=1)
        self.down1, self.shrink = Block(width, width, time_width), nn.Conv2d(width, width, 3, 2, padding=1)
        self.down2 = Block(width, wide, time_width)
        self.middle1, self.middle2 = Block(wide, wide, time_width), Residual(wide, wide, time_width)
        self.up3, self.up2 = Block(2 * wide, wide, time_width), Block(wide + width, wide, time_width)
        self.grow = nn.Conv2d(wide, wide, 3, padding=1)
        self.up1, self.up0 = Block(wide + width, width, time_width), Block(2 * width, width, time_width)
        self.norm, self.last = nn.GroupNorm(8, width), nn.Conv2d(width, 4, 3, padding=1)
        beta = torch.linspace(0.00085**0.5, 0.012**0.5, steps, dtype=torch.float64).square()
        self.register_buffer("alpha", (1 - beta).cumprod(0).float(), persistent=False)

    def forward(self, x: Tensor, t: Tensor, prompt: Tensor) -> Tensor:
        """The noise in x (b, 4, latent, latent) at timesteps (b,), for prompts (b, TOKENS, TOKEN_WIDTH)."""
        rates = torch.exp(torch.linspace(0, -9.2, self.width // 2, device=x.device, dtype=x.dtype))
        angles = t[:, None].to(x.dtype) * rates
        e = self.time2(F.silu(self.time1(torch.cat([angles.sin(), angles.cos()], 1))))
        h0 = self.first(x)
        h1 = self.down1(h0, e, prompt)
        h2 = self.shrink(h1)
        h3 = self.down2(h2, e, prompt)
        h = self.middle2(self.middle1(h3, e, prompt), e)
        h = self.up2(torch.cat([self.up3(torch.cat([h, h3], 1), e, prompt), h2], 1), e, prompt)
        h = self.grow(F.interpolate(h, scale_factor=2.0))
        h = self.up0(torch.cat([self.up1(torch.cat([h, h1], 1), e, prompt), h0], 1), e, prompt)
        out: Tensor = self.last(F.silu(self.norm(h)))
        return out

    def encode(self, images: Tensor, *, generator: torch.Generator) -> Tensor:  # noqa: ARG002 the protocol's; none drawn
        """Latents are made from nothing here: taken as they are."""
        return images.float()

    def draw(self, n: int, *, generator: torch.Generator) -> Draws:
        """(timesteps, noise), independent."""
        return torch.randint(self.steps, (n,), generator=generator), self._noise(n, generator)

    @property
    def terms(self) -> int:
        """Timesteps, all of which the loss is a sum over."""
        return self.steps

    def draw_stratified(self, n: int, *, generator: torch.Generator) -> Draws:
        """(timesteps, noise), one timestep in each nth of their range."""
        t = (torch.arange(n, dtype=torch.float64) + torch.rand(n, generator=generator, dtype=torch.float64)) / n
        return (t * self.steps).long(), self._noise(n, generator)

    def losses(self, x: Tensor, condition: Tensor, draws: Draws) -> Tensor:
        """|| eps(x_t, t, c) - eps ||^2, (n,)."""
        t, noise = draws
        kept = cast(Tensor, self.alpha)[t].to(x.dtype)[:, None, None, None]
        found = self(kept.sqrt() * x + (1 - kept).sqrt() * noise, t, condition)
        losses: Tensor = (found - noise).square().flatten(1).sum(1)
        return losses

    def sample(self, condition: Tensor, *, generator: torch.Generator) -> Tensor:
        """Part of the protocol, and of no figure: latents are made at random."""
        raise NotImplementedError("the stand-in has no sampler; F takes its examples as they are")

    def scopes(self) -> Mapping[str, Sequence[str]]:
        """All of it."""
        return {"all": [name for name, _ in self.named_parameters()]}

    def _noise(self, n: int, generator: torch.Generator) -> Tensor:
        return torch.randn(n, 4, self.latent, self.latent, generator=generator)


def vae_loop(model: ConditionalVAE, condition: Tensor, x: Tensor | None, rows: range) -> dict[str, Tensor]:
    """The reference-style loop: draws a sample for each row as it goes, and uses that, or the row of `x` if given."""
    totals = {name: torch.zeros_like(value) for name, value in model.named_parameters()}
    generator = stream(SEED, "loop")
    for row in rows:
        label = condition[row : row + 1]
        with torch.no_grad():
            drawn = model.decode(torch.randn(1, model.latent, generator=generator).to(_dtype(model)), label)
        one = drawn if x is None else x[row : row + 1]
        eps = draws_of(model, row, row + 1, 1, "independent", SEED)[0]
        model.zero_grad()
        torch.autograd.backward(model.losses(one, label, (eps.to(one.dtype),)).sum())
        for name, value in model.named_parameters():
            if value.grad is not None:
                totals[name] += value.grad.data**2 / len(rows)
    return totals


def unet_loop(model: SmallDiffusion, x: Tensor, condition: Tensor, draws: int, keep: int) -> dict[str, Tensor]:
    """One (image, timestep) at a time, the first `keep` of each image's draws."""
    totals = {name: torch.zeros_like(value) for name, value in model.named_parameters()}
    for row in range(len(x)):
        t, noise = draws_of(cast(ConditionalModel, model), row, row + 1, draws, "stratified", SEED)
        model.zero_grad()
        for k in range(keep):
            one = slice(k, k + 1)
            rows = slice(row, row + 1)
            loss = model.losses(x[rows], condition[rows], (t[one], noise[one].to(x.dtype)))
            torch.autograd.backward(loss.sum())
        for name, value in model.named_parameters():
            if value.grad is not None:
                totals[name] += value.grad.data**2 / len(x)
    return totals


def vae_side(rounds: int, examples: int) -> Side:
    """Both sides on the VAE."""
    generator = torch.Generator().manual_seed(SEED)
    model = ConditionalVAE((1, 28, 28), n_classes=10, generator=generator)
    names, condition = model.scopes()["all"], torch.arange(examples) % 10

    def ours() -> tuple[Tensor, Fisher]:
        with torch.no_grad():
            x = model.decode(torch.randn(examples, model.latent, generator=stream(SEED, "replay")), condition)
        return x, fisher_information(model, x, condition, names=names, seed=SEED, micro_batch=1000)

    x, found = ours()  # which also warms up
    some = range(min(ERROR_EXAMPLES, examples))
    exact = vae_loop(copy.deepcopy(model).double(), condition, x.double(), some)
    plain = vae_loop(model, condition, x, some)
    mine = fisher_information(model, x, condition, names=names, seed=SEED, rows=some).tensors
    part = range(min(LOOP_EXAMPLES, examples))
    loops, times = [], []
    for _ in range(rounds):
        loops.append(_seconds(lambda: vae_loop(model, condition, None, part)) * examples / len(part))
        times.append(_seconds(ours))
    return Side(loops, times, error(mine, exact), error(plain, exact), found.estimator)


def unet_side(rounds: int, latent: int, images: int, timesteps: int) -> Side:
    """Both sides on the U-Net."""
    torch.manual_seed(SEED)  # of the layers' own starting weights, which take no generator
    model = SmallDiffusion(latent)
    generator = torch.Generator().manual_seed(SEED)
    x = torch.randn(images, 4, latent, latent, generator=generator)
    condition = torch.randn(images, TOKENS, TOKEN_WIDTH, generator=generator)
    names = model.scopes()["all"]

    def ours(draws: int) -> Fisher:
        one = cast(ConditionalModel, model)
        return fisher_information(one, x, condition, names=names, seed=SEED, draws_per_example=draws)

    keep, few = min(LOOP_TIMESTEPS, timesteps), min(ERROR_TIMESTEPS, timesteps)
    mine = ours(few)  # which also warms up
    exact = unet_loop(copy.deepcopy(model).double(), x.double(), condition.double(), few, few)
    plain = unet_loop(model, x, condition, few, few)
    loops, times = [], []
    for _ in range(rounds):
        loops.append(_seconds(lambda: unet_loop(model, x, condition, timesteps, keep)) * timesteps / keep)
        times.append(_seconds(lambda: ours(timesteps)))
    return Side(loops, times, error(mine.tensors, exact), error(plain, exact), mine.estimator)


def error(found: Mapping[str, Tensor], exact: Mapping[str, Tensor]) -> Error:
    """How far `found` is from `exact`, both ways."""
    scaled = entrywise = 0.0
    for name, value in exact.items():
        truth, apart = value.double(), (found[name].double() - value.double()).abs()
        counted = truth > TINY * truth.mean()
        scaled = max(scaled, float(apart.max() / truth.max()))
        entrywise = max(entrywise, float((apart / truth)[counted].max()))
    return Error(scaled, entrywise)


def summary(vae: Side, unet: Side, *, quick: bool = False) -> dict[str, object]:
    """The figures of the last line; a quick run says nothing about the goals."""
    sides = {"vae": vae, "unet": unet}
    figures: dict[str, object] = {}
    for name, side in sides.items():
        ratios = [loop / ours for loop, ours in zip(side.loop, side.ours, strict=True)]
        figures |= {
            f"{name}_speedup": round(side.speedup, 1),
            f"{name}_max_relative_error": float(f"{side.error.scaled:.2e}"),
            f"{name}_speedup_range": [round(min(ratios), 1), round(max(ratios), 1)],
            f"{name}_seconds": round(statistics.median(side.ours), 3),
            f"{name}_loop_seconds": round(statistics.median(side.loop), 2),
            f"{name}_loop_max_relative_error": float(f"{side.loop_error.scaled:.2e}"),
            f"{name}_entrywise_error": float(f"{side.error.entrywise:.2e}"),
            f"{name}_loop_entrywise_error": float(f"{side.loop_error.entrywise:.2e}"),
            f"{name}_estimator": side.estimator,
            f"{name}_goal": GOALS[name],
        }
    met = all(side.speedup >= GOALS[name] and side.error.scaled <= MOST_ERROR for name, side in sides.items())
    return {**figures, "goal_max_relative_error": MOST_ERROR, "within_goals": None if quick else met, "quick": quick}


def main(arguments: list[str] | None = None) -> None:
    """The command line: see the module's docstring."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.fisher", description=__doc__.split("\n")[0])
    parser.add_argument("--threads", type=int, help="of both sides; torch's own choice by default")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--latent", type=int, default=4, help="side of the U-Net's latents, even")
    parser.add_argument("--quick", action="store_true", help="one round on little: a check of this script")
    options = parser.parse_args(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    print(f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}", flush=True)
    rounds = 1 if options.quick else options.rounds
    vae = vae_side(rounds, 500 if options.quick else EXAMPLES)
    _print("VAE", vae)
    unet = unet_side(rounds, options.latent, 1 if options.quick else IMAGES, 50 if options.quick else TIMESTEPS)
    _print("U-Net", unet)
    print(json.dumps({**summary(vae, unet, quick=options.quick), "unet_latent": options.latent}, allow_nan=False))


def _print(name: str, side: Side) -> None:
    loop, ours = statistics.median(side.loop), statistics.median(side.ours)
    print(
        f"{name:6} loop {loop:8.2f} s   ours {ours:7.3f} s   {side.speedup:6.1f}x   error {side.error.scaled:.1e}"
        f" (loop {side.loop_error.scaled:.1e}), by entry {side.error.entrywise:.1e} ({side.loop_error.entrywise:.1e})"
        f"   by {side.estimator}",
        flush=True,
    )


def _seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def _dtype(model: nn.Module) -> torch.dtype:
    return next(model.parameters()).dtype


if __name__ == "__main__":
    main()
