"""A model that FSDP2 has sharded, and that grows, by hand and by a controller, on two processes."""

import pytest
import sharded_trials
import torch.multiprocessing as multiprocessing

pytestmark = pytest.mark.network


def outcomes_of(run, cases, folder):
    """Return what each of two ranks says of each case."""
    context = multiprocessing.get_context("spawn")
    queue = context.SimpleQueue()
    multiprocessing.spawn(run, (2, f"file://{folder}/rendezvous", queue), nprocs=2)
    said = [queue.get() for _ in range(2 * len(cases))]
    return {case: [how for name, how in said if name == case] for case in cases}


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    return outcomes_of(sharded_trials.run_short, sharded_trials.CASES, folder)


@pytest.fixture(scope="module")
def long_outcomes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    return outcomes_of(sharded_trials.run_long, sharded_trials.LONG_CASES, folder)


@pytest.mark.slow
@pytest.mark.parametrize("case", sharded_trials.CASES)
def test_ranks_grow_together(outcomes, case):
    """Each way to grow a sharded model, with each fault on one rank, ends as promised on both."""
    assert set(outcomes[case]) == {"passed"}


@pytest.mark.torture
@pytest.mark.parametrize("case", sharded_trials.LONG_CASES)
def test_ranks_go_through_trials_together(long_outcomes, case):
    """Refused, rolled back, or resumed under watch: both ranks are where one would be."""
    assert set(long_outcomes[case]) == {"passed"}
