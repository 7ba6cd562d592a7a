"""The benchmark of TarFlow: what its figures are made of, and that its baseline samples what ours does."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest
import torch

from benchmarks.orl_judge import Verdict
from benchmarks.tarflow import (
    LARGE_BATCH,
    Samplers,
    Tamed,
    concatenating,
    described,
    summary,
    time_samplers,
    usable,
    whole_residual,
)
from models.tarflow import TarFlow
from models.tarflow_sampling import sequential

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
PROMISED = {"parallel_speedup", "cached_ratio", "max_residual", "tokens", "taming_seconds"}
SINGLE = Samplers(
    {"sequential": [4.0, 6.0, 8.0], "parallel": [1.0, 2.0, 2.0], "default": [1.0, 3.0, 8.0],
     "concatenating": [6.0, 9.0, 12.0]},
    residual=3e-5, difference=1e-6,
)  # fmt: skip
CROWD = Samplers(
    {"sequential": [4.0], "parallel": [5.0], "default": [4.0], "concatenating": [2.0]}, residual=5e-5, difference=2e-6
)
TAMED = Tamed(
    seconds=50.0, cpu_seconds=90.0, steps=200, met=True,
    verdict=Verdict(
        confirmed=True, z_min=3.6, q_forget=1e-4, qd_forget=0.5, qd_same=0.3, qd_remember=0.0, qd_unseen=0.01,
        qd_nearest=math.nan, drift=0.1,
    ),
)  # fmt: skip


def flow() -> TarFlow:
    """A tiny flow off its linear start, so that its tokens do depend on each other."""
    generator = torch.Generator().manual_seed(0)
    found = TarFlow((1, 8, 8), 8, patch_size=2, width=8, n_block=2, n_layer=1, generator=generator)
    with torch.no_grad():
        for parameter in found.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return found


def test_the_promised_keys_are_there_and_the_line_is_json() -> None:
    figures = summary(SINGLE, CROWD, 256, [TAMED])

    assert set(figures) >= PROMISED
    assert None not in figures.values()
    assert json.loads(json.dumps(figures, allow_nan=False)) == figures


def test_ratios_are_above_1_where_ours_is_faster_and_medians_over_rounds() -> None:
    figures = summary(SINGLE, CROWD, 256, [])

    assert (figures["parallel_speedup"], figures["cached_ratio"], figures["default_ratio_batch_1"]) == (4, 1.5, 2)
    assert (figures["parallel_ratio_batch_8"], figures["cached_ratio_batch_8"]) == (0.8, 0.5)
    assert figures["default_ratio_batch_8"] == 1


@pytest.mark.parametrize("batches", [(SINGLE, CROWD), (CROWD, SINGLE)])
def test_the_residual_is_the_worst_of_both_batch_sizes(batches: tuple[Samplers, Samplers]) -> None:
    figures = summary(*batches, 64, [])

    assert (figures["max_residual"], figures["largest_difference"], figures["tokens"]) == (5e-5, 2e-6, 64)


@pytest.mark.parametrize("batches", [(0, 1), (1, 0)])
def test_a_residual_that_is_no_number_is_not_passed_off_as_a_small_one(batches: tuple[int, int]) -> None:
    both = (dataclasses.replace(SINGLE, residual=math.nan), CROWD)

    figures = summary(both[batches[0]], both[batches[1]], 256, [])

    assert figures["max_residual"] is None
    json.dumps(figures, allow_nan=False)


def test_a_person_whom_the_judge_does_not_confirm_is_counted_as_missed() -> None:
    turned_down = dataclasses.replace(TAMED, verdict=dataclasses.replace(TAMED.verdict, confirmed=False), seconds=70.0)
    cut_off = dataclasses.replace(TAMED, met=False, seconds=80.0)

    figures = summary(SINGLE, CROWD, 256, [TAMED, turned_down, cut_off])

    assert (figures["taming_people"], figures["taming_confirmed"], figures["taming_seconds"]) == (3, 1, 70)


def test_the_large_batch_of_an_accelerator_adds_keys_and_takes_none_away() -> None:
    without = summary(SINGLE, CROWD, 256, [TAMED])
    large = dataclasses.replace(CROWD, residual=7e-5)

    figures = summary(SINGLE, CROWD, 256, [TAMED], large)

    assert figures.keys() - without.keys() == {
        f"{name}_ratio_batch_{LARGE_BATCH}" for name in ("default", "parallel", "cached")
    }
    assert (figures["parallel_ratio_batch_64"], figures["cached_ratio_batch_64"]) == (0.8, 0.5)
    assert figures["max_residual"] == 7e-5


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=needs_gpu)])
def test_samplers_are_timed_on_the_device_of_the_flow(device: str) -> None:
    timed = time_samplers(flow().to(usable(device)), 2, 2)

    assert set(timed.seconds) == {"sequential", "parallel", "default", "concatenating"}
    assert all(len(rounds) == 2 and min(rounds) > 0 for rounds in timed.seconds.values())
    assert max(timed.residual, timed.difference) < 1e-3
    assert described(torch.device(device))


def test_a_device_that_is_not_there_is_named_with_the_reason() -> None:
    with pytest.raises(SystemExit, match="'meta' cannot be used here: "):
        usable("meta")
    with pytest.raises(SystemExit, match="'nonsense' cannot be used here: "):
        usable("nonsense")


def test_where_nobody_was_tamed_the_promised_key_is_null() -> None:
    assert summary(SINGLE, CROWD, 256, [])["taming_seconds"] is None


def test_the_baseline_that_concatenates_gives_the_images_of_the_sequential_sampler() -> None:
    tarflow = flow()
    latents = torch.randn(2, *tarflow.latent_shape, generator=torch.Generator().manual_seed(1))

    theirs, own = concatenating(tarflow, latents), sequential(tarflow, latents)

    torch.testing.assert_close(theirs.images, own.images, rtol=1e-4, atol=1e-5)  # float32, other order of sums
    assert whole_residual(tarflow, theirs, latents) < 1e-4
    assert whole_residual(tarflow, theirs, latents + 1) > 0.1
