"""A report as a table for a terminal: the figures of the flow taming paper (arXiv 2211.16488, Table 1) for one job."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["lines"]

Report = Mapping[str, Any]


def lines(report: Report) -> list[str]:
    """The verdict, a row for each set of images, and what else the paper's tables hold."""
    return [report["verdict"]["sentence"], "", *_rows(report), "", *_facts(report)]


def _rows(report: Report) -> list[str]:
    head = ("set", "images", "q before", "q after", "drop", "95 % interval", "BPD before", "BPD after", "")
    cells = [head]
    for row in report["sets"]:
        drop = row["quantile_drop"]
        low, high = _number(drop["low"]), _number(drop["high"])
        cells.append(
            (
                row["symbol"],
                str(row["n"]),
                _number(row["q_before"]),
                _number(row["q_after"]),
                _number(drop["value"]),
                f"{low} to {high}" if drop["low"] is not None else "-",
                _number(row["bpd_before"]),
                _number(row["bpd_after"]),
                row["description"],
            )
        )
    return _aligned(cells)


def _facts(report: Report) -> list[str]:
    reference, side, origin = report["reference"], report["side_effects"], report["provenance"]
    least = [image["z_after"] for image in report["forget_images"] if image["z_after"] is not None]
    seconds = {name: value for name, value in origin["seconds"].items() if value is not None}
    drift = side["drift_held_out"] or side["drift_remember"]
    where = "people never seen" if side["drift_held_out"] else "images to remember"
    facts = [
        ("quantile", f"{reference['primary_quantile']}: {reference['primary_reason']}"),
        ("KS", f"{_ks(reference['normality_before'])} before, {_ks(reference['normality_after'])} after"),
        ("smallest z", f"{_number(min(least))} standard deviations" if least else "-"),
        ("drift", f"{_number(drift['value'])} sigma on {where}"),
        ("steps", str(origin["steps"]) if origin["steps"] is not None else "-"),
        ("seconds", ", ".join(f"{name} {value:.1f}" for name, value in seconds.items()) or "-"),
        ("neighbours", report["data"]["neighbours_method"]),
    ]
    return _aligned(facts)


def _ks(test: Mapping[str, Any]) -> str:
    """A Kolmogorov-Smirnov test in a few words."""
    verdict = {True: "normality rejected", False: "normality not rejected", None: "too few values"}[test["rejected"]]
    return f"{_number(test['statistic'])} (p {_number(test['p_value'])}, {verdict})"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Columns of equal width; figures to the right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]

    def cell(text: str, column: int) -> str:
        figure = len(rows[0]) > 2 and 0 < column < len(widths) - 1
        return text.rjust(widths[column]) if figure else text.ljust(widths[column])

    return ["  ".join(cell(text, column) for column, text in enumerate(row)).rstrip() for row in rows]
