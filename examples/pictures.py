"""The picture of a report, as an SVG file that stands alone, drawn from the report's numbers.

    python -m examples.pictures report.json picture.svg

Of a forgotten person the likelihoods before and after, of an attribute its fraction against the step, of a debiased
flow the fractions beside what was asked. Equal reports give equal bytes.
"""

import io
import json
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from evidence.plots import BASE, FORGET, MUTED, RULE, STYLE, TAMED, curves_svg, histograms_svg
from evidence.schema import SCHEMA, Distributions, SteeringReport

NAMESPACES = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'


def save_likelihoods(distributions: Distributions, path: Path) -> None:
    """Negative log-likelihoods of the images to remember and to forget, before and after (taming paper, Fig. 6)."""
    _write(histograms_svg(distributions), "Likelihoods before and after", path)


def save_curves(report: Mapping[str, Any], path: Path) -> None:
    """The fraction of samples in each class that was bounded, against the step, with its interval (Fig. 4)."""
    steered = _steering(report)
    bounds = [row for row in steered.fractions if row.told is not None]
    asked = {(row.judge, row.label) for row in bounds}
    curves = [curve for curve in steered.curves if (curve.judge, curve.label) in asked]
    _write(curves_svg(curves, bounds), "Fraction of samples against the step", path)


def save_fractions(report: Mapping[str, Any], path: Path) -> None:
    """The fraction of every class before and after, with the band that it was to lie in."""
    rows = _steering(report).fractions
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(7.4, 2.8), layout="constrained")
        axes = figure.add_subplot()
        for place, row in enumerate(rows):
            low, high = row.low or 0.0, 1.0 if row.high is None else row.high
            label = "asked for" if place == 0 else None
            axes.bar(place, high - low, bottom=low, width=0.8, color=RULE, alpha=0.6, label=label)
        for shift, name, colour in ((-0.16, "before", BASE), (0.16, "after", TAMED)):
            found = [getattr(row, name) for row in rows]
            middle = [one.value for one in found]
            ends = [[one.value - one.low for one in found], [one.high - one.value for one in found]]
            places = [place + shift for place in range(len(rows))]
            axes.errorbar(places, middle, ends, fmt="o", ms=3.5, lw=1.2, color=colour, label=name)
        axes.set_xticks(range(len(rows)), [row.label for row in rows])
        axes.set_ylabel("fraction of samples")
        axes.set_ylim(bottom=0)
        figure.legend(loc="outside upper right", ncols=3)
        _write(_text(figure), "Fractions of samples before and after", path)


def save_removal(reports: Mapping[str, Mapping[str, Any]], path: Path) -> None:
    """How often samples show a class that was removed: before, after, and once somebody tries to bring it back.

    The last are samples of that class, of a prior fitted to a few of its images; the others are of all classes.

    Args:
        reports: by the name of the way that the class went.
        path: of the file.
    """
    bars = (("before", BASE), ("after", TAMED), ("after, from a prior fitted to a few images", FORGET))
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(7.4, 2.6), layout="constrained")
        axes = figure.add_subplot()
        for place, report in enumerate(reports.values()):
            told = _steering(report)
            row = next(one for one in told.fractions if one.told is not None)
            values = [row.before.value, row.after.value, None if told.relearn is None else told.relearn.after]
            for number, ((name, colour), value) in enumerate(zip(bars, values, strict=True)):
                if value is not None:
                    at, label = place + (number - 1) * 0.26, name if place == 0 else None
                    axes.bar(at, value, width=0.22, color=colour, label=label)
                    axes.text(at, value, f"{100 * value:.1f} %", ha="center", va="bottom", fontsize=8, color=MUTED)
        axes.set_xticks(range(len(reports)), list(reports))
        axes.set_ylabel("fraction of samples")
        axes.margins(y=0.15)
        figure.legend(loc="outside upper right", ncols=3)
        _write(_text(figure), "Samples of a removed class", path)


def main(report: str, picture: str) -> None:
    """Draw the report of a job."""
    told = json.loads(Path(report).read_text())
    if told["schema"] == SCHEMA:
        save_likelihoods(Distributions.model_validate(told["distributions"]), Path(picture))
    else:
        draw = save_curves if told["kind"] == "attribute" else save_fractions
        draw(told, Path(picture))


def _steering(report: Mapping[str, Any]) -> SteeringReport:
    return SteeringReport.from_json(json.dumps(report))


def _text(figure: Figure) -> str:
    buffer = io.StringIO()
    FigureCanvasSVG(figure).print_svg(buffer, metadata={"Date": None, "Creator": None, "Format": None, "Type": None})  # type: ignore[no-untyped-call]  # matplotlib has no types here
    return buffer.getvalue()


def _write(svg: str, title: str, path: Path) -> None:
    """One element, with the name spaces that a file needs and a title for who cannot see it."""
    body = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    size = re.search(r'viewBox="[^"]*"', body)
    opening = f'<svg {NAMESPACES} {size[0] if size else ""} role="img"><title>{title}</title>'
    path.write_text(re.sub(r"<svg [^>]*>", opening, body, count=1).rstrip() + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
