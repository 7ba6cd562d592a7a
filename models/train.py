"""Train a flow on a folder of images, and write its checkpoint: what `forgetd train` runs in a process of its own.

    python -m models.train photos --family glow --out base.safetensors

Exit codes: 0 done; 1 a file or the training failed; 2 wrong usage; 130 interrupted.
"""

import argparse
import contextlib
import dataclasses
import hashlib
import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn, cast

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from models.checkpoints import save_checkpoint, tensor_digest
from models.class_prior import ClassPriorFlow
from models.conditional import ClassConditional
from models.errors import ArchitectureError, ModelError, UnusableModelError
from models.families import CONDITIONALS
from models.image_folder import FolderError, ImageFolder, hold_out, read_folder
from models.probe import probe
from models.protocol import Checkpointed, Flow
from models.recipes import TRAINABLE, SettingError, model_for, plan_for, read_settings, replaced
from models.training import INITIAL_IMAGES, Training, TrainingRecipe, bits_per_dim, image_losses, start

DONE, FAILED, USAGE, INTERRUPTED = 0, 1, 2, 130
REPORT_SECONDS = 1.0
SAVE_SECONDS = 120.0
"""Between two saves of a training that can be resumed."""
EVALUATED = 512
"""Most images of each kind that the figures at the end are taken over."""
MAX_CLASS_NAMES = 32_768
"""Characters of all class names together, which stand in the checkpoint's manifest."""
N_BITS, FULL_N_BITS = 5, 8
"""Colour depth by default: of a flow over dequantised images, as published for Glow; of all other models."""
UNITS = {"vae": "nats_per_image", "ddpm": "squared_error_per_image"}
"""Of the figures of families without a likelihood; of all others: bits_per_dim."""
WORDS = {
    "bits_per_dim": ("bpd", "bits a dimension", "bits per dimension"),
    "nats_per_image": ("nats", "nats an image", "negative ELBO in nats an image"),
    "squared_error_per_image": ("squared_error", "squared error an image", "squared error, summed over an image"),
}
"""By unit: its name in a line of progress, in words there, and in words of the result."""
OF_CLASSES = ("class-prior", *CONDITIONALS)
"""Families that cannot be without classes."""


class Stopped(Exception):
    """The training was asked to stop, between two steps."""


