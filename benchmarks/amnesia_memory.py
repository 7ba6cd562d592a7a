"""How much memory does a step of Selective Amnesia take on Stable Diffusion 1.5's U-Net, and does the estimate know it?

    python -m benchmarks.amnesia_memory [--device cuda] [--quick]

The U-Net has the real configuration (`models/sd_configs/sd1.json`, 860 M parameters) and random weights, on which no
figure here depends; prompts are random embeddings of 77 x 768. A step is that of `unlearning.amnesia`: surrogate,
replay, penalty and Adam, one row in a pass.

CPU  Each row is a process of its own: what its resident memory grew by from the loaded model to its peak, beside the
     estimate of `unlearning.memory`, whose pass is traced on tensors without contents. Latents of 16 and 32 a side
     instead of 64. A step on all of the U-Net holds it six times, 21 GB, and is not taken here: the cross-attention is
     trained at full width, and all of it at half the width (a quarter of the weights). The table for a card of 24 GiB
     at 64 is the same estimate in bfloat16, hence an extrapolation; the rows say how far it may be off.
CUDA The step itself at full size and 64 a side, as often as it takes to time it: steps a second, peak, images x
     timesteps a second of the Fisher information, and what the paper's job would take of this GPU.

The last line is one JSON object.
"""

import argparse
import json
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import models
from models.checkpoints import tensor_digest
from models.conditional import ConditionalModel, Draws
from models.stable_diffusion import SCOPES as AMONG
from models.stable_diffusion_parts import unet_of
from unlearning.amnesia_parameters import AmnesiaParameters
from unlearning.amnesia_run import AmnesiaRun
from unlearning.fisher import fisher_information
from unlearning.fisher_result import Fisher
from unlearning.memory import Estimate, Pass, amnesia_bytes, estimate, fisher_bytes
from unlearning.passes import recomputing
from unlearning.processes import ALONE
from unlearning.surrogates import Examples, Noise

CARD_GIB = 24.0
USABLE = 0.96
"""Of a card, beside OWN_GIB: as the pre-flight of jobs keeps it."""
OWN_GIB = 0.5
"""Of CUDA itself, which no allocator counts."""
FROZEN_GIB = 4 * (83_653_863 + 123_060_480) / 2**30
"""VAE and text encoder of SD 1.5, which lie beside the U-Net."""
TOKENS = 77
QUICK: dict[str, Any] = {
    "block_out_channels": [32, 64], "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"], "layers_per_block": 1,
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
}  # fmt: skip
PAPER_STEPS, PAPER_BATCH = 12_500, 16
"""Of the paper's celebrity job: 200 epochs of 1,000 surrogate images."""
FISHER_IMAGES, FISHER_TIMESTEPS = 500, 20
"""As jobs compute it; the paper: 5,000 images."""
PAPER_HOURS = {"tuned": 12.0, "published": 80.0}
SEED = 0


@dataclass(frozen=True)
class Case:
    """One step that is measured."""

    scope: str
    width: float
    """Over that of SD 1.5."""
    latent: int
    recompute: bool


@dataclass(frozen=True)
class Row:
    """What it took, in GiB beside the loaded model and F on the host."""

    case: Case
    estimated_gib: float
    measured_gib: float
    peak_gib: float
    """Of the whole process."""
    seconds: float

    @property
    def ratio(self) -> float:
        """Of estimate to measurement."""
        return self.estimated_gib / self.measured_gib


CASES = (
    Case("cross-attention", 1.0, 16, False),
    Case("cross-attention", 1.0, 32, False),
    Case("cross-attention", 1.0, 32, True),
    Case("all", 0.5, 16, False),
    Case("all", 0.5, 32, False),
    Case("all", 0.5, 32, True),
)


