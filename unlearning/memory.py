"""How much memory a run will take, before it starts: what it holds by the weights, what a pass takes by measuring one.

What is held follows from the number of trained weights. What a pass of n rows takes beside that is measured at one row
and at two, and taken for a line through both. `plan_memory` says how many rows fit, and whether their activations have
to be computed twice.
"""

import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from models.conditional import ConditionalModel, Draws
from unlearning.errors import NotEnoughMemoryError
from unlearning.optimiser import MOMENT_BYTES
from unlearning.passes import autocast, held, recomputable, recomputing

__all__ = [
    "Estimate",
    "LiveBytes",
    "MemoryPlan",
    "Pass",
    "amnesia_bytes",
    "estimate",
    "fisher_bytes",
    "host_bytes",
    "pass_of",
    "plan_memory",
]

SMALL = 4096
"""Entries below which bitsandbytes keeps the moments of a tensor in float32."""
TEMPORARIES = 3
"""Tensors of the largest parameter's size that the penalty makes on its way."""


@dataclass(frozen=True)
class Pass:
    """What a forward and backward pass takes beside weights and gradients, in bytes: fixed + row n for n rows."""

    fixed: int
    row: int

    def of(self, rows: int) -> int:
        """So many rows."""
        return self.fixed + self.row * rows

    def rows_within(self, available: int) -> int:
        """Most rows that take no more than this; they may be as many as one likes where a row takes nothing."""
        left = available - self.fixed
        return left // max(1, self.row) if left >= 0 else 0


@dataclass(frozen=True)
class Estimate:
    """What a run takes beside the model that it starts from, in bytes."""

    held: Mapping[str, int]
    """All along, by what it is."""
    kept: Pass | None
    """Of a pass that keeps its activations; None: one row of it was more than there is."""
    recomputed: Pass | None = None
    """Of a pass that computes them twice; None where the model cannot, or one row of it was more than there is."""

    @property
    def fixed(self) -> int:
        """What is held, together."""
        return sum(self.held.values())

    def needed(self, rows: int, recompute: bool) -> int | None:
        """With so many rows in a pass; None where that is not known."""
        taken = self.recomputed if recompute else self.kept
        return None if taken is None else self.fixed + taken.of(rows)


@dataclass(frozen=True)
class MemoryPlan:
    """How a run passes through its model."""

    micro_batch: int
    recompute: bool
    needed: int
    """Bytes, by the estimate."""


def plan_memory(estimate: Estimate, available: int, *, most_rows: int, recompute: bool = False) -> MemoryPlan:
    """The most rows a pass that fit, with their activations kept wherever one row fits so.

    Args:
        estimate: of the run.
        available: bytes that it may take beside the model that it starts from.
        most_rows: never more than these, 1 or more.
        recompute: compute activations twice in any case, where the model can.

    Raises:
        NotEnoughMemoryError: not even one row fits.
    """
    kept = [] if recompute and estimate.recomputed is not None else [(estimate.kept, False)]
    for taken, again in [*kept, (estimate.recomputed, True)]:
        rows = 0 if taken is None else min(most_rows, taken.rows_within(available - estimate.fixed))
        if taken is not None and rows >= 1:
            return MemoryPlan(rows, again, estimate.fixed + taken.of(rows))
    known = [need for again in (False, True) if (need := estimate.needed(1, again)) is not None]
    raise NotEnoughMemoryError(min(known) if known else None, available, estimate.fixed)


def amnesia_bytes(parameters: Sequence[nn.Parameter], optimiser: str, device: torch.device) -> dict[str, int]:
    """What a run of Selective Amnesia holds beside the model that it starts from, which is theta* as it stands.

    Args:
        parameters: those that are trained, on the run's device.
        optimiser: "adam" or "adam-8bit".
        device: of the run; on the CPU, what is kept to go back to and the state that is written take the same memory.
    """
    weights = sum(one.nbytes for one in parameters)
    found = {
        "copy": weights,
        "gradients": weights,
        "moments": _moments(parameters, optimiser),
        "fisher": weights,
        "temporaries": TEMPORARIES * max((one.nbytes for one in parameters), default=0),
    }
    return found | (host_bytes(parameters, optimiser) if device.type == "cpu" else {})


def host_bytes(parameters: Sequence[nn.Parameter], optimiser: str) -> dict[str, int]:
    """What such a run holds in the host's memory, wherever it runs: weights and moments to go back to, and a state."""
    kept = sum(one.nbytes for one in parameters) + _moments(parameters, optimiser)
    return {"rollback": kept, "state": kept}


def _moments(parameters: Sequence[nn.Parameter], optimiser: str) -> int:
    each, small = MOMENT_BYTES[optimiser], MOMENT_BYTES["adam"]
    return sum(round(one.numel() * (each if one.numel() >= SMALL else small)) for one in parameters)