class _Stop:
    """Ctrl-C and SIGTERM while a training runs: asked for once, it ends after the step; twice, at once."""

    def __init__(self, gently: bool) -> None:
        self._gently = gently
        self.asked = False

    def __call__(self, _number: int, _frame: object) -> None:
        if self.asked or not self._gently:
            raise KeyboardInterrupt
        self.asked = True

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """While this lasts, signals come here."""
        before = {number: signal.signal(number, self) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def main(arguments: list[str] | None = None) -> int:
    """The command line: see the module's docstring."""
    options = _parser().parse_args(arguments)
    stop = _Stop(gently=options.resume)
    try:
        with stop.listening():
            train(options, stop)
    except (SettingError, FolderError, ArchitectureError) as error:
        return _refuse(error, USAGE)
    except (ModelError, OSError) as error:
        return _refuse(error, FAILED)
    except Stopped:
        return _refuse("stopped; the same command goes on from here", INTERRUPTED)
    except KeyboardInterrupt:
        return _refuse("interrupted; no checkpoint was written", INTERRUPTED)
    return DONE


def train(options: argparse.Namespace, stop: _Stop) -> None:
    """Read, build, train, measure, write."""
    _check_out(options.out)
    device = _device(options.device)
    with_classes = options.conditional or options.family in OF_CLASSES
    architecture, n_bits, _ = _plan(options, n_classes=2 if with_classes else 0)
    with torch.device("meta"):  # refuses what cannot be built before the images are read
        model_for(options.family, _shape(options), n_bits, None, **architecture)
    folder = read_folder(options.folder, image_size=options.size, channels=options.channels, with_classes=with_classes)
    if sum(map(len, folder.classes)) > MAX_CLASS_NAMES:
        raise FolderError(f"the names of {len(folder.classes)} classes are too long for a checkpoint; shorten them")
    architecture, n_bits, recipe = _plan(options, len(folder.classes))
    weights = _stream(options.seed, "weights")
    model = model_for(options.family, _shape(options), n_bits, weights, **architecture)
    kept, apart = hold_out(folder, options.hold_out, _stream(options.seed, "hold-out"))
    images, labels = folder.images[kept], folder.labels[kept] if folder.labels is not None else None
    module = cast(nn.Module, model).to(device)
    generator = _stream(options.seed, "training")
    if isinstance(model, ClassPriorFlow) and labels is not None:
        model.reweight(torch.bincount(labels, minlength=model.n_classes))
    first = torch.randperm(len(images), generator=generator)[:INITIAL_IMAGES]
    start(module, images[first], n_bits=n_bits, generator=generator)
    training = Training(module, images, recipe, n_bits=n_bits, generator=generator, labels=labels)
    _run(training, options, stop, _state_key(model, recipe, options.seed, folder))
    figures = {
        f"{_unit(options)}_training": _figure(model, folder, kept, options.seed),
        f"{_unit(options)}_held_out": _figure(model, folder, apart, options.seed),
    }
    module.to("cpu")
    extra = {
        "data": {"images": len(kept), "held_out": len(apart), "classes": folder.classes},
        "recipe": dataclasses.asdict(recipe), "seed": options.seed, "steps": training.steps, **figures,
    }  # fmt: skip
    save_checkpoint(options.out, module, extra)
    _state_path(options.out).unlink(missing_ok=True)
    facts = {
        "path": str(options.out), "family": model.family, "architecture": model.architecture,
        "parameters": sum(p.numel() for p in module.parameters()), "seconds": round(training.elapsed(), 1),
        "passed_over": folder.passed_over,
    }  # fmt: skip
    _tell_result({**facts, **extra, **_probed(model)}, options)


def _plan(options: argparse.Namespace, n_classes: int) -> tuple[dict[str, Any], int, TrainingRecipe]:
    """Architecture, colour depth and recipe: the family's defaults with what was asked for."""
    plan = plan_for(options.family, _shape(options), n_classes=n_classes)
    overrides, recipe = read_settings(options.family, options.set, plan.recipe)
    if "n_classes" in overrides:
        raise SettingError("n_classes is the number of sub-folders; --conditional makes classes of them")
    if options.steps is not None or options.minutes is not None:
        seconds = None if options.minutes is None else 60 * options.minutes
        recipe = replaced(recipe, {"steps": options.steps, "seconds": seconds})
    architecture = plan.architecture | overrides
    full = options.family in CONDITIONALS or architecture.get("noise_std", 0.0) > 0
    n_bits = FULL_N_BITS if full else N_BITS
    return architecture, options.n_bits if options.n_bits is not None else n_bits, recipe


def _shape(options: argparse.Namespace) -> tuple[int, int, int]:
    return options.channels, options.size, options.size


def _run(training: Training, options: argparse.Namespace, stop: _Stop, key: str) -> None:
    """Step by step, with a word now and then, and saved now and then where the training can be resumed."""
    path = _state_path(options.out)
    if options.resume and path.exists():
        _load_state(path, training, key)
    told = saved = time.monotonic()
    while (share := training.share()) < 1.0:
        training.step(share)
        now = time.monotonic()
        if training.steps == 1 or now - told >= REPORT_SECONDS:
            told = now
            _tell_progress(training, share, options)
        if options.resume and (stop.asked or now - saved >= SAVE_SECONDS):
            saved = now
            _save_state(path, training, key)
        if stop.asked:
            raise Stopped
    training.finish()


def _state_path(out: Path) -> Path:
    return out.with_name(f"{out.name}.state")


def _state_key(model: Checkpointed, recipe: TrainingRecipe, seed: int, folder: ImageFolder) -> str:
    """What a state belongs to: another model, recipe, seed or set of images cannot go on from it."""
    tensors = {"images": folder.images} | ({"labels": folder.labels} if folder.labels is not None else {})
    facts = [model.family, model.image_shape, model.n_bits, model.architecture, dataclasses.asdict(recipe), seed]
    return hashlib.sha256(json.dumps([*facts, tensor_digest(tensors)], sort_keys=True).encode()).hexdigest()


def _save_state(path: Path, training: Training, key: str) -> None:
    part = path.with_name(f"{path.name}.part")
    try:
        save_file(training.tensors(), part, metadata={"key": key})
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def _load_state(path: Path, training: Training, key: str) -> None:
    try:
        with safe_open(path, framework="pt") as file:
            if (file.metadata() or {}).get("key") != key:
                raise SettingError(
                    f"{path} belongs to a training with other images or settings; give those, or delete the file"
                )
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 it is no dict
    except SettingError:
        raise
    except Exception as error:  # whatever the reader of a damaged file raises
        raise SettingError(f"{path} cannot be read ({type(error).__name__}); delete it to begin again") from error
    training.restore(tensors)


def _unit(options: argparse.Namespace) -> str:
    """What is measured of a model of that family: its likelihood's code length, or the bound or loss it is known by."""
    return UNITS.get(options.family, "bits_per_dim")


def _figure(model: Checkpointed, folder: ImageFolder, rows: Tensor, seed: int) -> float | None:
    """The mean, over up to 512 of those images, of bits per dimension or of the bound; null for none."""
    if not len(rows):
        return None
    generator = _stream(seed, "evaluation")
    rows = rows[torch.randperm(len(rows), generator=generator)[:EVALUATED]]
    images, labels = folder.images[rows], folder.labels[rows] if folder.labels is not None else None
    if isinstance(model, ClassConditional) and labels is not None:
        values = image_losses(model, images, labels, generator=generator)
    else:
        values = bits_per_dim(cast(Flow, model), images, n_bits=model.n_bits, generator=generator, labels=labels)
    return round(float(values.mean()), 4)


def _probed(model: Checkpointed) -> dict[str, Any]:
    """What the service would say of the checkpoint when it is uploaded."""
    try:
        return {"warnings": probe(model), "refused": None}
    except UnusableModelError as error:
        return {"warnings": [], "refused": str(error)}


def _tell_progress(training: Training, share: float, options: argparse.Namespace) -> None:
    progress = training.progress(share)
    name, unit, _ = WORDS[_unit(options)]
    value = progress.bits_per_dim if name == "bpd" else progress.loss
    line = {
        "step": progress.step, "seconds": round(progress.seconds, 2), name: round(value, 4),
        "total_seconds": progress.total_seconds,
    }  # fmt: skip
    _write(json.dumps(line) if options.json else f"step {progress.step:6d}  {value:.3f} {unit}")


def _tell_result(result: dict[str, Any], options: argparse.Namespace) -> None:
    if options.json:
        return _write(json.dumps(result))
    _write(f"wrote {result['path']}: {result['family']}, {result['parameters']:,} parameters, {result['steps']} steps")
    unit = _unit(options)
    _write(f"{WORDS[unit][2]}: training {result[f'{unit}_training']}, held out {result[f'{unit}_held_out']}")
    for text in [*result["warnings"], *([f"not usable yet: {result['refused']}"] if result["refused"] else [])]:
        _write(f"note: {text}")


def _write(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def _refuse(error: object, code: int) -> int:
    sys.stderr.write(f"Error: {error}\n")
    return code


def _check_out(out: Path) -> None:
    """Before hours of training, not after."""
    if out.is_dir():
        raise SettingError(f"{out} is a folder; name the file to write, such as {out / 'base.safetensors'}")
    if not out.absolute().parent.is_dir():
        raise SettingError(f"there is no folder {out.absolute().parent} to write to")
    if not os.access(out.absolute().parent, os.W_OK):
        raise SettingError(f"the folder {out.absolute().parent} cannot be written to")


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cuda" and not torch.cuda.is_available():
        raise SettingError("there is no CUDA device here, or this build of torch knows none; use --device cpu")
    return torch.device(name)


def _stream(seed: int, name: str) -> torch.Generator:
    """A CPU generator for one purpose, so that one's draws do not move another's."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, as everything else here does."""

    def error(self, message: str) -> NoReturn:
        self.exit(USAGE, f"Error: {message}\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="python -m models.train", description="Train a model on a folder of images.")
    parser.add_argument("folder", type=_folder, help="JPEG, PNG or WEBP files; its sub-folders are classes")
    parser.add_argument("--family", required=True, help=", ".join(TRAINABLE))
    parser.add_argument("--out", type=Path, required=True, help="checkpoint to write")
    parser.add_argument("--size", type=_number(int, 2, 1024), default=32, help="side of the square image, in pixels")
    parser.add_argument("--channels", type=int, choices=[1, 3], default=3, help="1: grey; 3: RGB")
    parser.add_argument("--n-bits", type=_number(int, 1, 8), help="colour depth (default: 5; with noise: 8)")
    parser.add_argument("--steps", type=_number(int, 1, 10**8), help="optimiser steps")
    parser.add_argument("--minutes", type=_number(float, 1e-3, 10**6), help="time budget; with --steps, what is first")
    parser.add_argument("--seed", type=_number(int, 0, 2**63), default=0, help="of all draws")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="architecture or recipe")
    parser.add_argument("--hold-out", type=_number(float, 0.0, 0.9), default=0.1, help="share that is only measured")
    parser.add_argument("--conditional", action="store_true", help="sub-folders are the classes of a tarflow")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--resume", action="store_true", help="keep a state file beside --out and go on from it")
    parser.add_argument("--json", action="store_true", help="progress and result as JSON lines")
    return parser


def _folder(text: str) -> Path:
    path = Path(text)
    if not path.is_dir():
        raise argparse.ArgumentTypeError(f"there is no folder {text}")
    return path


def _number(kind: type[int] | type[float], low: float, high: float) -> Any:
    def read(text: str) -> int | float:
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not low <= value <= high:
            raise argparse.ArgumentTypeError(f"a number from {low:g} to {high:g}, not {text}")
        return value

    return read


if __name__ == "__main__":
    sys.exit(main())
