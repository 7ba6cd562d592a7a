"""What a slow base drew: kept for later jobs, except for what is to be forgotten, and free of any caller's images."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.models.sd_cases import IMAGE_SHAPE
from tests.worker.prompt_jobs import FORGOTTEN, KEPT, REPLACING, Job, noise, signals_restored, untrained_pipeline
from worker.runner.fisher import fisher_of_parts


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained pipeline."""
    return untrained_pipeline(tmp_path_factory.mktemp("base") / "base.safetensors")


@pytest.fixture(autouse=True)
def signals() -> Iterator[None]:
    """As they were."""
    with signals_restored():
        yield


def test_nothing_of_what_is_forgotten_is_kept_beside_the_checkpoint(file: Path, tmp_path: Path) -> None:
    job = Job(tmp_path, file)

    job.own.examples([FORGOTTEN, KEPT, REPLACING], 30, "any")
    fisher_of_parts(job.base, job.own, [KEPT, REPLACING], job.assets, job.reporter)

    assert job.base.conditions.names == ("zero", "one", "photo")
    assert job.base.conditions.added == (REPLACING,)
    kept = job.left("checkpoint")
    assert sorted(name.partition("-")[0] for name in kept) == ["examples", "examples", "fisher", "fisher"]
    stored = b"".join(path.read_bytes() for path in kept.values())
    forgotten = job.base.conditions.trained(FORGOTTEN)[0]
    assert forgotten.numpy().tobytes() not in stored
    assert job.base.conditions.trained(KEPT)[0].numpy().tobytes() in stored


def test_what_others_may_find_depends_on_no_image_of_the_callers(file: Path, tmp_path: Path) -> None:
    images = noise(7, *IMAGE_SHAPE)
    plain, sent = Job(tmp_path / "plain", file), Job(tmp_path / "sent", file, {KEPT: images})

    drawn = [one.own.drawn([KEPT], 20, "any") for one in (plain, sent)]
    examples = [one.own.examples([KEPT], 20, "any") for one in (plain, sent)]

    assert torch.equal(drawn[0].x, drawn[1].x)
    assert torch.equal(examples[0].x, drawn[0].x[:20])
    assert not torch.equal(examples[0].x, examples[1].x)
    assert len(torch.unique(examples[1].x, dim=0)) == len(
        images
    )  # every one of them, none more than the others but once
    assert plain.left("checkpoint").keys() == sent.left("checkpoint").keys()
