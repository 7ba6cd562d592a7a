"""Flow taming: make given images unlikely under a flow and leave the rest as it was (Malnick et al., WACV 2024).

`tame` is the one entry: it cleans the sets, runs one of two engines step by step, and lets only a confirmation on fresh
noise decide that the criterion is met. The engines stand in `unlearning.taming_fast` and `unlearning.taming_paper`.
"""

import copy
import hashlib
import json
import time
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from models.checkpoints import tensor_digest
from models.protocol import Density
from models.training import set_memory_format
from unlearning.errors import InputError, StateError
from unlearning.likelihood import Statistics, nll_of, statistics
from unlearning.near_duplicates import near_duplicates
from unlearning.progress import Callback, Step
from unlearning.randomness import stream
from unlearning.state import State
from unlearning.taming_fast import FastEngine
from unlearning.taming_paper import PaperEngine
from unlearning.taming_parameters import TamingParameters

PHASE = "unlearning"
SAFETY = 0.15
"""In sigma_R: by how much the fast engine clears the criterion before it stops early, for the next judge's noise."""


@dataclass(frozen=True)
class TamingResult:
    """A tamed flow and how it came about."""

    flow: nn.Module
    """The tamed copy."""
    met: bool
    """Whether every forget image fulfilled the criterion in the final confirmation on fresh noise."""
    steps: int
    z: list[float]
    """(nll - mu_R) / sigma_R of each forget image in that confirmation, under the tamed flow."""
    mu: float
    """mu_R under the tamed flow, in nats."""
    sigma: float
    """sigma_R under the tamed flow, in nats."""
    history: list[dict[str, float]]
    """Losses and metrics of each step, with its number."""
    removed_near_duplicates: list[int]
    """Positions in the remember set of the images that were left out."""
    seconds: float
    """Wall time, over all attempts of a resumed run."""
    parameters: TamingParameters


class Engine(Protocol):
    """One way to take a step; `tame` owns the loop, the confirmation and the state."""

    def check(self, step: int) -> bool:
        """Whether a confirmation is worth its cost after so many steps."""
        ...

    def step(self, step: int) -> tuple[dict[str, float], dict[str, float]]:
        """Take one optimiser step; returns its losses and metrics."""
        ...

    def tensors(self) -> dict[str, Tensor]:
        """Everything that the next step reads and the seed does not give: weights, moments, running values."""
        ...

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Take the tensors of a saved state."""
        ...

    def rejected(self, shortfall: float) -> None:
        """A confirmation failed: the lowest image missed a safe verdict by so many sigma_R."""
        ...


def tame(
    flow: Density,
    forget: Tensor,
    remember: Tensor,
    parameters: TamingParameters,
    *,
    n_bits: int,
    seed: int,
    state: State | None = None,
    callback: Callback | None = None,
    micro_batch: int = 128,
) -> TamingResult:
    """Tame a copy of a flow until every forget image lies delta sigma_R above mu_R, confirmed on fresh noise.

    Args:
        flow: the base, a module with `log_prob`; it is not modified. Runs on the device it is on.
        forget: D_F, uint8 (n, c, h, w).
        remember: D_R, uint8 (m, c, h, w); near-duplicates of D_F are taken out of it.
        parameters: see `TamingParameters`.
        n_bits: colour depth that images are quantised to.
        seed: of every draw; equal seeds give equal bits on the CPU with the same number of threads.
        state: of an interrupted run with the same arguments; the result is that of a run never interrupted.
        callback: gets a `Step` at every boundary; may call its `snapshot()` and may raise `Interrupted`.
        micro_batch: most images that pass through the flow at once. Bounds memory and is no part of the method: a
            state resumes under any other, though the last bits of the result then differ.

    Returns:
        The tamed copy and the final confirmation; `met` is False where max_steps did not suffice.

    Raises:
        InputError: the sets or the flow cannot be used.
        DivergedError: a loss was not finite.
        StateError: the state belongs to another run.
        Interrupted: as the callback raised it.
    """
    start = time.monotonic()
    values = parameters.resolved()
    base = _checked_flow(flow)
    _check_images(forget, remember)
    removed = near_duplicates(forget, remember, values.near_duplicate_rms)
    dropped = set(removed)
    remember = remember[[row for row in range(len(remember)) if row not in dropped]]
    if len(remember) < 2:
        raise InputError(f"{len(removed)} images of the remember set are the forget images; {len(remember)} are left")

    # Algorithm 1: theta_T <- theta_B, then steps until |d(x)| < epsilon for every x of D_F.
    tamed, base = copy.deepcopy(base).requires_grad_(True), copy.deepcopy(base)
    for module in (tamed, base):
        set_memory_format(module, torch.channels_last)  # convolutions run faster so
    build = FastEngine if values.engine == "fast" else PaperEngine
    engine: Engine = build(base, tamed, forget, remember, values, n_bits=n_bits, seed=seed, micro_batch=micro_batch)
    judge = _Judge(cast(Density, tamed), forget, remember, values, n_bits, seed, micro_batch)
    fingerprint = _fingerprint(base, forget, remember, values, n_bits, seed)
    step, attempts, history, before = 0, 0, list[dict[str, float]](), 0.0
    if state is not None:
        if state.meta.get("fingerprint") != fingerprint:
            raise StateError("the state belongs to a run with another base, other images, parameters or seed")
        engine.restore(state.tensors)
        step, attempts = int(state.meta["step"]), int(state.meta["attempts"])
        history, before = list(state.meta["history"]), float(state.meta["seconds"])
    max_steps = values.max_steps or 1
    while True:
        if engine.check(step) or step >= max_steps:
            confirmation = judge.confirm(attempts)
            attempts += 1
            if confirmation.shortfall <= 0 or step >= max_steps:
                break
            engine.rejected(confirmation.shortfall)
        losses, metrics = engine.step(step)
        step += 1
        history.append({"step": float(step), **losses, **metrics})
        if callback is not None:
            meta = {"fingerprint": fingerprint, "step": step, "attempts": attempts}

            def capture(meta: dict[str, Any] = meta) -> State:
                tensors = {name: value.detach().cpu().clone() for name, value in engine.tensors().items()}
                seconds = before + time.monotonic() - start
                return State(tensors, {**meta, "history": list(history), "seconds": seconds})

            callback(Step(PHASE, step, max_steps, losses, metrics, capture))
    set_memory_format(tamed.eval(), torch.contiguous_format)
    return TamingResult(
        flow=tamed, met=confirmation.met, steps=step, z=confirmation.z, mu=confirmation.tamed.mu,
        sigma=confirmation.tamed.sigma, history=history, removed_near_duplicates=removed,
        seconds=before + time.monotonic() - start, parameters=values,
    )  # fmt: skip


@dataclass(frozen=True)
class _Confirmation:
    met: bool
    shortfall: float
    """In sigma_R: what the worst image lacks of being met by more than another judge's noise could take away."""
    z: list[float]
    tamed: Statistics


