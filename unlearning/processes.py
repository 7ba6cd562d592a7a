"""Several processes on one run, one a GPU: each passes its share of a batch through its own copy of the model.

All processes are called with equal arguments and draw the same random numbers, so that they agree on every batch; what
they exchange are sums of gradients and of losses, and what the first of them alone is asked. The result is that of one
process up to rounding. Start them with ``accelerate launch`` or torchrun; a process that is alone exchanges nothing.
"""

import importlib
import json
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any, Self

import torch
import torch.distributed as dist
from torch import Tensor

from models.conditional import ConditionalModel
from unlearning.errors import InputError, ProcessError
from unlearning.fisher import fisher_information
from unlearning.fisher_result import Fisher
from unlearning.progress import Interrupted

__all__ = ["ALONE", "Processes", "shared_fisher"]

LONGEST_WAIT = timedelta(days=7)
"""For what the first process is asked: it may draw and judge samples for hours meanwhile."""


@dataclass(frozen=True)
class Processes:
    """The processes of a run, seen from one of them."""

    rank: int = 0
    """Of this process, from 0."""
    count: int = 1
    device: torch.device = torch.device("cpu")  # noqa: RUF009 - immutable
    """Where this process passes through its model, and exchanges tensors."""

    @classmethod
    def launched(cls, *, cpu: bool = False, meeting: Path | None = None) -> Self:
        """The processes that accelerate finds itself among, by the environment that its launcher or torchrun set.

        Args:
            cpu: on CPUs, over gloo, even where there are GPUs.
            meeting: a file that does not exist yet, the same for all, by which they find each other on one machine; by
                default they do at the address that the environment names.
        """
        accelerate = importlib.import_module("accelerate")  # takes seconds, which who is alone need not wait for
        found = (
            {}
            if meeting is None
            else {
                "init_method": f"file://{meeting}",
                "rank": int(os.environ["RANK"]),
                "world_size": int(os.environ["WORLD_SIZE"]),
            }
        )
        state = accelerate.PartialState(cpu=cpu, timeout=LONGEST_WAIT, **found)
        return cls(state.process_index, state.num_processes, state.device)

    def part(self) -> None:
        """Wait for the others, then let go of them: who leaves without may take down those that still listen."""
        if self.count > 1:
            dist.barrier()
            dist.destroy_process_group()
            importlib.import_module("accelerate").PartialState._reset_state()  # else it is launched for good

    @property
    def main(self) -> bool:
        """Whether this is the one that judges, reports and writes."""
        return self.rank == 0

    def share(self, n: int) -> range:
        """This process's part of n rows: consecutive, and of all processes together each row once."""
        return range(self.rank * n // self.count, (self.rank + 1) * n // self.count)

    def add_up(self, tensors: Iterable[Tensor]) -> None:
        """Replace each tensor by its sum over all processes, in place; it lies on the processes' device."""
        if self.count > 1:
            for one in tensors:
                dist.all_reduce(one)

    def total(self, value: float) -> float:
        """The sum of a number over all processes."""
        if self.count == 1:
            return value
        held = torch.tensor(value, dtype=torch.float64, device=self.device)
        dist.all_reduce(held)
        return float(held)

    def ask(self, question: Callable[[], Any]) -> Any:
        """What the first process answers, told to all; JSON values.

        Raises:
            Interrupted: the question raised it.
            ProcessError: in the others, where the question failed; the first raises what the question raised.
        """
        if self.count == 1:
            return question()
        failure: Exception | None = None
        told: dict[str, Any] = {}
        if self.main:
            try:
                told = {"answer": question()}
            except Exception as error:  # whatever it is, the others must not wait for an answer for ever
                failure, told = error, {"failed": type(error).__name__, "stop": isinstance(error, Interrupted)}
        told = self._told(told)
        if failure is not None:
            raise failure
        if "failed" in told:
            raise Interrupted if told["stop"] else ProcessError(f"the first process met a {told['failed']}")
        return told["answer"]

    def agree(self, what: str, value: str) -> None:
        """Make sure that all processes have been given the same.

        Raises:
            ProcessError: in each process that has something else than the first, and in the first.
        """
        odd = self.total(float(value != self.ask(lambda: value)))
        if odd:
            raise ProcessError(
                f"{odd:.0f} of {self.count} processes have another {what}; call all with equal arguments"
            )

    def _told(self, value: dict[str, Any]) -> dict[str, Any]:
        """The first process's value, as JSON in a tensor: nothing is unpickled."""
        data = json.dumps(value).encode()
        size = torch.tensor(len(data), device=self.device)
        dist.broadcast(size, src=0)
        sent = torch.zeros(int(size), dtype=torch.uint8, device=self.device)
        if self.main:
            sent.copy_(torch.frombuffer(bytearray(data), dtype=torch.uint8))
        dist.broadcast(sent, src=0)
        return dict(json.loads(bytes(sent.cpu().tolist())))


ALONE = Processes()
"""One process."""


def shared_fisher(
    model: ConditionalModel, x: Tensor, condition: Tensor, *, processes: Processes, **arguments: Any
) -> Fisher:
    """`unlearning.fisher_information`, each process over its share of the examples; all get the whole.

    Equals `merge_fisher` of the shares up to rounding. States and progress are each process's own.

    Args:
        model: on the process's device.
        x: all examples, in every process.
        condition: of each.
        processes: at most as many as there are examples.
        arguments: further ones of `fisher_information`, but for `rows`.

    Raises:
        InputError: there are fewer examples than processes; or as `fisher_information` says.
    """
    if len(x) < processes.count:
        raise InputError(f"{len(x)} examples cannot be shared among {processes.count} processes")
    part = fisher_information(model, x, condition, rows=processes.share(len(x)), **arguments)
    tensors = {}
    for name, value in part.tensors.items():
        weighted = (value * (part.examples / len(x))).to(processes.device)
        processes.add_up([weighted])
        tensors[name] = weighted.cpu()
    return replace(part, tensors=tensors, rows=((0, len(x)),))
