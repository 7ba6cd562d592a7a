"""What a job of each kind is told, and that the files it is told of are there: a supervisor and the stub runner."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from services import leases, object_keys
from services.settings import Settings
from services.tables import Checkpoint, Classifier, ImageSet
from tests.worker.helpers import Jobs
from worker import inputs
from worker.supervisor import Supervisor


@pytest.fixture
def told(supervisor: Supervisor, jobs: Jobs, tmp_path: Path) -> Any:
    """Runs a job of this request to its end; gives its ``job.json``, with the files beside it under ``_files``."""

    def run(asked: dict[str, Any], *, kind: str = "forget", **parameters: Any) -> dict[str, Any]:
        path = tmp_path / "job.json"
        job_id = jobs.queue(kind=kind, asked=asked, keep_job=str(path), steps=1, **parameters)
        assert supervisor.run(job_id) == "succeeded", jobs.row(job_id).problem
        job: dict[str, Any] = json.loads(path.read_text())
        assert set(_paths(job)) == job["_files"].keys()
        return job

    return run


def _paths(value: Any) -> list[str]:
    """Every path below ``inputs`` that a job names."""
    if isinstance(value, dict):
        return [path for name, item in value.items() if name != "_files" for path in _paths(item)]
    if isinstance(value, list):
        return [path for item in value for path in _paths(item)]
    return [value] if isinstance(value, str) and value.startswith("inputs/") else []


def _numbered(folder: str) -> list[str]:
    return [f"{folder}/000000.png", f"{folder}/000001.png"]


def test_a_job_about_images_has_them_to_forget(told: Any, jobs: Jobs) -> None:
    job = told({"method": "flow-taming", "target": {"images": jobs.image_set()}})

    assert (job["kind"], job["target"]) == ("forget", {"images": True})
    assert job["inputs"]["forget"] == _numbered("inputs/forget")
    assert job["inputs"]["remember"] is None
    assert job["digests"].keys() == {"checkpoint"}


def test_the_runner_is_told_ahead_what_it_can_load_meanwhile(told: Any, jobs: Jobs) -> None:
    flow = told({"method": "flow-taming", "target": {"images": jobs.image_set()}})
    with jobs.database.transaction() as session:
        session.get_one(Checkpoint, jobs.checkpoint_id).manifest = {"family": "stable-diffusion", "channels": 3}
    prompts = told(_of_concept())

    assert flow["_ahead"] == ["forget", "flow-taming", "glow"]
    assert prompts["_ahead"] == ["forget", "selective-amnesia", "stable-diffusion"]


def test_the_reader_of_an_import_is_told_nothing_ahead(jobs: Jobs, settings: Settings) -> None:
    job_id = jobs.queue(kind="import")
    with jobs.database.transaction() as session:
        session.get_one(Checkpoint, jobs.checkpoint_id).source_key = "source"
        claim = leases.claim(session, job_id, worker="one", ttl_seconds=60)
        assert claim is not None

        assert inputs.plan(session, claim, settings).ahead == ()


def test_a_job_about_attributes_is_told_its_judges(told: Any, jobs: Jobs) -> None:
    first, second = jobs.classifier(), jobs.classifier(scale={"mean": [0.5], "std": [0.25]})
    sets = {"glasses": jobs.image_set(), "none": jobs.image_set()}
    asked = [
        {"classifier": first, "class": "smiling", "at_most": 0.1},
        {"classifier": second, "class": "other", "at_least": 0.5},
        {"classifier": first, "class": "other", "at_least": 0.2},
        {"sets": sets, "class": "glasses", "at_most": 0.0},
    ]

    job = told({"method": "steering", "target": {"attributes": asked}})

    judges = [wanted["judge"] for wanted in job["target"]["attributes"]]
    assert [(it["class"], it["at_most"], it["at_least"]) for it in job["target"]["attributes"]] == [
        ("smiling", 0.1, None),
        ("other", None, 0.5),
        ("other", None, 0.2),
        ("glasses", 0.0, None),
    ]
    assert judges[0] == judges[2]
    assert (
        judges[0].items()
        >= {
            "onnx": "inputs/classifiers/0.onnx",
            "classes": ["smiling", "other"],
            "output": "logits",
            "threshold": 0.5,
            "scale": "unit",
            "name": "smiles",
        }.items()
    )
    assert judges[1]["scale"] == {"mean": [0.5] * 3, "std": [0.25] * 3}  # the checkpoint has three channels
    numbers = {name: paths[0].split("/")[2] for name, paths in judges[3]["sets"].items()}
    assert sorted(numbers.values()) == ["0", "1"]
    assert judges[3]["sets"] == {name: _numbered(f"inputs/sets/{number}") for name, number in numbers.items()}
    assert job["_files"]["inputs/classifiers/1.onnx"] == f"onnx of {second}"
    assert job["inputs"]["forget"] == []
    assert [judges[0]["sha256"], judges[1]["sha256"]] == [
        job["digests"]["classifier_0"],
        job["digests"]["classifier_1"],
    ]


def test_a_set_that_two_attributes_share_is_fetched_once(told: Any, jobs: Jobs) -> None:
    sets = {"a": jobs.image_set(), "b": jobs.image_set()}
    asked = [{"sets": sets, "class": "a", "at_most": 0.5}, {"sets": sets, "class": "b", "at_most": 0.9}]

    job = told({"method": "steering", "target": {"attributes": asked}})

    first, second = (wanted["judge"] for wanted in job["target"]["attributes"])
    assert first == second


@pytest.mark.parametrize("where", ["weights", "prior"])
def test_a_job_about_a_class_is_told_its_label(told: Any, jobs: Jobs, where: str) -> None:
    job = told({"method": "class-removal", "target": {"class_label": 3, "where": where}})

    assert job["target"] == {"class_label": 3, "where": where}
    assert job["inputs"]["forget"] == []


def test_a_class_in_the_weights_has_its_images_to_forget(told: Any, jobs: Jobs) -> None:
    target = {"class_label": 3, "where": "weights", "images": jobs.image_set()}

    job = told({"method": "class-taming", "target": target})

    assert job["target"] == {"class_label": 3, "where": "weights"}
    assert job["inputs"]["forget"] == _numbered("inputs/forget")


def _amnesia(**changes: Any) -> dict[str, Any]:
    target = {"class_label": 0, "where": "weights"}
    return {"method": "selective-amnesia", "target": target, "replace_with": "noise"} | changes


def test_a_job_of_selective_amnesia_is_told_the_class_alone(told: Any) -> None:
    criteria = {"forgotten_at_most": 0.05, "others_within": 0.02}

    job = told(_amnesia(), criteria=criteria)

    assert (job["kind"], job["method"], job["target"]) == ("forget", "selective-amnesia", {"class_label": 0})
    assert (job["replace_with"], job["judge"], job["criteria"]) == ({"noise": True}, None, criteria)
    assert job["remember"] == {"generated": 64}
    assert job["inputs"] == {
        "checkpoint": "inputs/checkpoint.safetensors",
        "surrogate": [],
        "fisher": {},
        "remember_sets": {},
        "forget": [],
        "remember": None,
        "evaluation": {"same_identity": [], "held_out": []},
    }


def test_a_job_is_told_how_many_gpus_it_has(
    make_supervisor: Callable[..., Supervisor], settings: Settings, jobs: Jobs, tmp_path: Path
) -> None:
    generous = make_supervisor(settings=settings.model_copy(update={"gpus_per_job": 4}))
    job_id = jobs.queue(asked=_amnesia(), keep_job=str(tmp_path / "job.json"), steps=1)

    assert generous.run(job_id) == "succeeded"

    assert json.loads((tmp_path / "job.json").read_text())["gpus"] == 4


def test_a_class_is_replaced_by_another_or_by_images(told: Any, jobs: Jobs) -> None:
    another = told(_amnesia(replace_with={"class_label": 1}))
    images = told(_amnesia(replace_with={"images": jobs.image_set()}))

    assert (another["replace_with"], another["inputs"]["surrogate"]) == ({"class_label": 1}, [])
    assert images["replace_with"] == {"images": True}
    assert images["inputs"]["surrogate"] == _numbered("inputs/surrogate")


def test_a_judge_of_labels_is_told_in_their_order(told: Any, jobs: Jobs) -> None:
    sets = {str(label): jobs.image_set() for label in reversed(range(12))}

    by_sets = told(_amnesia(judge={"sets": sets}))
    by_classifier = told(_amnesia(judge={"classifier": jobs.classifier()}))

    assert list(by_sets["judge"]["sets"]) == [str(label) for label in range(12)]
    assert by_classifier["judge"]["classes"] == ["smiling", "other"]
    assert by_classifier["digests"]["classifier_0"] == by_classifier["judge"]["sha256"]


def _of_concept(**changes: Any) -> dict[str, Any]:
    return _amnesia(target={"concept": "zero", "aliases": ["nought"]}, replace_with="others") | changes


def test_a_job_about_a_concept_is_told_its_names_and_what_stays(told: Any, jobs: Jobs) -> None:
    judge = {"classifier": jobs.classifier(), "shows": {"zero": "smiling", "a": "other"}}
    stays = {"concepts": ["two", "one"], "generated": 64}

    job = told(_of_concept(judge=judge, replace_with={"concept": "one"}), remember=stays)

    assert job["target"] == {"concept": "zero", "aliases": ["nought"]}
    assert job["replace_with"] == {"concept": "one"}
    assert job["judge"]["onnx"] == "inputs/classifiers/0.onnx"
    assert list(job["judge"]["shows"].items()) == [("a", "other"), ("zero", "smiling")]
    assert (job["remember"], job["inputs"]["remember_sets"]) == (stays, {})


def test_a_job_about_a_concept_is_told_what_is_not_said(told: Any) -> None:
    job = told(_of_concept(target={"concept": "zero"}))

    assert (job["target"], job["replace_with"]) == ({"concept": "zero", "aliases": []}, {"others": True})
    assert (job["judge"], job["remember"]) == (None, {"generated": 64})


def test_images_that_stay_are_told_by_the_concept_that_they_show(told: Any, jobs: Jobs) -> None:
    sets = {"two": jobs.image_set(), "a/b": jobs.image_set()}

    job = told(_of_concept(), remember={"sets": sets})

    assert job["remember"] == {"sets": ["a/b", "two"]}
    assert list(job["inputs"]["remember_sets"].items()) == [
        ("a/b", _numbered("inputs/remember_sets/0")),
        ("two", _numbered("inputs/remember_sets/1")),
    ]
    assert job["inputs"]["remember"] is None


def test_expired_images_of_a_concept_fail_the_job_in_their_place(supervisor: Supervisor, jobs: Jobs) -> None:
    images = jobs.image_set()
    job_id = jobs.queue(asked=_of_concept(), remember={"sets": {"a/b": images}})
    with jobs.database.transaction() as session:
        row = session.get_one(ImageSet, images)
        row.erased_at = row.expires_at

    assert supervisor.run(job_id) == "failed"

    assert (jobs.row(job_id).problem or {})["errors"][0]["pointer"] == "/remember/sets/a~1b"


def test_a_job_that_debias_a_condition_is_told_what_shows_each_class(told: Any, jobs: Jobs) -> None:
    wanted = {
        "target_distribution": {"smiling": 0.5, "other": 0.5},
        "tolerance": 0.03,
        "confidence": 0.95,
        "condition": {"concept": "a doctor", "aliases": ["a physician"]},
        "replacements": {"smiling": {"concept": "a smiling doctor"}, "other": {"concept": "a stern doctor"}},
    }
    asked = {"method": "selective-amnesia", "attribute": {"classifier": jobs.classifier()}, **wanted}

    job = told(asked, kind="debias", remember={"concepts": ["a nurse"], "generated": 64})

    assert job.items() >= wanted.items()
    assert list(job["replacements"]) == ["other", "smiling"]
    assert job["attribute"]["onnx"] == "inputs/classifiers/0.onnx"
    assert job["remember"] == {"concepts": ["a nurse"], "generated": 64}
    assert (job["inputs"]["surrogate"], job["inputs"]["fisher"]) == ([], {})
    assert job.keys().isdisjoint({"target", "judge", "replace_with"})


def test_expired_images_that_replace_a_class_fail_the_job_in_their_place(supervisor: Supervisor, jobs: Jobs) -> None:
    images = jobs.image_set()
    job_id = jobs.queue(asked=_amnesia(replace_with={"images": images}))
    with jobs.database.transaction() as session:
        row = session.get_one(ImageSet, images)
        row.erased_at = row.expires_at

    assert supervisor.run(job_id) == "failed"

    assert (jobs.row(job_id).problem or {})["errors"][0]["pointer"] == "/replace_with/images"


def test_a_job_that_debias_is_told_the_distribution(told: Any, jobs: Jobs) -> None:
    wanted = {"target_distribution": {"smiling": 0.5, "other": 0.5}, "tolerance": 0.03, "confidence": 0.95}
    held_out = {"evaluation": {"sample_grid": True, "held_out": {"images": jobs.image_set()}}}

    job = told(
        {"method": "steering", "attribute": {"classifier": jobs.classifier()}, **wanted, **held_out}, kind="debias"
    )

    assert job["kind"] == "debias"
    assert job.items() >= wanted.items()
    assert job["attribute"]["onnx"] == "inputs/classifiers/0.onnx"
    assert "target" not in job
    assert job["inputs"]["forget"] == []
    assert job["inputs"]["evaluation"]["held_out"] == _numbered("inputs/held_out")
    assert job["evaluation"] == {"sample_grid": True}


def test_the_checkpoints_own_classes_need_no_file(told: Any) -> None:
    job = told(
        {
            "method": "class-removal",
            "attribute": {"classes": True},
            "target_distribution": {"0": 1.0, "1": 0.0},
            "tolerance": 0.03,
            "confidence": 0.95,
        },
        kind="debias",
    )

    assert job["attribute"] == {"classes": True}
    assert job["_files"].keys() == {"inputs/checkpoint.safetensors"}


def test_a_classifier_that_was_erased_fails_the_job_in_its_place(supervisor: Supervisor, jobs: Jobs) -> None:
    judge = jobs.classifier()
    wanted = {"classifier": judge, "class": "smiling", "at_most": 0.1}
    job_id = jobs.queue(asked={"method": "steering", "target": {"attributes": [wanted]}})
    jobs.storage.erase(object_keys.classifier_prefix(jobs.tenant_id, judge))

    assert supervisor.run(job_id) == "failed"

    problem = jobs.row(job_id).problem or {}
    assert problem["errors"][0]["pointer"] == "/target/attributes/0/classifier"


def test_labelled_images_that_expired_fail_the_job_in_their_place(supervisor: Supervisor, jobs: Jobs) -> None:
    sets = {"a/b": jobs.image_set(), "c": jobs.image_set()}
    asked = {"method": "steering", "target": {"attributes": [{"sets": sets, "class": "c", "at_most": 0.1}]}}
    job_id = jobs.queue(asked=asked)
    with jobs.database.transaction() as session:
        row = session.get_one(ImageSet, sets["a/b"])
        row.erased_at = row.expires_at

    assert supervisor.run(job_id) == "failed"

    problem = jobs.row(job_id).problem or {}
    assert problem["errors"][0]["pointer"] == "/target/attributes/0/sets/a~1b"
    assert "Upload them again" in problem["detail"]


def test_a_job_resumes_with_the_same_judges(supervisor: Supervisor, jobs: Jobs, tmp_path: Path) -> None:
    path = tmp_path / "job.json"
    attribute = {"classifier": jobs.classifier()}
    asked = {
        "method": "steering",
        "attribute": attribute,
        "target_distribution": {},
        "tolerance": 0.1,
        "confidence": 0.9,
    }
    job_id = jobs.queue(kind="debias", asked=asked, keep_job=str(path), steps=8, die_at=6, state_every=2)

    assert supervisor.run(job_id) == "queued"
    before = json.loads(path.read_text())
    assert supervisor.run(job_id) == "succeeded"

    after = json.loads(path.read_text())
    assert after["attribute"] == before["attribute"]
    assert after["resume"] is not None


def test_rows_are_the_tenants_own(supervisor: Supervisor, jobs: Jobs) -> None:
    judge = jobs.classifier()
    wanted = {"classifier": judge, "class": "smiling", "at_most": 0.1}
    job_id = jobs.queue(asked={"method": "steering", "target": {"attributes": [wanted]}})
    with jobs.database.transaction() as session:
        session.get_one(Classifier, judge).tenant_id = _other_tenant(session)

    assert supervisor.run(job_id) == "failed"
    assert (jobs.row(job_id).problem or {})["type"] == "urn:forgetd:problem:input-missing"


def _other_tenant(session: Any) -> str:
    from services import tenancy

    return tenancy.create_key(session, tenant="another", name="test").tenant_id
