"""The captioned digits: every phrasing in captions, a tokenizer that spells them, a folder for diffusers."""

from __future__ import annotations

import importlib.metadata
import json
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from diffusers import StableDiffusionPipeline
from transformers import CLIPTokenizer

from examples import captioned_digits
from examples.caption_tokenizer import VocabularyError, clip_merges, clip_tokenizer
from examples.captioned_digits import (
    ALIASES,
    RECIPE,
    TINY,
    WORDS,
    base_path,
    captions_of,
    judge,
    load_images,
    sample_figures,
    write_tar,
)
from examples.captioned_training import (
    PartProgress,
    PartRecipe,
    PipelineRecipe,
    open_folder,
    train_text_encoder,
    untrained,
)
from examples.digits import ClassifierRecipe, DigitClassifier, export_onnx, load_digits
from models.conditional import Sampling
from models.errors import ImageError
from unlearning.prompts import HELD_OUT, TRAINED, phrasings

MOMENT = replace(
    TINY,
    vae=PartRecipe(steps=2, batch=4, learning_rate=1e-3),
    text=PartRecipe(steps=2, batch=4, learning_rate=1e-3),
    unet=PartRecipe(steps=2, batch=4, learning_rate=1e-3),
)
GLANCE = ClassifierRecipe(steps=3, batch=8)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def folder(cache: Path) -> Path:
    """A pipeline that was trained for a moment."""
    return captioned_digits.captioned_digits(cache, recipe=MOMENT)


def test_captions_have_both_names_of_a_digit_in_every_phrasing() -> None:
    for digit, (word, alias) in enumerate(zip(WORDS, ALIASES, strict=True)):
        asked = phrasings(word, [alias])
        assert sorted(captions_of(digit)) == sorted([*asked.trained, *asked.held_out])


def test_the_tokenizer_spells_every_caption_and_gives_it_back() -> None:
    tokenizer = clip_tokenizer(RECIPE.merges, RECIPE.positions)

    for digit in RECIPE.digits:
        for caption in captions_of(digit):
            ids = tokenizer(caption).input_ids
            assert tokenizer.decode(ids, skip_special_tokens=True).replace(" ", "") == caption.replace(" ", "")
    assert len(tokenizer) == RECIPE.merges + 514


@pytest.mark.parametrize("template", [*TRAINED, *HELD_OUT])
def test_a_name_of_three_long_words_fits_every_phrasing(template: str) -> None:
    tokenizer = clip_tokenizer(RECIPE.merges, RECIPE.positions)

    assert len(tokenizer(template.format("handwritten number seven")).input_ids) <= RECIPE.positions


def test_two_captions_never_have_equal_tokens() -> None:
    tokenizer = clip_tokenizer(RECIPE.merges, RECIPE.positions)
    captions = [caption for digit in RECIPE.digits for caption in captions_of(digit)]

    assert len({tuple(tokenizer(caption).input_ids) for caption in captions}) == len(captions)


def test_without_the_vocabulary_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> list[importlib.metadata.PackagePath]:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "files", missing)
    with pytest.raises(VocabularyError, match="pip install --no-deps open-clip-torch"):
        clip_merges(2000)


def test_more_merges_than_there_are_are_refused() -> None:
    with pytest.raises(VocabularyError, match="does not begin with 1000000 merges"):
        clip_merges(1_000_000)


@pytest.mark.parametrize("recipe", [RECIPE, TINY], ids=["full", "tiny"])
def test_every_field_of_a_recipe_is_part_of_its_name(recipe: PipelineRecipe, tmp_path: Path) -> None:
    changed = [
        replace(recipe, unet=replace(recipe.unet, steps=1)),
        replace(recipe, text=replace(recipe.text, batch=1)),
        replace(recipe, digits=recipe.digits[:2]),
        replace(recipe, seed=1),
    ]

    assert len({base_path(tmp_path, one) for one in (recipe, *changed)}) == 5
    assert base_path(tmp_path, recipe).parent == tmp_path


