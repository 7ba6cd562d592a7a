"""The report's figures, drawn from its numbers alone as SVG to stand inside a page: same numbers, same bytes."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from scipy import special

from evidence.likelihood import FloatArray
from evidence.schema import Curve, Distributions, FractionRow, LossPoint

__all__ = ["curves_svg", "density_svg", "histograms_svg", "losses_svg", "qq_svg"]

INK, MUTED, RULE = "#1c2733", "#5b6875", "#c9d0d8"
BASE, TAMED, FORGET = "#7a8797", "#1f5a92", "#c2491d"

STYLE: Any = {
    "svg.hashsalt": "forgetd",
    "svg.fonttype": "none",
    "font.size": 9,
    "axes.edgecolor": RULE,
    "axes.labelcolor": MUTED,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 9,
    "axes.titlecolor": INK,
    "axes.titlelocation": "left",
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "legend.frameon": False,
    "text.color": INK,
    "text.parse_math": False,
}

LOSSES_IN_A_ROW = 3

BINS = 40

CLASSES = ("#1f5a92", "#c2491d", "#2f7d5b", "#8a5aa8", "#a8841c", "#3e8fa3", "#b0476b", "#5b6875", "#6f8f2f", "#7a4a2b")
"""Colours of classes, used again from the start where there are more."""


def density_svg(data: Distributions) -> str:
    """Likelihoods to remember before and after, with the forget images below (as in the taming paper's Fig. 6)."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(7.4, 3.5), layout="constrained")
        axes = figure.add_subplot()
        before, after = _finite(data.remember.before), _finite(data.remember.after)
        forget = _finite(data.forget.before), _finite(data.forget.after)
        everything = np.concatenate([before, after, *forget, _finite([data.threshold_after])])
        if len(everything):
            grid = np.linspace(*_padded(everything), 400)
            peak = max(_density(axes, grid, before, after), 1e-9)
            _forget_lanes(axes, *forget, peak)
            if data.threshold_after is not None:
                axes.axvline(data.threshold_after, color=FORGET, lw=1, ls=(0, (1, 2)), label="criterion, after")
        axes.set_xlabel("negative log-likelihood, bits per dimension   (less likely →)")
        axes.set_yticks([])
        axes.spines["left"].set_visible(False)
        figure.legend(loc="outside upper left", ncols=5, handlelength=1.6, columnspacing=1.2)
        return _svg(figure, "density")


def histograms_svg(data: Distributions) -> str:
    """Two histograms of the likelihoods to remember, under the base and under the tamed model, on one axis.

    Below each, the images to forget under that model; with images that no model has seen, their histogram as an
    outline (as in the taming paper's Fig. 6 and B.3).
    """
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(7.4, 2.9), layout="constrained")
        sides = _sides(data)
        everything = np.concatenate(
            [values for side in sides for values in (side.remember, side.forget, side.held_out)]
        )
        edges = np.linspace(*_padded(everything), BINS + 1) if len(everything) else None
        shared: Axes | None = None
        for place, side in enumerate(sides):
            shared = axes = figure.add_subplot(1, 2, place + 1, sharex=shared, sharey=shared)
            axes.set_title(side.title)
            axes.set_yticks([])
            axes.spines["left"].set_visible(False)
            if edges is not None:
                _histogram(axes, list(edges), side)
        figure.supxlabel("negative log-likelihood, bits per dimension   (less likely →)", fontsize=9, color=MUTED)
        if shared is not None and shared.get_legend_handles_labels()[0]:
            handles, labels = shared.get_legend_handles_labels()
            figure.legend(handles, labels, loc="outside upper right", ncols=4, handlelength=1.6, columnspacing=1.2)
        return _svg(figure, "histograms")


