"""Several processes share a run: they divide rows, agree on everything, and end where one process alone would."""

from __future__ import annotations

import json
import multiprocessing
import os
import socket
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from models.vae import ConditionalVAE
from tests.unlearning.tiny_conditional import SHAPE, replay_of
from unlearning import (
    AmnesiaParameters,
    AmnesiaResult,
    Check,
    Fisher,
    InputError,
    Interrupted,
    Noise,
    ProcessError,
    Processes,
    Step,
    fisher_information,
    forget_conditions,
    merge_fisher,
    shared_fisher,
)

COUNT = 2
PIXELS = SHAPE[1] * SHAPE[2]
# An odd batch: the shares differ, and a sum of means would not be the mean.
SHORT = AmnesiaParameters(max_steps=6, batch=9, replay_batch=7, check_every=3, learning_rate=1e-3)


def base() -> ConditionalVAE:
    return ConditionalVAE(SHAPE, n_classes=3, hidden=(24, 16), latent=2, generator=torch.Generator().manual_seed(0))


def fisher_arguments(model: ConditionalVAE) -> dict[str, Any]:
    return {"names": model.scopes()["all"], "seed": 9, "micro_batch": 5}


def forget(model: ConditionalVAE, fisher: Fisher, **changes: Any) -> AmnesiaResult:
    def half(_model: object, seed: int) -> Check:
        return Check(False, {"asked": float(seed % 97)})

    arguments: dict[str, Any] = {
        "surrogate": Noise((PIXELS,), 0.0, 1.0), "replay": replay_of(model, [1, 2], 40), "fisher": fisher,
        "parameters": SHORT, "criterion": half, "seed": 5, "micro_batch": 3,
    }  # fmt: skip
    return forget_conditions(model, torch.tensor([0]), **(arguments | changes))


