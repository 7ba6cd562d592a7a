"""What a Fisher information is once computed: tensors by parameter, and the facts without which they mean nothing."""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace

import torch
from torch import Tensor

from unlearning.errors import FisherError, InputError, ParameterError

FLOOR = 1e-3
CLIP = 1e3


@dataclass(frozen=True)
class Fisher:
    """The diagonal Fisher information F of a conditional model, over some examples."""

    tensors: Mapping[str, Tensor] = field(repr=False, compare=False)
    """F_i by parameter name, float32 on the CPU: the squared gradient of an example's summed loss, averaged."""
    rows: tuple[tuple[int, int], ...]
    """The examples that went in, as ascending half-open ranges of positions in the replay set."""
    draws: int
    """Estimates of the loss that were summed for each example; F grows with about their square."""
    plan: str
    """How they were drawn: "independent" or "stratified"."""
    reduction: str
    """How the model's loss joins the elements of an image, "sum" or "mean"; F scales with the square of it."""
    seed: int
    """Of all draws."""
    precision: str
    """Of the model's passes, "float32" or "bfloat16"; squares are summed in float32."""
    estimator: str
    """"autograd" or "hooks", or both with a plus: no part of what F is."""
    weights: str
    """`models.checkpoints.tensor_digest` of the model's state dict."""
    replay: str
    """That of {"condition": condition, "x": x}, the whole set that `rows` counts in."""

    @property
    def examples(self) -> int:
        """How many examples F is an average over."""
        return sum(stop - start for start, stop in self.rows)


def merge_fisher(parts: Sequence[Fisher]) -> Fisher:
    """The Fisher information over the examples of all parts, as several workers computed them.

    Args:
        parts: one or more, of the same model, set, names, draws and seed, over different rows; any order.

    Returns:
        Their average, each weighted with its number of examples. The order of the parts does not change a bit.

    Raises:
        FisherError: the parts differ in something else than their rows, or share rows.
    """
    if not parts:
        raise InputError("there is no part of a Fisher information to merge")
    parts = sorted(parts, key=lambda part: part.rows)
    first = parts[0]
    apart = ("tensors", "rows", "estimator")
    for part in parts[1:]:
        for name in (one.name for one in fields(Fisher) if one.name not in apart):
            if getattr(part, name) != getattr(first, name):
                raise FisherError(f"parts of different {name}: {getattr(first, name)!r} and {getattr(part, name)!r}")
        if {key: value.shape for key, value in part.tensors.items()} != {
            key: value.shape for key, value in first.tensors.items()
        }:
            raise FisherError("parts of different parameters")
    total = sum(part.examples for part in parts)
    tensors = {name: torch.zeros_like(value) for name, value in first.tensors.items()}
    for part in parts:
        for name, value in tensors.items():
            value.add_(part.tensors[name], alpha=part.examples / total)
    estimators = sorted({name for part in parts for name in part.estimator.split("+")})
    return replace(
        first, tensors=tensors, rows=_joined(row for part in parts for row in part.rows), estimator="+".join(estimators)
    )


def average_fisher(parts: Sequence[Fisher]) -> Fisher:
    """The Fisher information over several sets of examples, such as those of single classes, computed apart.

    Args:
        parts: one or more, of the same weights, parameters, draws, plan and reduction; seeds may differ. Any order.

    Returns:
        Their average, each weighted with its number of examples. The order of the parts does not change a bit. Its
        `replay` names all their sets, rows and seeds, its `rows` count through them in the order of their names, and
        its `seed` is that of the first.

    Raises:
        InputError: there is no part.
        FisherError: the parts do not go together, or two are of the same set and share rows.
    """
    if not parts:
        raise InputError("there is no part of a Fisher information to average")
    parts = sorted(parts, key=lambda part: (part.replay, part.seed, part.rows))
    for name in ("weights", "draws", "plan", "reduction", "precision"):
        values = sorted({str(getattr(part, name)) for part in parts})
        if len(values) > 1:
            raise FisherError(f"parts of different {name}: {', '.join(values)}")
    for replay in {part.replay for part in parts}:
        _joined(row for part in parts if part.replay == replay for row in part.rows)
    named = json.dumps([[part.replay, part.seed, part.rows] for part in parts])
    set_of_all, start, rest = hashlib.sha256(named.encode()).hexdigest(), 0, []
    for part in parts:
        rows = ((start, start + part.examples),)
        rest.append(replace(part, rows=rows, replay=set_of_all, seed=parts[0].seed))
        start += part.examples
    return merge_fisher(rest)


def check_weights(found: object, wanted: str) -> None:
    """Refuse what is of another model; both are `tensor_digest` of a state dict.

    Raises:
        FisherError: they differ.
    """
    if found != wanted:
        raise FisherError(
            f"the Fisher information is of weights {str(found)[:12]}, the model has {wanted[:12]}: compute it for this "
            "checkpoint"
        )


def normalise_fisher(
    fisher: Fisher, names: Iterable[str] | None = None, *, floor: float = FLOOR, clip: float = CLIP
) -> dict[str, Tensor]:
    """F in units of its own mean, within bounds: what a dimensionless strength of the penalty multiplies.

    The scale of F follows from the loss's reduction and the number of draws (subsampled timesteps inflate it); its
    mean over the trained entries takes all of that out. Few entries hold most of the mass, and many are zero.

    Args:
        fisher: not modified.
        names: the trained parameters, which the mean is over; all of `fisher` by default.
        floor: lowest value, in [0, 1): weights that no example asks for are not free to drift either.
        clip: highest value, above 1: an entry far above the mean makes an explicit step unstable.

    Returns:
        By name: F / mean(F), then clamped to [floor, clip]. The mean is 1 before the clamp.

    Raises:
        ParameterError: floor or clip is out of range.
        FisherError: a name is missing, or no entry is above zero.
    """
    if not 0 <= floor < 1:
        raise ParameterError("floor", f"lies in [0, 1), not at {floor:g}")
    if not clip > 1:
        raise ParameterError("clip", f"lies above 1, not at {clip:g}")
    wanted = list(fisher.tensors) if names is None else list(names)
    missing = [name for name in wanted if name not in fisher.tensors]
    if missing:
        raise FisherError(f"the Fisher information has no {missing[0]!r}; compute it for this scope")
    mass = sum(float(fisher.tensors[name].sum(dtype=torch.float64)) for name in wanted)
    if not mass > 0:
        raise FisherError("no entry of the Fisher information is above zero: the loss does not depend on the weights")
    mean = mass / sum(fisher.tensors[name].numel() for name in wanted)
    return {name: (fisher.tensors[name].float() / mean).clamp_(floor, clip) for name in wanted}


def _joined(rows: Iterable[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    """Ranges in order, neighbours made one; refuses those that overlap."""
    joined: list[tuple[int, int]] = []
    for start, stop in sorted(rows):
        if joined and start < joined[-1][1]:
            raise FisherError(f"rows {start} to {min(stop, joined[-1][1]) - 1} are in more than one part")
        if joined and start == joined[-1][1]:
            joined[-1] = (joined[-1][0], stop)
        else:
            joined.append((start, stop))
    return tuple(joined)
