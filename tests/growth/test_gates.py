"""Gates: what passes, what does not, and what is refused for want of evidence."""

import math
from statistics import NormalDist

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from esper.contracts.intervals import student_t_quantile
from esper.growth.gates import (
    FAMILY_LEVEL,
    NO_SAMPLES,
    GateVerdict,
    Spread,
    is_worse,
    judge,
    judge_not_worse,
    level_of,
    not_worse,
    read_gate,
    spread_of_equals,
    upper_rise,
)
from esper.growth.measurement import parse_measurement


def losses(size=400, seed=0):
    return np.random.default_rng(seed).gamma(2.0, 0.5, size)


def poisoned(bad):
    return np.where(np.arange(400) == 3, bad, losses())


def noise(size=400, seed=1):
    return np.random.default_rng(seed).normal(0.0, 0.1, size)


@pytest.mark.parametrize("tries", [1, 2, 5])
def test_levels_of_all_tries_sum_to_five_percent(tries):
    """However many packages may be refused, they share the 5 % among them."""
    assert tries * level_of(tries) == pytest.approx(FAMILY_LEVEL)


def test_clear_gain_passes():
    """A fall of the loss far above its noise passes, with the numbers of the paired test."""
    reference = losses()
    candidate = reference - 0.05 + noise() - noise().mean()
    stderr = 1.6 * noise().std(ddof=1) / 20
    verdict = read_gate(reference, candidate, level=0.025, spread=Spread(factor=1.6))
    assert verdict == GateVerdict(
        passed=True,
        effect=pytest.approx(0.05),
        stderr=pytest.approx(stderr),
        spread=1.6,
        z=pytest.approx(0.05 / stderr),
        threshold=NormalDist().inv_cdf(0.975),
        level=0.025,
        samples=400,
        reason=f"the loss falls by 0.05, z = {0.05 / stderr:.2f} above 1.96",
    )


def test_gate_is_one_sided():
    """A graft that makes the loss rise does not pass, however significant that is."""
    reference = losses()
    assert not read_gate(reference, reference + 0.05 + noise(), level=0.025).passed


@pytest.mark.parametrize(("offset", "passes"), [(-0.02, False), (0.02, True)])
def test_threshold_is_the_normal_quantile(offset, passes):
    """A z just above the quantile of 1 - level passes, one just below does not."""
    wiggle = noise()
    wiggle = (wiggle - wiggle.mean()) / wiggle.std(ddof=1)
    effect = (NormalDist().inv_cdf(1 - 0.01) + offset) / math.sqrt(400)
    verdict = read_gate(wiggle + effect, np.zeros(400), level=0.01)
    assert verdict.passed is passes


def test_spread_widens_the_standard_error():
    """What passed beyond the error of the samples may not pass beyond that of equal runs."""
    reference = losses()
    candidate = reference + (noise() - noise().mean()) - 0.011
    alone = read_gate(reference, candidate, level=0.05)
    spread = read_gate(reference, candidate, level=0.05, spread=Spread(factor=1.6))
    assert alone.passed
    assert not spread.passed
    assert spread.stderr == pytest.approx(1.6 * alone.stderr, rel=1e-12)
    assert spread.threshold == alone.threshold


def test_spread_that_was_not_measured_does_not_pass():
    """An infinite spread stands for one that was not measured: no evidence, no pass."""
    reference = losses()
    verdict = read_gate(
        reference, reference - 1.0 + noise(), level=0.025, spread=Spread(factor=math.inf, degrees=3)
    )
    assert verdict == GateVerdict(
        passed=False,
        effect=None,
        stderr=None,
        spread=1.0,
        z=None,
        threshold=NormalDist().inv_cdf(0.975),
        level=0.025,
        samples=400,
        reason="the spread between equal runs could not be measured",
    )


def test_spread_of_a_few_equals_has_students_quantile():
    """Three degrees of freedom ask for 2.35 standard errors where a setting asks for 1.64."""
    reference = losses()
    candidate = reference - 0.02 + noise()
    known = read_gate(reference, candidate, level=0.05, spread=Spread(factor=1.6))
    measured = read_gate(reference, candidate, level=0.05, spread=Spread(factor=1.6, degrees=3))
    assert measured.threshold == student_t_quantile(0.95, 3) == pytest.approx(2.353, abs=1e-3)
    assert known.threshold == NormalDist().inv_cdf(0.95)
    assert measured.z == known.z


