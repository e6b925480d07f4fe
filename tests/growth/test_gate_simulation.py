"""How often a useless graft gets through: 1,000 simulated runs, and controls that must fail.

A null graft's per-sample differences have mean 0 on the population and the heavy tails and the
skew of real loss differences; every gate sees a finite sample of it.
"""

import numpy as np
import pytest

from esper.growth.gates import read_gate, test_level

NUM_RUNS = 1_000
NUM_GRAFTS = 8
NUM_PEEKS = 5
NUM_SAMPLES = 500

pytestmark = pytest.mark.slow


def null_differences(random, num_samples=NUM_SAMPLES):
    """Draw differences of mean 0: most are tiny, few are large, the tail leans to one side."""
    size = np.exp(random.normal(0.0, 1.0, num_samples))
    lean = random.exponential(1.0, num_samples) - 1.0
    return 0.02 * (size * random.normal(0.0, 1.0, num_samples) + 0.5 * lean)


def passes(random, level, *, shift=0.0, tau=0.0):
    differences = null_differences(random) + shift
    reference = random.gamma(2.0, 0.25, NUM_SAMPLES)
    return read_gate(reference, reference - differences, level=level, tau=tau).passed


def share_of_runs(admits):
    return sum(admits(np.random.default_rng(run)) for run in range(NUM_RUNS)) / NUM_RUNS


def test_at_most_five_percent_of_null_runs_admit_anything():
    """Eight useless grafts in a run, one look each at the shrinking level: 5 % of runs at most."""

    def admits(random):
        return any(passes(random, test_level(k)) for k in range(1, NUM_GRAFTS + 1))

    assert 0.0 < share_of_runs(admits) <= 0.05


def test_peeking_every_epoch_at_five_percent_lets_useless_grafts_through():
    """The control: the same grafts, looked at five times each at 5 %, get into most runs."""

    def admits(random):
        return any(passes(random, 0.05) for _ in range(NUM_GRAFTS * NUM_PEEKS))

    assert share_of_runs(admits) > 0.5


def chaotic_fork(random, *, with_tau):
    """One useless graft at the fork: two equal runs drift apart, all samples together."""
    drift, one, other = random.normal(0.0, 0.01, 3)
    tau = abs(one - other) if with_tau else 0.0
    return passes(random, test_level(1), shift=drift * np.sqrt(2.0), tau=tau)


def test_useless_graft_is_not_fossilized_by_chaos():
    """Through both gates, drift between equal twins included, few useless grafts come."""

    def fossilizes(random):
        return passes(random, test_level(1)) and chaotic_fork(random, with_tau=True)

    assert share_of_runs(fossilizes) <= 0.01


def test_fork_without_tau_takes_chaos_for_a_gain():
    """The control: without tau the fork's gate alone passes chaos several times as often."""
    without = share_of_runs(lambda random: chaotic_fork(random, with_tau=False))
    with_tau = share_of_runs(lambda random: chaotic_fork(random, with_tau=True))
    assert without > 0.25
    assert with_tau < 0.5 * without
