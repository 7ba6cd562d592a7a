"""Parts of a Fisher information merge, normalise, and outlive a file only beside the weights they are of."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.unlearning.fisher_models import MlpVae, TinyDiffusion
from tests.unlearning.test_fisher import EXACT, computed, far
from unlearning import (
    Fisher,
    FisherError,
    InputError,
    ParameterError,
    average_fisher,
    load_fisher,
    merge_fisher,
    normalise_fisher,
    save_fisher,
)
from unlearning.fisher_files import METADATA_KEY


def of(values: dict[str, torch.Tensor], **changes: Any) -> Fisher:
    """A Fisher information of these tensors."""
    facts: dict[str, Any] = {
        "rows": ((0, 4),), "draws": 1, "plan": "independent", "reduction": "sum", "seed": 0, "precision": "float32",
        "estimator": "hooks", "weights": "abc", "replay": "def",
    }  # fmt: skip
    return Fisher(tensors=values, **{**facts, **changes})


@pytest.mark.parametrize(("kind", "draws"), [(MlpVae, 1), (TinyDiffusion, 5)])
def test_parts_of_several_workers_are_the_whole(kind: type[Any], draws: int) -> None:
    whole = computed(kind, draws)
    parts = [computed(kind, draws, rows=rows) for rows in (range(3), range(3, 13), range(13, 20))]

    merged = merge_fisher(parts)

    assert far(merged.tensors, whole.tensors) < EXACT
    assert (merged.rows, merged.examples) == (((0, 20),), 20)
    assert merged == whole  # in all facts
    assert all(torch.equal(value, merged.tensors[name]) for name, value in merge_fisher(parts[::-1]).tensors.items())


def test_parts_weigh_what_they_hold() -> None:
    few, many = of({"w": torch.ones(2)}, rows=((0, 1),)), of({"w": torch.full((2,), 5.0)}, rows=((7, 10),))

    merged = merge_fisher([few, many])

    assert merged.tensors["w"].tolist() == [4.0, 4.0]
    assert merged.rows == ((0, 1), (7, 10))


@pytest.mark.parametrize("changes", [{"seed": 1}, {"weights": "x"}, {"draws": 2}, {"reduction": "mean"}])
def test_parts_of_different_facts_do_not_merge(changes: dict[str, Any]) -> None:
    value = {"w": torch.ones(2)}

    with pytest.raises(FisherError, match=next(iter(changes))):
        merge_fisher([of(value), of(value, rows=((4, 8),), **changes)])


def test_no_example_counts_twice() -> None:
    with pytest.raises(FisherError, match="rows 3 to 3"):
        merge_fisher([of({"w": torch.ones(2)}), of({"w": torch.ones(2)}, rows=((3, 6),))])
    with pytest.raises(FisherError, match="different parameters"):
        merge_fisher([of({"w": torch.ones(2)}), of({"v": torch.ones(2)}, rows=((4, 6),))])
    with pytest.raises(InputError, match="no part"):
        merge_fisher([])


def test_sets_of_their_own_average_by_their_numbers_in_any_order() -> None:
    sets = [
        of({"w": torch.tensor([value, 0.1])}, replay=name, seed=seed, rows=rows)
        for value, name, seed, rows in (
            (1.0, "b", 7, ((0, 1),)),
            (5.0, "a", 8, ((0, 2), (4, 5))),
            (9.0, "c", 9, ((0, 4),)),
        )
    ]

    found = average_fisher(sets)

    assert found.tensors["w"].tolist() == pytest.approx([(1 + 3 * 5 + 4 * 9) / 8, 0.1])
    assert found.examples == 8
    for other in (sets[::-1], [sets[1], sets[0], sets[2]]):
        again = average_fisher(other)
        assert again == found
        assert torch.equal(again.tensors["w"], found.tensors["w"])
    assert average_fisher(sets[:2]).replay != found.replay


def test_an_average_over_parts_of_one_set_is_their_merger() -> None:
    parts = [computed(MlpVae, 1, rows=rows) for rows in (range(3), range(3, 20))]

    assert far(average_fisher(parts).tensors, merge_fisher(parts).tensors) < EXACT


@pytest.mark.parametrize("changes", [{"weights": "x"}, {"draws": 2}, {"reduction": "mean"}, {"plan": "stratified"}])
def test_sets_of_different_facts_have_no_average(changes: dict[str, Any]) -> None:
    value = {"w": torch.ones(2)}

    with pytest.raises(FisherError, match=next(iter(changes))):
        average_fisher([of(value), of(value, **{"replay": "other", **changes})])


def test_no_example_of_a_set_counts_twice_in_an_average() -> None:
    value = {"w": torch.ones(2)}

    with pytest.raises(FisherError, match="rows 0 to 3"):
        average_fisher([of(value), of(value)])
    with pytest.raises(FisherError, match="different parameters"):
        average_fisher([of(value), of({"v": torch.ones(2)}, replay="other")])
    with pytest.raises(InputError, match="no part"):
        average_fisher([])


def test_a_normalised_one_has_mean_1_whatever_its_scale() -> None:
    fisher = computed(MlpVae, 1)
    scaled = dataclasses.replace(fisher, tensors={name: 1e-9 * value for name, value in fisher.tensors.items()})

    found = normalise_fisher(fisher, floor=0.0, clip=1e9)

    total = sum(float(value.sum()) for value in found.values()) / sum(value.numel() for value in found.values())
    assert total == pytest.approx(1, rel=1e-5)
    for name, value in normalise_fisher(scaled, floor=0.0, clip=1e9).items():
        torch.testing.assert_close(value, found[name], rtol=1e-4, atol=0)


def test_a_normalised_one_keeps_within_floor_and_clip_over_the_named_tensors_alone() -> None:
    fisher = of({"w": torch.tensor([0.0, 1.0, 1.0, 14.0]), "other": torch.full((4,), 1e6)})

    assert normalise_fisher(fisher, ["w"], floor=0.01, clip=3)["w"].tolist() == pytest.approx([0.01, 0.25, 0.25, 3.0])
    assert list(normalise_fisher(fisher, ["w"])) == ["w"]


def test_what_cannot_be_normalised_is_refused() -> None:
    fisher = of({"w": torch.ones(2), "dead": torch.zeros(2)})

    for values, name in (({"floor": 1.0}, "floor"), ({"floor": -0.1}, "floor"), ({"clip": 1.0}, "clip")):
        with pytest.raises(ParameterError, match=name):
            normalise_fisher(fisher, **values)  # type: ignore[arg-type]  # the values are floats, mypy joins them with names
    with pytest.raises(FisherError, match="above zero"):
        normalise_fisher(fisher, ["dead"])
    with pytest.raises(FisherError, match="'v'"):
        normalise_fisher(fisher, ["v"])


def test_a_file_gives_back_every_bit_and_fact(tmp_path: Path) -> None:
    fisher = computed(TinyDiffusion, 3, n=4)

    save_fisher(fisher, tmp_path / "f")
    found = load_fisher(tmp_path / "f", weights=fisher.weights, names=list(fisher.tensors))

    assert found == fisher  # in all facts
    assert all(torch.equal(value, fisher.tensors[name]) for name, value in found.tensors.items())
    assert [path.name for path in tmp_path.iterdir()] == ["f"]


def test_a_wider_scope_serves_a_narrower_one(tmp_path: Path) -> None:
    save_fisher(of({"w": torch.ones(2), "v": torch.zeros(3)}), tmp_path / "f")

    assert list(load_fisher(tmp_path / "f", weights="abc", names=["v"]).tensors) == ["v"]


def test_one_of_other_weights_or_names_is_refused(tmp_path: Path) -> None:
    save_fisher(of({"w": torch.ones(2)}), tmp_path / "f")

    with pytest.raises(FisherError, match="of weights abc, the model has abd"):
        load_fisher(tmp_path / "f", weights="abd", names=["w"])
    with pytest.raises(FisherError, match="has no v: compute it for this scope"):
        load_fisher(tmp_path / "f", weights="abc", names=["w", "v"])


def test_bfloat16_keeps_entries_that_float16_would_lose(tmp_path: Path) -> None:
    values = torch.logspace(-12, 3, 60)
    fisher = of({"w": values})

    save_fisher(fisher, tmp_path / "f", torch.bfloat16)
    found = load_fisher(tmp_path / "f", weights="abc", names=["w"]).tensors["w"]

    assert (values.half() == 0).sum() > 10
    torch.testing.assert_close(found, values, rtol=2**-8, atol=0)
    assert found.dtype == torch.float32
    assert load_file(tmp_path / "f")["w"].dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_other_precisions_are_not_stored(dtype: torch.dtype, tmp_path: Path) -> None:
    with pytest.raises(ParameterError, match="float32 or bfloat16"):
        save_fisher(of({"w": torch.ones(2)}), tmp_path / "f", dtype)
    assert not list(tmp_path.iterdir())


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    whole, path = tmp_path / "whole", tmp_path / "f"
    save_fisher(of({"w": torch.ones(2)}), whole)
    manifest = json.loads(_metadata(whole)[METADATA_KEY])
    tensors = {"w": torch.ones(2)}

    def refused(message: str) -> None:
        with pytest.raises(FisherError, match=message):
            load_fisher(path, weights="abc", names=["w"])

    refused("cannot be read")
    path.write_bytes(whole.read_bytes()[:-3])
    refused("cannot be read")
    save_file(tensors, path)
    refused("no stored Fisher")
    for text, message in (
        ("{", "no JSON"), ("[]", "lacks"), (json.dumps({**manifest, "versions": {"schema": 99}}), "schema 99"),
        (json.dumps({**manifest, "shapes": {"w": [3]}}), "not what its manifest says"),
        (json.dumps({**manifest, "shapes": {"w": [2], "v": [1]}, "draws": None}), "damaged"),
    ):  # fmt: skip
        save_file(tensors, path, metadata={METADATA_KEY: text})
        refused(message)


def _metadata(path: Path) -> dict[str, str]:
    header = path.read_bytes()
    size = int.from_bytes(header[:8], "little")
    return dict(json.loads(header[8 : 8 + size])["__metadata__"])