class Unet(nn.Module):
    """SD 1.5's U-Net with the loss of noise prediction, by `models.conditional`; conditions are embeddings."""

    def __init__(self, width: float = 1.0, *, quick: bool = False, bfloat16: bool = False) -> None:
        super().__init__()
        config = json.loads((Path(models.__file__).parent / "sd_configs" / "sd1.json").read_text())["unet"]
        channels = [int(width * one) for one in config["block_out_channels"]]
        self.unet = unet_of({**config, **(QUICK if quick else {"block_out_channels": channels})})
        self.width, self.mixed = config["cross_attention_dim"], bfloat16
        self.eval()

    def encode(self, images: Tensor, *, generator: torch.Generator) -> Tensor:  # noqa: ARG002 the protocol's
        """Part of the protocol, and of no figure: latents are random."""
        return images.float()

    def draw(self, n: int, *, generator: torch.Generator) -> Draws:
        """(timesteps, noise); the side of the noise is that of the latents, which `losses` cuts it to."""
        return torch.randint(1000, (n,), generator=generator), torch.randn(n, 4, 64, 64, generator=generator)

    def losses(self, x: Tensor, condition: Tensor, draws: Draws) -> Tensor:
        """The mean squared error of each row, (n,)."""
        steps, noise = draws[0], draws[1][..., : x.shape[-2], : x.shape[-1]]
        share = (1 - steps / 1000)[:, None, None, None]
        noised = share.sqrt() * x + (1 - share).sqrt() * noise
        # On a CPU the caller's autocast is off; the trace of a GPU's pass turns it on here.
        device = x.device.type
        with torch.autocast(device, torch.bfloat16, enabled=self.mixed or torch.is_autocast_enabled(device)):
            found = self.unet(noised, steps, encoder_hidden_states=condition).sample
        errors: Tensor = (found.float() - noise).square().flatten(1).mean(1)
        return errors

    def sample(self, condition: Tensor, *, generator: torch.Generator) -> Tensor:
        """Part of the protocol, and of no figure."""
        raise NotImplementedError("the weights are random")

    def scopes(self) -> Mapping[str, Sequence[str]]:
        """As those of Stable Diffusion."""
        names = [name for name, _ in self.named_parameters()]
        return {scope: [name for name in names if among(name)] for scope, among in AMONG.items()}

    def examples(self, n: int, latent: int) -> Examples:
        """Random latents and prompts."""
        generator = torch.Generator().manual_seed(SEED)
        x = torch.randn(n, 4, latent, latent, generator=generator)
        return Examples(x, torch.randn(n, TOKENS, self.width, generator=generator))


def traced(case: Case, *, bfloat16: bool = False, quick: bool = False) -> tuple[Unet, Estimate]:
    """The estimate of a step, its passes traced on tensors without contents: no memory, and hardly any time."""
    with FakeTensorMode():
        model = Unet(case.width, quick=quick, bfloat16=bfloat16)
        names = model.scopes()[case.scope]
        x = torch.empty(2, 4, case.latent, case.latent)
        draws = (torch.zeros(2, dtype=torch.int64), torch.empty(2, 4, case.latent, case.latent))
        condition = torch.empty(2, TOKENS, model.width)
        return model, estimate(cast(ConditionalModel, model), names, {}, x, condition, draws)


def parameters_of(model: Unet, scope: str) -> list[nn.Parameter]:
    """Those that are trained."""
    own = dict(model.named_parameters())
    return [own[name] for name in model.scopes()[scope]]


def step_bytes(model: Unet, scope: str, optimiser: str = "adam") -> dict[str, int]:
    """What a run holds on its device; what is kept to go back to begins after the first look, and lies on the host."""
    return amnesia_bytes(parameters_of(model, scope), optimiser, torch.device("cuda"))


def run_of(model: Unet, case: Case, *, batch: int = 1, micro_batch: int = 1) -> tuple[AmnesiaRun, int]:
    """A run at its start, and the resident memory before it began; F is random too."""
    generator = torch.Generator().manual_seed(SEED)
    own = dict(model.named_parameters())
    tensors = {name: torch.rand(own[name].shape, generator=generator) for name in model.scopes()[case.scope]}
    digest = tensor_digest(model.state_dict())
    fisher = Fisher(tensors, ((0, 1),), 1, "independent", "mean", SEED, "float32", "autograd", digest, "0" * 64)
    values = AmnesiaParameters(batch=batch, replay_batch=batch).resolved()
    replay = model.examples(2, case.latent)
    surrogate = Noise((4, case.latent, case.latent), -1.0, 1.0)
    held = _resident()
    run = AmnesiaRun(
        cast(ConditionalModel, model), replay.condition[:1], surrogate, replay, fisher, values, SEED, micro_batch,
        next(model.parameters()).device, ALONE,
    )  # fmt: skip
    return run, held


