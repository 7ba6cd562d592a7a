"""The report on a steered flow: words that can be quoted, a schema it fits, a page that stays offline."""

import json
import re
from dataclasses import replace
from html.parser import HTMLParser

import jsonschema
import numpy as np
import pytest

from evidence.drift import Drift, SampleHealth
from evidence.fractions import Bound, Judgement, fraction_of, judge_fraction
from evidence.kid import Kid
from evidence.rendering import render_html
from evidence.report_parts import RunFacts
from evidence.schema import Criterion, Report, SteeringReport, json_schema
from evidence.steering_records import (
    ClassChange,
    JudgeEvaluation,
    LikelihoodChange,
    RelearnProbe,
    SteeringEvaluation,
)
from evidence.steering_report import build_steering_report

HOSTILE = "<script>alert('x')</script>\"&$\\frac{--><img src=x onerror=alert(1)>"
SOUND = SampleHealth(n=64, finite=1.0, in_range=0.99, round_trip_error=1e-5)
HISTORY = [
    {"step": 0.0, "loss": 2.0, "smile.yes": 0.5, "smile.no": 0.5, "n": 512.0},
    {"step": 20.0, "loss": 1.5, "smile.yes": 0.3, "smile.no": 0.7, "n": 512.0},
    {"step": 30.0, "loss": 1.2},
    {"step": 40.0, "loss": 1.1, "smile.yes": 0.12, "smile.no": 0.88},
]


def change(name, before, after, n=1000, bound=None, kid=None):
    fractions = fraction_of(round(before * n), n), fraction_of(round(after * n), n)
    told = None if bound is None else judge_fraction(fractions[1], bound)
    return ClassChange(name, *fractions, bound, told, kid or Kid(1e-4, 2e-4, 3e-4, 400, 300, "pixels"))


ACCURACY = fraction_of(195, 200)
AT_MOST = Bound(high=0.15)


def judged(*changes, name="smile", accuracy=ACCURACY):
    told = next((one.judgement for one in changes if one.judgement), Judgement("inside"))
    return JudgeEvaluation(name, changes, told, accuracy)


def evaluation(after=0.1, bound=AT_MOST, n=1000, **overrides):
    rng = np.random.default_rng(1)
    nll = rng.normal(20.0, 3.0, 50)
    values = {
        "kind": "attribute",
        "image_shape": (1, 4, 4),
        "n_bits": 5,
        "samples": n,
        "confidence": 0.95,
        "seed": 7,
        "judges": (judged(change("no", 0.5, 1 - after, n), change("yes", 0.5, after, n, bound)),),
        "remember": LikelihoodChange(nll, nll + 0.5, 1, Drift(0.16, 0.01, 50)),
        "held_out": LikelihoodChange(nll[:20] + 2, nll[:20] + 2.5, 1, Drift(0.17, 0.02, 20)),
        "health_base": SOUND,
        "health_steered": SOUND,
        "relearn": None,
        "notes": ("A note.",),
    }
    return SteeringEvaluation(**{**values, **overrides})


def page_of(report):
    return render_html(report)


@pytest.fixture(scope="module")
def report(run_facts):
    facts = replace(run_facts, method="steering", steps=50)
    return build_steering_report(evaluation(), facts, history=HISTORY, history_samples=512)


@pytest.fixture(scope="module")
def page(report):
    return render_html(report)


def test_json_round_trip_loses_nothing(report):
    assert SteeringReport.from_json(report.to_json()) == report
    assert SteeringReport.from_json(report.to_json()).to_json() == report.to_json()


def test_page_is_drawn_from_json_alone(report, page):
    assert render_html(SteeringReport.from_json(report.to_json())) == page


def test_json_names_its_schema_first_and_fits_it(report):
    document = json.loads(report.to_json())

    jsonschema.validate(document, json_schema(SteeringReport))
    assert next(iter(document)) == "schema"
    assert document["schema"] == "forgetd.steering-report/1"


def test_the_two_kinds_of_report_are_not_mistaken(report):
    with pytest.raises(ValueError, match="schema"):
        Report.from_json(report.to_json())


def test_a_kept_bound_can_be_quoted(report):
    sentence = report.verdict.sentence

    assert report.verdict.outcome == "succeeded"
    assert sentence.startswith("The fraction that was asked for is kept, with its whole interval, by 1,000 samples")
    assert "“yes” from 50.0 % to 10.0 % of samples" in sentence
    assert "at or below 15 %" in sentence


def test_several_kept_bounds_are_counted():
    judges = (judged(change("a", 0.5, 0.3, bound=Bound(0.2, 0.4)), change("b", 0.5, 0.7, bound=Bound(0.6, 0.8))),)

    sentence = build_steering_report(evaluation(judges=judges)).verdict.sentence

    assert sentence.startswith("All 2 fractions that were asked for are kept")


def test_a_missed_bound_is_told_with_its_numbers():
    verdict = build_steering_report(evaluation(after=0.4)).verdict

    assert verdict.outcome == "criteria_not_met"
    assert "“yes” from 50.0 % to 40.0 %" in verdict.sentence
    assert "at or below 15 % was asked for" in verdict.sentence


