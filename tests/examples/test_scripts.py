"""The scripts that call a service send bodies that it takes, draw what it reports, and say how it ended; and taming a
flow of one's own, which calls none, runs."""

from __future__ import annotations

import json
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from evidence.amnesia_evaluation import evaluate_amnesia
from evidence.amnesia_records import Goal
from evidence.amnesia_report import build_amnesia_report
from evidence.balance_evaluation import evaluate_balance
from evidence.balance_report import Ingredient, Recipe, build_balance_report
from evidence.drift import SampleHealth
from evidence.fractions import Bound, fraction_of, judge_fraction
from evidence.kid import Kid
from evidence.report_parts import RunFacts
from evidence.steering_records import ClassChange, JudgeEvaluation, RelearnProbe, SteeringEvaluation
from evidence.steering_report import build_steering_report
from examples import (
    debias,
    debias_condition,
    digits,
    forget_class,
    forget_concept,
    labelled_sets,
    lower_attribute,
    own_flow,
    pictures,
    service,
)
from models.checkpoints import load_checkpoint
from models.class_prior import ClassPriorFlow
from models.training import TransformerRecipe
from services.conditional_checks import CONDITIONAL, check_conditions
from services.job_checks import METHODS_OF_FAMILY
from services.requests import DebiasRequest, ForgetRequest
from tests.cli.scripted import Answer, ScriptedServer
from tests.evidence.painted import Levels, Painter

HEX = "0192f3c1a2b47d0e8f1a2b3c4d5e6f70"
CHECKPOINT, CLASSIFIER, JOB = f"ckpt_{HEX}", f"clf_{HEX}", f"job_{HEX}"
DOCS = Path(__file__).resolve().parents[2] / "docs"
POSTED = re.compile(r'/jobs/(\w+)" <<EOF\n(.*?)\nEOF', re.DOTALL)
SOUND = SampleHealth(n=64, finite=1.0, in_range=0.99, round_trip_error=1e-5)


def report_on(after: float, *, kind: str = "attribute") -> dict[str, Any]:
    """A report that 1,000 samples show a 1 at this rate, where at most 2 % was asked for."""
    bound, near = Bound(high=0.02), Kid(1e-4, 2e-4, 3e-4, 400, 300, "pixels")
    changes = []
    for name in digits.CLASSES:
        before, now = (
            fraction_of(round(share * 1000), 1000) for share in ((0.11, after) if name == "1" else (0.1, 0.1))
        )
        told = (bound, judge_fraction(now, bound)) if name == "1" else (None, None)
        changes.append(ClassChange(name, before, now, *told, near))
    evaluation = SteeringEvaluation(
        kind=kind, image_shape=(1, 16, 16), n_bits=4, samples=1000, confidence=0.95, seed=0,
        judges=(JudgeEvaluation("digit", tuple(changes), changes[1].judgement, fraction_of(190, 200)),),
        remember=None, held_out=None, health_base=SOUND, health_steered=SOUND,
        relearn=RelearnProbe("1", 0, 5, after, 0.4), notes=(),
    )  # fmt: skip
    rows = [{"step": 0.0, "1": 0.11, "2": 0.09, "n": 500.0}, {"step": 10.0, "1": after, "2": 0.1, "n": 500.0}]
    text = build_steering_report(evaluation, RunFacts(method="steering", steps=10), history=rows).to_json()
    document: dict[str, Any] = json.loads(text)
    return document


def report_on_a_condition(*, shown: float) -> dict[str, Any]:
    """A report that a forgotten class comes to show another in this share of samples, where .9 was asked for."""
    found = evaluate_amnesia(
        Painter({}), Painter({0: (1, shown)}), Levels(), label=0, replacement=1, image_shape=(1, 6, 6), n_bits=8,
        samples=400, others=400, goal=Goal(replaced_at_least=0.9), seed=1,
    )  # fmt: skip
    document: dict[str, Any] = json.loads(build_amnesia_report(found, replacement="what class 1 shows").to_json())
    return document


