"""What a base shows under each of a job's labels: the examples of replay and of the Fisher information, and pictures.

A VAE draws thousands in a second, and so it draws anew for every purpose. A diffusion model takes minutes or hours for
as many: it draws once, and what it drew is an asset of the checkpoint, read by every later job that names the label.
What no other job may see, and a label that is only half drawn, is left to the next attempt at the job.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Protocol, cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from evidence.amnesia_evaluation import labels_in_turn, samples_of
from evidence.likelihood import derive_seed
from models.checkpoints import tensor_digest
from models.conditional import GuidedConditional
from unlearning import Examples, State
from worker.runner.assets import AssetFolder
from worker.runner.conditional_base import ConditionalBase
from worker.runner.conditions import picked
from worker.runner.contract import Interrupted, Reporter
from worker.runner.pace import Pace

__all__ = ["FreshSamples", "OwnSamples", "StoredSamples", "own_samples"]

KIND = "examples"
VERSION = 1
"""Of how examples are drawn: raised whenever that changes."""
RUNGS = (10, 20, 50, 100, 200, 500, 1000, 2000, 5000)
"""Numbers of examples that are drawn of a label, so that requests for almost as many share a file."""
STOCK, FEW_LABELS = 200, 20
"""Least examples of a label where there are few labels: whatever a later job asks of one, it finds."""
METADATA_KEY = "forgetd_examples"
PICTURES_AT_ONCE = 250
DRAWN_AT_ONCE = 50
"""Most that is lost where SIGTERM cuts a drawing. Large latent models pass through fewer in any case."""


class OwnSamples(Protocol):
    """Samples of the base."""

    def examples(self, labels: Sequence[int], n: int, purpose: str) -> Examples:
        """At least n examples over labels, of each as many as of the others, on the CPU; conditions as training has
        them. The caller's images stand for a label where there are some.
        """
        ...

    def drawn(self, labels: Sequence[int], n: int, purpose: str) -> Examples:
        """As `examples`, but drawn by the model in any case: what other jobs may find depends on no caller's images."""
        ...

    def pictures(self, labels: Sequence[int], n: int, purpose: str, *, after: int = 0) -> tuple[Tensor, Tensor]:
        """n pictures, uint8 (n, c, h, w), and their labels in turn (n,).

        Where samples are shared by all purposes, the first `after` of each label are passed over.
        """
        ...


@dataclass(frozen=True)
class FreshSamples:
    """Draws anew for each purpose."""

    base: ConditionalBase
    seed: int

    def examples(self, labels: Sequence[int], n: int, purpose: str) -> Examples:
        """See `OwnSamples`."""
        return self.base.drawn(labels_in_turn(labels, n), derive_seed(self.seed, purpose))

    drawn = examples

    def pictures(
        self,
        labels: Sequence[int],
        n: int,
        purpose: str,
        *,
        after: int = 0,  # noqa: ARG002 none is shared
    ) -> tuple[Tensor, Tensor]:
        """See `OwnSamples`."""
        drawn_of = labels_in_turn(labels, n)
        return samples_of(self.base.sampler, drawn_of, seed=derive_seed(self.seed, purpose)), drawn_of


