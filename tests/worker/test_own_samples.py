"""What a slow base drew: kept for later jobs, except for what is to be forgotten, and free of any caller's images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from models.checkpoints import save_checkpoint
from tests.models.sd_cases import IMAGE_SHAPE, POSITIONS, tiny
from tests.worker.runs import Bench, Recorder
from worker.runner.assets import AssetFolder
from worker.runner.conditional_base import ConditionalBase, load_conditional_base
from worker.runner.fisher import fisher_of_parts
from worker.runner.own_samples import StoredSamples

FORGOTTEN, KEPT, REPLACING = 0, 1, 2
PROMPTS_TOO_LONG = 24
"""Tokens that the longest phrasing of these words takes, of this tokenizer's few."""


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained pipeline, whose text encoder reads every phrasing."""
    path = tmp_path_factory.mktemp("base") / "base.safetensors"
    save_checkpoint(path, tiny(text_encoder={"max_position_embeddings": POSITIONS + 5 * PROMPTS_TOO_LONG}))
    return path


class Job:
    """One job on it, with its assets."""

    def __init__(self, folder: Path, file: Path, images: dict[int, Tensor] | None = None, **job: Any) -> None:
        bench = Bench(folder, file)
        bench.job.update(target={"concept": "zero"}, replace_with={"concept": "photo"})
        bench.job.update(remember={"concepts": ["one"], "generated": 64}, **job)
        bench.job["inputs"]["fisher"] = {}
        self.reporter = Recorder()
        self.base: ConditionalBase = load_conditional_base(bench.job, folder)
        self.assets = AssetFolder(bench.job, folder, self.reporter)
        self.own = StoredSamples(self.base, self.assets, self.reporter, images or {})

    @property
    def kept(self) -> list[str]:
        """Names of the assets that it announced."""
        return [one["name"] for one in self.reporter.messages if one["type"] == "asset"]


def test_nothing_of_what_is_forgotten_is_kept(file: Path, tmp_path: Path) -> None:
    job = Job(tmp_path, file)

    job.own.examples([FORGOTTEN, KEPT, REPLACING], 30, "any")
    fisher_of_parts(job.base, job.own, [KEPT, REPLACING], job.assets, job.reporter)

    assert job.base.conditions.names == ("zero", "one", "photo")
    assert job.base.conditions.added == (REPLACING,)
    assert sorted(name.partition("-")[0] for name in job.kept) == ["examples", "examples", "fisher", "fisher"]
    stored = b"".join(path.read_bytes() for path in (tmp_path / "assets").iterdir())
    forgotten = job.base.conditions.trained(FORGOTTEN)[0]
    assert forgotten.numpy().tobytes() not in stored
    assert job.base.conditions.trained(KEPT)[0].numpy().tobytes() in stored


def test_what_others_may_find_depends_on_no_image_of_the_callers(file: Path, tmp_path: Path) -> None:
    images = torch.randint(256, (7, *IMAGE_SHAPE), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    plain, sent = Job(tmp_path / "plain", file), Job(tmp_path / "sent", file, {KEPT: images})

    drawn = [one.own.drawn([KEPT], 20, "any") for one in (plain, sent)]
    examples = [one.own.examples([KEPT], 20, "any") for one in (plain, sent)]

    assert torch.equal(drawn[0].x, drawn[1].x)
    assert torch.equal(examples[0].x, drawn[0].x[:20])
    assert not torch.equal(examples[0].x, examples[1].x)
    assert len(torch.unique(examples[1].x, dim=0)) == len(
        images
    )  # every one of them, none more than the others but once
    assert plain.kept == sent.kept