def report_on_a_balance(*, half: float) -> dict[str, Any]:
    """A report that a condition shows another in this share of samples and itself else, where each half was asked."""
    target = {"a": 0.5, "b": 0.5, "c": 0.0, "nothing": 0.0}
    found = evaluate_balance(
        Painter({}), Painter({0: (1, half)}), Levels(), label=0, names=["x", "y", "z"], image_shape=(1, 6, 6), n_bits=8,
        bounds={name: Bound.around(share, 0.1) for name, share in target.items()}, samples=800, others=400, seed=1,
    )  # fmt: skip
    recipe = Recipe(target, 0.1, [Ingredient("x", 0.5, {"a": 1, "b": 0, "c": 0, "nothing": 0}),
                                  Ingredient("y", 0.5, {"a": 0, "b": 1, "c": 0, "nothing": 0})])  # fmt: skip
    document: dict[str, Any] = json.loads(build_balance_report(found, recipe=recipe).to_json())
    return document


def answer(**members: Any) -> Answer:
    return Answer(body=json.dumps(members).encode())


READY = answer(id=CHECKPOINT, status="ready")
JUDGE = answer(id=CLASSIFIER, classes=list(digits.CLASSES))
QUEUED, DONE = answer(id=JOB, status="queued"), answer(id=JOB, status="succeeded")
MET, MISSED = answer(**report_on(0.01)), answer(**report_on(0.05))


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., ScriptedServer]]:
    """A server that plays these answers in order, and is the one that scripts find."""
    servers: list[ScriptedServer] = []

    def make(*answers: Answer) -> ScriptedServer:
        servers.append(ScriptedServer())
        servers[-1].script = list(answers)
        monkeypatch.setenv("FORGETD_URL", servers[-1].url)
        monkeypatch.setenv("FORGETD_KEY", "fgt_" + "0" * 32 + "_" + "k" * 43)
        return servers[-1]

    yield make
    for server in servers:
        server.close()


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    """A base and a classifier, as arguments; to the scripts they are bytes."""
    for name in ("base.safetensors", "digits.onnx"):
        (tmp_path / name).write_bytes(name.encode())
    return ["--base", str(tmp_path / "base.safetensors"), "--classifier", str(tmp_path / "digits.onnx")]


def bodies(server: ScriptedServer, kind: str) -> list[dict[str, Any]]:
    """The bodies of the jobs that were posted."""
    return [json.loads(one.body) for one in server.received if (one.method, one.path) == ("POST", f"/jobs/{kind}")]


def words(picture: Path) -> set[str]:
    """The text in an SVG file that stands alone."""
    root = ElementTree.parse(picture).getroot()
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    return {(element.text or "").strip() for element in root.iter("{http://www.w3.org/2000/svg}text")}


