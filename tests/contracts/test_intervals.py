"""The t interval of a mean."""

import math

import pytest

from esper.contracts.intervals import mean_interval, student_t_cdf, student_t_quantile


@pytest.mark.parametrize(
    ("probability", "degrees", "expected"),
    [
        (0.975, 1, 12.706204736),
        (0.975, 2, 4.3026527297),
        (0.975, 9, 2.2621571628),
        (0.95, 7, 1.8945786051),
        (0.995, 30, 2.7499956536),
        (0.975, 1_000_000, 1.9599663598),
    ],
)
def test_quantiles_are_those_of_the_tables(probability, degrees, expected):
    """The quantiles are the published ones, from one degree of freedom to a million."""
    assert student_t_quantile(probability, degrees) == pytest.approx(expected, rel=1e-8)


def test_the_quantile_is_odd():
    """The lower quantile is the upper one with the other sign, and the median is 0."""
    assert student_t_quantile(0.025, 5) == -student_t_quantile(0.975, 5)
    assert student_t_quantile(0.5, 5) == pytest.approx(0.0, abs=1e-9)


@pytest.mark.parametrize("t", [-3.0, -0.5, 0.0, 0.2, 4.0])
def test_one_degree_of_freedom_is_cauchys_distribution(t):
    """With one degree of freedom the probability is the arctangent's."""
    assert student_t_cdf(t, 1) == pytest.approx(0.5 + math.atan(t) / math.pi, rel=1e-12)


def test_the_interval_is_that_of_the_paired_t_test():
    """Mean, low and high agree with the formula worked out by hand for four differences."""
    interval = mean_interval([1.0, 2.0, 3.0, 4.0])
    half = 3.1824463053 * math.sqrt(5.0 / 3.0) / 2.0
    assert interval.mean == 2.5
    assert interval.low == pytest.approx(2.5 - half, rel=1e-9)
    assert interval.high == pytest.approx(2.5 + half, rel=1e-9)


def test_more_confidence_is_a_wider_interval():
    """The 99 % interval contains the 90 % interval."""
    wide, narrow = (mean_interval([1.0, 2.0, 4.0], confidence=c) for c in (0.99, 0.9))
    assert wide.low < narrow.low < narrow.high < wide.high


@pytest.mark.parametrize("values", [[], [3.0]], ids=["none", "one"])
def test_too_few_values_have_no_interval(values):
    """Fewer than two values have no ends, and an unknown interval is on no side of 0."""
    interval = mean_interval(values)
    assert interval.mean == (values[0] if values else None)
    assert (interval.low, interval.high) == (None, None)
    assert not interval.is_above_zero
    assert not interval.is_below_zero


def test_the_side_of_zero_is_that_of_the_whole_interval():
    """An interval is above 0 if its low end is, below if its high end is, else neither."""
    above, below = mean_interval([4.9, 5.0, 5.1]), mean_interval([-4.9, -5.0, -5.1])
    around = mean_interval([-1.0, 2.0])
    assert (above.is_above_zero, above.is_below_zero) == (True, False)
    assert (below.is_above_zero, below.is_below_zero) == (False, True)
    assert (around.is_above_zero, around.is_below_zero) == (False, False)


@pytest.mark.parametrize(
    "call",
    [
        lambda: mean_interval([1.0, 2.0], confidence=1.0),
        lambda: mean_interval([1.0, math.nan]),
        lambda: student_t_quantile(0.0, 3),
        lambda: student_t_quantile(0.5, 0),
    ],
    ids=["all confidence", "no number", "no probability", "no freedom"],
)
def test_what_has_no_answer_is_refused(call):
    """Arguments out of range raise instead of returning a number."""
    with pytest.raises(ValueError, match="got"):
        call()
