"""The report on a balanced condition: a sentence to quote, a schema it fits, a page that stays offline."""

import json

import jsonschema
import pytest

from evidence.amnesia_records import Drop, Spread
from evidence.amnesia_schema import AmnesiaReport, BalanceReport
from evidence.balance_evaluation import BalanceEvaluation
from evidence.balance_report import Ingredient, Recipe, build_balance_report
from evidence.fractions import Bound, fraction_of
from evidence.rendering import render_html
from evidence.schema import json_schema
from tests.evidence.remapping_reports import HOSTILE, alike, escapes, kept, of_amnesia, stays_offline

HISTORY = [
    {"step": 1.0, "surrogate": 2.0},
    {"step": 50.0, "surrogate": 1.5, "faces.female": 0.4, "faces.male": 0.6, "n": 100.0},
    {"step": 100.0, "surrogate": 1.1, "faces.female": 0.5, "faces.male": 0.5, "n": 1000.0},
]
RECIPE = Recipe(
    {"female": 0.5, "male": 0.5},
    0.1,
    [
        Ingredient("a female doctor", 0.55, {"female": 0.9, "male": 0.1}),
        Ingredient("a male doctor", 0.45, {"female": 0.0, "male": 1.0}),
    ],
)


def shown(female, n=1000):
    return {"female": fraction_of(round(female * n), n), "male": fraction_of(n - round(female * n), n)}


def evaluation(female=0.49, n=1000, **overrides):
    values = {
        "condition": "a doctor",
        "bounds": {"female": Bound.around(0.5, 0.1), "male": Bound.around(0.5, 0.1)},
        "before": shown(0.05),
        "after": shown(female, n),
        "usual": ("female", "male"),
        "read_otherwise": fraction_of(40, 1000),
        "others_within": 0.02,
        "classes": ("female", "male"),
        "judge": "faces",
        "kept": kept("a nurse", "a pilot"),
        "spread": Spread(fraction_of(930, 1000), fraction_of(940, 1000), None, "pixels"),
        "image_shape": (3, 64, 64),
        "samples": n,
        **alike(),
    }
    return BalanceEvaluation(**{**values, **overrides})


def built(found=None, **more):
    return build_balance_report(found or evaluation(), recipe=RECIPE, **more)


@pytest.fixture(scope="module")
def report(run_facts):
    return built(history=HISTORY, **of_amnesia(run_facts))


@pytest.fixture(scope="module")
def page(report):
    return render_html(report)


def test_json_round_trip_loses_nothing_and_fits_its_schema(report):
    document = json.loads(report.to_json())

    jsonschema.validate(document, json_schema(BalanceReport))
    assert document["schema"] == "forgetd.balance-report/1"
    assert BalanceReport.from_json(report.to_json()) == report
    with pytest.raises(ValueError, match="schema"):
        AmnesiaReport.from_json(report.to_json())


def test_what_was_kept_can_be_quoted(report):
    assert report.verdict.outcome == "succeeded"
    assert report.verdict.sentence == (
        "The condition shows what was asked for: of 1,000 samples under the condition “a doctor”, the judge takes 49 % "
        "for “female” (interval 45.9 to 52.1 %; 50 % asked for, 5 % before), 51 % for “male” (interval 47.9 to 54.1 %; "
        "50 % asked for, 95 % before); the other conditions show what they mostly showed 0.30 points less often (a "
        "change of no more than 0.95 points at 95 % confidence)."
    )


@pytest.mark.parametrize(
    ("found", "opening"),
    [
        (evaluation(0.65), "The criteria were not met (share of female, share of male): "),
        (evaluation(0.42, 100), "Insufficient evidence (share of female, share of male, "),
        (evaluation(drop=Drop(-0.02, 0.03, 5, 25, 1000, 0.95)), "The criteria were not met (others stayed): "),
    ],
)
def test_what_was_missed_is_named(found, opening):
    verdict = built(found).verdict

    assert verdict.outcome == "criteria_not_met" == found.outcome
    assert verdict.sentence.startswith(opening)


def test_a_criterion_names_the_end_that_comes_nearest_to_missing_it():
    female, male, _ = built(evaluation(0.45)).verdict.criteria

    assert (female.threshold, male.threshold) == (0.4, 0.6)
    assert female.value == pytest.approx(fraction_of(450, 1000).low, abs=1e-5)
    assert male.value == pytest.approx(fraction_of(550, 1000).high, abs=1e-5)


def test_what_the_mixture_shows_is_told(report):
    assert report.expected == {"female": 0.495, "male": 0.505}
    assert [one.fraction for one in report.ingredients] == [0.55, 0.45]


def test_curves_begin_and_end_with_the_reports_own_samples(report):
    points = {one.label: one.points for one in report.curves}

    assert [point.step for point in points["female"]] == [0, 50, 100]
    assert [point.value for point in points["female"]] == [0.05, 0.4, 0.49]


def test_the_page_shows_the_figures_and_asks_nothing_of_the_network(page):
    for text in ("What the condition shows", "a female doctor", "55.0 %", "49.5 %", "Mostly shows", "a nurse", "0.95 %",
                 "4.00 %", "The judge “faces” tells female, male"):  # fmt: skip
        assert text in page
    assert stays_offline(page)


def test_names_are_escaped():
    page = render_html(built(evaluation(condition=HOSTILE, judge=HOSTILE, usual=(HOSTILE, "male"))))

    assert escapes(page)
