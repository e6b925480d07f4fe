"""Trials under DistributedDataParallel: no rank notices one, and all switch at the same update."""

import pytest
import torch.multiprocessing as multiprocessing
import trial_ranks


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """What each of two ranks says of each case."""
    context = multiprocessing.get_context("spawn")
    queue = context.SimpleQueue()
    rendezvous = f"file://{tmp_path_factory.mktemp('ranks')}/rendezvous"
    multiprocessing.spawn(trial_ranks.run, (2, rendezvous, queue), nprocs=2)
    said = [queue.get() for _ in range(2 * len(trial_ranks.CASES))]
    return {case: [how for name, how in said if name == case] for case in trial_ranks.CASES}


@pytest.mark.slow
@pytest.mark.network
@pytest.mark.parametrize("case", trial_ranks.CASES)
def test_ranks_agree_and_are_left_alone(outcomes, case):
    """Each case passes on both ranks."""
    assert set(outcomes[case]) == {"passed"}
