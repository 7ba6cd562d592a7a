"""Tiny jobs for the law that a resumed run is the same run: each method and each family of the service has one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from models.checkpoints import save_checkpoint
from models.ddpm import ClassDDPM
from tests.models.sd_cases import tiny as tiny_stable_diffusion
from tests.models.sdxl_cases import tiny_xl
from tests.unlearning.tiny_conditional import CLASSES, SHAPE
from tests.worker.judges import write_bands, write_brightness
from tests.worker.runs import Bench, blobs, generator, tiny

STEPS = 4
FEW = 3
"""Where each attempt takes a second to open its model or its judge."""
EVERY = 2
"""Steps between two looks at the goal, where a method looks on its way: one falls on a boundary within the run."""
FAR = 20.0
"""A delta that no run reaches in so few steps."""
ROOMY = {"max_position_embeddings": 77}
JUDGE = Path("inputs/classifiers/0.onnx")


@dataclass(frozen=True)
class Row:
    """One job, which takes its steps to the last."""

    family: str
    method: str
    prepare: Callable[[Bench], None]
    """Fills in the job's request."""
    steps: int = STEPS
    engine: str | None = None
    """Of flow taming."""
    kind: str = "forget"


def _taming(engine: str, **parameters: Any) -> Callable[[Bench], None]:
    def prepare(bench: Bench) -> None:
        bench.job["parameters"] = {"delta": FAR, "engine": engine, **parameters}
        bench.job["inputs"]["forget"] = bench.images("forget", blobs(2, seed=5))
        bench.job["inputs"]["remember"] = bench.images("remember", blobs(24, seed=6))
        bench.job["remember"] = None

    return prepare


STEERED = {"pool": 128, "samples": 200, "probe": 50, "measure_every": EVERY}


def _steered_bounds(bench: Bench) -> None:
    bound = {"judge": write_brightness(bench.folder / JUDGE), "class": "bright", "at_most": 0.05, "at_least": None}
    bench.job.update(target={"attributes": [bound]}, parameters=dict(STEERED))


def _debiased(bench: Bench, **job: Any) -> None:
    del bench.job["target"]
    bench.job.update(kind="debias", confidence=0.95, **job)


def _steered_distribution(bench: Bench) -> None:
    judge = write_brightness(bench.folder / JUDGE)
    target = {"dark": 0.02, "bright": 0.98}
    _debiased(bench, attribute=judge, target_distribution=target, tolerance=0.015, parameters=dict(STEERED))


def _class(where: str, **parameters: Any) -> Callable[[Bench], None]:
    def prepare(bench: Bench) -> None:
        bench.job.update(target={"class_label": 1, "where": where}, parameters=parameters)

    return prepare


def _weighted(bench: Bench) -> None:
    target = {"0": 0.7, "1": 0.2, "2": 0.1}
    _debiased(bench, attribute={"classes": True}, target_distribution=target, tolerance=0.2)


def _conditional(bench: Bench, generated: int, **parameters: Any) -> None:
    bench.job["parameters"] = {"check_every": EVERY, "batch": 8, **parameters}
    bench.job["remember"] = {"generated": generated}
    bench.job["inputs"].update(surrogate=[], fisher={}, remember_sets={})


def _class_to_noise(bench: Bench) -> None:
    _conditional(bench, 100)
    judge = write_bands(bench.folder / JUDGE)
    criteria = {"forgotten_at_most": 0.01, "others_within": 0.05}
    bench.job.update(target={"class_label": 0}, replace_with={"noise": True}, judge=judge, criteria=criteria)


def _balanced_class(bench: Bench) -> None:
    _conditional(bench, 100)
    _debiased(
        bench,
        attribute=write_bands(bench.folder / JUDGE, nothing=False),
        target_distribution={"top": 0.0, "middle": 0.5, "bottom": 0.5},
        tolerance=0.1,
        condition={"class_label": 0},
        replacements={"middle": {"class_label": 1}, "bottom": {"class_label": 2}},
        criteria={"others_within": 0.05},
    )


