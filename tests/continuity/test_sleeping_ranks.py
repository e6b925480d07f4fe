"""Blocks that sleep under DDP and FSDP2, on two processes."""

import pytest
import sleeping_ranks
import torch.multiprocessing as multiprocessing

pytestmark = [pytest.mark.slow, pytest.mark.network]


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """What each of two ranks says of each case."""
    context = multiprocessing.get_context("spawn")
    queue = context.SimpleQueue()
    rendezvous = f"file://{tmp_path_factory.mktemp('ranks')}/rendezvous"
    multiprocessing.spawn(sleeping_ranks.run, (2, rendezvous, queue), nprocs=2)
    said = [queue.get() for _ in range(2 * len(sleeping_ranks.CASES))]
    return {case: [how for name, how in said if name == case] for case in sleeping_ranks.CASES}


@pytest.mark.parametrize("case", sleeping_ranks.CASES)
def test_ranks_sleep_and_wake_together(outcomes, case):
    """Each way to shard or replicate, with each order and fault, ends as promised on both ranks."""
    assert set(outcomes[case]) == {"passed"}
