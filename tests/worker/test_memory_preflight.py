"""The memory of a job is looked at before it starts: passes shrink to what there is, and what cannot fit is refused."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from models.ddpm import ClassDDPM
from unlearning import AmnesiaParameters, Examples, Fisher, NotEnoughMemoryError
from unlearning.memory import Estimate, Pass, plan_memory
from worker.runner import fisher, memory
from worker.runner.conditional_base import ConditionalBase
from worker.runner.conditions import classes_of
from worker.runner.memory import Available, fit_fisher, fit_training, host_available, planned
from worker.runner.problems import UserError

GIB = 2**30
FEW = AmnesiaParameters(batch=32, replay_batch=16)


@pytest.fixture(scope="module")
def base() -> ConditionalBase:
    model = ClassDDPM(
        (1, 8, 8), channels=[16, 32], layers=1, attention=[False, False], n_classes=3, generator=torch.Generator()
    )
    return ConditionalBase(model, Path("none"), torch.device("cpu"), 64, "0" * 64, classes_of(model), model.sampling)


@pytest.fixture(scope="module")
def replay(base: ConditionalBase) -> Examples:
    return Examples(torch.zeros(4, 1, 8, 8), torch.tensor([0, 1, 2, 0]))


def names(base: ConditionalBase) -> Sequence[str]:
    return base.model.scopes()["all"]


@dataclass(frozen=True)
class Machine:
    """Files as Linux shows them, of a control group within another."""

    folder: Path

    def write(self, free: int, group: tuple[str, int, int], outer: tuple[str, int, int] = ("max", 0, 0)) -> int | None:
        """MemFree in bytes; of each group its limit, what it uses, and how much of that is files."""
        own = self.folder / "cgroup" / "outer" / "own"
        own.mkdir(parents=True, exist_ok=True)
        (self.folder / "self").mkdir(exist_ok=True)
        (self.folder / "self" / "cgroup").write_text("0::/outer/own\n")
        (self.folder / "meminfo").write_text(f"MemTotal: 9 kB\nMemAvailable:   {free // 1024} kB\n")
        for path, (limit, used, files) in ((own, group), (own.parent, outer)):
            (path / "memory.max").write_text(f"{limit}\n")
            (path / "memory.current").write_text(f"{used}\n")
            (path / "memory.stat").write_text(f"anon 1\ninactive_file {files}\n")
        return host_available(self.folder / "cgroup", self.folder)


def test_what_is_free_is_the_least_of_machine_and_control_groups_less_a_margin(tmp_path: Path) -> None:
    machine, share = Machine(tmp_path), memory.USED_OF_HOST

    assert machine.write(8 * GIB, ("max", GIB, 0)) == int(share * 8 * GIB)
    assert machine.write(8 * GIB, (str(4 * GIB), 3 * GIB, 0)) == int(share * GIB)
    assert machine.write(8 * GIB, (str(4 * GIB), 3 * GIB, 2 * GIB)) == int(share * 3 * GIB)
    assert machine.write(8 * GIB, ("max", GIB, 0), (str(4 * GIB), 2 * GIB, 0)) == int(share * 2 * GIB)
    assert machine.write(8 * GIB, (str(GIB), 3 * GIB, 0)) == 0


def test_a_machine_that_does_not_say_is_not_asked(tmp_path: Path) -> None:
    assert host_available(tmp_path, tmp_path) is None


def there_are(count: int | None) -> Available:
    return lambda _device: count


def test_a_pass_has_as_many_rows_as_ever_where_memory_is_plenty_or_unknown(
    base: ConditionalBase, replay: Examples
) -> None:
    for count in (64 * GIB, None):
        training = fit_training(base, names(base), FEW, replay, there_are(count))
        fisher = fit_fisher(base, names(base), replay, there_are(count))

        assert (training.micro_batch, training.recompute) == (32, False)  # more than a batch never pass at once
        assert (fisher.micro_batch, fisher.recompute) == (64, False)


def test_less_memory_shrinks_passes_then_computes_activations_twice_then_refuses(
    base: ConditionalBase, replay: Examples
) -> None:
    whole = fit_training(base, names(base), FEW, replay, there_are(GIB))
    too_little, enough = 0, whole.needed  # of which the least that is enough is looked for
    plans = [whole]

    while enough - too_little > whole.needed // 1000:
        available = (too_little + enough) // 2
        try:
            plans.append(fit_training(base, names(base), FEW, replay, there_are(available)))
            enough = available
        except UserError:
            too_little = available

    rows = [plan.micro_batch for plan in plans if not plan.recompute]
    assert rows == sorted(rows, reverse=True)
    assert (rows[0], rows[-1]) == (32, 1)
    assert len(set(rows)) > 2
    assert (plans[-1].micro_batch, plans[-1].recompute) == (1, True)
    assert plans[-1].needed <= enough


def test_a_refusal_says_what_is_missing_and_what_helps(base: ConditionalBase, replay: Examples) -> None:
    with pytest.raises(UserError) as refused:
        fit_training(base, names(base), FEW, replay, there_are(1000))

    problem = refused.value.problem
    assert problem["type"] == "urn:forgetd:problem:out-of-memory"
    assert problem["available_bytes"] == 1000
    assert problem["needed_bytes"] > 1000
    assert "adam-8bit" in problem["detail"]
    assert "a worker with more memory" in problem["detail"]


def test_a_job_may_ask_for_activations_to_be_computed_twice(base: ConditionalBase, replay: Examples) -> None:
    asked = replace(base, recompute=True)

    assert fit_training(asked, names(base), FEW, replay, there_are(GIB)).recompute
    assert fit_fisher(asked, names(base), replay, there_are(None)).recompute


def test_an_optimiser_that_does_not_run_here_is_refused_at_its_place(base: ConditionalBase, replay: Examples) -> None:
    elsewhere = replace(base, device=torch.device("meta"))

    with pytest.raises(UserError) as refused:
        fit_training(elsewhere, names(base), replace(FEW, optimiser="adam-8bit"), replay)

    assert refused.value.problem["errors"][0]["pointer"] == "/parameters/optimiser"


FOUND = Estimate({"weights": 100}, Pass(10, 40), Pass(10, 8))


@given(st.integers(0, 2000), st.sampled_from([1, 2, 4, 8]), st.integers(1, 64))
def test_an_attempt_after_one_that_ran_out_takes_less(available: int, divisor: int, most: int) -> None:
    try:
        first = plan_memory(FOUND, available, most_rows=most)
    except NotEnoughMemoryError:
        return

    again = planned(FOUND, available, most_rows=most, divisor=divisor, recompute=False)

    assert again.needed == FOUND.needed(again.micro_batch, again.recompute)
    assert again.needed <= first.needed
    if divisor > 1 and (first.micro_batch > 1 or not first.recompute):
        assert again.needed < first.needed


def test_a_fisher_information_of_another_precision_is_another_asset(base: ConditionalBase) -> None:
    here = fisher._plan(base, (0,), fisher._everything(base), 4, published=False)
    tensors = {"w": torch.ones(2)}
    found = Fisher(
        tensors, ((0, 4),), here.draws, "stratified", here.reduction, here.seed, "bfloat16", "autograd", "", ""
    )

    assert here.precision == "float32"
    assert here.check(replace(found, precision="float32"), {"w": torch.Size([2])}).examples == 4
    with pytest.raises(fisher.FisherError):
        here.check(found, {"w": torch.Size([2])})
