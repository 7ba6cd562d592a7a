"""Selective Amnesia on a diffusion model through the runner: what it draws slowly is drawn once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from models.checkpoints import load_conditional
from models.conditional import GuidedConditional, Sampling
from tests.unlearning.tiny_conditional import judged
from tests.unlearning.tiny_diffusion import trained_file
from tests.worker.amnesia_runs import assets_of, given, phases_of
from tests.worker.judges import write_bands
from tests.worker.runs import Bench, Ended

FORGOTTEN, OTHER = 0, 1
CRITERIA = {"forgotten_at_most": 0.1, "others_within": 0.08}
QUICK = {"max_steps": 200, "sampling_steps": 4}
SHORT = {**QUICK, "max_steps": 1}

Amnesia = Callable[..., Bench]


@pytest.fixture(scope="module")
def base_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A DDPM that draws three classes of stripes."""
    return trained_file(tmp_path_factory)


@pytest.fixture(scope="module")
def amnesia(base_file: Path) -> Amnesia:
    """A job on it: one class shall show another."""

    def amnesia(folder: Path, **job: Any) -> Bench:
        bench = Bench(folder, base_file)
        bench.job.update(
            method="selective-amnesia",
            target={"class_label": FORGOTTEN},
            replace_with={"class_label": OTHER},
            judge=write_bands(folder / "inputs" / "classifiers" / "0.onnx"),
            criteria=CRITERIA,
            parameters=QUICK,
            remember={"generated": 100},
        )
        bench.job.update(job)
        bench.job["inputs"].update(surrogate=[], fisher={})
        return bench

    return amnesia


@dataclass(frozen=True)
class First:
    """The first job on a checkpoint, and what it leaves to the next ones."""

    bench: Bench
    ended: Ended
    assets: dict[str, Path]


@pytest.fixture(scope="module")
def first(amnesia: Amnesia, tmp_path_factory: pytest.TempPathFactory) -> First:
    """It, once for all tests."""
    bench = amnesia(tmp_path_factory.mktemp("first"))
    ended = bench.run_here()
    return First(bench, ended, assets_of(bench, ended))


def test_a_class_comes_to_show_another(first: First) -> None:
    tamed = load_conditional(first.bench.folder / "outputs" / "tamed.safetensors")

    shown = judged(tamed.sample(torch.full((100,), FORGOTTEN), generator=torch.Generator().manual_seed(5)))

    assert first.ended.result["outcome"] == "succeeded"
    assert set(phases_of(first.ended)) == {"replay", "fisher", "unlearning", "evaluating"}
    assert int((shown == OTHER).sum()) > 90


def test_the_next_job_draws_nothing(first: First, amnesia: Amnesia, tmp_path: Path) -> None:
    again = amnesia(tmp_path, target={"class_label": 2}, parameters=SHORT, seed=8)

    ended = given(again, first.assets).run_here()

    assert phases_of(ended) == ["unlearning", "evaluating"]
    assert ended.result["summary"]["fisher_parts_computed"] == 0
    assert assets_of(again, ended) == {}


def test_the_others_can_stand_in_evenly(first: First, amnesia: Amnesia, tmp_path: Path) -> None:
    bench = given(amnesia(tmp_path, replace_with={"others": True}), first.assets)

    ended = bench.run_here()

    shares = {row["label"]: row["after"]["value"] for row in bench.report()["shares"]}
    assert ended.result["outcome"] == "succeeded"
    assert min(shares["middle"], shares["bottom"]) > 0.25


def test_a_damaged_or_foreign_sample_file_is_drawn_anew(
    first: First, amnesia: Amnesia, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    whole, again = (amnesia(tmp_path / name, parameters=SHORT) for name in ("whole", "again"))
    drawn = sorted(name for name in first.assets if name.startswith("examples-"))
    given(whole, first.assets).run_here()
    swapped = {**first.assets, drawn[0]: first.assets[drawn[1]]}
    capfd.readouterr()

    ended = given(again, swapped).run_here()

    assert list(assets_of(again, ended)) == [drawn[0]]
    assert capfd.readouterr().err.count("is made anew") == 1
    assert again.digest() == whole.digest()


def test_a_job_draws_as_it_was_asked_to_and_leaves_the_models_own_way(
    first: First, amnesia: Amnesia, tmp_path: Path
) -> None:
    bench = amnesia(tmp_path, parameters={"max_steps": 1, "guidance_scale": 2.5, "sampling_steps": 2})

    assets = assets_of(bench, given(bench, first.assets).run_here())

    tamed = load_conditional(tmp_path / "outputs" / "tamed.safetensors")
    assert {name.split("-")[0] for name in assets} == {name.split("-")[0] for name in first.assets}
    assert set(assets).isdisjoint(first.assets)  # samples that were drawn otherwise are other samples
    assert isinstance(tamed, GuidedConditional)
    assert tamed.sampling == Sampling(steps=8, guidance_scale=1.5)


@pytest.mark.parametrize(("name", "value"), [("guidance_scale", 0.0), ("sampling_steps", 0), ("sampling_steps", 1001)])
def test_a_way_to_draw_that_is_none_is_refused(name: str, value: float, amnesia: Amnesia, tmp_path: Path) -> None:
    problem = amnesia(tmp_path, parameters={name: value}).run_here().problem

    assert problem["type"] == "urn:forgetd:problem:invalid-parameter"
    assert str(value) in problem["detail"]