def test_the_images_are_those_digits_in_three_equal_channels() -> None:
    full, tiny = load_digits(16), load_images(TINY)

    assert tiny.training.shape == (1200, 3, 8, 8)
    assert set(tiny.held_out_labels.tolist()) == {0, 1, 2}
    assert torch.equal(tiny.held_out[:, 0], tiny.held_out[:, 2])
    shrunk = torch.nn.functional.avg_pool2d(full.held_out[:300].float(), 2)
    assert float((shrunk - tiny.held_out[:, :1].float()).abs().max()) <= 0.5


def test_a_size_that_the_digits_cannot_be_averaged_to_is_refused() -> None:
    with pytest.raises(ImageError, match="cannot be averaged to 12"):
        load_images(replace(TINY, image_size=12))


def test_diffusers_opens_the_folder_and_draws(folder: Path) -> None:
    pipeline = StableDiffusionPipeline.from_pretrained(folder, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    arguments = {"num_inference_steps": 2, "guidance_scale": 2.0, "output_type": "np"}

    first, again = (
        pipeline("a photo of zero", generator=torch.Generator().manual_seed(0), **arguments).images for _ in range(2)
    )

    assert first.shape == (1, 8, 8, 3)
    assert np.array_equal(first, again)
    assert pipeline.safety_checker is None
    assert pipeline.scheduler.config.prediction_type == "epsilon"
    assert not list(folder.rglob("*.bin"))


def test_the_folder_draws_what_the_pipeline_of_diffusers_draws(folder: Path) -> None:
    pipeline = StableDiffusionPipeline.from_pretrained(folder, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    start = torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(3))

    theirs = pipeline("this is two", latents=start, num_inference_steps=4, guidance_scale=3.0, output_type="np").images
    ours = open_folder(folder).draw(["this is two"], torch.Generator().manual_seed(3), Sampling(4, 3.0))

    assert np.abs(ours[0].permute(1, 2, 0).numpy() - theirs[0] * 255).max() <= 0.51  # we round to whole levels


def test_the_library_draws_what_the_folder_draws(cache: Path, folder: Path) -> None:
    model = captioned_digits.load(cache, recipe=MOMENT)
    prompts = ["zero", "an image of the digit 1"]

    ours = model.sample(model.tokens(prompts), generator=torch.Generator().manual_seed(7))
    theirs = open_folder(folder).draw(prompts, torch.Generator().manual_seed(7), model.sampling)

    assert model.sampling == Sampling(8, 4.0)
    assert int((ours.int() - theirs.int()).abs().max()) <= 1  # latents in another order of batches


def test_the_vocabulary_in_the_folder_is_the_tokenizers(folder: Path) -> None:
    of = folder / "tokenizer"
    again = CLIPTokenizer(str(of / "vocab.json"), str(of / "merges.txt"))

    assert json.loads((of / "vocab.json").read_text("utf-8")) == clip_tokenizer(TINY.merges, 24).get_vocab()
    assert again("seven, in detail").input_ids == CLIPTokenizer.from_pretrained(of)("seven, in detail").input_ids


def test_a_pipeline_is_trained_once_and_kept_under_its_recipe(cache: Path, folder: Path) -> None:
    written = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}

    again = captioned_digits.captioned_digits(cache, recipe=MOMENT)

    assert again == folder == base_path(cache, MOMENT)
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == written
    assert [path.name for path in cache.iterdir() if path.is_dir()] == [folder.name]


def test_equal_recipes_train_equal_weights_and_leave_the_global_generator_alone(folder: Path) -> None:
    before = torch.random.get_rng_state()
    reports: list[PartProgress] = []

    again = captioned_digits.train_base(load_images(MOMENT), MOMENT, reports.append)

    assert torch.equal(torch.random.get_rng_state(), before)
    kept = open_folder(folder)
    for part in ("vae", "text_encoder", "unet"):
        weights = getattr(kept, part).state_dict()
        assert all(torch.equal(value, weights[name]) for name, value in getattr(again, part).state_dict().items())
    assert kept.vae.config.scaling_factor == pytest.approx(again.vae.config.scaling_factor)
    assert [(one.part, one.step) for one in reports] == [("vae", 2), ("text", 2), ("unet", 2)]