def test_insufficient_evidence_names_the_samples_that_would_do():
    few = evaluation(after=0.13, n=200)

    report = build_steering_report(few)

    assert report.verdict.outcome == "criteria_not_met"
    assert report.verdict.sentence.startswith("Insufficient evidence: “yes” from")
    assert f"{few.needed:,} samples would do where 200 were drawn" in report.verdict.sentence
    assert "insufficient evidence" in page_of(report)
    assert f"{few.needed:,} samples would do" in page_of(report)


def test_unsound_samples_fail_a_kept_bound():
    broken = SampleHealth(n=64, finite=0.5, in_range=0.99, round_trip_error=None)

    verdict = build_steering_report(evaluation(health_steered=broken)).verdict

    assert verdict.outcome == "criteria_not_met"
    assert "samples sound" in verdict.sentence


def test_extra_criterion_can_fail_the_job():
    strict = Criterion(name="confirmed", statement="Confirmed.", threshold=0.0, value=0.1, met=False)

    verdict = build_steering_report(evaluation(), extra_criteria=[strict]).verdict

    assert verdict.outcome == "criteria_not_met"
    assert "confirmed" in verdict.sentence


def test_curves_carry_the_runs_fractions_with_intervals(report):
    curve = next(one for one in report.curves if one.label == "yes")

    assert [point.step for point in curve.points] == [0, 20, 40, 50]
    assert curve.points[1].value == pytest.approx(0.3, abs=1e-3)
    assert all(point.low < point.value < point.high for point in curve.points)
    assert curve.points[-1].value == 0.1  # the report's own samples


def test_fractions_without_samples_have_no_interval():
    rows = [{"step": 0, "yes": 0.5}, {"step": 1, "yes": 0.2}]

    (curve,) = build_steering_report(evaluation(), history=rows).curves

    assert [(point.value, point.low) for point in curve.points] == [(0.5, None), (0.2, None)]


def test_curves_of_two_judges_are_kept_apart():
    judges = (judged(change("yes", 0.5, 0.1, bound=Bound(high=0.2))), judged(change("yes", 0.4, 0.4), name="hat"))
    rows = [{"step": 0, "smile.yes": 0.5, "hat.yes": 0.4, "yes": 0.9}]

    curves = build_steering_report(evaluation(judges=judges), history=rows).curves

    assert [(one.judge, one.points[0].value) for one in curves] == [("smile", 0.5), ("hat", 0.4)]


def test_access_removal_is_called_what_it_is():
    probe = RelearnProbe("yes", steps=25, images=60, before=0.0, after=0.42)

    page = page_of(build_steering_report(evaluation(kind="access removal", relearn=probe)))

    assert "no unlearning" in page
    assert "60 images of yes for 25 steps" in page
    assert "42.0 %" in page


def test_no_nan_reaches_the_json():
    nothing = Kid(float("nan"), None, None, 0, 0, "pixels")
    nll = np.array([np.nan, 1.0])
    broken = evaluation(
        judges=(judged(change("yes", 0.5, 0.0, bound=Bound(high=0.1), kid=nothing), accuracy=None),),
        remember=LikelihoodChange(nll, nll, 1, Drift(float("nan"), None, 2)),
    )

    report = build_steering_report(broken)

    assert "NaN" not in report.to_json()
    assert report.likelihoods[0].bpd_before is None
    assert "too few" in page_of(report)


def test_likelihoods_are_left_out_where_no_images_were_given():
    report = build_steering_report(evaluation(remember=None, held_out=None))

    assert report.distributions is None
    assert report.likelihoods == ()
    assert page_of(report).count("<svg") == 0


def test_page_shows_every_figure_with_an_alternative_text(page):
    # Curves, density, histograms and losses.
    assert page.count("<svg") == page.count('role="img"') == 4


def test_ids_are_unique_and_references_resolve(page):
    ids = re.findall(r'\bid="([^"]+)"', page)
    references = set(re.findall(r'(?:xlink:href="#|url\(#)([^")]+)', page))

    assert len(ids) == len(set(ids))
    assert references <= set(ids)


def test_page_asks_nothing_of_the_network(page):
    assert not re.search(r"https?:|//[a-z]|@import|url\((?!#)", page)


def test_accuracy_of_a_trained_judge_is_shown(page):
    assert "97.5 %" in page
    unknown = build_steering_report(evaluation(judges=(judged(change("yes", 0.5, 0.1), accuracy=None),)))
    assert "accuracy was not measured" in page_of(unknown)


class Tags(HTMLParser):
    """Collects the tags of a page, and attributes that would run something."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.handlers: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.handlers += [name for name, _ in attrs if name.startswith("on")]


def test_hostile_strings_are_shown_and_not_run():
    judges = (judged(change(HOSTILE, 0.5, 0.1, bound=Bound(high=0.2)), name=HOSTILE),)
    probe = RelearnProbe(HOSTILE, steps=1, images=1, before=0.0, after=0.0)
    rows = [{"step": 0, HOSTILE: 0.5}, {"step": 5, HOSTILE: 0.2}]
    hostile = evaluation(judges=judges, kind=HOSTILE, notes=(HOSTILE,), relearn=probe)

    page = page_of(build_steering_report(hostile, RunFacts(method=HOSTILE), history=rows, title=HOSTILE))

    assert not Tags(page).tags & {"script", "img"}
    assert Tags(page).handlers == []


def test_a_picture_is_shown_only_when_asked(report, page):
    assert "data:image" not in page
    assert 'src="data:image/png;base64,iVBORw=="' in render_html(report, sample_grid_png=b"\x89PNG")