def fisher_bytes(parameters: Iterable[nn.Parameter], device: torch.device) -> dict[str, int]:
    """What the computation of a Fisher information holds beside the model."""
    weights = sum(one.nbytes for one in parameters)
    return {"gradients": weights, "squares": weights} | ({"result": weights} if device.type == "cpu" else {})


def estimate(
    model: ConditionalModel,
    names: Sequence[str],
    holds: Mapping[str, int],
    x: Tensor,
    condition: Tensor,
    draws: Draws,
    *,
    bfloat16: bool = True,
    recomputed: bool = True,
) -> Estimate:
    """Measure passes, and put them together with what is held.

    Args:
        model: the one that the run starts from, on the run's device; left as it was.
        names: the trained parameters.
        holds: bytes by what they are, such as `amnesia_bytes`.
        x: two examples as the model's losses take them, any device.
        condition: of each.
        draws: of each.
        bfloat16: whether the run's passes are under autocast, where the device has it.
        recomputed: whether passes that compute activations twice are measured too, where the model can.
    """
    module = cast(nn.Module, model)
    parameters = dict(module.named_parameters())
    trained = {name: parameters[name] for name in names}

    def measured(recompute: bool) -> Pass | None:
        try:
            with held(module, trained), recomputing(module, recompute):
                return pass_of(model, trained, x, condition, draws, bfloat16=bfloat16)
        except torch.OutOfMemoryError:
            return None

    return Estimate(dict(holds), measured(False), measured(True) if recomputed and recomputable(module) else None)


def pass_of(
    model: ConditionalModel,
    trained: Mapping[str, nn.Parameter],
    x: Tensor,
    condition: Tensor,
    draws: Draws,
    *,
    bfloat16: bool = True,
) -> Pass:
    """Measure a pass of one row and one of two, with gradients in place as they are in a run from its second pass on.

    On CUDA what was allocated at most; elsewhere what tensors hold at most, without what a kernel has for itself.

    Args:
        model: as it is passed through; the parameters below require gradients.
        trained: get their gradients.
        x: (2, ...).
        condition: (2, ...).
        draws: of two rows.
        bfloat16: see `estimate`.

    Raises:
        torch.OutOfMemoryError: one row was too much.
    """
    device = next(iter(trained.values())).device
    for parameter in trained.values():
        parameter.grad = torch.zeros_like(parameter)
    x, condition, draws = x.to(device), condition.to(device), tuple(one.to(device) for one in draws)

    def work(rows: int) -> None:
        with autocast(device, bfloat16):
            losses = model.losses(x[:rows], condition[:rows], tuple(one[:rows] for one in draws))
        torch.autograd.backward(losses.float().sum())

    try:
        one = _peak(work, 1, device)
        try:
            two = _peak(work, 2, device)
        except torch.OutOfMemoryError:
            return Pass(0, one)
    finally:
        for parameter in trained.values():
            parameter.grad = None
    row = min(one, max(two - one, 1))
    return Pass(one - row, row)


def _peak(work: Callable[[int], None], rows: int, device: torch.device) -> int:
    """Bytes at most beyond those before."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work(rows)
        torch.cuda.synchronize(device)
        return int(torch.cuda.max_memory_allocated(device)) - before
    live = LiveBytes()
    with live:
        work(rows)
    return live.most


class LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch leaves it without types
    """Counts the bytes of tensors that are made inside, backward passes included, from their making to their end.

    Tensors that were there before do not count, nor does what a kernel allocates for itself. Any device, also "meta",
    where nothing is computed.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch leaves it without types
        self.most = 0
        """At any time so far."""
        self._now = 0
        self._known: dict[int, weakref.finalize[Any, Any]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:  # what torch asks for
        """Run an operation; storages that only its results have are new."""
        given = {_key(one) for one in tree_leaves((args, kwargs)) if isinstance(one, Tensor)}
        found = func(*args, **(kwargs or {}))
        for one in tree_leaves(found):
            if isinstance(one, Tensor) and _key(one) not in given | self._known.keys():
                self._count(one)
        return found

    def _count(self, one: Tensor) -> None:
        storage, key = one.untyped_storage(), _key(one)
        size = storage.nbytes()
        self._now += size
        self.most = max(self.most, self._now)
        self._known[key] = weakref.finalize(storage, self._gone, key, size)
        self._known[key].atexit = False

    def _gone(self, key: int, size: int) -> None:
        self._known.pop(key, None)
        self._now -= size


def _key(one: Tensor) -> int:
    """Of the memory behind a tensor, while it lasts."""
    return int(one.untyped_storage()._cdata)