def equal_runs(drift, num=4, size=400):
    """Runs that are equal but for luck: each sample wobbles, and all of a run drift together."""
    random = np.random.default_rng(5)
    shared = losses(size)
    drifts = random.normal(0.0, drift, num)
    return [shared + random.normal(0.0, 0.1, size) + own for own in drifts]


def test_spread_is_how_far_equal_runs_come_out_apart():
    """In standard errors of a pair: the formula of its docstring, from the means and the pairs."""
    runs = equal_runs(drift=0.02)
    found = spread_of_equals(runs)
    variance = np.var([run.mean() for run in runs], ddof=1)
    errors = [np.var(a - b, ddof=1) / 400 for i, a in enumerate(runs) for b in runs[:i]]
    assert found.factor == pytest.approx(math.sqrt(2 * variance / np.mean(errors)), rel=1e-12)
    assert found.factor > 1.6
    assert found.degrees == 3


def test_spread_of_half_precision_losses_is_that_of_their_values():
    """It is computed in doubles, whatever the losses are."""
    halves = [run.astype(np.float16) for run in equal_runs(drift=0.02)]
    assert spread_of_equals(halves) == spread_of_equals([run.astype(float) for run in halves])


def test_spread_is_at_least_one():
    """Equal runs that happen to come out close make no gate easier to pass."""
    assert spread_of_equals(equal_runs(drift=0.0)).factor >= 1.0
    runs = [losses() + wiggle - wiggle.mean() for wiggle in (noise(seed=s) for s in range(4))]
    assert spread_of_equals(runs).factor == 1.0


def test_spread_of_runs_that_do_not_differ_is_unknown():
    """Bit-equal twins tell nothing of luck, and losses that are not finite neither."""
    assert spread_of_equals([losses()] * 4).factor == math.inf
    for bad in (math.nan, math.inf):
        assert spread_of_equals([losses(), poisoned(bad), poisoned(bad)]).factor == math.inf


def test_effect_below_the_minimum_does_not_pass():
    """A gain beyond luck but too small to matter does not pass, and the reason says so."""
    reference = losses()
    candidate = reference - 0.01 + 0.01 * noise()
    assert read_gate(reference, candidate, level=0.025).passed
    verdict = read_gate(reference, candidate, level=0.025, min_effect=0.02)
    assert not verdict.passed
    assert "too small" in verdict.reason


def test_effect_of_just_the_minimum_passes():
    """Half of the samples gain 1.5, half 0.5: the mean is 1, exactly."""
    gains = np.tile([1.5, 0.5], 200)
    assert read_gate(gains, np.zeros(400), level=0.025, min_effect=1.0).passed


def test_differences_too_small_for_a_standard_error_do_not_pass():
    """Their variance is the smallest number there is, and no z can be had."""
    verdict = read_gate(np.tile([3e-162, -1e-162], 200), np.zeros(400), level=0.025)
    assert (verdict.passed, verdict.stderr, verdict.z) == (False, 0.0, None)
    assert "no spread" in verdict.reason


def test_too_few_samples_have_too_little_power():
    """Under 200 samples nothing passes; the verdict says what would have been asked."""
    spread = Spread(factor=1.6, degrees=3)
    verdict = read_gate(losses(120), losses(120) - 1.0 + noise(120), level=0.05, spread=spread)
    assert verdict == GateVerdict(
        passed=False,
        effect=None,
        stderr=None,
        spread=1.6,
        z=None,
        threshold=student_t_quantile(0.95, 3),
        level=0.05,
        samples=120,
        reason="too little power: 120 samples, at least 200 needed",
    )


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("side", ["reference", "candidate"])
def test_loss_that_is_not_finite_does_not_pass(bad, side):
    """One loss that is not finite, on either side, and there is no verdict on numbers."""
    pair = {"reference": losses() + 1.0, "candidate": losses() + 0.1 * noise()}
    pair[side][7] = bad
    verdict = read_gate(pair["reference"], pair["candidate"], level=0.025)
    assert not verdict.passed
    assert verdict.effect is None
    assert "1 of 400" in verdict.reason


def test_losses_that_are_infinite_on_both_sides_do_not_pass():
    """Their difference is no number, and is refused as one, without a warning."""
    verdict = read_gate(poisoned(math.inf), poisoned(math.inf), level=0.025)
    assert not verdict.passed
    assert "1 of 400" in verdict.reason


def test_graft_that_changes_nothing_does_not_pass():
    """A no-op has differences of exactly 0, no spread to divide by, and no pass."""
    verdict = read_gate(losses(), losses(), level=0.025)
    assert not verdict.passed
    assert verdict.effect == 0.0
    assert verdict.z is None
    assert verdict.reason == "it changes no loss at all"


