"""What the judge of flow taming promises."""

import math

import pytest
import torch

from evidence.flow_evaluation import evaluate_taming


def test_a_tamed_flow_has_forgotten(evaluation):
    assert evaluation.outcome == "succeeded"
    assert evaluation.smallest_z >= evaluation.threshold_z
    assert evaluation.set("forget").gaussian.drop.value > 0.2


def test_sets_come_in_order_with_forget_first(evaluation):
    assert [one.key for one in evaluation.sets] == ["forget", "same_identity", "remember", "held_out", "neighbours"]


def test_equal_models_change_nothing(gaussian_flow, images):
    flow = gaussian_flow()
    same = evaluate_taming(
        flow, flow, forget=images(3), remember=images(60, seed=1), remember_source="images", n_bits=5, delta=4.0,
        tolerance=0.15, seed=1, draws=2, remember_draws=1, kl_samples=20,
    )  # fmt: skip

    drops = [change.drop.value for one in same.sets for change in (one.gaussian, one.empirical)]
    assert drops == [0.0] * len(drops)
    assert (same.kl.value, same.drift_remember.value, same.sigma_ratio) == (0, 0, 1)
    assert same.outcome == "criteria_not_met"


def test_untouched_sets_keep_their_quantiles(evaluation):
    for key in ("same_identity", "remember", "held_out"):
        assert abs(evaluation.quantiles(key).drop.value) < 1e-6


def test_verdict_is_the_z_threshold(evaluate):
    for image in evaluate(drop=9.0).forget_images:
        assert image.forgotten == (image.z_after >= 3.4)


def test_two_sided_verdict_refuses_overshooting(evaluate):
    assert not evaluate(drop=500.0, two_sided=True).forgotten
    assert evaluate(drop=500.0).forgotten


def test_same_seed_gives_the_same_figures_at_any_batch_size(evaluate, evaluation):
    again = evaluate(batch_size=7)

    for key, value in evaluation.summary().items():
        expected = pytest.approx(value, rel=1e-4, abs=1e-6) if isinstance(value, float) else value
        assert again.summary()[key] == expected, key


def test_another_seed_gives_other_noise(evaluate, evaluation):
    assert evaluate(seed=6).smallest_z != evaluation.smallest_z


def test_neighbours_are_images_to_remember(evaluation):
    neighbours, remember = evaluation.set("neighbours"), evaluation.set("remember")

    assert set(neighbours.nll_base) <= set(remember.nll_base)
    assert 5 <= neighbours.n <= 20


def test_progress_ends_at_its_total(evaluate):
    seen = []

    evaluate(on_progress=lambda step, total: seen.append((step, total)))

    assert seen == [(i + 1, len(seen)) for i in range(len(seen))]


def test_absent_sets_are_left_out(evaluate):
    bare = evaluate(same_identity=None, held_out=None, neighbours=0, kl_samples=0)

    assert [one.key for one in bare.sets] == ["forget", "remember"]
    assert (bare.kl, bare.drift_held_out, bare.health_tamed) == (None, None, None)


@pytest.mark.parametrize(("name", "n"), [("forget", 0), ("remember", 0), ("remember", 1), ("held_out", 0)])
def test_too_few_images_are_a_result(evaluate, images, name, n):
    evaluation = evaluate(**{name: images(n)})

    assert evaluation.outcome == ("succeeded" if name == "held_out" else "criteria_not_met")
    assert evaluation.notes


def test_few_images_to_remember_are_noted(evaluation):
    assert any("Insufficient evidence" in note for note in evaluation.notes)


def test_a_broken_model_has_not_forgotten(gaussian_flow, images):
    broken = evaluate_taming(
        gaussian_flow(), gaussian_flow(0.0, math.nan), forget=images(2), remember=images(30, seed=1),
        remember_source="generated", n_bits=5, delta=4.0, tolerance=0.15, seed=1, draws=1, remember_draws=1,
        kl_samples=5,
    )  # fmt: skip

    assert broken.outcome == "criteria_not_met"
    assert not broken.healthy
    assert broken.summary()["smallest_z"] is None


def test_images_of_another_size_are_refused(evaluate):
    with pytest.raises(ValueError, match="held_out"):
        evaluate(held_out=torch.zeros(2, 1, 8, 8, dtype=torch.uint8))


@pytest.mark.parametrize("bad", [{"delta": 0.0}, {"tolerance": 1.0}, {"tolerance": -0.1}])
def test_senseless_thresholds_are_refused(evaluate, bad):
    with pytest.raises(ValueError, match="delta"):
        evaluate(**bad)
