"""What the judge of steering promises: fractions on fresh samples, bounds kept by whole intervals, honest gaps."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from evidence.errors import TargetError, UnknownClassError
from evidence.fractions import Bound
from evidence.steering_evaluation import evaluate_steering, sampled_images
from evidence.steering_records import FractionBounds, RelearnProbe

SHAPE = (1, 4, 4)


class Shade:
    """A judge that tells dark pictures from light ones."""

    name = "shade"
    classes = ("dark", "light")

    def __call__(self, images: Tensor) -> Tensor:
        return (images.float().flatten(1).mean(1) > 127).long()


class TwoShades(nn.Module):
    """A flow that draws light pictures at a known rate, with a proper density: a mixture of two normals."""

    def __init__(self, rate: float, std: float = 0.05, shift: float = 0.0) -> None:
        super().__init__()
        self.rate = nn.Parameter(torch.tensor(rate))
        self.std = std
        self.shift = shift

    def log_prob(self, x: Tensor) -> Tensor:
        parts = [
            weight.log() - (x - mean).flatten(1).square().sum(1) / (2 * self.std**2)
            for weight, mean in ((self.rate, 0.25), (1 - self.rate, -0.25))
        ]
        return torch.logsumexp(torch.stack(parts), 0) - 16 * math.log(self.std * math.sqrt(2 * math.pi))

    def sample(self, n: int, *, generator: torch.Generator, temperature: float = 1.0) -> Tensor:
        light = torch.rand(n, 1, 1, 1, generator=generator) < self.rate
        noise = torch.randn(n, *SHAPE, generator=generator) * self.std * temperature
        return torch.where(light, 0.25, -0.25) + self.shift + noise


class Broken(TwoShades):
    """Draws the same pictures, some of them of no numbers."""

    def sample(self, n: int, *, generator: torch.Generator, temperature: float = 1.0) -> Tensor:
        x = super().sample(n, generator=generator, temperature=temperature)
        x[::2] = math.nan
        return x


class BrokenLater(TwoShades):
    """Draws a first batch of pictures, and one in four of no numbers from then on."""

    drawn = 0

    def sample(self, n: int, *, generator: torch.Generator, temperature: float = 1.0) -> Tensor:
        x = super().sample(n, generator=generator, temperature=temperature)
        if self.drawn:
            x[::4] = math.nan
        self.drawn += n
        return x


class Noisy(TwoShades):
    """Draws pictures with so much noise that only what denoises them tells their shade."""

    noise_std = 0.1

    def denoise(self, y: Tensor) -> Tensor:
        with torch.enable_grad():
            leaf = y.requires_grad_(True)
            (slope,) = torch.autograd.grad(leaf.square().sum(), leaf)  # a gradient, as Tweedie's formula takes one
        return slope / 4 - 0.3


class Labelled(TwoShades):
    """Tells which shade it drew."""

    def sample_with_labels(
        self, n: int, *, generator: torch.Generator, temperature: float = 1.0
    ) -> tuple[Tensor, Tensor]:
        x = self.sample(n, generator=generator, temperature=temperature)
        return x, (x.flatten(1).mean(1) > self.shift).long()


class Colourblind(Shade):
    """Takes each light picture for a dark one."""

    def __call__(self, images: Tensor) -> Tensor:
        return torch.zeros(len(images), dtype=torch.int64)


def evaluate(before=0.5, after=0.1, *, samples=600, constraint=None, steered=None, **options):
    constraints = [constraint or FractionBounds.at_most(Shade(), {"light": 0.15})]
    values = {"n_bits": 8, "seed": 8, **options}
    return evaluate_steering(TwoShades(before), steered or TwoShades(after), constraints, samples=samples, **values)


def images(n, seed=0):
    x = TwoShades(0.5).sample(n, generator=torch.Generator().manual_seed(seed))
    return ((x + 0.5) * 255).clamp(0, 255).to(torch.uint8)


@pytest.fixture(scope="module")
def lowered():
    return evaluate(remember=images(40), held_out=images(20, 1))


def test_a_lowered_attribute_keeps_its_bound(lowered):
    light = lowered.judges[0].changes[1]

    assert lowered.outcome == "succeeded"
    assert light.before.low <= 0.5 <= light.before.high
    assert light.after.low <= 0.1 <= light.after.high <= 0.15
    assert light.judgement.told == "inside"


def test_an_attribute_that_stayed_is_outside():
    same = evaluate(after=0.5)

    assert (same.told, same.outcome) == ("outside", "criteria_not_met")


def test_too_few_samples_are_insufficient_evidence_with_a_number_that_would_do():
    few = evaluate(after=0.1, samples=100)

    assert (few.told, few.outcome) == ("insufficient", "criteria_not_met")
    assert few.needed > 100
    assert evaluate(after=few.judges[0].changes[1].after.value, samples=2 * few.needed).told == "inside"


def test_a_distribution_is_kept_within_its_tolerance():
    target = FractionBounds.distribution(Shade(), {"dark": 0.7, "light": 0.3}, 0.06)

    assert evaluate(after=0.3, samples=1500, constraint=target).told == "inside"
    assert evaluate(after=0.45, samples=1500, constraint=target).told == "outside"


def test_bounds_by_label_count_what_was_drawn_and_leave_the_reading_beside_it():
    target = FractionBounds.distribution(Colourblind(), {"dark": 0.7, "light": 0.3}, 0.06, by_label=True)

    found = evaluate_steering(Labelled(0.5), Labelled(0.3), [target], n_bits=8, samples=1500, seed=8)

    drawn, read = found.judges
    assert (drawn.name, read.name) == ("drawn shade", "shade")
    assert (drawn.drawn, read.drawn) == (True, False)
    assert drawn.changes[1].after.low <= 0.3 <= drawn.changes[1].after.high
    assert [one.judgement.told for one in drawn.changes] == ["inside", "inside"]
    assert [(one.after.value, one.judgement) for one in read.changes] == [(1.0, None), (0.0, None)]
    assert found.outcome == "succeeded"


def test_bounds_by_label_are_missed_by_what_was_drawn_whatever_is_read():
    target = FractionBounds.distribution(Colourblind(), {"dark": 1.0, "light": 0.0}, 0.06, by_label=True)

    found = evaluate_steering(Labelled(0.5), Labelled(0.3), [target], n_bits=8, samples=600, seed=8)

    assert (found.told, found.outcome) == ("outside", "criteria_not_met")


def test_flows_that_do_not_tell_what_they_draw_have_no_bounds_by_label():
    target = FractionBounds.distribution(Shade(), {"dark": 0.7, "light": 0.3}, 0.06, by_label=True)

    with pytest.raises(TargetError, match="flows that tell what they draw; shade has to read these"):
        evaluate(constraint=target)


def test_samples_of_a_class_look_as_they_did(lowered):
    assert [one.kid.within_noise for one in lowered.judges[0].changes] == [True, True]


def test_samples_that_changed_within_their_class_are_named():
    lighter = evaluate(steered=TwoShades(0.1, shift=0.03))

    assert lighter.judges[0].changes[0].kid.within_noise is False
    assert any("dark" in note and "differ" in note for note in lighter.notes)


def test_a_class_that_is_gone_is_told_without_a_distance():
    gone = evaluate(after=1e-9, constraint=FractionBounds.at_most(Shade(), {"light": 0.01}))

    assert gone.told == "inside"
    assert gone.judges[0].changes[1].after.value == 0
    assert gone.judges[0].changes[1].kid.within_noise is None
    assert any("too few samples of light" in note for note in gone.notes)


def test_the_flows_draw_from_latents_of_their_own():
    flow = TwoShades(0.5)
    same = evaluate_steering(
        flow, flow, [FractionBounds.at_least(Shade(), {"light": 0.2})], n_bits=8, samples=200, seed=1
    )
    light = same.judges[0].changes[1]

    assert light.before.value != light.after.value


def test_drift_is_measured_where_images_are_given(lowered):
    assert lowered.remember.drift.value > 0
    assert lowered.remember.drift.n == 40
    assert lowered.held_out.drift.n == 20
    assert evaluate().remember is None


def test_equal_flows_do_not_drift():
    assert evaluate(before=0.3, after=0.3, remember=images(30)).remember.drift.value == 0


def test_broken_samples_fail_whatever_they_are_taken_for():
    # to_uint8 makes black of what is no number, and black counts as dark.
    broken = evaluate(steered=Broken(0.1))

    assert broken.told == "inside"
    assert not broken.healthy
    assert broken.outcome == "criteria_not_met"


def test_broken_samples_behind_the_first_few_are_counted_too():
    late = evaluate(steered=BrokenLater(0.1), batch_size=64)

    assert (late.health_steered.n, late.health_steered.finite) == (600, 1 - 134 / 600)  # one in four, after 64
    assert (late.told, late.outcome) == ("inside", "criteria_not_met")
    assert any("134 of 600 samples of the steered flow" in note for note in late.notes)


def test_a_flow_of_no_numbers_at_all_fails_against_a_base_like_it():
    with torch.no_grad():
        flow = TwoShades(0.1, shift=math.nan)

    found = evaluate_steering(
        flow, flow, [FractionBounds.at_most(Shade(), {"light": 0.15})], n_bits=8, samples=200, seed=1
    )

    assert (found.health_steered.finite, found.outcome) == (0, "criteria_not_met")


def test_what_a_noisy_flow_draws_is_denoised():
    pictures, raw = sampled_images(Noisy(0.0), 5, n_bits=8, seed=1)

    assert torch.allclose(pictures.float() / 255 - 0.5, (raw / 2 - 0.3), atol=0.01)


def test_the_same_seed_gives_the_same_figures_at_any_speed_of_progress(lowered):
    again = evaluate(remember=images(40), held_out=images(20, 1))

    assert again.summary() == lowered.summary()
    assert evaluate(seed=6).summary() != evaluate(seed=5).summary()


def test_several_attributes_are_judged_at_once():
    class Edge(Shade):
        name = "edge"

        def __call__(self, images: Tensor) -> Tensor:
            return (images[:, 0, 0, 0] > 127).long()

    constraints = [FractionBounds.at_most(Shade(), {"light": 0.15}), FractionBounds.at_least(Edge(), {"light": 0.9})]

    both = evaluate_steering(TwoShades(0.5), TwoShades(0.1), constraints, n_bits=8, samples=1000, seed=1)

    assert [one.judgement.told for one in both.judges] == ["inside", "outside"]
    assert both.told == "outside"


def test_progress_ends_at_its_total():
    seen = []

    evaluate(remember=images(40), batch_size=64, on_progress=lambda step, total: seen.append((step, total)))

    assert seen == [(i + 1, len(seen)) for i in range(len(seen))]


def test_what_the_caller_knows_is_kept():
    probe = RelearnProbe("light", steps=10, images=50, before=0.0, after=0.4)

    known = evaluate(kind="access removal", relearn=probe, notes=["Said by the caller."])

    assert (known.kind, known.relearn, known.notes[0]) == ("access removal", probe, "Said by the caller.")


def test_figures_are_json_values(lowered):
    assert all(not isinstance(value, float) or math.isfinite(value) for value in lowered.summary().values())
    assert lowered.summary()["after/shade/light"] == lowered.judges[0].changes[1].after.value


def test_bounds_name_what_is_asked():
    assert FractionBounds.at_most(Shade(), {"light": 0.1}).bounds == {"light": Bound(0.0, 0.1)}
    assert FractionBounds.at_least(Shade(), {"dark": 0.1}).bounds == {"dark": Bound(0.1, 1.0)}
    assert FractionBounds.distribution(Shade(), {"dark": 1.0}, 0.03).bounds == {
        "dark": Bound(0.97, 1.0), "light": Bound(0.0, 0.03),
    }  # fmt: skip


def test_a_distribution_that_does_not_sum_to_one_is_refused():
    with pytest.raises(TargetError, match=r"sums to 0\.9"):
        FractionBounds.distribution(Shade(), {"dark": 0.5, "light": 0.4}, 0.03)


def test_a_class_that_the_judge_does_not_tell_is_refused():
    with pytest.raises(UnknownClassError, match=r"grey.*dark, light"):
        FractionBounds.distribution(Shade(), {"dark": 0.5, "grey": 0.5}, 0.03)


def test_no_question_is_refused():
    with pytest.raises(TargetError, match="nothing is asked"):
        FractionBounds(Shade())
    with pytest.raises(TargetError, match="nothing to judge"):
        evaluate(samples=0)


def test_the_open_number_is_that_of_the_open_judges(lowered):
    judge = lowered.judges[0]
    open_ = replace(judge, judgement=replace(judge.judgement, told="insufficient", needed=None))

    assert replace(lowered, judges=(open_,)).needed is None
    assert lowered.needed is None