def test_same_gain_on_every_sample_does_not_pass():
    """Differences without any spread are no measurement of a model's losses."""
    verdict = read_gate(np.full(400, 2.0), np.full(400, 1.0), level=0.025)
    assert not verdict.passed
    assert "no spread" in verdict.reason


@given(st.lists(st.floats(-1e3, 1e3), min_size=2, max_size=30), st.floats(0.001, 0.4))
def test_numbers_of_a_verdict_can_be_logged(values, level):
    """Whatever the losses, no number of a verdict is infinite or NaN."""
    verdict = read_gate(values, [0.0] * len(values), level=level, min_samples=2)
    numbers = (verdict.effect, verdict.stderr, verdict.spread, verdict.z)
    assert all(number is None or math.isfinite(number) for number in numbers)


def test_unpaired_losses_are_refused():
    """Losses of different samples cannot be compared, and the shapes are named."""
    with pytest.raises(ValueError, match=r"\(400,\) and \(300,\)"):
        read_gate(losses(400), losses(300), level=0.025)


@pytest.mark.parametrize(
    "setting", [{"level": 0.0}, {"level": 0.5}, {"min_samples": 1}, {"min_effect": -1.0}]
)
def test_settings_outside_their_range_are_refused(setting):
    """A level, number or minimum that means nothing is a caller's mistake."""
    with pytest.raises(ValueError, match="got"):
        read_gate(losses(), losses(), **{"level": 0.025, **setting})


def test_not_worse_compares_the_means():
    """Any fall of the mean passes, any rise does not, whatever the noise."""
    reference = losses()
    wiggle = noise() - noise().mean()
    assert not_worse(reference, reference + wiggle - 1e-4, level=0.025).passed
    assert not not_worse(reference, reference + wiggle + 1e-4, level=0.025).passed


@pytest.mark.parametrize(("rise", "said"), [(0.01, "rose by 0.01"), (-0.01, "fell by 0.01")])
def test_not_worse_tells_the_numbers_of_the_pair(rise, said):
    """What was measured is in the verdict, whichever way it went."""
    stderr = noise().std(ddof=1) / 20
    verdict = not_worse(losses(), losses() + noise() - noise().mean() + rise, level=0.025)
    assert verdict == GateVerdict(
        passed=rise < 0,
        effect=pytest.approx(-rise),
        stderr=pytest.approx(stderr),
        spread=1.0,
        z=pytest.approx(-rise / stderr),
        threshold=0.0,
        level=0.025,
        samples=400,
        reason=f"the loss {said} against the snapshot",
    )


def test_what_is_as_good_is_not_worse():
    """A graft that changes no loss stays, and has no z."""
    verdict = not_worse(losses(), losses(), level=0.025)
    assert (verdict.passed, verdict.effect, verdict.z) == (True, 0.0, None)
    assert verdict.reason == "the loss did not rise by 0 against the snapshot"


def test_not_worse_needs_the_samples_too():
    """The comparison with a snapshot is no way around a gate split that is too small."""
    assert not_worse(losses(100), losses(100) - 1.0, level=0.025).passed
    verdict = not_worse(losses(99), losses(99) - 1.0, level=0.025)
    assert (verdict.passed, verdict.samples) == (False, 99)
    assert verdict.reason == "too little power: 99 samples, at least 100 needed"
    with pytest.raises(ValueError, match="min_samples"):
        not_worse(losses(), losses(), level=0.025, min_samples=1)


@pytest.mark.parametrize("read", [judge, judge_not_worse])
@pytest.mark.parametrize(("before", "after"), [(1.0, losses()), (losses(), 1.0)])
def test_measurement_without_samples_is_no_evidence(read, before, after):
    """On either side; the verdict says so, with the level that it would have had."""
    assert read(measured(before), measured(after), level=0.025) == GateVerdict(
        passed=False,
        effect=None,
        stderr=None,
        spread=1.0,
        z=None,
        threshold=NormalDist().inv_cdf(0.975),
        level=0.025,
        samples=0,
        reason=NO_SAMPLES,
    )


def test_measurements_are_judged_by_their_samples():
    """Two measurements have the verdict that their losses have."""
    before, after = losses(), losses() - 0.01 + noise()
    found = judge_not_worse(measured(before), measured(after), level=0.025)
    assert found == not_worse(before, after, level=0.025)
    options = {"level": 0.025, "spread": Spread(factor=1.6), "min_effect": 0.002}
    assert judge(measured(before), measured(after), **options) == read_gate(
        before, after, **options
    )


