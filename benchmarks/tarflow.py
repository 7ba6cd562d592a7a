"""How much sooner does the parallel sampler of a TarFlow invert it, and how soon is a person tamed out of one?

    python -m benchmarks.tarflow [--quick] [--device cuda]

A TarFlow of 256 tokens and 4 blocks on the ORL faces (32 x 32, patches of 2 x 2), trained once and kept in the cache.

Sampling: the same latents are inverted in turn by (a) our sequential sampler, whose keys and values are written into
place; (b) the parallel one (`models.tarflow_sampling.parallel`); (c) the default; (d) a sequential sampler that caches
as the published code does: keys and values in lists that are concatenated anew for every token. All share the latents
of a round, and rounds alternate; ratios are medians over rounds. max_residual is the largest |f(x) - z| of the whole
flow in float32 over all images of the parallel sampler; the sequential one's own is printed beside it. An accelerator
has a batch of 64 as well, whose figures end in `_batch_64`; what it has queued is done before a clock is read.

Taming: five photos of a person by `unlearning.tame` with its default parameters, at 8 bits, to the confirmed stop, and
the judge of `benchmarks.taming` on noise that the run has not seen. taming_seconds is the median over people. The last
line is one JSON object.
"""

import argparse
import hashlib
import json
import math
import os
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.orl_judge import Judge, Verdict
from examples.orl import HELD_OUT, IMAGE_SIZE, SEED, Faces, default_cache, load_faces
from models.checkpoints import load_checkpoint, save_checkpoint
from models.tarflow import TarFlow
from models.tarflow_blocks import Block, Layer
from models.tarflow_sampling import Inverted, fastest, free_tokens, parallel, sequential
from models.training import TrainingProgress, TrainingRecipe, bits_per_dim, fit_flow
from unlearning import TamingParameters, tame

N_BITS = 8
ARCHITECTURE: dict[str, Any] = {"patch_size": 2, "width": 64, "n_block": 4, "n_layer": 2, "noise_std": 0.035}
"""The noise is 0.07 on images in [-1, 1], as in the published model of animal faces."""
RECIPE = TrainingRecipe(steps=1500, batch=8, learning_rate=3e-3, clip=200.0, average=0.98)
"""Bounded by steps: a busy machine takes longer and gives the same base. About five minutes on 2 cores."""
FORGET_PHOTOS = 5
PEOPLE_TAMED = (1, 13, 25)
LARGE_BATCH = 64
"""Images in the third batch of an accelerator."""


def trained(faces: Faces, cache: Path | None = None) -> TarFlow:
    """The base, from the cache or trained now and kept there."""
    key = json.dumps([ARCHITECTURE, asdict(RECIPE), IMAGE_SIZE, SEED, HELD_OUT], sort_keys=True)
    path = (cache or default_cache()) / f"orl-tarflow-{hashlib.sha256(key.encode()).hexdigest()[:12]}.safetensors"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        generator = torch.Generator().manual_seed(SEED)
        flow = TarFlow((1, IMAGE_SIZE, IMAGE_SIZE), N_BITS, generator=generator, **ARCHITECTURE)
        fit_flow(flow, faces.training(), RECIPE, n_bits=N_BITS, generator=generator, callback=_show, report_every=100)
        save_checkpoint(path, flow, extra={"data": "ORL faces", "recipe": asdict(RECIPE)})
    found = load_checkpoint(path)
    if not isinstance(found, TarFlow):
        raise SystemExit(f"{path} holds no TarFlow; delete it and run again")
    return found


@torch.no_grad()
def concatenating(flow: TarFlow, latents: Tensor) -> Inverted:
    """The sequential sampler with the published code's way of caching: lists, concatenated for every token."""
    h = latents * flow.var.sqrt()
    for block in reversed(flow.chain()):
        z = block.ordered(h)
        x, places = z.clone(), block.embedding(None)
        caches: list[tuple[list[Tensor], list[Tensor]]] = [([], []) for _ in block.attn_blocks]
        for i in range(x.shape[1] - 1):
            a, b = _one_token(block, x[:, i : i + 1], places[:, i : i + 1], caches)
            x[:, i + 1] = z[:, i + 1] * a[:, 0].exp() + b[:, 0]
        h = block.ordered(x)
    return Inverted(flow.unscaled(h), len(flow.chain()) * (latents.shape[1] - 1), None)


def _one_token(
    block: Block, x: Tensor, place: Tensor, caches: list[tuple[list[Tensor], list[Tensor]]]
) -> tuple[Tensor, Tensor]:
    h = block.proj_in(x) + place
    for layer, (keys, values) in zip(block.attn_blocks, caches, strict=True):
        if not isinstance(layer, Layer):
            raise TypeError(f"{type(layer).__name__} is no layer of a TarFlow")
        q, k, v = layer.attention.heads(h)
        keys.append(k)
        values.append(v)
        mixed = F.scaled_dot_product_attention(
            q, torch.cat(keys, dim=2), torch.cat(values, dim=2), scale=layer.attention.scale(1.0)
        )
        h = h + layer.attention.proj(mixed.transpose(1, 2).flatten(2))
        h = h + layer.mlp(h)
    return block.read_out(h, x.dtype)


