"""What a base shows under each of a job's labels: the examples of replay and of the Fisher information, and pictures.

A VAE draws thousands in a second, and so it draws anew for every purpose. A diffusion model takes minutes or hours for
as many: it draws once, and what it drew is an asset of the checkpoint, read by every later job that names the label.
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
from unlearning import Examples
from worker.runner.assets import AssetFolder
from worker.runner.conditional_base import ConditionalBase
from worker.runner.conditions import picked
from worker.runner.contract import Reporter

__all__ = ["FreshSamples", "OwnSamples", "StoredSamples", "own_samples"]

VERSION = 1
"""Of how examples are drawn: raised whenever that changes."""
RUNGS = (10, 20, 50, 100, 200, 500, 1000, 2000, 5000)
"""Numbers of examples that are drawn of a label, so that requests for almost as many share a file."""
STOCK, FEW_LABELS = 200, 20
"""Least examples of a label where there are few labels: whatever a later job asks of one, it finds."""
METADATA_KEY = "forgetd_examples"
PICTURES_AT_ONCE = 250


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
        return _evenly(
            [self._captioned(label) if label in self.images else self._of(label, each) for label in labels], each
        )

    def drawn(self, labels: Sequence[int], n: int, purpose: str) -> Examples:  # noqa: ARG002 likewise
        """See `OwnSamples`."""
        each = -(-n // len(labels))
        return _evenly([self._of(label, each) for label in labels], each)

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
        shown = [self._shown(self._of(label, after + each).x[after : after + each]) for label in labels]
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

    def _of(self, label: int, n: int) -> Examples:
        """At least n examples of a label: those held, the smallest file that has as many, or drawn now."""
        n = max(n, STOCK if len(self.base.labels) <= FEW_LABELS else 0)
        held = self._held.get(label)
        if held is not None and len(held) >= n:
            return held
        rungs = [rung for rung in RUNGS if rung >= n] or [n]
        for rung in rungs:
            found = self.assets.found(self._name(label, rung), partial(self._load, self._name(label, rung)), _Damaged)
            if found is not None:
                self._held[label] = found
                return found
        if not self._drawing:
            self.reporter.phase("replay")
            self._drawing.append(True)
        self._held[label] = drawn = self._draw(label, rungs[0])
        if label not in self.base.conditions.private:
            self.assets.keep(self._name(label, rungs[0]), partial(self._save, drawn, self._name(label, rungs[0])))
        return drawn

    def _draw(self, label: int, n: int) -> Examples:
        model, rows = cast(GuidedConditional, self.base.model), self.base.conditions.stored(label)
        generator = torch.Generator().manual_seed(derive_seed(0, self._name(label, n)))
        condition = picked([rows], torch.zeros(n, dtype=torch.int64), generator)
        parts = []
        for part in torch.split(condition, PICTURES_AT_ONCE):
            with torch.no_grad():
                parts.append(model.generate(part, generator=generator).cpu())
            self.reporter.alive()
        return Examples(torch.cat(parts), condition)

    def _name(self, label: int, n: int) -> str:
        sampling = cast(GuidedConditional, self.base.model).sampling
        rows = tensor_digest({"condition": self.base.conditions.stored(label)})
        return AssetFolder.name(
            "examples", [VERSION, self.base.weights, rows, n, sampling.steps, sampling.guidance_scale]
        )

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
