"""The report: a round trip without loss, a page that stays offline, and nobody's picture unless asked."""

import io
import json
import re
from dataclasses import replace
from html.parser import HTMLParser

import jsonschema
import pytest
from PIL import Image

from evidence.pictures import sample_grid
from evidence.report import Criterion, Report, RunFacts, build_report, json_schema, render_html

HOSTILE = "<script>alert('x')</script>\"&$\\frac{--><img src=x onerror=alert(1)>"


class Page(HTMLParser):
    """Collects the tags and ids of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes.extend(attrs)


@pytest.fixture(scope="module")
def page(report) -> str:
    return render_html(report)


def test_json_round_trip_loses_nothing(report):
    assert Report.from_json(report.to_json()) == report
    assert Report.from_json(report.to_json()).to_json() == report.to_json()


def test_page_is_drawn_from_json_alone(report, page):
    assert render_html(Report.from_json(report.to_json())) == page


def test_equal_input_gives_equal_bytes(evaluate, report, run_facts):
    again = build_report(evaluate(), run_facts)

    assert again.to_json() == report.to_json()


def test_json_names_its_schema_first_and_fits_it(report):
    document = json.loads(report.to_json())

    jsonschema.validate(document, json_schema())
    assert next(iter(document)) == "schema"
    assert document["schema"] == "forgetd.report/1"


def test_another_version_is_refused(report):
    with pytest.raises(ValueError, match="schema"):
        Report.from_json(report.to_json().replace("forgetd.report/1", "forgetd.report/2"))


def test_no_nan_reaches_the_json(evaluate, images, run_facts):
    broken = build_report(evaluate(remember=images(1)), replace(run_facts, losses={"a": [(0, float("nan"))]}))

    assert "NaN" not in broken.to_json()
    assert broken.losses["a"][0].value is None
    assert "not met" in render_html(broken)


def test_verdict_can_be_quoted(report):
    assert report.verdict.outcome == "succeeded"
    assert report.verdict.sentence.startswith("All 4 images to forget are now")
    assert report.verdict.sentence.count(". ") == 0


def test_missed_criterion_is_told_with_its_numbers(evaluate):
    verdict = build_report(evaluate(drop=0.0)).verdict

    assert verdict.outcome == "criteria_not_met"
    assert "4 of 4 images" in verdict.sentence


def test_extra_criterion_can_fail_the_job(evaluation):
    strict = Criterion(name="drift", statement="Drift at most 0.", threshold=0.0, value=0.1, met=False)

    verdict = build_report(evaluation, extra_criteria=[strict]).verdict

    assert verdict.outcome == "criteria_not_met"
    assert "drift" in verdict.sentence


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_criterion_takes_a_value_that_is_not_finite_as_missing(value):
    assert Criterion(name="z", statement="z", threshold=1.0, value=value, met=False).value is None


def test_generated_images_are_called_samples(evaluate):
    generated = build_report(evaluate(remember_source="generated"))

    assert "samples of the base flow" in generated.reference.source_sentence
    assert "base-model samples" in generated.verdict.sentence


def test_defaults_are_spelled_out(report):
    assert [(one.name, one.value, one.changed) for one in report.provenance.parameters] == [
        ("delta", 4.0, False),
        ("engine", "fast", False),
        ("huber", 1.0, False),
        ("learning_rate", 1e-3, True),
    ]


def test_evaluation_seed_is_recorded(report):
    assert report.provenance.seeds == {"evaluation": 5, "taming": 11}


def test_page_asks_nothing_of_the_network(page):
    tags = set(Page(page).tags)

    assert not tags & {"script", "link", "iframe", "object", "embed", "base", "form", "image"}
    assert not re.search(r"https?:|//[a-z]|@import|url\((?!#)", page)


def test_page_carries_no_picture_unless_asked(report, page):
    assert "img" not in Page(page).tags
    assert "data:image" not in page

    asked = render_html(report, sample_grid_png=b"\x89PNG")

    assert 'src="data:image/png;base64,iVBORw=="' in asked


def test_ids_are_unique_and_references_resolve(page):
    ids = [value for name, value in Page(page).attributes if name == "id"]
    references = set(re.findall(r'(?:xlink:href="#|url\(#)([^")]+)', page))

    assert len(ids) == len(set(ids))
    assert references <= set(ids)


def test_every_figure_has_an_alternative_text(page):
    attributes = Page(page).attributes

    assert page.count("<svg") == sum(pair == ("role", "img") for pair in attributes) == 4


def test_hostile_strings_are_shown_and_not_run(evaluation):
    facts = RunFacts(
        job=HOSTILE,
        method=HOSTILE,
        created_at=HOSTILE,
        parameters={HOSTILE: HOSTILE},
        seeds={HOSTILE: 1},
        digests={HOSTILE: HOSTILE},
        software={HOSTILE: HOSTILE},
        device=HOSTILE,
        seconds={HOSTILE: 1.0},
        losses={HOSTILE: [(0, 1.0), (1, 0.5)]},
        image_fitting=HOSTILE,
    )
    criterion = Criterion(name=HOSTILE, statement=HOSTILE, threshold=None, value=None, met=False)

    page = render_html(build_report(evaluation, facts, title=HOSTILE, extra_criteria=[criterion]))

    parsed = Page(page)
    assert "script" not in parsed.tags
    assert "img" not in parsed.tags
    assert not [name for name, _ in parsed.attributes if name.startswith("on")]


def test_large_sets_are_thinned_to_their_shape(evaluate, images):
    kept = build_report(evaluate(remember=images(1300, seed=9), draws=1, kl_samples=0)).distributions.remember

    assert len(kept.before) == 1000
    assert list(kept.before) == sorted(kept.before)


def test_sample_grid_is_a_picture_of_two_rows(gaussian_flow):
    base = gaussian_flow()

    png = sample_grid(base, base, n=3, seed=1, n_bits=5, scale=1)

    picture = Image.open(io.BytesIO(png))
    assert (picture.format, picture.mode, picture.size) == ("PNG", "L", (3 * 6 + 2, 2 * 6 + 2))
    assert picture.crop((0, 0, 20, 8)).tobytes() == picture.crop((0, 6, 20, 14)).tobytes()
    assert png == sample_grid(base, base, n=3, seed=1, n_bits=5, scale=1)


def test_sample_grid_of_colour_models_is_in_colour(gaussian_flow):
    flow = gaussian_flow(shape=(3, 4, 4))

    assert Image.open(io.BytesIO(sample_grid(flow, flow, n=2, seed=1))).mode == "RGB"