@dataclass(frozen=True)
class StoredSamples:
    """Draws once a checkpoint. Whoever asks for the same label gets the same samples, whatever the purpose."""

    base: ConditionalBase
    assets: AssetFolder
    reporter: Reporter
    images: Mapping[int, Tensor] = field(default_factory=dict)
    """The caller's, uint8 (n, c, h, w), which stand for a label in training in place of samples."""
    _held: dict[int, Examples] = field(default_factory=dict, init=False)
    _drawing: list[bool] = field(default_factory=list, init=False)

    def examples(self, labels: Sequence[int], n: int, purpose: str) -> Examples:  # noqa: ARG002 none is drawn for one purpose
        """See `OwnSamples`."""
        each = -(-n // len(labels))
        drawn = self._of([label for label in labels if label not in self.images], each)
        return _evenly([drawn[label] if label in drawn else self._captioned(label) for label in labels], each)

    def drawn(self, labels: Sequence[int], n: int, purpose: str) -> Examples:  # noqa: ARG002 likewise
        """See `OwnSamples`."""
        each = -(-n // len(labels))
        return _evenly(list(self._of(labels, each).values()), each)

    def pictures(
        self,
        labels: Sequence[int],
        n: int,
        purpose: str,  # noqa: ARG002 none is drawn for one purpose
        *,
        after: int = 0,
    ) -> tuple[Tensor, Tensor]:
        """See `OwnSamples`."""
        drawn_of, each = labels_in_turn(labels, n), -(-n // len(labels))
        drawn = self._of(labels, after + each)
        shown = [self._shown(drawn[label].x[after : after + each]) for label in labels]
        turns = torch.arange(n)
        return torch.stack(shown)[turns % len(labels), turns // len(labels)], drawn_of

    def _shown(self, x: Tensor) -> Tensor:
        model = cast(GuidedConditional, self.base.model)
        with torch.no_grad():
            return torch.cat(
                [model.images(part.to(self.base.device)).cpu() for part in torch.split(x, PICTURES_AT_ONCE)]
            )

    def _captioned(self, label: int) -> Examples:
        """The caller's images, each under a phrasing of its concept."""
        generator = torch.Generator().manual_seed(derive_seed(0, "captions", label))
        x = self.base.encoded(self.images[label], derive_seed(0, "captioned", label))
        labels = torch.zeros(len(x), dtype=torch.int64)
        return Examples(x, picked([self.base.conditions.trained(label)], labels, generator))

    def _of(self, labels: Sequence[int], n: int) -> dict[int, Examples]:
        """At least n examples of each label: those held, the smallest file that has as many, or drawn now."""
        n = max(n, STOCK if len(self.base.labels) <= FEW_LABELS else 0)
        missing = [label for label in labels if not self._has(label, n)]
        if missing and not self._drawing:
            self.reporter.phase("replay")
            self._drawing.append(True)
        rung = _rungs(n)[0]
        pace = Pace(self.reporter, rung * len(missing))
        for label in missing:
            name, private = self._name(label, rung), label in self.base.conditions.private
            with self.assets.stop.held():
                self._held[label] = drawn = self._draw(label, rung, pace)
                self.assets.keep(name, partial(self._save, drawn, name), private=private)
        return {label: self._held[label] for label in labels}

    def _has(self, label: int, n: int) -> bool:
        """Whether n examples of a label are held, read now if need be."""
        if label in self._held and len(self._held[label]) >= n:
            return True
        for name in (self._name(label, rung) for rung in _rungs(n)):
            found = self.assets.found(name, partial(self._load, name), _Damaged)
            if found is not None:
                self._held[label] = found
                return True
        return False

    def _draw(self, label: int, n: int, pace: Pace) -> Examples:
        """So many examples, from where an earlier attempt left them: their conditions follow from the name.

        Raises:
            Interrupted: SIGTERM; what there is has been announced.
        """
        model, name = cast(GuidedConditional, self.base.model), self._name(label, n)
        generator = torch.Generator().manual_seed(derive_seed(0, name))
        rows = self.base.conditions.stored(label)
        condition = picked([rows], torch.zeros(n, dtype=torch.int64), generator)
        drawn = _Drawn(generator)
        if (state := self.assets.unfinished(KIND, name)) is not None:
            drawn.take_up(state)
            pace.found(len(drawn))
        while len(drawn) < n:
            next_ones = condition[len(drawn) : len(drawn) + DRAWN_AT_ONCE]
            try:
                with self.assets.stop.released(), torch.no_grad():
                    part = model.generate(next_ones, generator=generator).cpu()
            except Interrupted:
                if drawn.grown:
                    self.assets.save(KIND, name, drawn.capture)
                raise
            drawn.add(part)  # held: rows and generator go together
            pace.at(len(drawn))
            if len(drawn) < n:
                self.assets.offer(KIND, name, drawn.capture)
        pace.through(n)
        return Examples(drawn.x, condition)

    def _name(self, label: int, n: int) -> str:
        sampling = cast(GuidedConditional, self.base.model).sampling
        rows = tensor_digest({"condition": self.base.conditions.stored(label)})
        return AssetFolder.name(KIND, [VERSION, self.base.weights, rows, n, sampling.steps, sampling.guidance_scale])

    def _save(self, examples: Examples, name: str, path: Path) -> None:
        tensors = {"x": examples.x.contiguous(), "condition": examples.condition.contiguous()}
        save_file(tensors, path, metadata={METADATA_KEY: json.dumps(self._facts(examples, name))})

    def _load(self, name: str, path: Path) -> Examples:
        try:
            with safe_open(path, "pt") as file:
                facts = json.loads((file.metadata() or {}).get(METADATA_KEY, "null"))
                examples = Examples(file.get_tensor("x"), file.get_tensor("condition"))
        except (SafetensorError, OSError, ValueError) as error:
            raise _Damaged(str(error)) from error
        if facts != self._facts(examples, name):
            raise _Damaged("it holds other samples, or was altered")
        return examples

    def _facts(self, examples: Examples, name: str) -> dict[str, str]:
        return {"name": name, "weights": self.base.weights, "digest": examples.digest()}


class _Drawn:
    """Examples as far as they are drawn, and where their generator then stood: whoever goes on draws the same ones."""

    def __init__(self, generator: torch.Generator) -> None:
        self._generator, self._stood = generator, generator.get_state()
        self._parts: list[Tensor] = []
        self.grown = False
        """Since it was taken up."""

    def __len__(self) -> int:
        return sum(len(part) for part in self._parts)

    @property
    def x(self) -> Tensor:
        """All of them, (n, ...)."""
        return torch.cat(self._parts)

    def add(self, part: Tensor) -> None:
        """The next ones, just drawn."""
        self._parts.append(part)
        self._stood, self.grown = self._generator.get_state(), True

    def capture(self) -> State:
        """After the last part, whatever has been begun since."""
        return State({"x": self.x, "generator": self._stood})

    def take_up(self, state: State) -> None:
        """Go on from there."""
        self._parts, self._stood = [state.tensors["x"]], state.tensors["generator"]
        self._generator.set_state(self._stood)


def _rungs(n: int) -> list[int]:
    """Numbers of examples that a file may have which holds n, the smallest first."""
    return [rung for rung in RUNGS if rung >= n] or [n]


def _evenly(parts: Sequence[Examples], each: int) -> Examples:
    """So many of each, from the first again where there are fewer."""
    rows = [torch.arange(each) % len(part) for part in parts]
    return Examples(
        torch.cat([part.x[take] for part, take in zip(parts, rows, strict=True)]),
        torch.cat([part.condition[take] for part, take in zip(parts, rows, strict=True)]),
    )


class _Damaged(Exception):
    """The file holds no examples of this base."""


def own_samples(
    base: ConditionalBase, assets: AssetFolder, reporter: Reporter, seed: int, images: Mapping[int, Tensor]
) -> OwnSamples:
    """Samples of a base, as suits the time that it takes to draw."""
    if isinstance(base.model, GuidedConditional):
        return StoredSamples(base, assets, reporter, images)
    return FreshSamples(base, seed)
