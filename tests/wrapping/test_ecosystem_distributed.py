"""DDP and FSDP2, on one process and on two, before wrapping and after."""

import ecosystem_ranks
import pytest
import torch.multiprocessing as multiprocessing

pytestmark = [pytest.mark.slow, pytest.mark.network]


@pytest.fixture(scope="module", params=[1, 2], ids=["one_rank", "two_ranks"])
def outcomes(request, tmp_path_factory):
    """What each rank says of each case."""
    context = multiprocessing.get_context("spawn")
    queue = context.SimpleQueue()
    rendezvous = f"file://{tmp_path_factory.mktemp('ranks')}/rendezvous"
    multiprocessing.spawn(
        ecosystem_ranks.run, (request.param, rendezvous, queue), nprocs=request.param
    )
    said = [queue.get() for _ in range(request.param * len(ecosystem_ranks.CASES))]
    return {case: [how for name, how in said if name == case] for case in ecosystem_ranks.CASES}


@pytest.mark.parametrize("case", ecosystem_ranks.CASES)
def test_ranks_train_as_under_ddp_alone(outcomes, case):
    """Each order of wrapping, grafting, DDP and FSDP2 that is promised gives the bare numbers."""
    assert set(outcomes[case]) == {"passed"}