@dataclass(frozen=True)
class Samplers:
    """The samplers at one batch size."""

    seconds: dict[str, list[float]]
    """By sampler, one a round."""
    residual: float
    """Largest |f(x) - z| of the parallel sampler's images."""
    difference: float
    """Largest difference of a sampler's images to the sequential one's."""

    def speedup(self, name: str, over: str) -> float:
        """How many times sooner one is than another: above 1 where it is; the median over rounds."""
        pairs = zip(self.seconds[over], self.seconds[name], strict=True)
        return statistics.median(theirs / its for theirs, its in pairs)


@dataclass(frozen=True)
class Tamed:
    """One person."""

    seconds: float
    cpu_seconds: float
    steps: int
    met: bool
    verdict: Verdict

    @property
    def confirmed(self) -> bool:
        """Whether the run stopped by itself, and the judge agrees."""
        return self.met and self.verdict.confirmed


def time_samplers(flow: TarFlow, batch: int, rounds: int) -> Samplers:
    """Invert the same latents by each sampler in turn, and print what it took."""
    samplers: dict[str, Callable[[TarFlow, Tensor], Inverted]] = {
        "sequential": sequential, "parallel": parallel, "default": fastest, "concatenating": concatenating,
    }  # fmt: skip
    seconds: dict[str, list[float]] = {name: [] for name in samplers}
    reads: dict[str, int] = {}
    residual = own = difference = certificate = 0.0
    fallbacks = 0
    device = flow.var.device
    for turn in range(rounds + 1):  # the first warms up
        latents = torch.randn(batch, *flow.latent_shape, generator=torch.Generator().manual_seed(turn)).to(device)
        found: dict[str, Inverted] = {}
        for name, sampler in samplers.items():
            start = clock(device)
            found[name] = sampler(flow, latents)
            if turn:
                seconds[name].append(clock(device) - start)
            reads[name] = found[name].reads
        residual = _worst(residual, whole_residual(flow, found["parallel"], latents))
        own = _worst(own, whole_residual(flow, found["sequential"], latents))
        certificate = _worst(certificate, found["parallel"].residual or 0.0)
        fallbacks += found["parallel"].fallbacks
        for other in ("parallel", "default", "concatenating"):
            change = float((found[other].images - found["sequential"].images).abs().max())
            difference = _worst(difference, change)
    timed = Samplers(seconds, residual, difference)
    print(f"batch {batch}: {free_tokens(flow, batch):.0f} tokens free a read; largest difference {difference:.1e}")
    for name in samplers:
        spread = sorted(seconds[name])
        ratio = "" if name == "sequential" else f"{timed.speedup(name, 'sequential'):.2f} x"
        print(f"  {name:>14} {statistics.median(spread) * 1e3:9.1f} ms  {reads[name]:5d} reads  {ratio}")
    print(f"  residual {residual:.1e} (sequential {own:.1e}), certificate {certificate:.1e}, {fallbacks} fallbacks")
    return timed


def clock(device: torch.device) -> float:
    """Seconds, after everything that the device was told to do is done."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter()


def described(device: torch.device) -> str:
    """The device's own name, for the figures to be read by."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return platform.machine() if device.type == "cpu" else str(device)


def _worst(*values: float) -> float:
    """The largest; NaN where one of them is."""
    return float(torch.tensor(values, dtype=torch.float64).max())


@torch.no_grad()
def whole_residual(flow: TarFlow, found: Inverted, latents: Tensor) -> float:
    """max |f(x) - z| over all blocks together."""
    return float((flow(found.images)[0] - latents).abs().max())


def time_taming(flow: TarFlow, faces: Faces, people: list[int], draws: int) -> list[Tamed]:
    """Tame each person out of the base in turn, and judge."""
    judge = Judge(flow, faces, draws, TamingParameters(), n_bits=N_BITS)
    print("taming   who    ok  steps  seconds      cpu   z min   QD(DF)  QD(D'F)   QD(DR) QD(DRid)   drift")
    rows = []
    for person in people:
        wall, cpu = clock(flow.var.device), time.process_time()
        result = tame(
            flow, faces.of(person)[:FORGET_PHOTOS], faces.training(without=person), TamingParameters(),
            n_bits=N_BITS, seed=person,
        )  # fmt: skip
        wall, cpu = clock(flow.var.device) - wall, time.process_time() - cpu
        if not isinstance(result.flow, TarFlow):
            raise TypeError(f"taming a TarFlow gave a {type(result.flow).__name__}")
        v = judge(result.flow, person, FORGET_PHOTOS)
        rows.append(Tamed(wall, cpu, result.steps, result.met, v))
        print(
            f"        {person:4d} {'yes' if rows[-1].confirmed else 'no':>5} {result.steps:6d} {wall:8.1f} "
            f"{cpu:8.1f} {v.z_min:7.2f} {v.qd_forget:+8.3f} {v.qd_same:+8.3f} {v.qd_remember:+8.4f} "
            f"{v.qd_unseen:+8.3f} {v.drift:7.3f}",
            flush=True,
        )
    return rows