def work(rank: int, port: int, folder: Path) -> None:
    """What each process does; it tells what it met in a file."""
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(COUNT), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
        ACCELERATE_USE_CPU="true",
    )  # fmt: skip
    torch.set_num_threads(1)
    processes = Processes.launched(cpu=True)
    told: dict[str, Any] = {"rank": processes.rank, "count": processes.count}
    model, replay = base(), replay_of(base(), [1, 2], 41)
    arguments = fisher_arguments(model)
    part = fisher_information(model, replay.x, replay.condition, rows=processes.share(41), **arguments)
    whole = shared_fisher(model, replay.x, replay.condition, processes=processes, **arguments)
    save_file(dict(part.tensors), folder / f"part.{rank}")
    told["rows"] = part.rows
    asked, reported = list[int](), list[int]()

    def criterion(_model: object, seed: int) -> Check:
        asked.append(seed)
        return Check(False, {"asked": float(seed % 97)})

    def stop(step: Step) -> None:
        reported.append(step.step)
        if step.step == 3:
            raise Interrupted

    def fail(_step: Step) -> None:
        raise KeyError("nothing")

    result = forget(model, whole, criterion=criterion, processes=processes)
    save_file(dict(result.model.state_dict()), folder / f"model.{rank}")
    save_file(dict(whole.tensors), folder / f"fisher.{rank}")
    told |= {"asked": len(asked), "history": result.history, "drift": result.drift}
    for name, changes in {
        "interrupted": {"callback": stop},
        "failed": {"callback": fail},
        "apart": {"seed": 5 + rank},
    }.items():
        try:
            forget(model, whole, processes=processes, **changes)
        except (Interrupted, ProcessError, KeyError) as error:
            told[name] = type(error).__name__
    told["reported"] = reported
    (folder / f"told.{rank}").write_text(json.dumps(told))
    processes.part()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes left."""
    folder = tmp_path_factory.mktemp("processes")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=work, args=(rank, port, folder)) for rank in range(COUNT)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
        process.kill()
    assert [process.exitcode for process in processes] == [0] * COUNT
    return folder


def told(folder: Path, rank: int) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / f"told.{rank}").read_text())
    return found


def whole_fisher() -> Fisher:
    model, replay = base(), replay_of(base(), [1, 2], 41)
    return fisher_information(model, replay.x, replay.condition, **fisher_arguments(model))


def test_two_processes_end_where_one_would(folder: Path) -> None:
    alone = forget(base(), whole_fisher())

    shared = load_file(folder / "model.0")
    start = base().state_dict()
    for name, value in alone.model.state_dict().items():
        moved = float((value - start[name]).abs().max())
        torch.testing.assert_close(shared[name], value, rtol=0, atol=max(2e-2 * moved, 1e-7))
    assert told(folder, 0)["drift"] == pytest.approx(alone.drift, rel=1e-2)
    for ours, one in zip(told(folder, 0)["history"], alone.history, strict=True):
        assert ours == pytest.approx(one, rel=1e-3)


def test_all_processes_have_the_same_model_and_history_to_the_bit(folder: Path) -> None:
    first, second = (load_file(folder / f"model.{rank}") for rank in range(COUNT))

    assert all(torch.equal(value, second[name]) for name, value in first.items())
    assert told(folder, 0)["history"] == told(folder, 1)["history"]
    assert [told(folder, rank)["rank"] for rank in range(COUNT)] == [0, 1]


def test_the_first_process_alone_judges_and_reports(folder: Path) -> None:
    assert told(folder, 0)["asked"] == 3  # after steps 3 and 6, and to confirm
    assert told(folder, 0)["reported"] == [1, 2, 3]
    assert told(folder, 1)["asked"] == 0
    assert told(folder, 1)["reported"] == []


def test_whoever_is_interrupted_or_fails_takes_the_others_along(folder: Path) -> None:
    assert [told(folder, rank)["interrupted"] for rank in range(COUNT)] == ["Interrupted"] * COUNT
    assert [told(folder, rank)["failed"] for rank in range(COUNT)] == ["KeyError", "ProcessError"]


def test_processes_with_other_arguments_are_refused(folder: Path) -> None:
    assert [told(folder, rank)["apart"] for rank in range(COUNT)] == ["ProcessError"] * COUNT


def test_shares_of_a_fisher_information_merge_to_the_whole(folder: Path) -> None:
    whole = whole_fisher()
    rows = [tuple(map(tuple, told(folder, rank)["rows"])) for rank in range(COUNT)]
    parts = [replace(whole, tensors=load_file(folder / f"part.{rank}"), rows=rows[rank]) for rank in range(COUNT)]

    merged, shared = merge_fisher(parts), load_file(folder / "fisher.1")

    assert merged.rows == whole.rows == ((0, 41),)
    for name, value in whole.tensors.items():
        torch.testing.assert_close(merged.tensors[name], value, rtol=1e-5, atol=1e-7 * float(value.max()))
        torch.testing.assert_close(shared[name], value, rtol=1e-5, atol=1e-7 * float(value.max()))


@given(st.integers(1, 16), st.integers(0, 500))
def test_shares_cover_each_row_once_and_evenly(count: int, n: int) -> None:
    shares = [Processes(rank, count).share(n) for rank in range(count)]

    assert [row for share in shares for row in share] == list(range(n))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_who_is_alone_needs_no_launcher() -> None:
    alone, tensor = Processes(), torch.ones(2)

    alone.add_up([tensor])
    alone.agree("seed", "1")

    assert (alone.main, alone.total(2.5), alone.ask(lambda: {"a": 1})) == (True, 2.5, {"a": 1})
    assert torch.equal(tensor, torch.ones(2))


def test_more_processes_than_examples_are_refused() -> None:
    model, replay = base(), replay_of(base(), [1], 2)

    with pytest.raises(InputError, match="2 examples cannot be shared among 3"):
        shared_fisher(model, replay.x, replay.condition, processes=Processes(0, 3), **fisher_arguments(model))
