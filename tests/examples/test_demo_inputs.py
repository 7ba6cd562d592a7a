"""The demo's photos: who is in which set, and that nobody is in two."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from examples import demo_inputs


def pictures(folder: Path) -> set[str]:
    return {hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def test_the_sets_are_whole_and_share_no_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert demo_inputs.main(["--person", "7", "--out", str(tmp_path)]) == 0

    sets = {folder.name: pictures(folder) for folder in tmp_path.iterdir()}
    assert {name: len(found) for name, found in sets.items()} == {
        "forget": 5,
        "same_identity": 5,
        "remember": 350,
        "held_out": 40,
    }
    assert len(set.union(*sets.values())) == 400
    assert json.loads(capsys.readouterr().out)["base"].endswith(".safetensors")


@pytest.mark.parametrize("person", ["0", "37", "41"])
def test_only_people_in_training_can_be_forgotten(person: str, tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as refusal:
        demo_inputs.main(["--person", person, "--out", str(tmp_path)])

    assert refusal.value.code == 2
    assert list(tmp_path.iterdir()) == []
