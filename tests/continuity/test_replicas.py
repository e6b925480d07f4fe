"""A replicated model that grows: ranks stay equal whatever one of them meets, and none waits."""

import copy
import pickle

import pytest
import replicated_ranks
import torch.multiprocessing as multiprocessing

from esper.continuity.replicas import _Replication


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """What each of two ranks says of each case."""
    context = multiprocessing.get_context("spawn")
    queue = context.SimpleQueue()
    rendezvous = f"file://{tmp_path_factory.mktemp('ranks')}/rendezvous"
    multiprocessing.spawn(replicated_ranks.run, (2, rendezvous, queue), nprocs=2)
    said = [queue.get() for _ in range(2 * len(replicated_ranks.CASES))]
    return {case: [how for name, how in said if name == case] for case in replicated_ranks.CASES}


@pytest.mark.slow
@pytest.mark.network
@pytest.mark.parametrize("case", replicated_ranks.CASES)
def test_ranks_stay_equal_and_none_waits(outcomes, case):
    """Each way to train, with each fault on one rank, ends with the same weights on both."""
    assert set(outcomes[case]) == {"passed"}


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda r: pickle.loads(pickle.dumps(r))], ids=["copy", "pickle"]
)
def test_a_copy_of_a_replicated_model_averages_nothing(copied):
    """An EMA, or a file, has a hook with nothing in it."""
    replication = _Replication()
    replication._buckets = [[object()]]
    assert copied(replication)._buckets == []