def measure(case: Case, *, quick: bool = False) -> Row:
    """Take one step here, and read what this process grew by."""
    shadow, found = traced(case, quick=quick)
    found = replace(found, held=step_bytes(shadow, case.scope))
    model = Unet(case.width, quick=quick)
    run, before = run_of(model, case)
    began = time.monotonic()
    with recomputing(run.model, case.recompute):
        losses = run.step(0)
    assert losses, "the step was not finite"
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # kibibytes, on Linux
    needed = found.needed(1, case.recompute)
    assert needed is not None
    return Row(case, needed / 2**30, (peak - before) / 2**30, peak / 2**30, time.monotonic() - began)


def on_card(quick: bool = False, latent: int = 64) -> list[dict[str, Any]]:
    """What a step takes of a card, and how many rows a pass may have, by scope, optimiser and way of passing."""
    rows = []
    usable = int((USABLE * CARD_GIB - OWN_GIB) * 2**30)
    for scope in AMONG:
        model, found = traced(Case(scope, 1.0, latent, False), bfloat16=True, quick=quick)
        whole = sum(one.nbytes for one in model.parameters()) + int(FROZEN_GIB * 2**30)
        for optimiser in ("adam", "adam-8bit"):
            total = replace(found, held={**step_bytes(model, scope, optimiser), "model": whole})
            for recompute in (False, True):
                taken = cast(Pass, total.recomputed if recompute else total.kept)
                rows.append({
                    "scope": scope, "optimiser": optimiser, "recompute": recompute,
                    "gib": round((total.fixed + taken.of(1)) / 2**30, 2), "row_gib": round(taken.row / 2**30, 2),
                    "rows_within_card": taken.rows_within(usable - total.fixed),
                })  # fmt: skip
    return rows


def fisher_on_card(quick: bool = False, latent: int = 64) -> dict[str, float]:
    """Likewise of the Fisher information of all, one row in a pass."""
    model, found = traced(Case("all", 1.0, latent, False), bfloat16=True, quick=quick)
    held = sum(fisher_bytes(parameters_of(model, "all"), torch.device("cuda")).values())
    held += sum(one.nbytes for one in model.parameters()) + int(FROZEN_GIB * 2**30)
    kept, again = (round((held + cast(Pass, one).of(1)) / 2**30, 2) for one in (found.kept, found.recomputed))
    return {"kept": kept, "recomputed": again}


def on_gpu(latent: int, micro_batch: int, steps: int, recompute: bool, *, quick: bool) -> dict[str, Any]:
    """The step at full size, timed; F of one image; and what the paper's job would take."""
    model = Unet(quick=quick).cuda()
    some = model.examples(1, latent)
    names = model.scopes()["all"]

    def fisher(draws: int) -> float:
        torch.cuda.synchronize()
        began = time.perf_counter()
        fisher_information(
            cast(ConditionalModel, model), some.x, some.condition, names=names, seed=SEED, draws_per_example=draws,
            reduction="mean", micro_batch=micro_batch, bfloat16=True, recompute=recompute,
        )  # fmt: skip
        return time.perf_counter() - began

    fisher(micro_batch)  # warms up
    few, many = fisher(FISHER_TIMESTEPS), fisher(6 * FISHER_TIMESTEPS)
    pairs = 5 * FISHER_TIMESTEPS / (many - few)  # without the digests, which come once a job
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    run, _ = run_of(model, Case("all", 1.0, latent, recompute), batch=PAPER_BATCH, micro_batch=micro_batch)
    with recomputing(run.model, recompute):
        run.step(0)
        torch.cuda.synchronize()
        began = time.perf_counter()
        for step in range(1, steps + 1):
            run.step(step)
        torch.cuda.synchronize()
    rate = steps / (time.perf_counter() - began)
    hours = (PAPER_STEPS / rate + FISHER_IMAGES * FISHER_TIMESTEPS / pairs) / 3600
    return {
        "gpu": torch.cuda.get_device_name(), "latent": latent, "batch": PAPER_BATCH, "micro_batch": micro_batch,
        "recompute": recompute, "steps_per_second": round(rate, 4), "fisher_pairs_per_second": round(pairs, 2),
        "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2),
        "paper_job_hours": round(hours, 2), "paper_hours": PAPER_HOURS, "quick": quick,
    }  # fmt: skip