def summary(
    single: Samplers, crowd: Samplers, tokens: int, tamed: list[Tamed], large: Samplers | None = None
) -> dict[str, float | int | None]:
    """The figures of the last line; null: not finite, or not measured.

    They come from the samplers at batch 1, at batch 8 and, on an accelerator alone, at `LARGE_BATCH`.
    """
    all_batches = [single, crowd] if large is None else [single, crowd, large]
    figures: dict[str, float | int] = {
        "parallel_speedup": single.speedup("parallel", over="sequential"),
        "cached_ratio": single.speedup("sequential", over="concatenating"),
        "max_residual": _worst(*(timed.residual for timed in all_batches)),
        "tokens": tokens,
        "default_ratio_batch_1": single.speedup("default", over="sequential"),
        "default_ratio_batch_8": crowd.speedup("default", over="sequential"),
        "parallel_ratio_batch_8": crowd.speedup("parallel", over="sequential"),
        "cached_ratio_batch_8": crowd.speedup("sequential", over="concatenating"),
        "largest_difference": _worst(*(timed.difference for timed in all_batches)),
        "taming_seconds": math.nan,
    }
    if large is not None:
        figures |= {
            f"default_ratio_batch_{LARGE_BATCH}": large.speedup("default", over="sequential"),
            f"parallel_ratio_batch_{LARGE_BATCH}": large.speedup("parallel", over="sequential"),
            f"cached_ratio_batch_{LARGE_BATCH}": large.speedup("sequential", over="concatenating"),
        }
    if tamed:
        figures |= {
            "taming_seconds": statistics.median(run.seconds for run in tamed),
            "taming_cpu_seconds": statistics.median(run.cpu_seconds for run in tamed),
            "taming_steps": statistics.median(run.steps for run in tamed),
            "taming_people": len(tamed),
            "taming_confirmed": sum(run.confirmed for run in tamed),
            "taming_drift": statistics.median(run.verdict.drift for run in tamed),
            "taming_qd_forget": statistics.mean(run.verdict.qd_forget for run in tamed),
            "taming_qd_held_out": statistics.mean(run.verdict.qd_same for run in tamed),
        }
    return {name: value if math.isfinite(value) else None for name, value in figures.items()}


def main(arguments: list[str] | None = None) -> None:
    """The command line: see the module's docstring."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tarflow", description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="three rounds, one person")
    parser.add_argument("--rounds", type=int, default=None, help="timed rounds a batch size (default: 10)")
    parser.add_argument("--people", type=int, nargs="*", help=f"who is tamed away (default: {PEOPLE_TAMED})")
    parser.add_argument("--base", type=Path, help="checkpoint (default: the cached one, trained if need be)")
    parser.add_argument("--device", default="cpu", help='where the flow is: "cpu", or an accelerator such as "cuda"')
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args(arguments)
    device = usable(options.device)
    torch.set_num_threads(options.threads)
    faces = load_faces()
    flow = load_checkpoint(options.base) if options.base else trained(faces)
    if not isinstance(flow, TarFlow):
        raise SystemExit(f"{options.base} holds no TarFlow")
    flow.to(device)
    rounds = options.rounds or (3 if options.quick else 10)
    people = options.people if options.people is not None else list(PEOPLE_TAMED[: 1 if options.quick else None])

    tokens, values = flow.latent_shape
    load = f"{os.cpu_count()} cores, {options.threads} threads, load {os.getloadavg()[0]:.1f}"
    print(f"on {described(device)}; {load}; PyTorch {torch.__version__}")
    print(f"{tokens} tokens of {values} values, {json.dumps(flow.architecture)}")
    generator = torch.Generator().manual_seed(SEED)
    for name, images in (("training", faces.training()), ("unseen people", faces.held_out())):
        bits = float(bits_per_dim(flow, images, n_bits=N_BITS, generator=generator).mean())
        print(f"  {bits:.3f} bits a dimension, {name}")
    single, crowd = time_samplers(flow, 1, rounds), time_samplers(flow, 8, rounds)
    large = time_samplers(flow, LARGE_BATCH, rounds) if device.type != "cpu" else None
    tamed = time_taming(flow, faces, people, 3 if options.quick else 10) if people else []
    print(json.dumps(summary(single, crowd, tokens, tamed, large), allow_nan=False))


def usable(name: str) -> torch.device:
    """The device of that name; SystemExit, with the reason, where it cannot hold a tensor."""
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).cpu()
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # each backend has its own way to say no
        raise SystemExit(f"device {name!r} cannot be used here: {str(error).splitlines()[0]}") from error
    return device


def _show(progress: TrainingProgress) -> None:
    print(f"training, step {progress.step:5d}: {progress.bits_per_dim:.3f} bits a dimension", flush=True)


if __name__ == "__main__":
    main()
