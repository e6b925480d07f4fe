"""How often a useless package gets through: 1,000 simulated runs, and controls that must fail.

A useless package's per-sample differences have mean 0 on the population and the heavy tails and the
skew of real loss differences; every verdict sees a finite sample of it. Besides, two equal runs
drift apart, all samples together, as far as the spread says.
"""

import numpy as np
import pytest

from esper.growth.gates import EXACT, Spread, level_of, read_gate, spread_of_equals

NUM_RUNS = 1_000
NUM_PACKAGES = 8
NUM_PEEKS = 5
NUM_SAMPLES = 500
SPREAD = Spread(factor=1.6)

pytestmark = pytest.mark.slow


def null_differences(random, num_samples=NUM_SAMPLES):
    """Draw differences of mean 0: most are tiny, few are large, the tail leans to one side."""
    size = np.exp(random.normal(0.0, 1.0, num_samples))
    lean = random.exponential(1.0, num_samples) - 1.0
    return 0.02 * (size * random.normal(0.0, 1.0, num_samples) + 0.5 * lean)


def of_equal_runs(random, factor=SPREAD.factor):
    """Differences of two runs that are equal but for luck, whose z has the spread ``factor``."""
    differences = null_differences(random)
    stderr = differences.std() / np.sqrt(NUM_SAMPLES)
    return differences + random.normal(0.0, stderr * np.sqrt(factor**2 - 1.0))


def passes(random, level, *, spread=SPREAD):
    reference = random.gamma(2.0, 0.25, NUM_SAMPLES)
    candidate = reference - of_equal_runs(random)
    return read_gate(reference, candidate, level=level, spread=spread).passed


def share_of_runs(keeps):
    return sum(keeps(np.random.default_rng(run)) for run in range(NUM_RUNS)) / NUM_RUNS


@pytest.mark.parametrize("tries", [1, 3])
def test_at_most_five_percent_of_runs_ever_keep_a_useless_package(tries):
    """Each package at 0.05 / tries, and the last refusal ends it, however many could follow."""

    def keeps(random):
        verdicts = (passes(random, level_of(tries)) for _ in range(NUM_PACKAGES))
        return any(ended_by(verdicts, tries))

    assert 0.0 < share_of_runs(keeps) <= 0.05


def ended_by(verdicts, tries):
    """Yield verdicts up to the refusal that ends growth."""
    for passed in verdicts:
        yield passed
        tries -= not passed
        if not tries:
            return


def test_a_useful_package_after_a_refusal_costs_a_try_of_two():
    """A package that helps by six standard errors passes at either level."""
    random = np.random.default_rng(0)
    differences = null_differences(random)
    helped = differences + 6 * SPREAD.factor * differences.std() / np.sqrt(NUM_SAMPLES)
    for tries in (1, 2):
        assert read_gate(helped, 0 * helped, level=level_of(tries), spread=SPREAD).passed


def test_refusals_without_an_end_let_useless_packages_through():
    """The control: as many packages, each at 5 % whatever was refused before."""

    def keeps(random):
        return any(passes(random, 0.05) for _ in range(NUM_PACKAGES))

    assert share_of_runs(keeps) > 0.2


def test_peeking_every_epoch_at_five_percent_lets_useless_packages_through():
    """The control: each package looked at five times gets into most runs."""

    def keeps(random):
        return any(passes(random, 0.05) for _ in range(NUM_PACKAGES * NUM_PEEKS))

    assert share_of_runs(keeps) > 0.5


def test_the_plain_standard_error_takes_drift_for_a_gain():
    """The control: a single look, with an error that knows nothing of equal runs."""
    assert share_of_runs(lambda random: passes(random, 0.05, spread=EXACT)) > 0.1


def test_a_spread_that_is_measured_keeps_to_five_percent_too():
    """On three equal twins, with Student's quantile; with the normal one it would not."""

    def keeps(random, students):
        shared = random.gamma(2.0, 0.25, NUM_SAMPLES)
        live, candidate, *equals = (shared + of_equal_runs(random) / np.sqrt(2.0) for _ in range(5))
        found = spread_of_equals([live, *equals])
        if not students:
            found = Spread(factor=found.factor)
        return read_gate(live, candidate, level=0.05, spread=found).passed

    with_student = share_of_runs(lambda random: keeps(random, students=True))
    assert with_student <= 0.05 + 2 * np.sqrt(0.05 * 0.95 / NUM_RUNS)
    assert share_of_runs(lambda random: keeps(random, students=False)) > 1.3 * with_student
