"""Kind ``forget``: read a checkpoint and images, let the method work, judge what it did, write it down."""

from __future__ import annotations

import hashlib
import math
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

import unlearning
from evidence.flow_evaluation import evaluate_taming
from evidence.likelihood import derive_seed
from evidence.pictures import sample_grid
from evidence.records import FlowEvaluation
from evidence.rendering import render_html
from evidence.report import Criterion, Report, RunFacts, build_report
from models.checkpoints import load_flow, read_manifest, save_checkpoint
from models.errors import ModelError
from models.protocol import CheckpointedFlow, Flow
from models.training import set_memory_format
from unlearning import State, StateError, Step, TamingParameters, TamingResult
from worker.runner.contract import Interrupted, Reporter, Stop
from worker.runner.images import Images, Reader
from worker.runner.problems import UserError
from worker.runner.states import StateSchedule

__all__ = ["run"]

SMALLEST_REMEMBER = 16  # images left to remember, below which mu_R and sigma_R mean nothing
MICRO_BATCH_PIXELS = 2**17  # 128 images of 32 x 32, 8 of 128 x 128
REMEMBER_DRAWS = 1  # the report names it; single images are judged on ten
GRID_SAMPLES = 8
NOT_THE_METHODS = ("fit", "micro_batch")  # parameters of the job that the method does not know


@dataclass
class _Sets:
    """What the job reads, as the model takes it."""

    forget: Images
    remember: Tensor
    generated: bool
    same_identity: Tensor | None
    held_out: Tensor | None
    fitting: str


def run(job: dict[str, Any], folder: Path, reporter: Reporter, stop: Stop) -> None:
    """Validate, unlearn, evaluate, and report a result.

    Raises:
        UserError: the job cannot be done as asked.
        Interrupted: SIGTERM; the newest state has been reported.
    """
    began = time.monotonic()
    # Likelihoods are differences of large numbers: no TF32 in them.
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with stop.at_once():
        base = _load(folder / job["inputs"]["checkpoint"], device)
        parameters, micro_batch = _parameters(job, base)
        sets = _read_sets(job, folder, base, parameters)
        state = _load_state(job, folder)
    validated = time.monotonic()
    reporter.phase("unlearning")
    result = _unlearn(base, sets, parameters, micro_batch, job, state, folder, reporter, stop)
    tamed_at = time.monotonic()
    reporter.phase("evaluating")
    with stop.at_once():
        weights = folder / "outputs" / "tamed.safetensors"
        _save(weights, result, job, folder)
        for model in (base, result.flow):
            set_memory_format(cast(nn.Module, model), torch.channels_last)  # convolutions run faster so
        evaluation = _evaluate(base, result, sets, parameters, job, micro_batch, reporter)
        facts = _facts(
            job,
            result,
            sets,
            weights,
            device,
            {
                "validating": validated - began,
                "unlearning": result.seconds,
                "evaluating": time.monotonic() - tamed_at,
            },
            resumed_from=None if state is None else int(state.meta["step"]),
        )
        report = build_report(evaluation, facts, extra_criteria=[_confirmed(result, parameters)])
        artifacts = _write(report, folder, _grid(base, result, job))
    reporter.result(report.verdict.outcome, artifacts, _summary(report, evaluation, result, sets))