def curves_svg(curves: Sequence[Curve], bounds: Sequence[FractionRow]) -> str:
    """The fraction of samples in each class against the step, with its interval (as in the taming paper's Fig. 4).

    What is asked of a class is a dotted line of its colour at each bound.
    """
    judges = sorted({curve.judge for curve in curves})
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(7.4, 3.0 * max(1, len(judges))), layout="constrained")
        for row, judge in enumerate(judges):
            axes = figure.add_subplot(len(judges), 1, row + 1)
            asked = {one.label: one for one in bounds if one.judge == judge}
            for index, curve in enumerate(one for one in curves if one.judge == judge):
                _curve(axes, curve, asked.get(curve.label), CLASSES[index % len(CLASSES)])
            axes.set(title=judge, xlabel="step", ylabel="fraction of samples")
            axes.set_ylim(bottom=0)
            axes.grid(axis="y", color=RULE, lw=0.5, alpha=0.6)
            axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=8)
        return _svg(figure, "curves")


def _curve(axes: Axes, curve: Curve, asked: FractionRow | None, colour: str) -> None:
    def column(name: str) -> list[float]:
        values = [getattr(point, name) for point in curve.points]
        return [math.nan if value is None else value for value in values]

    steps = [point.step for point in curve.points]
    axes.fill_between(steps, column("low"), column("high"), color=colour, alpha=0.15, lw=0)
    axes.plot(steps, column("value"), color=colour, lw=1.4, marker="o", ms=3, label=curve.label)
    for bound in () if asked is None else (asked.low, asked.high):
        if bound is not None:
            axes.axhline(bound, color=colour, lw=0.9, ls=(0, (1, 2)))


class _Side(NamedTuple):
    """What one of the two histograms shows."""

    title: str
    colour: str
    remember: FloatArray
    forget: FloatArray
    held_out: FloatArray
    threshold: float | None


def _sides(data: Distributions) -> tuple[_Side, _Side]:
    none: tuple[float | None, ...] = ()
    return (
        _Side(
            "base model",
            BASE,
            _finite(data.remember.before),
            _finite(data.forget.before),
            _finite(none if data.held_out is None else data.held_out.before),
            data.threshold_before,
        ),
        _Side(
            "after",
            TAMED,
            _finite(data.remember.after),
            _finite(data.forget.after),
            _finite(none if data.held_out is None else data.held_out.after),
            data.threshold_after,
        ),
    )


def _histogram(axes: Axes, edges: list[float], side: _Side) -> None:
    """Densities over common bins; the images to forget in a lane below, which leaves the bars their scale."""
    peak = 1.0
    common: dict[str, Any] = {"bins": edges, "density": True}
    if len(side.remember):
        bars = axes.hist(side.remember, color=side.colour, alpha=0.45, label="remember", **common)
        peak = float(np.max(bars[0]))
    if len(side.held_out):
        outline: dict[str, Any] = {"histtype": "step", "color": INK, "lw": 0.9, "ls": (0, (3, 1.5))}
        axes.hist(side.held_out, label="never seen", **outline, **common)
    axes.axhline(0, color=RULE, lw=0.8)
    if len(side.forget):
        lane = np.full(len(side.forget), -0.1 * peak)
        axes.plot(side.forget, lane, "o", ms=5, color=FORGET, label="forget", clip_on=False)
        if side.threshold is not None:
            axes.axvline(side.threshold, color=FORGET, lw=1, ls=(0, (1, 2)), label="criterion")