def measured(values):
    return parse_measurement(values)


@pytest.mark.parametrize(("errors_above", "is_said"), [(2.999, False), (3.001, True)])
def test_watch_tells_a_rise_of_more_than_three_standard_errors(errors_above, is_said):
    """Of the paired difference: what all samples share does not hide a rise."""
    wiggle = (noise() - noise().mean()) / noise().std(ddof=1)
    rise = wiggle + errors_above / math.sqrt(400)
    found = is_worse(measured(losses()), measured(losses() + rise))
    assert (found is not None) is is_said


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_watch_tells_a_loss_that_is_not_finite(bad):
    """Of one sample, though all others fell."""
    now = losses() - 1.0
    now[3] = bad
    assert "became" in is_worse(measured(losses()), measured(now))


def test_watch_without_samples_is_trouble():
    """A mean tells no standard error, and unmeasured means no."""
    for before, now in ((1.0, 0.5), (1.0, losses()), (losses(), 0.5)):
        assert is_worse(measured(before), measured(now)) == NO_SAMPLES


def test_watch_has_nothing_to_say_of_a_loss_that_stays():
    """Differences that are all 0 have an error of 0, and are no rise."""
    assert is_worse(measured(losses()), measured(losses())) is None


def test_bound_of_a_rise_is_one_sided_at_95_percent():
    """The mean rise and 1.645 standard errors; infinite where nothing was measured."""
    rise = 0.1 + noise()
    bound = upper_rise(measured(losses()), measured(losses() + rise))
    quantile = NormalDist().inv_cdf(0.95)
    assert bound == pytest.approx(rise.mean() + quantile * rise.std(ddof=1) / 20)
    for before, now in ((1.0, 0.5), (1.0, losses()), (losses(), 0.5)):
        assert upper_rise(measured(before), measured(now)) == math.inf
    for bad in (math.nan, math.inf):
        assert upper_rise(measured(losses()), measured(poisoned(bad))) == math.inf


@pytest.mark.parametrize(
    "result",
    [
        torch.tensor([1.0, 3.0], requires_grad=True),
        np.array([1.0, 3.0], dtype=np.float32),
        [1.0, 3.0],
        {"loss": torch.tensor([1.0, 3.0], dtype=torch.bfloat16), "accuracy": 0.5},
        (torch.tensor([1.0, 3.0]), {"accuracy": torch.tensor([0.0, 1.0])}),
    ],
)
def test_per_sample_losses_are_read_in_every_form(result):
    """A tensor, an array, a list, a dict or a pair: the losses are the same float64 values."""
    measurement = parse_measurement(result)
    assert measurement.per_sample.dtype == np.float64
    assert measurement.per_sample.tolist() == [1.0, 3.0]
    assert measurement.loss == 2.0
    assert measurement.metrics in ({}, {"accuracy": 0.5})


def test_losses_read_are_a_copy():
    """What was read does not change when the owner reuses the buffer."""
    buffer = torch.tensor([1.0, 3.0], dtype=torch.float64)
    measurement = parse_measurement(buffer)
    buffer.zero_()
    assert measurement.per_sample.tolist() == [1.0, 3.0]


@pytest.mark.parametrize("result", [0.5, torch.tensor(0.5), np.float32(0.5), {"a": 0.5}])
def test_scalar_has_no_per_sample_losses(result):
    """A scalar is a loss, and no sample of anything."""
    measurement = parse_measurement(result)
    assert measurement.loss == 0.5
    assert measurement.per_sample is None


def test_goal_max_is_negated():
    """Where higher is better the deciding figure is negated, the metrics are not."""
    measurement = parse_measurement((torch.tensor([True, False]), {"accuracy": 0.5}), goal="max")
    assert measurement.loss == -0.5
    assert measurement.per_sample.tolist() == [-1.0, 0.0]
    assert measurement.metrics == {"accuracy": 0.5}


@pytest.mark.parametrize("result", [None, "0.5", {1, 2}, object(), [None], [[1.0], [1.0, 2.0]]])
def test_result_of_another_type_is_refused(result):
    """What is no number and no array is a TypeError that names what is expected."""
    with pytest.raises(TypeError, match="evaluate returned"):
        parse_measurement(result)


@pytest.mark.parametrize("result", [torch.zeros(5, 10), torch.zeros(0), [], {}])
def test_result_of_another_shape_is_refused(result):
    """Losses per class or per token, or none at all, are refused with the cure."""
    with pytest.raises(ValueError, match="evaluate returned"):
        parse_measurement(result)