def test_an_attribute_is_asked_for_and_its_curve_drawn(
    serve: Callable[..., ScriptedServer], files: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server = serve(READY, READY, JUDGE, QUEUED, DONE, MET)

    code = lower_attribute.main([*files, "--at-most", "0.02", "--picture", str(tmp_path / "picture.svg")])

    (body,) = bodies(server, "forget")
    (attribute,) = ForgetRequest.model_validate(body).target.attributes or []
    assert (attribute.name, attribute.at_most, attribute.classifier) == ("1", 0.02, CLASSIFIER)
    assert code == 0
    assert re.search(r"^1 +11\.0 % +1\.0 % .* at most 2 %$", capsys.readouterr().out, re.MULTILINE)
    assert {"digit", "1", "fraction of samples"} <= words(tmp_path / "picture.svg")


def test_a_job_that_missed_is_told_with_its_figures(
    serve: Callable[..., ScriptedServer], files: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    serve(READY, READY, JUDGE, QUEUED, answer(id=JOB, status="failed", reason="criteria_not_met"), MISSED)

    assert lower_attribute.main(files) == 1
    assert "criteria_not_met: The criteria were not met: “1” from 11.0 % to 5.0 %" in capsys.readouterr().out


def test_a_job_without_a_verdict_ends_a_script_in_the_words_of_the_service(
    serve: Callable[..., ScriptedServer], files: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    problem = {"title": "The target cannot be reached.", "detail": "Ask for less."}
    serve(READY, READY, JUDGE, QUEUED, answer(id=JOB, status="failed", reason="user_error", problem=problem))

    assert service.script(lambda: lower_attribute.main(files)) == 5
    assert "Ask for less." in capsys.readouterr().err


def test_a_distribution_over_the_digits_is_asked_for_and_drawn(
    serve: Callable[..., ScriptedServer], files: list[str], tmp_path: Path
) -> None:
    server = serve(READY, READY, JUDGE, QUEUED, DONE, answer(**report_on(0.01, kind="debias")))

    debias.main([*files, "--odd", "0.7", "--picture", str(tmp_path / "picture.svg")])

    (body,) = bodies(server, "debias")
    target = DebiasRequest.model_validate(body).target_distribution
    assert sum(share for name, share in target.items() if int(name) % 2) == pytest.approx(0.7)
    assert {*digits.CLASSES, "before", "after", "asked for"} <= words(tmp_path / "picture.svg")


def test_a_class_is_asked_for_at_the_prior_and_in_the_weights(
    serve: Callable[..., ScriptedServer], files: list[str], tmp_path: Path
) -> None:
    images = answer(id=f"imgs_{HEX}", count=128)
    server = serve(READY, READY, QUEUED, images, QUEUED, DONE, MET, DONE, MET)

    forget_class.main([*files[:2], "--picture", str(tmp_path / "picture.svg")])

    asked = [ForgetRequest.model_validate(body) for body in bodies(server, "forget")]
    decided = [one.decided(METHODS_OF_FAMILY["class-prior"]) for one in asked]
    assert [(one.target.where, one.method) for one in decided] == [
        ("prior", "class-removal"),
        ("weights", "class-taming"),
    ]
    assert {"40.0 %", "in the weights: unlearning"} <= words(tmp_path / "picture.svg")


def test_the_flow_of_classes_is_trained_to_a_checkpoint(tmp_path: Path) -> None:
    forget_class.train(tmp_path / "cache" / "base.safetensors", TransformerRecipe(steps=1, batch=4))

    flow = load_checkpoint(tmp_path / "cache" / "base.safetensors")
    assert isinstance(flow, ClassPriorFlow)
    assert flow.classes() == list(range(10))


def test_labelled_sets_are_the_ends_of_what_the_photos_measure(
    serve: Callable[..., ScriptedServer], files: list[str]
) -> None:
    sets = [answer(id=f"imgs_{number:032x}", count=120) for number in (1, 2)]
    server = serve(READY, READY, *sets, QUEUED, DONE, MET)

    labelled_sets.main(files[:2])

    (body,) = bodies(server, "forget")
    (attribute,) = ForgetRequest.model_validate(body).target.attributes or []
    assert attribute.sets == {"dark": f"imgs_{1:032x}", "bright": f"imgs_{2:032x}"}
    ramp = torch.arange(9, dtype=torch.uint8).view(9, 1, 1, 1).expand(9, 1, 32, 32)
    assert {name: len(part) for name, part in labelled_sets.labelled(ramp).items()} == {"dark": 3, "bright": 3}
    assert int(labelled_sets.labelled(ramp)["dark"].max()) < int(labelled_sets.labelled(ramp)["bright"].min())


def test_a_flow_of_ones_own_is_tamed_and_drawn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    own_flow.main(["--steps", "60", "--max-steps", "3", "--picture", str(tmp_path / "picture.svg")])

    assert capsys.readouterr().out.count("z after") == 2
    assert {"forget", "remember", "base model", "after"} <= words(tmp_path / "picture.svg")


def test_equal_reports_are_equal_pictures_without_a_date(tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    report.write_text(json.dumps(report_on(0.01)))
    for name in ("one.svg", "two.svg"):
        pictures.main(str(report), str(tmp_path / name))

    first, second = ((tmp_path / name).read_bytes() for name in ("one.svg", "two.svg"))
    assert first == second
    assert b"date" not in first.lower()
    assert len(first) < 60_000


@pytest.mark.parametrize(("shown", "code"), [(1.0, 0), (0.5, 1)])
def test_a_concept_is_asked_for_by_all_its_names_and_its_picture_drawn(
    shown: float,
    code: int,
    serve: Callable[..., ScriptedServer],
    files: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    server = serve(READY, READY, JUDGE, QUEUED, DONE, answer(**report_on_a_condition(shown=shown)))

    ended = forget_concept.main([*files, "--concept", "seven", "--picture", str(tmp_path / "picture.svg")])

    (body,) = bodies(server, "forget")
    request = ForgetRequest.model_validate(body).decided(METHODS_OF_FAMILY["stable-diffusion"])
    check_conditions(request, {"family": "stable-diffusion"})
    assert (request.target.concept, request.target.aliases) == ("seven", ["the digit 7"])
    assert "seven" not in (request.remember.concepts or [])
    assert len(request.remember.concepts or []) == 9
    assert ended == code
    assert "at least 90 %" in capsys.readouterr().out
    assert {"forgotten", "shows b instead", "before", "after"} <= words(tmp_path / "picture.svg")


@pytest.mark.parametrize(("half", "code"), [(0.5, 0), (0.9, 1)])
def test_a_condition_is_balanced_over_two_others_and_its_picture_drawn(
    half: float, code: int, serve: Callable[..., ScriptedServer], files: list[str], tmp_path: Path
) -> None:
    server = serve(READY, READY, JUDGE, QUEUED, DONE, answer(**report_on_a_balance(half=half)))

    ended = debias_condition.main([*files, "--halves", "one", "seven", "--picture", str(tmp_path / "picture.svg")])

    (body,) = bodies(server, "debias")
    request = DebiasRequest.model_validate(body).decided(METHODS_OF_FAMILY["stable-diffusion"])
    check_conditions(request, {"family": "stable-diffusion"})
    assert {name for name, share in request.target_distribution.items() if share == 0.5} == {"1", "7"}
    assert ended == code
    assert {"asked for", "before", "after", "nothing"} <= words(tmp_path / "picture.svg")


@pytest.mark.parametrize(
    "wrong", [["--concept", "one"], ["--instead", "zero"]], ids=["what stands in is forgotten", "the same"]
)
def test_a_concept_does_not_take_its_own_place(wrong: list[str]) -> None:
    with pytest.raises(SystemExit):
        forget_concept.main(wrong)


def test_a_digit_is_not_balanced_over_itself() -> None:
    with pytest.raises(SystemExit):
        debias_condition.main(["--halves", "three", "eight"])


def test_what_samples_show_is_drawn_for_each_replacement(tmp_path: Path) -> None:
    reports = {"one": report_on_a_condition(shown=1.0), "another": report_on_a_condition(shown=0.5)}

    pictures.save_shown(reports, tmp_path / "picture.svg")

    assert {"before", "one", "another", "what was forgotten", "100.0 %"} <= words(tmp_path / "picture.svg")


@pytest.mark.parametrize("about", ["a condition", "a balance"])
def test_a_report_on_a_condition_is_drawn_from_its_file(about: str, tmp_path: Path) -> None:
    told = report_on_a_condition(shown=0.5) if about == "a condition" else report_on_a_balance(half=0.5)
    (tmp_path / "report.json").write_text(json.dumps(told))

    pictures.main(str(tmp_path / "report.json"), str(tmp_path / "picture.svg"))

    assert {"before", "after", "asked for"} <= words(tmp_path / "picture.svg")


def test_the_bodies_in_the_how_tos_are_bodies_that_the_service_takes() -> None:
    kinds = {"CHECKPOINT": "ckpt", "CLASSIFIER": "clf", "PHOTOS": "imgs", "IMAGES": "imgs"}
    models = {"forget": ForgetRequest, "debias": DebiasRequest}
    methods: dict[str, list[str | None]] = {}
    for page in sorted(DOCS.glob("howto-*.md")):
        for kind, text in POSTED.findall(page.read_text()):
            body = re.sub(r"\$(\w+)", lambda name: f"{kinds[name[1]]}_{HEX}", text)
            family = family_of(page.stem, body)
            request = models[kind].model_validate_json(body).decided(METHODS_OF_FAMILY[family])
            if family in CONDITIONAL:
                check_conditions(request, {"family": family, "architecture": {"n_classes": 10}})
            methods.setdefault(page.stem, []).append(request.method)

    assert methods == {
        "howto-choose-a-replacement": ["selective-amnesia"],
        "howto-debias": ["steering", "selective-amnesia"],
        "howto-forget-a-class": ["class-taming"],
        "howto-forget-a-class-of-a-conditional-model": ["selective-amnesia"],
        "howto-forget-a-concept": ["selective-amnesia"],
        "howto-forget-a-person": ["flow-taming"],
        "howto-lower-an-attribute": ["steering"],
    }


def family_of(page: str, body: str) -> str:
    """The family of the checkpoint that an example is about."""
    if '"concept"' in body:
        return "stable-diffusion"
    return (
        "vae"
        if page in ("howto-choose-a-replacement", "howto-forget-a-class-of-a-conditional-model")
        else "class-prior"
    )


def test_the_flow_in_the_how_to_is_tamed_as_it_stands(capsys: pytest.CaptureFixture[str]) -> None:
    (program,) = re.findall(r"```python\n(.*?)```", (DOCS / "howto-tame-your-own-flow.md").read_text(), re.DOTALL)

    exec(program, {"__name__": "page"})

    assert capsys.readouterr().out.startswith("True ")
