"""A class of a conditional VAE is forgotten over HTTP, and what the first job learned spares the next one its work."""

from __future__ import annotations

from pathlib import Path

import pytest

from cli.client import Client
from cli.resources import Checkpoint, Job
from models.checkpoints import load_conditional, save_checkpoint
from tests.e2e.helpers import SECONDS, events
from tests.unlearning.tiny_conditional import trained_vae
from tests.worker.runs import one_thread

QUICK = {"max_steps": 1500, "batch": 64, "learning_rate": 3e-3}
CRITERIA = {"forgotten_at_most": 0.1, "others_within": 0.05}


@pytest.fixture
def checkpoint(client: Client, tmp_path: Path) -> Checkpoint:
    """A VAE that draws three classes of stripes."""
    with one_thread():
        save_checkpoint(tmp_path / "vae.safetensors", trained_vae())
    return client.push_checkpoint(tmp_path / "vae.safetensors", name="stripes")


def _phases(client: Client, job: Job) -> list[str]:
    return [event.data["phase"] for event in events(client, job, "phase")]


def test_a_class_is_forgotten_and_the_next_request_finds_the_fisher_information(
    client: Client, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    said = {"criteria": CRITERIA, "parameters": QUICK, "remember": 600, "seed": 11}

    first = client.wait(client.forget(checkpoint.id, class_label=0, **said).id, timeout=SECONDS)
    second = client.wait(client.forget(checkpoint.id, class_label=2, replace_with=1, **said).id, timeout=SECONDS)

    assert (first.status, second.status) == ("succeeded", "succeeded")
    assert "fisher" in _phases(client, first)
    assert "fisher" not in _phases(client, second)
    assert load_conditional(client.download(second.id, tmp_path / "tamed")).n_classes == 3
    assert "<html" in client.report_html(first.id)
