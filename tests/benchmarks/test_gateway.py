"""The gateway's benchmarks, at a tiny size: they run, and give the figures that they promise."""

from __future__ import annotations

from benchmarks import gateway, transfer


def test_gateway_is_measured_beside_its_baseline() -> None:
    figures = gateway.run(gateway.TINY)

    ratios = {"get_ratio", "get_cpu_ratio", "not_modified_ratio"}
    assert set(figures) == {*ratios, "post_p99_ms", "get_p99_ms", "rss_mb"}
    assert all(figure > 0 for figure in figures.values())


def test_transfers_are_measured_beside_boto3() -> None:
    figures = transfer.run(mebibytes=160, piece=80)

    assert set(figures) == {"up_ratio", "down_ratio", "gateway_rss_growth_mb"}
    assert figures["up_ratio"] > 0
    assert figures["down_ratio"] > 0
