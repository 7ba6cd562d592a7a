"""One run of Selective Amnesia: the copy that it changes, its optimiser, the penalty, the way back from a bad step."""

import copy
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from models.checkpoints import tensor_digest
from models.conditional import ConditionalModel, GuidedConditional, StratifiedConditional
from unlearning.amnesia_parameters import AmnesiaParameters
from unlearning.errors import DivergedError, FisherError, InputError
from unlearning.fisher_result import Fisher, check_weights, normalise_fisher
from unlearning.optimiser import adam, pack, unpack
from unlearning.passes import autocast
from unlearning.processes import Processes
from unlearning.randomness import stream
from unlearning.surrogates import Examples, Surrogate
from unlearning.working_copy import working_copy

__all__ = ["AmnesiaRun"]

MOST_ROLLBACKS = 5
"""Times that a run goes back to its last good weights and halves its learning rate, before it is given up."""
REFERENCE_ROWS = 512
"""Most replay examples that the loss at the start is taken over."""


class AmnesiaRun:
    """The copy, its optimiser and the penalty; `forget_conditions` owns the loop and the state."""

    def __init__(
        self,
        model: ConditionalModel,
        conditions: Tensor,
        surrogate: Surrogate,
        replay: Examples,
        fisher: Fisher,
        values: AmnesiaParameters,
        seed: int,
        micro_batch: int,
        device: torch.device,
        processes: Processes,
    ) -> None:
        check_weights(fisher.weights, tensor_digest(cast(nn.Module, model).state_dict()))
        base = dict(cast(nn.Module, model).named_parameters())
        odd = sorted(name for name in fisher.tensors if name not in base)
        if odd or not fisher.tensors:
            raise FisherError(f"the Fisher information is of other parameters: {', '.join(odd[:3]) or 'of none'}")
        self.model = working_copy(cast(nn.Module, model), fisher.tensors.keys(), device)
        self._conditions, self._surrogate, self._replay = conditions, surrogate, replay
        self._values, self._seed, self._micro_batch, self._processes = values, seed, micro_batch, processes
        own = dict(self.model.named_parameters())
        self._parameters = {name: own[name] for name in fisher.tensors}
        self._device = next(iter(self._parameters.values())).device
        # theta*: the base's own tensors where they are here, since nothing large is held twice.
        self._start = [base[name].detach().to(self._device) for name in self._parameters]
        self._teacher = self._beside(model) if isinstance(model, GuidedConditional) else None
        self._fisher = fisher
        if values.mode == "default":
            self._scale, self._information = self._loss_at_start(), self._relative_to_start()
        else:
            self._scale, self._information = 1.0, self._in_order(fisher.tensors)
        self._strength = cast(float, values.strength) * (
            1.0 if values.mode == "default" else _of_all_terms(model, fisher)
        )
        rate = cast(float, values.learning_rate)
        self._optimiser = adam(self._parameters.values(), learning_rate=rate, name=values.optimiser)
        self.rollbacks = 0
        self._keeps_next = False
        self._good = {f"weight.{name}": at for name, at in zip(self._parameters, self._start, strict=True)}

    def step(self, step: int) -> dict[str, float]:
        """One Adam step on eq. 4; one that is not finite goes back to the last good weights, at half the rate."""
        values, generator = self._values, stream(self._seed, "step", step)
        self._optimiser.zero_grad(set_to_none=True)
        losses = {}
        rows = torch.randint(len(self._conditions), (values.batch,), generator=generator)
        x = self._surrogate(values.batch, generator)
        losses["surrogate"] = self._backward(x, self._conditions[rows], 1.0, generator)
        if "replay" not in values.without and values.replay_weight:
            x, condition = self._replay.drawn(values.replay_batch, generator)
            condition = self._some_dropped(condition, generator)
            teacher = self._teacher if values.replay_target == "teacher" else None
            losses["replay"] = self._backward(x, condition, values.replay_weight, generator, teacher)
        self._join_gradients()
        losses["penalty"] = self._pull_back()
        norm = torch.nn.utils.clip_grad_norm_(list(self._parameters.values()), cast(float, values.clip))
        if not bool(torch.isfinite(norm)) or not all(map(_is_finite, losses.values())):
            self._roll_back(step)
            return {}
        if self._keeps_next:
            self._keep()  # only now it is known that these weights give finite losses
        for group in self._optimiser.param_groups:
            group["lr"] = cast(float, values.learning_rate) * 0.5**self.rollbacks
        self._optimiser.step()
        return losses

    def keep_next(self) -> None:
        """A step that is not finite shall lead back to these weights, once a step has shown that they are good."""
        self._keeps_next = True

    def drift(self) -> float:
        """See `AmnesiaResult.drift`; the run is over."""
        self._optimiser.zero_grad(set_to_none=True)  # the memory for what follows
        relative = self._information if self._values.mode == "default" else self._relative_to_start()
        parts = [
            (weight * (now.detach() - start).square()).sum()
            for weight, now, start in zip(relative, self._parameters.values(), self._start, strict=True)
        ]
        return float(torch.stack(parts).sum())

    def tensors(self) -> dict[str, Tensor]:
        """Weights and Adam's moments."""
        return pack(self._parameters, self._optimiser)

    def facts(self) -> dict[str, Any]:
        """What else a step depends on."""
        return {"rollbacks": self.rollbacks}

    def restore(self, tensors: dict[str, Tensor], meta: Mapping[str, Any]) -> None:
        """The reverse of `tensors` and `facts`."""
        unpack(tensors, self._parameters, self._optimiser)
        self.rollbacks = int(meta["rollbacks"])
        self._keep()

    def _beside(self, model: GuidedConditional) -> GuidedConditional:
        """The base on the device of the run: itself, where it is there."""
        here = next(cast(nn.Module, model).parameters()).device == self._device
        return model if here else cast(GuidedConditional, copy.deepcopy(cast(nn.Module, model)).to(self._device))

    def _keep(self) -> None:
        """In the host's memory: an accelerator's has more to hold."""
        packed = pack(self._parameters, self._optimiser)
        self._good = {name: value.detach().to("cpu", copy=True) for name, value in packed.items()}
        self._keeps_next = False

    def _backward(
        self,
        x: Tensor,
        condition: Tensor,
        weight: float,
        generator: torch.Generator,
        teacher: GuidedConditional | None = None,
    ) -> float:
        """Accumulate the gradient of a term's mean loss; returns the mean, in the loss's own units."""
        draws = cast(ConditionalModel, self.model).draw(len(x), generator=generator)
        share = weight / self._scale / (len(x) if self._values.reduction == "mean" else 1)
        total = 0.0
        for rows in self._parts(len(x)):
            part = self._losses(x[rows], condition[rows], tuple(draw[rows] for draw in draws), teacher).sum()
            torch.autograd.backward(part * share)
            total += float(part.detach())
        return self._processes.total(total) / len(x)

    def _parts(self, n: int) -> list[slice]:
        """This process's share of n rows, in micro-batches."""
        own = self._processes.share(n)
        return [slice(one, min(one + self._micro_batch, own.stop)) for one in own[:: self._micro_batch]]

    def _join_gradients(self) -> None:
        """Add them up over all processes, each of which has those of its rows."""
        for parameter in self._parameters.values():
            if parameter.grad is None:  # no row of this process, or no loss at all, depends on it
                parameter.grad = torch.zeros_like(parameter)
        self._processes.add_up(cast(Tensor, parameter.grad) for parameter in self._parameters.values())

    def _losses(
        self, x: Tensor, condition: Tensor, draws: tuple[Tensor, ...], teacher: GuidedConditional | None = None
    ) -> Tensor:
        device = self._device
        x, condition, draws = x.to(device), condition.to(device), tuple(draw.to(device) for draw in draws)
        with autocast(device):
            if teacher is None:
                return cast(ConditionalModel, self.model).losses(x, condition, draws).float()
            return cast(GuidedConditional, self.model).imitation(teacher, x, condition, draws).float()

    @torch.no_grad()
    def _pull_back(self) -> float:
        """Add the penalty's gradient in place, without a graph; returns the penalty."""
        if "penalty" in self._values.without or not self._strength:
            return 0.0
        total = torch.zeros((), device=self._device)
        for parameter, start, information in zip(
            self._parameters.values(), self._start, self._information, strict=True
        ):
            gap = parameter - start
            pull = information * gap  # one parameter at a time: all at once would hold the weights twice more
            total += (pull * gap).sum()
            cast(Tensor, parameter.grad).add_(pull, alpha=self._strength)
        return float(0.5 * self._strength * total)

    def _roll_back(self, step: int) -> None:
        if self.rollbacks == MOST_ROLLBACKS:
            raise DivergedError(
                f"steps up to {step} were not finite, {MOST_ROLLBACKS + 1} times, at a learning rate that was halved "
                "each time; lower the learning rate"
            )
        self.rollbacks += 1
        self._keeps_next = False
        self._optimiser.state.clear()  # the moments too; at the start there are none to go back to
        unpack(self._good, self._parameters, self._optimiser)

    def _in_order(self, tensors: Mapping[str, Tensor]) -> list[Tensor]:
        return [tensors[name].to(self._device, torch.float32) for name in self._parameters]

    def _some_dropped(self, condition: Tensor, generator: torch.Generator) -> Tensor:
        """Without their condition, a share of them: what the model makes without one is replayed too."""
        share = cast(float, self._values.null_share)
        if not share or not isinstance(self.model, GuidedConditional):
            return condition
        dropped = torch.rand(len(condition), generator=generator) < share
        condition = condition.clone()
        condition[dropped] = self.model.null_condition.to(condition)
        return condition

    def _relative_to_start(self) -> list[Tensor]:
        """Weights of the relative drift: F between floor and ceiling, divided by sum F theta*^2."""
        bounded = normalise_fisher(self._fisher, floor=self._values.floor, clip=self._values.ceiling)
        information = self._in_order(bounded)
        sizes = [(each * at.square()).sum() for each, at in zip(information, self._start, strict=True)]
        torch._foreach_div_(information, float(torch.stack(sizes).sum(dtype=torch.float64)))
        return information

    @torch.no_grad()
    def _loss_at_start(self) -> float:
        """The mean loss of replay examples under theta*."""
        generator = stream(self._seed, "reference")
        x, condition = self._replay.drawn(min(REFERENCE_ROWS, len(self._replay)), generator)
        draws = cast(ConditionalModel, self.model).draw(len(x), generator=generator)
        parts = [
            float(self._losses(x[rows], condition[rows], tuple(draw[rows] for draw in draws)).sum())
            for rows in self._parts(len(x))
        ]
        found = self._processes.total(sum(parts)) / len(x)
        if not _is_finite(found):
            raise InputError("the model's loss of its own samples is not finite; use an earlier checkpoint")
        return max(abs(found), 1e-12)


def _of_all_terms(model: ConditionalModel, fisher: Fisher) -> float:
    """What turns F over some of the loss's terms into F over all, as published: their ratio, squared."""
    terms = model.terms if isinstance(model, StratifiedConditional) else fisher.draws
    return (terms / fisher.draws) ** 2


def _is_finite(value: float) -> bool:
    return abs(value) < float("inf")