class _Judge:
    """The final word: fresh noise that no step has seen, and the statistics of the tamed flow."""

    def __init__(
        self,
        tamed: Density,
        forget: Tensor,
        remember: Tensor,
        values: TamingParameters,
        n_bits: int,
        seed: int,
        micro_batch: int,
    ) -> None:
        self._tamed, self._forget, self._values = tamed, forget, values
        self._n_bits, self._seed, self._micro_batch = n_bits, seed, micro_batch
        count = min(len(remember), values.statistics_images)
        rows = torch.randperm(len(remember), generator=stream(seed, "confirm", "rows"))[:count]
        self._remember = remember[rows]

    def confirm(self, attempt: int) -> _Confirmation:
        """Judge the tamed flow on the noise of this attempt; every attempt has noise of its own."""
        seed, values = self._seed, self._values
        forget = self._nll(self._forget, stream(seed, "confirm", "forget", attempt), values.confirmation_draws)
        tamed = statistics(self._nll(self._remember, stream(seed, "confirm", "remember", attempt)))
        z = [float(value) for value in tamed.z(forget)]
        bound = values.delta * values.tolerance
        if values.engine == "paper":  # eq. 10 is two-sided
            shortfall = max(abs(value - values.delta) for value in z) - bound
            met = shortfall <= 0
        else:
            shortfall = values.delta - bound + SAFETY - min(z)
            met = shortfall <= SAFETY
        return _Confirmation(met, shortfall, z, tamed)

    def _nll(self, images: Tensor, generator: torch.Generator, draws: int = 1) -> Tensor:
        batch, n_bits = self._micro_batch, self._n_bits
        return nll_of(self._tamed, images, n_bits=n_bits, generator=generator, draws=draws, batch=batch)


def _checked_flow(flow: Density) -> nn.Module:
    if not isinstance(flow, nn.Module) or not callable(getattr(flow, "log_prob", None)):
        raise InputError(f"a flow to be tamed is a torch module with log_prob; {type(flow).__name__} is not")
    if not any(parameter.is_floating_point() for parameter in flow.parameters()):
        raise InputError(f"{type(flow).__name__} has no parameters to tame")
    return flow


def _check_images(forget: Tensor, remember: Tensor) -> None:
    for name, images in (("forget", forget), ("remember", remember)):
        if images.dtype != torch.uint8 or images.ndim != 4:
            raise InputError(f"{name} images are uint8 (n, c, h, w), not {images.dtype} {tuple(images.shape)}")
    if not len(forget):
        raise InputError("there is no image to forget")
    if forget.shape[1:] != remember.shape[1:]:
        raise InputError(f"forget images are {tuple(forget.shape[1:])}, remember images {tuple(remember.shape[1:])}")


def _fingerprint(
    base: nn.Module, forget: Tensor, remember: Tensor, values: TamingParameters, n_bits: int, seed: int
) -> str:
    facts = [values.to_dict(), n_bits, seed, tensor_digest(base.state_dict())]
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
    for images in (forget, remember):
        digest.update(json.dumps(list(images.shape)).encode())
        digest.update(images.cpu().contiguous().numpy().data)
    return digest.hexdigest()