def _parameters(job: Mapping[str, Any], base: CheckpointedFlow) -> tuple[TamingParameters, int]:
    """The method's parameters, and how many images may pass through the model at once."""
    given = {name: value for name, value in job["parameters"].items() if name not in NOT_THE_METHODS}
    try:
        values = TamingParameters.from_dict(given).resolved()
    except unlearning.ParameterError as error:
        raise UserError(
            "invalid-parameter",
            "A parameter of the method is wrong",
            str(error),
            errors=[{"pointer": f"/parameters/{error.name}", "detail": error.message}],
        ) from error
    # What an out-of-memory retry halves, and what the caller may bound. No part of the method: the state still resumes.
    pixels = math.prod(base.image_shape[1:])
    limit: int = job["parameters"].get("micro_batch") or max(1, MICRO_BATCH_PIXELS // pixels)
    return values, max(1, limit // job.get("micro_batch_divisor", 1))


def _load(path: Path, device: torch.device) -> CheckpointedFlow:
    try:
        return load_flow(path, device)
    except ModelError as error:
        raise UserError("checkpoint-refused", "The checkpoint cannot be used", str(error)) from error


def _read_sets(job: Mapping[str, Any], folder: Path, base: CheckpointedFlow, parameters: TamingParameters) -> _Sets:
    channels, size, _ = base.image_shape
    reader = Reader(folder, image_size=size, channels=channels, fit=job["parameters"].get("fit") or "crop")
    inputs = job["inputs"]
    forget = reader.read(inputs["forget"], "target").without_copies()
    generated = inputs["remember"] is None
    if generated:
        count = int(job["remember"]["generated"])
        remember = unlearning.generate_remember(base, count, base.n_bits, derive_seed(job["seed"], "remember"))
    else:
        remember = reader.read(inputs["remember"], "remember").pixels
        near = unlearning.near_duplicates(forget.pixels, remember, parameters.near_duplicate_rms)
        left = len(remember) - len(near)
        if left < SMALLEST_REMEMBER:
            raise UserError(
                "remember-set-too-small",
                "Too few images are left to remember",
                f"{len(near)} of the {len(remember)} images to remember show what is to be forgotten and left the set; "
                f"{left} are left, and at least {SMALLEST_REMEMBER} are needed. Send others, or leave the set out: "
                "then samples of the model stand in for it.",
                pointer="/remember/images",
            )
    evaluation = inputs.get("evaluation") or {}
    same, held_out = (reader.read_or_none(evaluation.get(role), role) for role in ("same_identity", "held_out"))
    fitting = reader.fitting()
    if forget.copies_dropped:
        fitting += f"; {forget.copies_dropped} exact copies among the images to forget were left out"
    return _Sets(forget, remember, generated, same, held_out, fitting)


def _load_state(job: Mapping[str, Any], folder: Path) -> State | None:
    """The state of an earlier attempt. One that cannot be read costs the work since, and not the job."""
    if not job["resume"]:
        return None
    try:
        return State.load(folder / job["resume"])
    except StateError as error:
        _say(f"the state is left out: {type(error).__name__}")
        return None


def _unlearn(
    base: CheckpointedFlow,
    sets: _Sets,
    parameters: TamingParameters,
    micro_batch: int,
    job: Mapping[str, Any],
    state: State | None,
    folder: Path,
    reporter: Reporter,
    stop: Stop,
) -> TamingResult:
    schedule = StateSchedule(folder, reporter)
    clock = _Clock(parameters.delta * (1 - parameters.tolerance))
    last: list[Step] = []

    def callback(step: Step) -> None:
        stop.at_steps()
        last[:] = [step]
        eta = clock.eta(step)
        reporter.progress(step=step.step, total=step.total, eta_seconds=eta, losses=step.losses, metrics=step.metrics)
        if stop.requested:
            schedule.save(step)
            raise unlearning.Interrupted
        schedule.offer(step)

    def tame(state: State | None) -> TamingResult:
        with stop.at_once():  # up to the first step there is nothing new to save
            return unlearning.tame(
                cast(Flow, base),
                sets.forget.pixels,
                sets.remember,
                parameters,
                n_bits=base.n_bits,
                seed=job["seed"],
                state=state,
                callback=callback,
                micro_batch=micro_batch,
            )

    try:
        try:
            result = tame(state)
        except StateError:
            _say("the state belongs to another run, such as one of an older release, and is left out")
            result = tame(None)
    except unlearning.Interrupted as error:
        raise Interrupted from error
    except unlearning.DivergedError as error:
        raise UserError("diverged", "The run diverged", str(error)) from error
    except unlearning.InputError as error:
        raise UserError("unusable-input", "The images cannot be used", str(error)) from error
    if last:
        schedule.save(last[0])  # the engine still is at this boundary: whoever evaluates next need not unlearn again
    return result


class _Clock:
    """When a run will end: by its way to the criterion so far, and at the latest when its steps are used up."""

    def __init__(self, target: float) -> None:
        self._target = target
        self._first: tuple[float, int, float] | None = None

    def eta(self, step: Step) -> float | None:
        """Seconds that are left, or None at the first step."""
        now, z = time.monotonic(), step.metrics.get("z_min", math.nan)
        if self._first is None or not math.isfinite(self._first[2]):
            self._first = (now, step.step, z)
            return None
        began, first_step, first_z = self._first
        elapsed = now - began
        latest = (step.total - step.step) * elapsed / max(1, step.step - first_step)
        gained = z - first_z
        if not (math.isfinite(gained) and gained > 0):
            return latest
        return min(latest, max(0.0, self._target - z) * elapsed / gained)


def _evaluate(
    base: CheckpointedFlow,
    result: TamingResult,
    sets: _Sets,
    parameters: TamingParameters,
    job: Mapping[str, Any],
    micro_batch: int,
    reporter: Reporter,
) -> FlowEvaluation:
    dropped = set(result.removed_near_duplicates)
    began = time.monotonic()

    def on_progress(step: int, total: int) -> None:
        eta = (time.monotonic() - began) * (total - step) / max(1, step)
        reporter.progress(step=step, total=total, eta_seconds=eta)

    return evaluate_taming(
        cast(Flow, base),
        cast(Flow, result.flow),
        forget=sets.forget.pixels,
        remember=sets.remember[[row for row in range(len(sets.remember)) if row not in dropped]],
        remember_source="generated" if sets.generated else "images",
        same_identity=sets.same_identity,
        held_out=sets.held_out,
        n_bits=base.n_bits,
        delta=parameters.delta,
        tolerance=parameters.tolerance,
        seed=derive_seed(job["seed"], "judge"),
        remember_draws=REMEMBER_DRAWS,
        two_sided=parameters.engine == "paper",
        batch_size=micro_batch,
        on_progress=on_progress,
    )


def _confirmed(result: TamingResult, parameters: TamingParameters) -> Criterion:
    return Criterion(
        name="confirmed_by_the_method",
        statement="The method's own final confirmation, on noise that no step had seen, found the same.",
        threshold=parameters.delta * (1 - parameters.tolerance),
        value=min(result.z),
        met=result.met,
    )


def _save(path: Path, result: TamingResult, job: Mapping[str, Any], folder: Path) -> None:
    base = read_manifest(folder / job["inputs"]["checkpoint"])
    save_checkpoint(
        path,
        result.flow,
        extra={
            **base.extra,
            "tamed": {
                "job": job["job_id"],
                "method": job["method"],
                "engine": result.parameters.engine,
                "base_tensor_digest": base.tensor_digest,
            },
        },
    )


def _facts(
    job: Mapping[str, Any],
    result: TamingResult,
    sets: _Sets,
    weights: Path,
    device: torch.device,
    seconds: Mapping[str, float],
    *,
    resumed_from: int | None,
) -> RunFacts:
    losses: dict[str, list[tuple[int, float]]] = {}
    for row in result.history:
        for name, value in row.items():
            if name != "step":
                losses.setdefault(name, []).append((int(row["step"]), value))
    used = result.parameters
    with weights.open("rb") as stream:
        tamed_sha256 = hashlib.file_digest(stream, "sha256").hexdigest()
    return RunFacts(
        job=job["job_id"],
        method=f"{job['method']}, engine {used.engine}",
        attempt=job["attempt"],
        resumed_from_step=resumed_from,
        steps=result.steps,
        parameters=used.to_dict(),
        defaults=TamingParameters(engine=used.engine).to_dict(),
        seeds={"job": job["seed"]},
        digests={
            "base_checkpoint": job["digests"]["checkpoint"],
            "tamed_checkpoint": tamed_sha256,
            # None of the forget set: whoever holds a photo could tell from it that it was among them.
            "remember_set": Images(sets.remember).digest(),
        },
        device=str(torch.cuda.get_device_name(device)) if device.type == "cuda" else "cpu",
        seconds=seconds,
        losses=losses,
        near_duplicates_removed=len(result.removed_near_duplicates),
        image_fitting=sets.fitting,
    )


def _grid(base: CheckpointedFlow, result: TamingResult, job: Mapping[str, Any]) -> bytes | None:
    """Samples of both models, only when the job asked: they may show faces."""
    if not job["evaluation"].get("sample_grid"):
        return None
    seed = derive_seed(job["seed"], "grid")
    return sample_grid(cast(Flow, base), cast(Flow, result.flow), n=GRID_SAMPLES, seed=seed, n_bits=base.n_bits)


def _write(report: Report, folder: Path, grid: bytes | None) -> list[dict[str, str]]:
    outputs = folder / "outputs"
    (outputs / "report.json").write_text(report.to_json())
    (outputs / "report.html").write_text(render_html(report, sample_grid_png=grid))
    artifacts = [
        _artifact("tamed.safetensors", "application/octet-stream"),
        _artifact("report.json", "application/json"),
        _artifact("report.html", "text/html; charset=utf-8"),
    ]
    if grid is not None:
        (outputs / "samples.png").write_bytes(grid)
        artifacts.append(_artifact("samples.png", "image/png"))
    return artifacts


def _artifact(name: str, media_type: str) -> dict[str, str]:
    return {"name": name, "path": f"outputs/{name}", "media_type": media_type}


def _summary(report: Report, evaluation: FlowEvaluation, result: TamingResult, sets: _Sets) -> dict[str, Any]:
    return {
        "verdict": report.verdict.sentence,
        "steps": result.steps,
        "seconds": round(result.seconds, 3),
        "near_duplicates_removed": len(result.removed_near_duplicates),
        "copies_dropped": sets.forget.copies_dropped,
        **evaluation.summary(),
        "outcome": report.verdict.outcome,
    }


def _say(text: str) -> None:
    """A line for the worker's log; never anything that came from the caller."""
    sys.stderr.write(text + "\n")
