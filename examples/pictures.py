"""The picture of a report, as an SVG file that stands alone, drawn from the report's numbers.

    python -m examples.pictures report.json picture.svg

Of a forgotten person the likelihoods before and after, of an attribute its fraction against the step, of a debiased
model the fractions beside what was asked, of a forgotten condition how often samples show what they are asked for.
Equal reports give equal bytes.
"""

import io
import json
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from evidence.amnesia_schema import AMNESIA_SCHEMA, BALANCE_SCHEMA, AmnesiaReport, BalanceReport
from evidence.plots import BASE, FORGET, MUTED, RULE, STYLE, TAMED, curves_svg, histograms_svg
from evidence.schema import SCHEMA, Distributions, Interval, SteeringReport

LEAST_WRITTEN = 0.06
"""Share of a bar from which on there is room for its figure."""
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
    """The fraction of every class before and after, with the band that it was to lie in.

    Args:
        report: on a debiased flow, or on a balanced condition.
        path: of the file.
    """
    balanced = report["schema"] == BALANCE_SCHEMA
    rows = BalanceReport.model_validate_json(json.dumps(report)).shares if balanced else _steering(report).fractions
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(7.4, 2.8), layout="constrained")
        axes = figure.add_subplot()
        for place, row in enumerate(rows):
            low, high = row.low or 0.0, 1.0 if row.high is None else row.high
            label = "asked for" if place == 0 else None
            axes.bar(place, high - low, bottom=low, width=0.8, color=RULE, alpha=0.6, label=label)
        for shift, name, colour in ((-0.16, "before", BASE), (0.16, "after", TAMED)):
            places = [place + shift for place in range(len(rows))]
            _intervals(axes, places, [getattr(row, name) for row in rows], color=colour, label=name)
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


def save_conditions(report: Mapping[str, Any], path: Path) -> None:
    """How often samples show what they are asked for, before and after: of a forgotten condition and of what stays.

    Of the forgotten one also how often samples show the replacement, where it was asked how often they shall.
    """
    told = _amnesia(report)
    forgotten = next(row for row in told.shares if row.label == told.forgotten)
    labels = [f"{told.forgotten}\nforgotten", *(row.label for row in told.kept)]
    drawn = {
        "before": (-0.16, BASE, [forgotten.before, *(row.before for row in told.kept)]),
        "after": (0.16, TAMED, [forgotten.after, *(row.after for row in told.kept)]),
    }
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(7.4, 2.8), layout="constrained")
        axes = figure.add_subplot()
        axes.bar(0, forgotten.high or 0.0, width=0.8, color=RULE, alpha=0.6, label="asked for")
        for name, (shift, colour, found) in drawn.items():
            places = [place + shift for place in range(len(labels))]
            _intervals(axes, places, found, color=colour, label=name)
        for row in told.shares:
            if row.low is not None:
                axes.bar(0, 1 - row.low, bottom=row.low, width=0.8, color=RULE, alpha=0.6)
                _intervals(axes, [0.32], [row.after], color=FORGET, label=f"shows {row.label} instead")
        axes.set_xticks(range(len(labels)), labels)
        axes.set_ylabel("share that shows it")
        axes.set_ylim(0, 1.05)
        figure.legend(loc="outside upper right", ncols=4)
        _write(_text(figure), "Samples that show what they are asked for, before and after", path)


def save_shown(reports: Mapping[str, Mapping[str, Any]], path: Path) -> None:
    """What samples of a forgotten condition show, once for each replacement that was tried.

    Args:
        reports: by the name of the replacement; all of one model, one judge and one forgotten condition.
        path: of the file.
    """
    told = [_amnesia(report) for report in reports.values()]
    bars = [_parts(told[0], before=True), *(_parts(one, before=False) for one in told)]
    kinds = (
        ("what was forgotten", FORGET),
        ("the class named instead", TAMED),
        ("other classes", BASE),
        ("nothing recognisable", RULE),
    )
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(7.4, 0.9 + 0.38 * len(bars)), layout="constrained")
        axes = figure.add_subplot()
        for place, parts in enumerate(bars):
            left = 0.0
            for (name, colour), share in zip(kinds, parts, strict=True):
                axes.barh(place, share, left=left, height=0.66, color=colour, label=None if place else name)
                if share >= LEAST_WRITTEN:
                    ink = MUTED if colour == RULE else "white"
                    axes.text(
                        left + share / 2, place, f"{100 * share:.1f} %", ha="center", va="center", fontsize=8, color=ink
                    )
                left += share
        axes.set_yticks(range(len(bars)), ["before", *reports])
        axes.set_xlabel("share of samples that show")
        axes.set_xlim(0, 1)
        axes.invert_yaxis()
        figure.legend(loc="outside upper right", ncols=4)
        _write(_text(figure), "What samples of a forgotten condition show", path)


def main(report: str, picture: str) -> None:
    """Draw the report of a job."""
    told = json.loads(Path(report).read_text())
    if told["schema"] == SCHEMA:
        save_likelihoods(Distributions.model_validate(told["distributions"]), Path(picture))
    elif told["schema"] == AMNESIA_SCHEMA:
        save_conditions(told, Path(picture))
    elif told["schema"] == BALANCE_SCHEMA:
        save_fractions(told, Path(picture))
    else:
        draw = save_curves if told["kind"] == "attribute" else save_fractions
        draw(told, Path(picture))


def _amnesia(report: Mapping[str, Any]) -> AmnesiaReport:
    return AmnesiaReport.model_validate_json(json.dumps(report))


def _parts(told: AmnesiaReport, *, before: bool) -> tuple[float, float, float, float]:
    """Shares of samples that show the forgotten class, the one named instead, any other, and none; together 1."""
    shares = {row.label: (row.before if before else row.after).value or 0.0 for row in told.shares}
    named = {row.label for row in told.shares if row.low is not None}
    nothing = (told.before if before else told.after).unrecognisable
    instead = sum(share for label, share in shares.items() if label in named)
    forgotten, blank = shares[told.forgotten], (nothing.value if nothing else 0.0) or 0.0
    return forgotten, instead, max(1 - forgotten - instead - blank, 0.0), blank


def _intervals(axes: Axes, places: Sequence[float], found: Sequence[Interval], **style: Any) -> None:
    """A point with its interval for each place."""
    values = np.array([(one.value, one.low, one.high) for one in found], dtype=float)  # (n, 3)
    ends = [values[:, 0] - values[:, 1], values[:, 2] - values[:, 0]]
    axes.errorbar(places, values[:, 0], ends, fmt="o", ms=3.5, lw=1.2, **style)


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
