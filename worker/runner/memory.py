"""Before a run starts: how many rows may pass at once, and whether it fits into this worker's memory at all.

A run that dies of memory after an hour has wasted it. So the model is passed through once before, with one row and with
two, and what that takes is put beside what there is. Who still runs out of memory is tried again with smaller passes.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import cast

import torch
from torch import nn

from unlearning import AmnesiaParameters, Examples, NotEnoughMemoryError, ParameterError
from unlearning.memory import Estimate, MemoryPlan, amnesia_bytes, estimate, fisher_bytes, host_bytes, plan_memory
from unlearning.optimiser import check_optimiser
from worker.runner.conditional_base import ConditionalBase
from worker.runner.fisher_precision import in_bfloat16
from worker.runner.problems import UserError

__all__ = ["available_bytes", "fit_fisher", "fit_training", "host_available", "planned"]

USED_OF_HOST = 0.9
"""Share of the host's free memory that a run may take: others live there too."""
KEPT_OF_DEVICE = 0.04
"""Share of an accelerator's memory that is left free, for what libraries take and for what lies between pieces."""
TITLE = "The job does not fit into the worker's memory"
GROUPS = Path("/sys/fs/cgroup")

Available = Callable[[torch.device], int | None]
"""Bytes that a run may take on a device beside what this process holds; None where nobody says."""


def fit_training(
    base: ConditionalBase,
    trained: Sequence[str],
    parameters: AmnesiaParameters,
    examples: Examples,
    available: Available | None = None,
    *,
    processes: int = 1,
) -> MemoryPlan:
    """How Selective Amnesia shall pass through the base's copy.

    Args:
        base: on its device.
        trained: names of the trained parameters.
        parameters: of the method.
        examples: of replay; a few of them pass through the model.
        available: tells what there is; by default `available_bytes`.
        processes: that train. Each holds as much; they share the host's memory, and each has a device of its own.

    Raises:
        UserError: it does not fit, or its optimiser does not run here.
    """
    own = dict(cast(nn.Module, base.model).named_parameters())
    these = [own[name] for name in trained]
    try:
        check_optimiser(parameters.optimiser, base.device)
    except ParameterError as error:
        title = "A parameter of the method is wrong"
        raise UserError("invalid-parameter", title, str(error), pointer=f"/parameters/{error.name}") from error
    beside = processes * sum(host_bytes(these, parameters.optimiser).values())
    host = host_available()
    if base.device.type == "cuda" and host is not None and beside > host:
        raise _refused("Going back to earlier weights", beside, host, "of the host's memory", [])
    holds = amnesia_bytes(these, parameters.optimiser, base.device)
    hints = []
    scopes = base.model.scopes()
    if narrower := sorted(name for name, names in scopes.items() if len(names) < len(trained)):
        hints.append(f"a narrower parameters.scope ({', '.join(narrower)})")
    if parameters.optimiser == "adam":
        small = sum(amnesia_bytes(these, "adam-8bit", base.device).values())
        hints.append(f'parameters.optimiser "adam-8bit", which takes {_gib(sum(holds.values()) - small)} less')
    most = max(parameters.batch, parameters.replay_batch)
    measure = partial(estimate, base.model, trained, holds, *_two(base, examples))
    what = f"Training {sum(one.numel() for one in these):,} weights"
    return _fitted(base, measure, what, most, hints, _shared(available or available_bytes, base, processes))


def fit_fisher(
    base: ConditionalBase, names: Sequence[str], examples: Examples, available: Available | None = None
) -> MemoryPlan:
    """How the Fisher information of the base shall be computed.

    Raises:
        UserError: it does not fit.
    """
    own = dict(cast(nn.Module, base.model).named_parameters())
    holds = fisher_bytes([own[name] for name in names], base.device)
    measure = partial(estimate, base.model, names, holds, *_two(base, examples), bfloat16=in_bfloat16(base))
    return _fitted(base, measure, "The Fisher information", base.micro_batch * base.divisor, [], available)