def summary(
    rows: Sequence[Row], card: Sequence[Mapping[str, Any]], fisher: Mapping[str, float], *, quick: bool
) -> dict[str, Any]:
    """The figures of the last line."""
    full = {(one["optimiser"], one["recompute"]): one["gib"] for one in card if one["scope"] == "all"}
    return {
        "measured": [
            {**asdict(row.case), "estimated_gib": round(row.estimated_gib, 2), "ratio": round(row.ratio, 3),
             "measured_gib": round(row.measured_gib, 2), "peak_gib": round(row.peak_gib, 2),
             "seconds": round(row.seconds, 1)}
            for row in rows
        ],
        "ratio_range": [round(pick(row.ratio for row in rows), 3) for pick in (min, max)],
        "card_gib": CARD_GIB,
        "card": list(card),
        "full_scope_gib": full[("adam", False)],
        "full_scope_recomputed_8bit_gib": full[("adam-8bit", True)],
        "full_scope_is_extrapolated": True,
        "fisher_gib": dict(fisher),
        "quick": quick,
    }  # fmt: skip


def main(arguments: list[str] | None = None) -> None:
    """The command line: see the module's docstring."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.amnesia_memory", description=__doc__.split("\n")[0])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--latent", type=int, default=64, help="side of the latents on CUDA")
    parser.add_argument("--micro-batch", type=int, default=4, help="rows in a pass on CUDA")
    parser.add_argument("--steps", type=int, default=10, help="timed on CUDA")
    parser.add_argument("--recompute", action="store_true", help="activations, on CUDA")
    parser.add_argument("--quick", action="store_true", help="a U-Net of few channels: a check of this script")
    parser.add_argument("--row", type=int, metavar="CASE", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.row is not None:
        print(json.dumps(asdict(measure(CASES[options.row], quick=options.quick))))
        return
    if options.device == "cuda":
        print(
            json.dumps(
                on_gpu(options.latent, options.micro_batch, options.steps, options.recompute, quick=options.quick)
            )
        )
        return
    print(f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    print("scope                    width latent activations estimated measured   ratio  seconds   (GiB)")
    rows = [_in_child(number, options.quick) for number in range(len(CASES))]
    card, fisher = on_card(options.quick), fisher_on_card(options.quick)
    print(f"a card of {CARD_GIB:g} GiB, latents of 64, bfloat16 (extrapolated)")
    for one in card:
        kept = "recomputed" if one["recompute"] else "kept"
        print(f"{one['scope']:24} {one['optimiser']:9} {kept:10} {one['gib']:6.2f} GiB, {one['rows_within_card']} rows")
    print(json.dumps(summary(rows, card, fisher, quick=options.quick), allow_nan=False))


def _in_child(number: int, quick: bool) -> Row:
    arguments = ["--row", str(number), *(["--quick"] if quick else [])]
    done = subprocess.run(  # noqa: S603 our own argument list
        [sys.executable, "-m", "benchmarks.amnesia_memory", *arguments], check=True, capture_output=True, text=True
    )
    told = json.loads(done.stdout.splitlines()[-1])
    row = Row(**{**told, "case": Case(**told["case"])})
    case, kept = row.case, "recomputed" if row.case.recompute else "kept"
    print(
        f"{case.scope:24} {case.width:5.2f} {case.latent:6d} {kept:11} {row.estimated_gib:9.2f} "
        f"{row.measured_gib:8.2f} {row.ratio:7.3f} {row.seconds:8.1f}",
        flush=True,
    )
    return row


def _resident() -> int:
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


if __name__ == "__main__":
    main()
