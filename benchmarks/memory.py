"""How much memory does one taming step take on the paper's Glow, and what does recomputation save?

    python -m benchmarks.memory [--device cuda] [--quick]

The flow is that of Malnick et al. (WACV 2024): 4 blocks x 32 steps, hidden 512, 128 x 128 x 3, additive coupling, LU;
its weights and all images are random, which no figure depends on. One step of each engine of `unlearning.taming`:

    paper   every weight is tuned: base and tamed flow, gradients, Adam's moments, and what the backward pass needs
    fast    the last scale is tuned, on cuts of the images that were computed before

Each row is a process of its own, and its peak is that of the whole process: resident memory, or what was allocated on
a GPU. Rows without recomputation (`recompute_bytes` of the flow set to infinity) take fewer images, since 16 would not
fit on a small machine; what an image costs is the slope between two of them, and `without_16_gib` extrapolates by it.
Goal: the paper's step with 8 + 8 images within 12 GiB. The last line is one JSON object.
"""

import argparse
import copy
import json
import platform
import resource
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from models.glow import Glow
from unlearning.taming_fast import FastEngine
from unlearning.taming_paper import PaperEngine
from unlearning.taming_parameters import TamingParameters

IMAGE_SHAPE = (3, 128, 128)
N_BITS = 5
ARCHITECTURE: dict[str, Any] = {"n_block": 4, "n_flow": 32, "hidden": 512, "affine": False, "lu": True}
QUICK_ARCHITECTURE = {**ARCHITECTURE, "n_flow": 2}
GOAL_GIB = 12.0
IMAGES = 16
"""Images in the paper's step: 8 to forget and 8 to remember."""
FEW = (4, 8)
"""Images in the rows without recomputation."""


@dataclass(frozen=True)
class Row:
    """One step in one process."""

    engine: str
    recompute: bool
    images: int
    peak_gib: float
    before_gib: float
    """Held before the step: weights, the process itself, what was cached."""
    step_seconds: float
    setup_seconds: float


def measure(engine: str, recompute: bool, images: int, device: str, quick: bool) -> Row:
    """Set up an engine here, take one step and read this process's peak."""
    began = time.monotonic()
    generator = torch.Generator().manual_seed(0)
    base = Glow(IMAGE_SHAPE, N_BITS, generator=generator, **(QUICK_ARCHITECTURE if quick else ARCHITECTURE))
    if not recompute:
        base.recompute_bytes = sys.maxsize
    base.to(device)
    tamed: nn.Module = copy.deepcopy(base)
    n_forget = images // 2 if engine == "paper" else 2
    forget = torch.randint(256, (n_forget, *IMAGE_SHAPE), generator=generator, dtype=torch.uint8)
    remember = torch.randint(256, (images - n_forget, *IMAGE_SHAPE), generator=generator, dtype=torch.uint8)
    # The fast engine caches many cuts of each forget image: two, without copies and virtual ones, are soon computed,
    # and its step has as many images anyway.
    spare = {"noise_draws": 1, "forget_variants": 0, "virtual_share": 0.0} if engine == "fast" else {}
    values = TamingParameters.from_dict({"engine": engine, "remember_batch": images - n_forget, **spare}).resolved()
    build = PaperEngine if engine == "paper" else FastEngine
    taming = build(base, tamed, forget, remember, values, n_bits=N_BITS, seed=0, micro_batch=IMAGES)
    taming.check(0)
    setup, before = time.monotonic() - began, _held_gib(device, peak=False)
    began = time.monotonic()
    taming.step(0)
    seconds = time.monotonic() - began
    return Row(engine, recompute, images, _held_gib(device, peak=True), before, seconds, setup)


def _held_gib(device: str, *, peak: bool) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
        held = torch.cuda.max_memory_allocated() if peak else torch.cuda.memory_allocated()
        return held / 2**30
    if peak:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # kibibytes, on Linux
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * resource.getpagesize() / 2**30


def in_child(engine: str, recompute: bool, images: int, device: str, quick: bool) -> Row:
    """`measure` in a process of its own."""
    arguments = ["--row", engine, "yes" if recompute else "no", str(images), "--device", device]
    done = subprocess.run(  # noqa: S603 our own argument list
        [sys.executable, "-m", "benchmarks.memory", *arguments, *(["--quick"] if quick else [])],
        check=True,
        capture_output=True,
        text=True,
    )
    row = Row(**json.loads(done.stdout.splitlines()[-1]))
    kept = "recomputed" if row.recompute else "kept"
    print(
        f"{row.engine:6} {kept:10} {row.images:6d} {row.before_gib:8.2f} {row.peak_gib:8.2f} {row.step_seconds:8.1f}",
        flush=True,
    )
    return row


def main(arguments: list[str] | None = None) -> None:
    """The command line: see the module's docstring."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.memory", description=__doc__.split("\n")[0])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--quick", action="store_true", help="2 steps a block instead of 32: a check of this script")
    parser.add_argument("--row", nargs=3, metavar=("ENGINE", "RECOMPUTE", "IMAGES"), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.row:
        engine, recompute, images = options.row
        row = measure(engine, recompute == "yes", int(images), options.device, options.quick)
        print(json.dumps(asdict(row)))
        return
    print(f"{platform.machine()}, {torch.get_num_threads()} threads, {options.device}")
    print("engine activations images   before     peak  seconds   (GiB; of the whole process)")
    paper, fast = (in_child(engine, True, IMAGES, options.device, options.quick) for engine in ("paper", "fast"))
    few, more = (in_child("paper", False, images, options.device, options.quick) for images in FEW)
    print(json.dumps(summary(paper, fast, few, more, options.device, quick=options.quick), allow_nan=False))


def summary(paper: Row, fast: Row, few: Row, more: Row, device: str, *, quick: bool = False) -> dict[str, object]:
    """The figures of the last line, of both engines with recomputation, and of `paper` without on few and more images.

    A quick run has another flow than the goal speaks of, and says nothing about it.
    """
    image = (more.peak_gib - few.peak_gib) / (more.images - few.images)
    return {
        "paper_16_gib": round(paper.peak_gib, 2),
        "fast_16_gib": round(fast.peak_gib, 2),
        "without_images": [few.images, more.images],
        "without_gib": [round(few.peak_gib, 2), round(more.peak_gib, 2)],
        "without_image_gib": round(image, 3),
        "without_16_gib": round(more.peak_gib + (IMAGES - more.images) * image, 2),
        "without_16_is_extrapolated": more.images < IMAGES,
        "paper_16_seconds": round(paper.step_seconds, 1),
        "fast_16_seconds": round(fast.step_seconds, 1),
        "without_seconds": [round(few.step_seconds, 1), round(more.step_seconds, 1)],
        "goal_gib": GOAL_GIB,
        "within_goal": None if quick else paper.peak_gib <= GOAL_GIB,
        "device": device,
        "quick": quick,
    }


if __name__ == "__main__":
    main()