def test_training_that_fails_leaves_no_folder(tmp_path: Path) -> None:
    def stop(progress: PartProgress) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        captioned_digits.captioned_digits(tmp_path, stop, MOMENT)

    assert list(tmp_path.iterdir()) == []


def test_the_text_encoder_learns_to_tell_captions_apart() -> None:
    reports: list[PartProgress] = []
    pipeline = untrained(TINY)

    train_text_encoder(pipeline, [captions_of(digit) for digit in TINY.digits], TINY, reports.append)

    assert reports[-1].loss < 0.5 < float(torch.log(torch.tensor(4.0)))
    assert not any(parameter.requires_grad for parameter in pipeline.text_encoder.parameters())


def test_the_tar_holds_the_files_of_the_folder_under_their_names(folder: Path, tmp_path: Path) -> None:
    first, second = tmp_path / "first.tar", tmp_path / "second.tar"
    for path in (first, second):
        write_tar(folder, path)

    assert first.read_bytes() == second.read_bytes()
    with tarfile.open(first, "r:") as archive:
        for member in archive:
            content = archive.extractfile(member)
            assert content is not None
            assert content.read() == (folder / member.name).read_bytes()
        assert "unet/diffusion_pytorch_model.safetensors" in archive.getnames()


def test_the_judge_reads_three_channels_as_their_mean(tmp_path: Path) -> None:
    images = load_images(TINY).held_out[:5]
    coloured = images.clone()
    coloured[:, 0] //= 2
    classifier = judge(TINY, tmp_path, GLANCE)
    mean = coloured.float().mean(1, keepdim=True).expand(-1, 3, -1, -1) / 255
    with torch.no_grad():
        expected = classifier(mean)

    export_onnx(classifier, tmp_path / "judge.onnx")

    session = onnxruntime.InferenceSession(tmp_path / "judge.onnx", providers=["CPUExecutionProvider"])
    assert session.get_inputs()[0].shape == ["N", 3, 8, 8]
    (logits,) = session.run(None, {"image": (coloured.float() / 255).numpy()})
    assert np.allclose(logits, expected.numpy(), atol=1e-4)
    assert torch.equal(judge(TINY, tmp_path, GLANCE).posterior(images), classifier.posterior(images))


def test_the_figures_are_the_judges(folder: Path) -> None:
    classifier = DigitClassifier(8)
    classifier.conv1 = torch.nn.Conv2d(3, 32, 3, padding=1)
    with torch.no_grad():
        for parameter in classifier.parameters():
            parameter.zero_()
        classifier.linear2.bias[1] = torch.log(torch.tensor(9.0))  # P(1) = 1/2, all others 1/18

    figures = sample_figures(open_folder(folder), classifier, (0, 1), sampling=Sampling(1, 2.0), n=3)

    assert figures == {"p": [round(1 / 18, 4), 0.5], "accuracy": [0.0, 1.0], "samples": 3}


def test_networks_of_another_seed_start_elsewhere() -> None:
    first, second = (untrained(replace(TINY, seed=seed)).unet.state_dict() for seed in (0, 1))

    assert not torch.equal(first["conv_in.weight"], second["conv_in.weight"])


def test_the_command_line_writes_folder_tar_and_figures(
    cache: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FORGETD_CACHE", str(cache))
    monkeypatch.setattr(captioned_digits, "TINY", MOMENT)
    monkeypatch.setattr(captioned_digits, "TINY_JUDGE", GLANCE)
    monkeypatch.setattr(captioned_digits, "SAMPLES", 2)
    out, tar, onnx = tmp_path / "out", tmp_path / "out.tar", tmp_path / "judge.onnx"

    code = captioned_digits.main(["--tiny", "--out", str(out), "--tar", str(tar), "--judge", str(onnx), "--figures"])

    assert code == 0
    printed = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert printed["digits"] == [0, 1, 2]
    assert len(printed["p"]) == 3
    assert {path.relative_to(out) for path in out.rglob("*")} == {
        path.relative_to(folder) for path in folder.rglob("*")
    }
    with pytest.raises(SystemExit):
        captioned_digits.main(["--tiny", "--out", str(out)])
