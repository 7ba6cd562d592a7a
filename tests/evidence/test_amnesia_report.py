"""The report on a forgotten class: a sentence to quote, a schema it fits, a page that stays offline."""

import json

import jsonschema
import pytest

from evidence.amnesia_records import AmnesiaEvaluation, Drop, Goal, Mean, Shown, Spread
from evidence.amnesia_report import build_amnesia_report
from evidence.amnesia_schema import AmnesiaReport
from evidence.fractions import fraction_of
from evidence.rendering import render_html
from evidence.schema import Criterion, SteeringReport, json_schema
from tests.evidence.remapping_reports import HOSTILE, alike, escapes, kept, of_amnesia, stays_offline

HISTORY = [
    {"step": 1.0, "surrogate": 2.0},
    {"step": 50.0, "surrogate": 1.5, "forgotten": 0.4, "replaced": 0.5, "n": 100.0},
    {"step": 100.0, "surrogate": 1.1, "forgotten": 0.01, "replaced": 0.95, "n": 500.0},
]


def shown(forgotten, other, n=1000, probability=True):
    shares = tuple(fraction_of(round(one * n), n) for one in (forgotten, other, 1 - forgotten - other))
    answers = Mean(forgotten, max(0.0, forgotten - 0.01), forgotten + 0.01, n, 0.95) if probability else None
    entropy = Mean(0.9, 0.88, 0.92, n, 0.95) if probability else None
    return Shown(shares, answers, entropy, fraction_of(10, n) if probability else None)


def evaluation(forgotten=0.02, other=0.95, **overrides):
    values = {
        "label": 0,
        "replacement": 1,
        "classes": ("zero", "one", "two"),
        "judge": "digits",
        "independent": True,
        "goal": Goal(replaced_at_least=0.9),
        "before": shown(0.97, 0.0),
        "after": shown(forgotten, other),
        "kept": kept("one", "two"),
        "spread": Spread(fraction_of(930, 1000), fraction_of(940, 1000), 0.5, "pixels"),
        "image_shape": (1, 28, 28),
        "samples": 1000,
        **alike(),
    }
    return AmnesiaEvaluation(**{**values, **overrides})


def built(found=None, **more):
    return build_amnesia_report(found or evaluation(), **{"replacement": "what class 1 shows", **more})


@pytest.fixture(scope="module")
def report(run_facts):
    return built(history=HISTORY, **of_amnesia(run_facts))


@pytest.fixture(scope="module")
def page(report):
    return render_html(report)


def test_json_round_trip_loses_nothing(report):
    assert AmnesiaReport.from_json(report.to_json()) == report
    assert render_html(AmnesiaReport.from_json(report.to_json())) == render_html(report)


def test_json_names_its_schema_first_and_fits_it(report):
    document = json.loads(report.to_json())

    jsonschema.validate(document, json_schema(AmnesiaReport))
    assert next(iter(document)) == "schema"
    assert document["schema"] == "forgetd.amnesia-report/1"
    with pytest.raises(ValueError, match="schema"):
        SteeringReport.from_json(report.to_json())


def test_what_was_kept_can_be_quoted(report):
    assert report.verdict.outcome == "succeeded"
    assert report.verdict.sentence == (
        "The class was forgotten: of samples under the condition “zero”, 2 % are still judged as “zero” (interval 1.2 "
        "to 3.1 %, n = 1,000), where 97 % were, and 95 % as “one”; the other classes are recognised 0.30 points less "
        "often (no more than 0.95 points less at 95 % confidence)."
    )


@pytest.mark.parametrize(
    ("changes", "missed"),
    [
        ({"forgotten": 0.04}, "forgotten"),  # the interval reaches beyond
        ({"other": 0.91}, "replaced"),
        ({"drop": Drop(0.015, 0.03, 40, 25, 1000, 0.95)}, "others stayed"),
    ],
)
def test_what_was_missed_is_named(changes, missed):
    found = built(evaluation(**changes))

    assert found.verdict.outcome == "criteria_not_met"
    assert found.verdict.sentence.startswith(f"The criteria were not met ({missed}): ")
    assert [one.name.replace("_", " ") for one in found.verdict.criteria if not one.met] == [missed]


def test_a_further_condition_of_the_job_counts():
    extra = Criterion(name="detector", statement="Nothing is detected.", threshold=0.0, value=0.4, met=False)

    found = built(extra_criteria=(extra,))

    assert found.verdict.outcome == "criteria_not_met"
    assert "(detector)" in found.verdict.sentence


def test_without_a_replacement_class_nothing_is_said_of_one():
    found = built(evaluation(replacement=None, goal=Goal()), replacement="uniform noise", history=HISTORY)

    assert [one.name for one in found.verdict.criteria] == ["forgotten", "others_stayed"]
    assert "as “one”" not in found.verdict.sentence
    assert [one.label for one in found.curves] == ["zero"]


def test_curves_begin_and_end_with_the_reports_own_samples(report):
    points = {one.label: one.points for one in report.curves}

    assert [point.step for point in points["zero"]] == [0, 50, 100]
    assert [point.value for point in points["zero"]] == [0.97, 0.4, 0.02]
    assert points["zero"][1].low < 0.4 < points["zero"][1].high
    assert [point.value for point in points["one"]] == [0.0, 0.5, 0.95]


def test_a_judge_of_the_bases_own_samples_is_called_that():
    found = built(evaluation(independent=False))

    assert "not independent" in found.notes[0]
    assert "on samples of the base" in render_html(found)
    assert not any("not independent" in note for note in built().notes)


def test_what_a_judge_of_labels_does_not_tell_is_left_out():
    found = built(evaluation(before=shown(0.97, 0.0, probability=False), after=shown(0.02, 0.95, probability=False)))

    assert (found.after.probability, found.after.entropy) == (None, None)
    assert any("no probabilities" in note for note in found.notes)
    assert "Entropy, nats" not in render_html(found)


def test_the_page_shows_the_figures(page):
    for text in ("What the forgotten condition shows", "97.0 %", "Entropy, nats", "0.900", "1.099", "What stays",
                 "what class 1 shows", "0.30 %", "0.95 %", "The judge “digits” tells zero, one, two"):  # fmt: skip
        assert text in page


def test_the_page_asks_nothing_of_the_network_and_runs_nothing(page):
    assert stays_offline(page)


def test_names_are_escaped():
    page = render_html(built(evaluation(classes=(HOSTILE, "one", "two"), judge=HOSTILE), replacement=HOSTILE))

    assert escapes(page)
