"""What the ranks measured becomes one measurement: each held-out sample counts once."""

import numpy as np
import pytest

from esper.contracts.errors import GrowthError
from esper.growth.measurement import parse_measurement
from esper.growth.shards import joined

LOSSES = np.arange(6.0)


def measured(losses, **metrics):
    return parse_measurement((losses, metrics))


def test_one_process_has_what_it_measured():
    """Nothing is put together where there is one rank."""
    found = measured(LOSSES)
    assert joined([(found, "mark")]) is found


@pytest.mark.parametrize("mark", ["mark", ""])
def test_ranks_that_read_the_same_samples_have_the_first_ones_reading(mark):
    """Statistics that ranks keep apart move it a little; more copies are no more evidence."""
    first = measured(LOSSES, accuracy=0.5)
    assert joined([(first, mark), (measured(LOSSES * (1 + 1e-5)), mark)]) is first


def test_losses_that_their_owner_gathered_count_once():
    """Each rank read a share and returned all: the marks differ, and the losses do not."""
    first = measured(LOSSES)
    assert joined([(first, "a"), (measured(LOSSES), "b")]) is first


@pytest.mark.parametrize("marks", [("a", "b"), ("", "")])
def test_shares_are_put_one_behind_the_other(marks):
    """Losses in the ranks' order; metrics weigh as many samples as they are of."""
    shares = [measured(LOSSES[:2], accuracy=0.0), measured(LOSSES[2:], accuracy=0.75)]
    found = joined(list(zip(shares, marks, strict=True)))
    assert np.array_equal(found.per_sample, LOSSES)
    assert (found.loss, found.metrics) == (2.5, {"accuracy": 0.5})


def test_some_the_same_and_some_not_is_refused():
    """Nobody could say which samples count twice."""
    shares = [(measured(LOSSES[:2]), "a"), (measured(LOSSES[:2] + 1), "a")]
    with pytest.raises(GrowthError, match="2 different sets of held-out samples on 3 ranks"):
        joined([*shares, (measured(LOSSES[2:]), "b")])


def test_scalars_have_a_mean_and_no_samples():
    """No gate passes by them."""
    found = joined([(measured(1.0, a=1.0), "a"), (measured(2.0, a=2.0, b=1.0), "b")])
    assert (found.loss, found.per_sample, found.metrics) == (1.5, None, {"a": 1.5})
    first = measured(1.0)
    assert joined([(first, "a"), (measured(1.1), "a")]) is first
