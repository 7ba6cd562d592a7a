"""The report as one HTML page that opens offline: drawn from the report's data alone, everything escaped."""

from __future__ import annotations

import base64
import json
import math
from functools import cache
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape
from pydantic import JsonValue

from evidence.amnesia_schema import AmnesiaReport, ConditionReport
from evidence.records import SetKey
from evidence.schema import Document, Interval, Report, SteeringReport

__all__ = ["render_html"]

NOTHING = "n/a"

SYMBOLS: dict[SetKey, Markup] = {
    "forget": Markup("<var>D</var><sub>F</sub>"),
    "same_identity": Markup("<var>D</var>&prime;<sub>F</sub>"),
    "remember": Markup("<var>D</var><sub>R</sub>"),
    "held_out": Markup("<var>D</var><sub>R</sub><sup>id</sup>"),
    "neighbours": Markup("<var>D</var><sub>R</sub><sup>NN</sup>"),
}

PROSE = (
    ("mu_R", "&mu;<sub>R</sub>"),
    ("sigma_R", "&sigma;<sub>R</sub>"),
    ("D_R^NN", str(SYMBOLS["neighbours"])),
    ("D_R^id", str(SYMBOLS["held_out"])),
    ("D&#39;_F", str(SYMBOLS["same_identity"])),
    ("D_F", str(SYMBOLS["forget"])),
    ("D_R", str(SYMBOLS["remember"])),
    ("1 / (n + 1)", "1&nbsp;/&nbsp;(n&nbsp;+&nbsp;1)"),
)
"""Symbols as plain text writes them, longest first where one begins another, and as the page sets them."""

SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def render_html(report: Document, *, sample_grid_png: bytes | None = None) -> str:
    """One self-contained page: no script, no request, no picture of anyone unless one is passed.

    Args:
        report: what to show; `from_json` of a stored file gives the same page.
        sample_grid_png: opt-in picture of samples before and after (`evidence.pictures.sample_grid`).
    """
    # Later: matplotlib is a tenth of what a job loads before it begins, and nothing is drawn before it ends.
    from evidence.plots import curves_svg, density_svg, histograms_svg, losses_svg, qq_svg

    template, figures = "report.html.j2", dict[str, str | None]()
    if isinstance(report, SteeringReport):
        template = "steering_report.html.j2"
        shown = report.distributions
        figures["curves"] = curves_svg(report.curves, report.fractions) if report.curves else None
        figures["density"] = None if shown is None else density_svg(shown)
        figures["histograms"] = None if shown is None else histograms_svg(shown)
    elif isinstance(report, ConditionReport):
        template = "amnesia_report.html.j2" if isinstance(report, AmnesiaReport) else "balance_report.html.j2"
        figures["curves"] = curves_svg(report.curves, report.shares) if report.curves else None
    elif isinstance(report, Report):
        figures["density"] = density_svg(report.distributions)
        figures["histograms"] = histograms_svg(report.distributions)
        figures["qq"] = qq_svg(report.distributions)
    figures["losses"] = losses_svg(report.losses) if report.losses else None
    return (
        _environment()
        .get_template(template)
        .render(
            report=report,
            symbols=SYMBOLS,
            picture=None if sample_grid_png is None else base64.b64encode(sample_grid_png).decode("ascii"),
            # Figures are markup of our own making; matplotlib escapes the texts in them.
            **{name: None if svg is None else Markup(svg) for name, svg in figures.items()},  # noqa: S704 our own SVG
        )
    )


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        number=_number,
        quantile=_quantile,
        interval=_interval,
        percent=_percent,
        span=_span,
        plain=_plain,
        seconds=_seconds,
        prose=_prose,
    )
    return environment


def _prose(text: str) -> Markup:
    """The text escaped, with its plain-text symbols set as mathematics."""
    escaped = str(escape(text))
    for plain, markup in PROSE:
        escaped = escaped.replace(plain, markup)
    return Markup(escaped)  # noqa: S704 escaped above


def _number(value: float | None, digits: int = 3, signed: bool = False) -> str:
    if value is None:
        return NOTHING
    value = round(value, digits)
    if value == 0:
        return f"{0:.{digits}f}"
    return f"{value:{'+' if signed else ''}.{digits}f}".replace("-", "\N{MINUS SIGN}")


def _quantile(value: float | None) -> str:
    """Three decimals, or powers of ten where these would read as zero."""
    if value is None:
        return NOTHING
    if value == 0 or abs(value) >= 0.001:
        return _number(value)
    power = math.floor(math.log10(abs(value)))
    return f"{_number(value / 10**power, 1)}·10{str(power).translate(SUPERSCRIPTS)}"


def _interval(estimate: Interval) -> str:
    if estimate.low is None or estimate.high is None:
        return "too few images"
    return f"{_number(estimate.low, signed=True)} to {_number(estimate.high, signed=True)}"


def _percent(value: float | None, digits: int = 1) -> str:
    return NOTHING if value is None else f"{_number(100 * value, digits)} %"


def _span(estimate: Interval) -> str:
    """A fraction's interval."""
    if estimate.low is None or estimate.high is None:
        return NOTHING
    return f"{_number(100 * estimate.low, 1)} to {_number(100 * estimate.high, 1)} %"


def _plain(value: JsonValue) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _seconds(value: float | None) -> str:
    return NOTHING if value is None else f"{value:.1f} s"
