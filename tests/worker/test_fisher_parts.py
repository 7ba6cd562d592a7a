"""Of which parameters the Fisher information of a large model is: of all while that fits, else of those trained."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.worker.prompt_jobs import KEPT, REPLACING, Job, signals_restored, untrained_pipeline
from tests.worker.runs import one_thread
from worker.runner import fisher, own_samples
from worker.runner.fisher import Parts, fisher_of_parts

WANTED = [KEPT, REPLACING]


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained pipeline."""
    return untrained_pipeline(tmp_path_factory.mktemp("base") / "base.safetensors")


@pytest.fixture(autouse=True, scope="module")
def small() -> Iterator[None]:
    """Little work."""
    with pytest.MonkeyPatch.context() as patch, signals_restored(), one_thread():
        patch.setattr(own_samples, "STOCK", 0)
        for name, value in {"SLOW_EXAMPLES": 4, "POOLED_EXAMPLES": 4, "TIMESTEPS": 2}.items():
            patch.setattr(fisher, name, value)
        yield


def parts_of(job: Job, scope: str) -> Parts:
    trained = job.base.model.scopes()[scope]
    return fisher_of_parts(job.base, job.own, WANTED, job.assets, job.reporter, trained=trained)


def test_a_model_too_large_for_all_of_it_has_one_part_of_what_is_trained(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = parts_of(Job(tmp_path / "small", file), "cross-attention")
    monkeypatch.setattr(fisher, "MOST_BYTES", 1)
    job = Job(tmp_path / "first", file)
    names = list(job.base.model.scopes()["cross-attention"])

    first = parts_of(job, "cross-attention")
    again = parts_of(Job(tmp_path / "again", file, given=job.left()), "cross-attention")
    other = parts_of(Job(tmp_path / "other", file, given=job.left()), "all")

    assert all(set(one.tensors) == set(job.base.model.scopes()["all"]) for one in whole.of.values())
    ((labels, found),) = first.of.items()
    assert (sorted(found.tensors), set(labels) <= set(WANTED)) == (sorted(names), True)
    assert (first.computed, again.computed, other.computed) == (1, 0, 1)
    for name, value in again.over(list(labels), names).tensors.items():
        assert torch.equal(value, found.tensors[name])
    (of_all,) = other.of.values()
    assert set(of_all.tensors) == set(job.base.model.scopes()["all"])
