"""Job ``forget``, method ``selective-amnesia``: a condition of a model comes to show something else; others stay."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evidence.amnesia_evaluation import evaluate_amnesia
from evidence.amnesia_report import build_amnesia_report
from evidence.likelihood import derive_seed
from evidence.schema import Document
from unlearning import Criterion, Noise, Pool, Surrogate
from worker.runner.amnesia_inputs import label_of, surrogates_of
from worker.runner.amnesia_judge import Asked, asked_of, criterion_of
from worker.runner.conditional_base import ConditionalBase
from worker.runner.conditions import Concepts
from worker.runner.contract import Reporter, Stop
from worker.runner.problems import UserError
from worker.runner.remapping import Changed, Opened, remap

__all__ = ["run"]

FAINT = (
    "Noise replaces the class, and the classifier that judged was sent. One that never saw faint pictures can take "
    "what is left of the class for another: look at samples, or let a judge be trained on the base's own, faded ones "
    "among them, by sending none."
)


def run(job: dict[str, Any], folder: Path, reporter: Reporter, stop: Stop) -> None:
    """Let a condition show something else, see `remapping.remap`."""
    remap(job, folder, reporter, stop, named="target", planned=_planned)


@dataclass(frozen=True)
class _Forgetting:
    """What the forgotten condition is to show, and who says that it is forgotten."""

    opened: Opened
    asked: Asked
    surrogate: Surrogate
    replacement: str
    """In words."""
    kind: str = "amnesia"
    losses: tuple[str, ...] = ("surrogate", "replay", "penalty", "p_forgotten", "entropy")

    @property
    def criterion(self) -> Criterion:
        """Fresh samples show what is aimed at."""
        return criterion_of(self.asked, self.opened.base, self.opened.reporter.alive)

    @property
    def digests(self) -> Mapping[str, str]:
        """Of the classifier that was sent."""
        return {f"classifier/{self.asked.judge.name}": self.asked.digest} if self.asked.digest else {}

    def judged(self, changed: Changed) -> tuple[Document, Mapping[str, Any]]:
        """See `remapping.Remapping`."""
        base, asked = self.opened.base, self.asked
        evaluation = evaluate_amnesia(
            base.sampler,
            changed.sampler,
            asked.judge,
            label=self.opened.label,
            shows=asked.shows,
            names=base.conditions.names if isinstance(base.conditions, Concepts) else None,
            image_shape=base.image_shape,
            n_bits=base.n_bits,
            samples=asked.samples,
            others=asked.others,
            goal=asked.goal,
            replacement=asked.replacement,
            confidence=asked.confidence,
            seed=derive_seed(self.opened.seed, "judge"),
            independent=asked.independent,
            on_progress=changed.on_progress,
        )
        report = build_amnesia_report(
            evaluation,
            changed.facts(),
            replacement=self.replacement,
            history=changed.result.history,
            drift=changed.result.drift,
            rollbacks=changed.result.rollbacks,
            notes=(FAINT,) if asked.independent and isinstance(self.surrogate, Noise) else (),
        )
        return report, evaluation.summary()


def _planned(opened: Opened) -> _Forgetting:
    replacement = _replacement(opened)
    asked = asked_of(
        opened.job,
        opened.folder,
        opened.reader,
        opened.base,
        opened.own,
        label=opened.label,
        replacement=replacement,
        reporter=opened.reporter,
    )
    return _Forgetting(opened, asked, _surrogate(opened, replacement), _in_words(opened.job, opened.base, replacement))


def _replacement(opened: Opened) -> int | None:
    """The label that the forgotten one is to show instead, where there is one."""
    asked = opened.job["replace_with"]
    if asked.get("class_label") is None and asked.get("concept") is None:
        return None
    other = label_of(asked, opened.base, "/replace_with")
    if other == opened.label:
        raise UserError(
            "invalid-request",
            "The request cannot be met as it stands",
            f"“{opened.base.conditions.names[other]}” is to be replaced with itself; name another, images, or noise.",
            pointer=f"/replace_with/{'concept' if asked.get('concept') else 'class_label'}",
        )
    return other


def _in_words(job: Mapping[str, Any], base: ConditionalBase, replacement: int | None) -> str:
    """What the condition is to show instead."""
    asked = job["replace_with"]
    if replacement is not None:
        name = base.conditions.names[replacement]
        return f"what “{name}” shows" if asked.get("concept") else f"what class {name} shows"
    if asked.get("others"):
        return "what the others show, evenly"
    return "images of the caller's" if asked.get("images") else "uniform noise"


def _surrogate(opened: Opened, replacement: int | None) -> Surrogate:
    base, asked = opened.base, opened.job["replace_with"]
    if replacement is not None:
        return Pool(opened.own.examples([replacement], surrogates_of(base), "surrogate").x)
    if asked.get("images"):
        images = opened.reader.read(opened.job["inputs"]["surrogate"], "surrogate")
        return Pool(base.encoded(images.pixels, derive_seed(opened.seed, "surrogate")))
    return Pool(opened.replay.x) if asked.get("others") else base.noise(surrogates_of(base))