def qq_svg(data: Distributions) -> str:
    """Standardised likelihoods to remember against normal quantiles; on the diagonal, they are normal."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(3.6, 3.5), layout="constrained")
        axes = figure.add_subplot()
        reach = 3.0
        for values, colour, marker, label in (
            (_finite(data.remember.before), BASE, "o", "before"),
            (_finite(data.remember.after), TAMED, "x", "after"),
        ):
            if len(values) > 1 and values.std() > 0:
                ordered = np.sort((values - values.mean()) / values.std())
                expected = special.ndtri((np.arange(len(ordered)) + 0.5) / len(ordered))
                reach = max(reach, float(np.abs(ordered).max()))
                axes.plot(expected, ordered, marker, ms=2.6, mfc="none", mew=0.7, color=colour, label=label)
        axes.axline((0, 0), slope=1, color=RULE, lw=1, zorder=0)
        axes.set(xlim=(-reach * 1.05, reach * 1.05), ylim=(-reach * 1.05, reach * 1.05), aspect="equal")
        axes.set(xlabel="normal quantile", ylabel="standardised likelihood")
        if axes.get_legend_handles_labels()[0]:
            axes.legend(loc="upper left")
        return _svg(figure, "qq")


def losses_svg(losses: Mapping[str, Sequence[LossPoint]]) -> str:
    """Every loss against the step, each on a scale of its own."""
    rows = max(1, math.ceil(len(losses) / LOSSES_IN_A_ROW))
    columns = max(1, min(len(losses), LOSSES_IN_A_ROW))
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(7.4, 2.0 * rows), layout="constrained")
        for position, (name, points) in enumerate(sorted(losses.items())):
            axes = figure.add_subplot(rows, columns, position + 1)
            steps = [point.step for point in points]
            values = [math.nan if point.value is None else point.value for point in points]
            axes.plot(steps, values, color=TAMED, lw=1.2, marker="." if len(steps) < 2 else "")
            axes.set_title(name)
            axes.set_xlabel("step")
            axes.grid(axis="y", color=RULE, lw=0.5, alpha=0.6)
            axes.locator_params(nbins=4)
        return _svg(figure, "losses")


def _density(axes: Axes, grid: FloatArray, before: FloatArray, after: FloatArray) -> float:
    peak = 0.0
    for values, colour, line, label in (
        (before, BASE, (0, (4, 2)), "remember, before"),
        (after, TAMED, "-", "remember, after"),
    ):
        density = _kernel_density(values, grid)
        if density is not None:
            axes.plot(grid, density, color=colour, ls=line, lw=1.6, label=label)
            axes.fill_between(grid, density, color=colour, alpha=0.10, lw=0)
            peak = max(peak, float(density.max()))
    axes.axhline(0, color=RULE, lw=0.8)
    return peak


def _forget_lanes(axes: Axes, before: FloatArray, after: FloatArray, peak: float) -> None:
    upper, lower = -0.09 * peak, -0.2 * peak
    if len(before) == len(after):
        axes.plot([before, after], [[upper] * len(before), [lower] * len(after)], color=FORGET, lw=0.6, alpha=0.5)
    common: dict[str, Any] = {"ls": "", "ms": 5.5, "color": FORGET, "marker": "o", "clip_on": False}
    axes.plot(before, np.full(len(before), upper), mfc="white", label="forget, before", **common)
    axes.plot(after, np.full(len(after), lower), label="forget, after", **common)
    axes.set_ylim(-0.29 * peak, 1.06 * peak)


def _kernel_density(values: FloatArray, grid: FloatArray) -> FloatArray | None:
    """Gaussian kernels (m,) with Silverman's bandwidth; None where there is no spread to draw."""
    if len(values) < 2:
        return None
    quartiles = np.quantile(values, [0.25, 0.75])
    spread = min(float(values.std(ddof=1)), float(quartiles[1] - quartiles[0]) / 1.349)
    if not spread > 0:
        return None
    width = 0.9 * spread * len(values) ** -0.2
    kernels = np.exp(-0.5 * ((grid[:, None] - values) / width) ** 2)
    return np.asarray(kernels.sum(1) / (len(values) * width * math.sqrt(2 * math.pi)), dtype=np.float64)


def _finite(values: Sequence[float | None]) -> FloatArray:
    return np.array([value for value in values if value is not None], dtype=np.float64)


def _padded(values: FloatArray) -> tuple[float, float]:
    low, high = float(values.min()), float(values.max())
    margin = 0.04 * (high - low) or 0.1
    return low - margin, high + margin


def _svg(figure: Figure, name: str) -> str:
    """The figure as an inline element: no prolog, no metadata, ids of its own, hidden from readers of the alt text."""
    buffer = io.StringIO()
    FigureCanvasSVG(figure).print_svg(buffer, metadata={"Date": None, "Creator": None, "Format": None, "Type": None})  # type: ignore[no-untyped-call]  # matplotlib has no types here
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r' xmlns(:\w+)?="[^"]*"', "", text)
    text = re.sub(r'\b(id="|xlink:href="#|url\(#)', rf"\g<1>{name}-", text)
    return re.sub(
        r'<svg [^>]*?(viewBox="[^"]*")[^>]*>', r'<svg \1 aria-hidden="true" focusable="false">', text, count=1
    )
