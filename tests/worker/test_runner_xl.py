"""A job on Stable Diffusion XL: it reads concepts by both tokenizers, plans its memory, and leaves a pipeline."""

from __future__ import annotations

import tarfile
from pathlib import Path
from typing import cast

import pytest
import torch
from diffusers import StableDiffusionXLPipeline

from models.checkpoints import load_conditional, save_checkpoint
from models.conditional import PromptConditional
from models.stable_diffusion_xl import StableDiffusionXL
from tests.models.sd_cases import POSITIONS
from tests.models.sdxl_cases import tiny_xl
from tests.worker.prompt_jobs import PROMPTS_TOO_LONG, Job, signals_restored
from unlearning import AmnesiaParameters, Examples
from worker.runner.artifacts import PIPELINE, TAMED, Work, save_tamed, write_artifacts
from worker.runner.conditions import concepts_of
from worker.runner.memory import fit_training
from worker.runner.problems import UserError

ROOMY = {"max_position_embeddings": POSITIONS + 5 * PROMPTS_TOO_LONG}


@pytest.fixture(scope="module")
def base_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained model that reads every phrasing."""
    path = tmp_path_factory.mktemp("xl") / "base.safetensors"
    save_checkpoint(path, tiny_xl(text_encoder=ROOMY, text_encoder_2=ROOMY))
    return path


@pytest.fixture
def job(base_file: Path, tmp_path: Path) -> Job:
    """A job on it."""
    with signals_restored():
        return Job(tmp_path, base_file)


def test_a_concept_that_is_cut_off_is_refused_at_its_place(job: Job) -> None:
    asked = {"target": {"concept": "zero"}, "remember": {"concepts": ["one", "photo " * 200]}}

    with pytest.raises(UserError, match="would be cut off") as refused:
        concepts_of(asked, cast(PromptConditional, job.base.model))

    assert refused.value.problem["errors"][0]["pointer"] == "/remember/concepts/1"


def test_its_training_is_planned_or_refused_before_it_starts(job: Job) -> None:
    base = job.base
    trained = list(base.model.scopes()["cross-attention"])
    latent_shape = cast(StableDiffusionXL, base.model).latent_shape
    condition = torch.cat([base.conditions.trained(label)[:1] for label in range(len(base.conditions.names))])
    examples = Examples(torch.randn(len(condition), *latent_shape), condition)
    parameters = AmnesiaParameters(batch=4, replay_batch=4)

    plan = fit_training(base, trained, parameters, examples, lambda _: 2**30)

    assert plan.micro_batch == 4
    assert 0 < plan.needed < 2**30
    with pytest.raises(UserError, match="takes at least"):
        fit_training(base, trained, parameters, examples, lambda _: plan.needed // 100)


def test_what_it_leaves_is_a_checkpoint_and_the_pipeline_of_it(job: Job, tmp_path: Path) -> None:
    assert isinstance(job.base.model, StableDiffusionXL)
    tamed = job.base.model
    with torch.no_grad():
        tamed.unet.conv_in.bias.add_(1)
    named = {"job_id": "job_0", "method": "selective-amnesia"}

    save_tamed(tamed, Work("test", {}, {}), named, job.base, tmp_path)
    left = [one["name"] for one in write_artifacts(tmp_path, report_json="{}", report_html="", grid=None)]

    assert left[:2] == [TAMED, PIPELINE]
    with tarfile.open(tmp_path / "outputs" / PIPELINE) as archive:
        archive.extractall(tmp_path / "opened", filter="data")
    opened = StableDiffusionXLPipeline.from_pretrained(tmp_path / "opened", use_safetensors=True, local_files_only=True)
    again = load_conditional(tmp_path / "outputs" / TAMED)
    assert isinstance(again, StableDiffusionXL)
    for name in ("unet", "vae", "text_encoder", "text_encoder_2"):
        theirs = getattr(opened, name).state_dict()
        assert all(torch.equal(value, theirs[key]) for key, value in again.get_submodule(name).state_dict().items())
