"""Bad input through the whole service: each refusal says what is wrong and what to do, with nothing half done."""

from __future__ import annotations

import os
import pickle  # noqa: TID251 - what a hostile file is made with
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from cli.client import Client
from cli.errors import CheckpointRejected
from cli.resources import Job
from examples.orl import Faces
from models import Glow
from tests.e2e.conftest import IMAGE_SIZE, N_BITS, Material, untrained, written

SECONDS = 240.0
FACTS = {"image_size": IMAGE_SIZE, "n_bits": N_BITS}
State = dict[str, Tensor]


@pytest.fixture(scope="module")
def base(faces: Faces) -> Glow:
    """What is refused here needs to have learnt nothing."""
    return untrained(faces, torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def material(base: Glow, faces: Faces, tmp_path_factory: pytest.TempPathFactory) -> Material:
    return written(base, faces, tmp_path_factory.mktemp("untrained"))


def _published(base: Glow) -> State:
    """The weights as the authors of flow taming save them."""
    return {f"module.{name}": value.clone() for name, value in base.state_dict().items()}


def _not_a_number(state: State) -> None:
    state["module.blocks.0.flows.0.coupling.net.0.weight"][0, 0, 0, 0] = float("nan")


def _missing(state: State) -> None:
    del state["module.blocks.1.flows.2.coupling.net.2.bias"]


def _odd(state: State) -> None:
    state["module.blocks.0.flows.0.odd"] = torch.zeros(1)


def _problem_of(client: Client, path: Path, **facts: Any) -> dict[str, Any]:
    """What GET /checkpoints/{id} says of a file that validation refused."""
    with pytest.raises(CheckpointRejected):
        client.push_checkpoint(path, name=path.name, **facts)
    row = next(row for row in client.checkpoints() if row.name == path.name)
    again = client.checkpoint(row.id)
    assert again.status == "rejected"
    assert again.problem is not None
    assert again.problem["type"] == "urn:forgetd:problem:checkpoint-refused"
    return dict(again.problem)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (_not_a_number, "coupling.net.0.weight holds NaN or infinity; use an earlier checkpoint"),
        (_missing, "1 tensors are missing: blocks.1.flows.2.coupling.net.2.bias"),
        (_odd, "1 tensors do not belong to the model: blocks.0.flows.0.odd"),
    ],
)
def test_weights_that_cannot_be_used_are_rejected_by_name(
    client: Client, base: Glow, tmp_path: Path, damage: Callable[[State], None], said: str
) -> None:
    state = _published(base)
    damage(state)
    path = tmp_path / f"{damage.__name__}.pt"
    torch.save(state, path)

    assert said in _problem_of(client, path, **FACTS)["detail"]


def _zero_scale(state: State) -> None:
    state["module.blocks.0.flows.1.actnorm.scale"].zero_()


def _singular(state: State) -> None:
    state["module.blocks.1.flows.0.invconv.w_s"].fill_(-200.0)


def _of_bytes(state: State) -> None:
    state["module.blocks.0.flows.0.actnorm.scale"].div_(255.0)
    state["module.blocks.0.flows.0.actnorm.loc"].mul_(255.0).sub_(127.5)


@pytest.mark.parametrize(
    ("damage", "facts", "said"),
    [
        (_zero_scale, FACTS, "the samples of the flow hold NaN or infinity"),
        (_singular, FACTS, "a 1x1 convolution is singular"),
        (_of_bytes, FACTS, "or was trained on images of another scale"),
        (None, {**FACTS, "n_bits": 1}, "n_bits = 1 is implausible"),
    ],
)
def test_weights_that_load_and_make_no_usable_flow_are_rejected(
    client: Client,
    base: Glow,
    tmp_path: Path,
    damage: Callable[[State], None] | None,
    facts: dict[str, int],
    said: str,
) -> None:
    state = _published(base)
    if damage is not None:
        damage(state)
    path = tmp_path / f"{damage.__name__ if damage else 'depth'}.pt"
    torch.save(state, path)

    problem = _problem_of(client, path, **facts)

    assert said in problem["detail"]
    assert problem["kind"] == "UnusableFlowError"


class _Touch:
    """Unpickled by a careless reader, it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mknod, (str(self.path),)


def test_code_in_a_checkpoint_is_refused_and_never_run(client: Client, tmp_path: Path) -> None:
    trace, path = tmp_path / "trace", tmp_path / "hostile.pt"
    attack = pickle.dumps(_Touch(trace), protocol=2)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", attack)
        archive.writestr("archive/version", "3\n")
    pickle.loads(attack)
    trace.unlink()

    problem = _problem_of(client, path, **FACTS)

    assert not trace.exists()
    assert "nothing in it was run" in problem["detail"]
    assert "save model.state_dict(), or write safetensors" in problem["detail"]


def test_the_authors_layout_is_converted_and_what_it_does_not_tell_is_asked_for(
    client: Client, base: Glow, tmp_path: Path
) -> None:
    path = tmp_path / "published.pt"
    torch.save(_published(base), path)

    ready = client.push_checkpoint(path, name="told", **FACTS)
    problem = _problem_of(client, path)

    assert ready.status == "ready"
    assert ready.manifest is not None
    assert ready.manifest["architecture"] == base.architecture
    assert ready.manifest["warnings"] == []
    assert "image_size and n_bits" in problem["detail"]


def _failed(client: Client, job: Job) -> Job:
    done = client.wait(job.id, timeout=SECONDS, raise_on_failure=False)
    assert (done.status, done.reason) == ("failed", "user_error")
    assert client.artifacts(job.id) == []
    return done


def test_a_remember_set_that_is_the_forget_set_is_refused(client: Client, material: Material) -> None:
    checkpoint = client.push_checkpoint(material.base)
    target = client.push_images(material.person[:5])
    same = client.push_images([*material.person[:5], *material.others[:11]])

    job = _failed(client, client.forget(checkpoint.id, target.id, remember=same.id))

    assert job.problem is not None
    assert job.problem["errors"][0]["pointer"].startswith("/remember")
    assert "5 of the 16 images to remember show what is to be forgotten" in job.problem["detail"]


def test_images_of_another_size_are_refused_where_exact_was_asked(
    client: Client, material: Material, tmp_path: Path
) -> None:
    checkpoint = client.push_checkpoint(material.base)
    larger = []
    for number, path in enumerate(material.person[:2]):
        larger.append(tmp_path / f"{number}.png")
        Image.open(path).resize((24, 20)).save(larger[-1])
    target = client.push_images(larger)

    job = _failed(client, client.forget(checkpoint.id, target.id, remember=64, parameters={"fit": "exact"}))

    assert job.problem is not None
    assert job.problem["errors"][0]["pointer"] == "/target/images"
    assert "24" in job.problem["detail"]
    assert str(IMAGE_SIZE) in job.problem["detail"]