def planned(found: Estimate, available: int, *, most_rows: int, divisor: int, recompute: bool) -> MemoryPlan:
    """What fits, or a part of that where an attempt ran out of memory with it.

    Args:
        found: of the run.
        available: bytes.
        most_rows: of a pass, where nothing went wrong yet.
        divisor: how many times fewer rows than at first; where that is less than one, activations are computed twice.
        recompute: have them computed twice in any case.

    Raises:
        NotEnoughMemoryError: not even one row fits.
    """
    plan = plan_memory(found, available, most_rows=most_rows, recompute=recompute)
    if plan.micro_batch < divisor and not plan.recompute and found.recomputed is not None:
        return plan_memory(found, available, most_rows=1, recompute=True)
    rows = max(1, plan.micro_batch // divisor)
    return MemoryPlan(rows, plan.recompute, cast(int, found.needed(rows, plan.recompute)))


def available_bytes(device: torch.device) -> int | None:
    """What a run may take beside what this process holds; None where the machine does not say."""
    if device.type != "cuda":
        return host_available()
    free, total = torch.cuda.mem_get_info(device)
    own = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return max(0, free + own - int(KEPT_OF_DEVICE * total))


def host_available(groups: Path = GROUPS, proc: Path = Path("/proc")) -> int | None:
    """Of the host's memory, or of what our control group leaves of it; None where neither says (macOS)."""
    known = [_meminfo(proc / "meminfo"), *(_room(group) for group in _own_groups(groups, proc))]
    rooms = [one for one in known if one is not None]
    return int(USED_OF_HOST * min(rooms)) if rooms else None


def _shared(ask: Available, base: ConditionalBase, processes: int) -> Available:
    """What each of several processes may take: on the CPU its share of what further copies of the model leave."""
    copies = (processes - 1) * sum(one.nbytes for one in cast(nn.Module, base.model).parameters())

    def share(device: torch.device) -> int | None:
        found = ask(device)
        return found if found is None or device.type == "cuda" else max(0, found - copies) // processes

    return share


def _fitted(
    base: ConditionalBase,
    measure: Callable[..., Estimate],
    what: str,
    most: int,
    hints: list[str],
    ask: Available | None,
) -> MemoryPlan:
    available = (ask or available_bytes)(base.device)
    ceiling = min(most, base.micro_batch * base.divisor)
    if available is None:
        return MemoryPlan(max(1, ceiling // base.divisor), base.recompute, 0)
    try:
        plan = _planned(base, measure, available, ceiling)
    except NotEnoughMemoryError as error:
        where = f"are left of the {'GPU' if base.device.type == 'cuda' else 'machine'}'s memory"
        raise _refused(what, error.needed or error.held, available, where, hints) from error
    recomputed = ", activations computed twice" if plan.recompute else ""
    sys.stderr.write(f"memory: {plan.micro_batch} rows a pass{recomputed}, {_gib(plan.needed)} of {_gib(available)}\n")
    return plan


def _planned(base: ConditionalBase, measure: Callable[..., Estimate], available: int, most_rows: int) -> MemoryPlan:
    """See `planned`. Passes that compute activations twice are measured once they are called for."""
    divisor, recompute = base.divisor, base.recompute
    if not recompute and divisor == 1:
        with suppress(NotEnoughMemoryError):
            return planned(measure(recomputed=False), available, most_rows=most_rows, divisor=1, recompute=False)
    return planned(measure(), available, most_rows=most_rows, divisor=divisor, recompute=recompute)


def _refused(what: str, needed: int, available: int, where: str, hints: Sequence[str]) -> UserError:
    ways = ", ".join([*hints, "or " * bool(hints) + "a worker with more memory"])
    return UserError(
        "out-of-memory",
        TITLE,
        f"{what} takes at least {_gib(needed)} beside the model, with one row in a pass and all that can be computed "
        f"twice; {_gib(available)} {where}. What helps: {ways}.",
        needed_bytes=needed,
        available_bytes=available,
    )


def _two(base: ConditionalBase, examples: Examples) -> tuple[torch.Tensor, torch.Tensor, tuple[torch.Tensor, ...]]:
    rows = torch.tensor([0, len(examples) - 1])
    draws = base.model.draw(2, generator=torch.Generator().manual_seed(0))
    return examples.x[rows], examples.condition[rows], draws


def _gib(count: int) -> str:
    return f"{count / 2**30:.2f} GiB"


def _meminfo(path: Path) -> int | None:
    for name, _, value in (line.partition(":") for line in _lines(path)):
        if name == "MemAvailable":
            return int(value.split()[0]) * 1024
    return None


def _own_groups(groups: Path, proc: Path) -> list[Path]:
    """This process's control group (version 2) and those around it, each of which may have a limit."""
    for line in _lines(proc / "self" / "cgroup"):
        if line.startswith("0::/"):
            own = groups / line[4:]
            return [own, *(one for one in own.parents if one.is_relative_to(groups))]
    return []


def _room(group: Path) -> int | None:
    """What a control group may still take; pages of files that nobody uses are given back when asked for."""
    limit, used = (next(iter(_lines(group / f"memory.{name}")), "") for name in ("max", "current"))
    if not (limit.isdigit() and used.isdigit()):
        return None
    spare = (line.split()[1] for line in _lines(group / "memory.stat") if line.startswith("inactive_file "))
    return max(0, int(limit) - int(used) + int(next(spare, "0")))


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except OSError:
        return []
