"""The demo's table is drawn from any report of the schema, also from one with little in it."""

from __future__ import annotations

from typing import Any

from cli.demo_table import lines

NORMAL = {"statistic": 0.05, "p_value": 0.4, "rejected": False}
SET = {
    "symbol": "D_F",
    "n": 5,
    "q_before": 0.51,
    "q_after": 0.001,
    "quantile_drop": {"value": 0.509, "low": 0.4, "high": 0.6},
    "bpd_before": 2.2,
    "bpd_after": 3.1,
    "description": "images to forget",
}


def report(**changes: Any) -> dict[str, Any]:
    whole: dict[str, Any] = {
        "verdict": {"sentence": "All 5 images to forget are gone."},
        "sets": [SET],
        "forget_images": [{"z_after": 3.9}, {"z_after": 4.4}],
        "reference": {
            "primary_quantile": "gaussian",
            "primary_reason": "normality is not rejected",
            "normality_before": NORMAL,
            "normality_after": NORMAL,
        },
        "side_effects": {"drift_held_out": {"value": 0.11}, "drift_remember": {"value": 0.09}},
        "provenance": {"steps": 30, "seconds": {"unlearning": 12.34}},
        "data": {"neighbours_method": "PCA of pixels"},
    }
    return whole | changes


def test_it_holds_the_figures_of_the_paper() -> None:
    text = "\n".join(lines(report()))

    for figure in ("All 5 images", "D_F", "0.510", "0.001", "0.509", "0.400 to 0.600", "2.200", "3.100", "3.900"):
        assert figure in text
    for fact in ("normality not rejected", "0.110 sigma on people never seen", "unlearning 12.3", "PCA of pixels"):
        assert fact in text


def test_what_is_missing_is_a_dash() -> None:
    empty = SET | {"q_after": None, "quantile_drop": {"value": None, "low": None, "high": None}}
    few = {"statistic": None, "p_value": None, "rejected": None}
    reference = report()["reference"] | {"normality_after": few}
    side = {"drift_held_out": None, "drift_remember": {"value": None}}
    origin = {"steps": None, "seconds": {"unlearning": None}}

    text = "\n".join(
        lines(report(sets=[empty], forget_images=[], reference=reference, side_effects=side, provenance=origin))
    )

    assert "None" not in text
    assert "too few values" in text
    assert "- sigma on images to remember" in text


def test_columns_line_up() -> None:
    head, row = lines(report(sets=[SET]))[2:4]

    assert head.index("q before") + len("q before") == row.index("0.510") + len("0.510")