def _balanced_by_brightness(
    side: int, channels: int, name: Callable[[int], Any], **remember: Any
) -> Callable[[Bench], None]:
    """Of an untrained diffusion model, all of whose samples the judge finds bright: a goal that is met."""

    def prepare(bench: Bench) -> None:
        _conditional(bench, 16, batch=2, sampling_steps=1, check_every=STEPS)
        bench.job["remember"] |= remember
        _debiased(
            bench,
            attribute=write_brightness(bench.folder / JUDGE, side=side, channels=channels) | {"threshold": 0.02},
            target_distribution={"dark": 0.1, "bright": 0.9},
            tolerance=0.25,
            condition=name(0),
            replacements={"dark": name(1), "bright": name(2)},
            criteria={"others_within": 0.3},
        )

    return prepare


def _label(number: int) -> dict[str, int]:
    return {"class_label": number}


def _concept(number: int) -> dict[str, str]:
    return {"concept": ("a doctor", "zero", "one")[number]}


TAMING, STEERING, REMOVAL, AMNESIA = "flow-taming", "steering", "class-removal", "selective-amnesia"
PROMPTED = _balanced_by_brightness(8, 3, _concept, concepts=["two"])

ROWS: Mapping[str, Row] = {
    "taming-glow": Row("glow", TAMING, _taming("fast"), engine="fast"),
    "taming-maf": Row("maf", TAMING, _taming("fast"), engine="fast"),
    "paper-taming-glow": Row("glow", TAMING, _taming("paper", refresh_every=EVERY), engine="paper"),
    "paper-taming-realnvp": Row("realnvp", TAMING, _taming("paper", refresh_every=EVERY), engine="paper"),
    "steering-glow": Row("glow", STEERING, _steered_bounds),
    "debias-steering-iaf": Row("iaf", STEERING, _steered_distribution, kind="debias"),
    "debias-steering-tarflow": Row("tarflow", STEERING, _steered_distribution, kind="debias"),
    "class-taming-class-prior": Row("class-prior", "class-taming", _class("weights", delta=FAR), steps=FEW),
    "class-removal-class-prior": Row("class-prior", REMOVAL, _class("prior"), steps=0),
    "debias-classes-class-prior": Row("class-prior", REMOVAL, _weighted, steps=0, kind="debias"),
    "amnesia-vae": Row("vae", AMNESIA, _class_to_noise),
    "debias-balance-vae": Row("vae", AMNESIA, _balanced_class, kind="debias"),
    "debias-balance-ddpm": Row("ddpm", AMNESIA, _balanced_by_brightness(6, 1, _label), kind="debias"),
    "debias-balance-stable-diffusion": Row("stable-diffusion", AMNESIA, PROMPTED, steps=FEW, kind="debias"),
    "debias-balance-stable-diffusion-xl": Row("stable-diffusion-xl", AMNESIA, PROMPTED, steps=FEW, kind="debias"),
}


def write_base(row: Row, folder: Path, vae: Path) -> Path:
    """The checkpoint of a row's job."""
    if row.family == "vae":
        return vae
    path = folder / f"{row.family}.safetensors"
    if not path.exists():
        made = BASES.get(row.family, lambda: tiny(row.family))
        save_checkpoint(path, made())
    return path


def _ddpm() -> ClassDDPM:
    sampling = {"steps": 2, "guidance_scale": 1.5}
    return ClassDDPM(
        SHAPE, channels=[8, 16], layers=1, attention=[False, False], middle_attention=False, n_classes=CLASSES,
        sampling=sampling, generator=generator(),
    )  # fmt: skip


BASES: Mapping[str, Callable[[], Any]] = {
    "ddpm": _ddpm,
    "stable-diffusion": lambda: tiny_stable_diffusion(text_encoder=ROOMY),
    "stable-diffusion-xl": lambda: tiny_xl(text_encoder=ROOMY, text_encoder_2=ROOMY),
}
