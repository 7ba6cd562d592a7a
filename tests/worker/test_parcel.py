"""What one process packs, another finds: equal values of equal types, and nothing that was not said."""

from __future__ import annotations

from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from unlearning import AmnesiaParameters, Examples, Mixture, Noise, Pool, State
from worker.runner.parcel import pack, unpack

LEAVES = st.one_of(
    st.none(), st.booleans(), st.integers(-(2**60), 2**60), st.floats(allow_nan=False), st.text(max_size=5),
    st.lists(st.integers(0, 9), min_size=1, max_size=4).map(torch.tensor),
)  # fmt: skip
VALUES = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.lists(inner, max_size=3).map(tuple),
        st.dictionaries(st.text(max_size=4), inner, max_size=3),
    ),
    max_leaves=8,
)


def same(one: Any, other: Any) -> bool:
    """Whether two values are equal, to the bit and by type."""
    if type(one) is not type(other):
        return False
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if is_dataclass(one):
        return all(same(getattr(one, part.name), getattr(other, part.name)) for part in fields(one))
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(value, other[name]) for name, value in one.items())
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)


@given(VALUES)
def test_a_value_comes_back_as_it_was(tmp_path_factory: pytest.TempPathFactory, value: Any) -> None:
    path = tmp_path_factory.mktemp("parcel") / "one"

    pack(value, path)

    assert same(unpack(path, ()), value)


def test_records_come_back_with_all_that_they_hold(tmp_path: Path) -> None:
    x = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    records = (
        Noise((3,), -1.0, 1.0),
        Mixture((Pool(x), Pool(x.flip(0).T.contiguous().T)), (0.25, 0.75)),
        Examples(x, torch.arange(4)),
        AmnesiaParameters(without=("penalty",)).resolved(),
        State({"a": x[:, 1]}, {"step": 3, "history": [{"loss": 0.1}]}),
    )

    pack(records, tmp_path / "one")
    found = unpack(tmp_path / "one", [type(one) for one in records] + [Pool])

    assert same(found, records)


def test_a_record_of_another_type_is_not_made(tmp_path: Path) -> None:
    pack({"surrogate": Noise((3,), -1.0, 1.0)}, tmp_path / "one")

    with pytest.raises(KeyError, match="Noise"):
        unpack(tmp_path / "one", [Examples])


def test_what_json_does_not_hold_is_not_packed(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="set cannot be packed"):
        pack({"names": {"a"}}, tmp_path / "one")
