"""Some samples of a batch, whatever it is made of, and parts that are joined again."""

from collections import OrderedDict, namedtuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.utils.rnn import pack_padded_sequence

from esper.seeds.batch_rows import (
    NoRowsError,
    cuts,
    joined_rows,
    num_rows,
    rows_of,
    shapes_of,
    spread_rows,
)

Pair = namedtuple("Pair", ["x", "y"])


def batches(num):
    """Return batches of ``num`` samples: tensors, nested, with what belongs to all of them."""
    tensors = st.sampled_from([(), (3,), (2, 5)]).map(
        lambda shape: torch.arange(num * max(1, len(shape) * 4)).float().reshape(num, -1)
    )
    shared = st.sampled_from([None, 3, 0.5, torch.tensor(2.0)])
    return st.recursive(
        tensors,
        lambda parts: st.one_of(
            st.tuples(parts, parts),
            st.lists(parts, min_size=1, max_size=3),
            st.builds(Pair, parts, parts),
            st.dictionaries(st.sampled_from("abc"), parts, min_size=1),
            st.builds(lambda part, also: {"part": part, "also": also}, parts, shared),
            st.builds(lambda part: OrderedDict(labels=part), parts),
        ),
        max_leaves=6,
    )


def equal(one, other):
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return (
            type(one) is type(other)
            and list(one) == list(other)
            and all(equal(one[name], other[name]) for name in one)
        )
    if isinstance(one, (tuple, list)):
        return type(one) is type(other) and all(map(equal, one, other))
    return one is other or one == other


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_parts_of_a_batch_joined_are_the_batch(data):
    """In its order and of its types, wherever it is cut."""
    num = data.draw(st.integers(1, 12))
    batch = data.draw(batches(num))
    parts = cuts(num, data.draw(st.integers(1, 14)))
    found = [rows_of(batch, *part) for part in parts]
    sizes = [stop - start for start, stop in parts]
    assert num_rows(batch) == num
    assert [num_rows(part) for part in found] == sizes
    without_scalars = "also" not in repr(batch)  # a tensor without rows is not one a sample
    if without_scalars:
        assert equal(joined_rows(found, sizes), batch)


@given(st.integers(1, 200), st.integers(1, 200))
def test_cuts_are_few_and_even(num, most):
    """They follow one another, hold at most so many, and differ by one at most."""
    found = cuts(num, most)
    sizes = [stop - start for start, stop in found]
    assert [start for start, _ in found] == [0, *(stop for _, stop in found[:-1])]
    assert found[-1][1] == num
    assert max(sizes) <= most
    assert max(sizes) - min(sizes) <= 1
    assert len(sizes) == -(-num // most)


@given(st.integers(1, 300), st.integers(1, 40), st.integers(0, 5))
def test_samples_are_taken_from_all_over_a_batch(num, wanted, random_seed):
    """One of each of equal ranges, in their order; all tensors have those of the same samples."""
    wanted = min(num, wanted)
    batch = {"x": torch.arange(num), "y": (torch.arange(num)[:, None], 3)}
    found = spread_rows(batch, wanted, random_seed=random_seed)
    rows = found["x"].tolist()
    edges = [i * num // wanted for i in range(wanted + 1)]
    assert len(rows) == num_rows(found) == wanted
    assert all(a <= row < b for a, row, b in zip(edges, rows, edges[1:], strict=False))
    assert torch.equal(found["y"][0][:, 0], found["x"])
    assert found["y"][1] == 3


@pytest.mark.parametrize(
    ("batch", "words"),
    [
        ((torch.zeros(3, 2), torch.zeros(4)), "ragged: its tensors have 3 and 4 rows"),
        ({"x": torch.zeros(3), "names": ["a", "b", "c"]}, r"\['names'\]\[0\] is a str"),
        ((torch.tensor(1.0), 3), "no tensor in the batch has an axis of samples"),
        (torch.eye(3).to_sparse(), "sparse"),
        (object(), "is a object"),
        (
            pack_padded_sequence(torch.zeros(2, 2, 1), torch.tensor([2, 2])),
            "PackedSequence",
        ),
    ],
)
def test_what_has_no_rows_says_why(batch, words):
    """The part that stands against cutting it is named."""
    with pytest.raises(NoRowsError, match=words):
        num_rows(batch)


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        ([torch.zeros(2), torch.zeros(1)], "not one row a sample"),
        ([torch.tensor(1.0), torch.tensor(2.0)], "not one row a sample"),
        ([(torch.zeros(2),), torch.zeros(2)], "different types"),
        ([{"a": torch.zeros(2)}, {"b": torch.zeros(2)}], "different names"),
        ([(1, torch.zeros(2)), (2, torch.zeros(2))], "holds a int"),
    ],
)
def test_what_is_not_one_row_a_sample_is_not_joined(parts, words):
    """A mean over the batch, for one, cannot be put together."""
    with pytest.raises(NoRowsError, match=words):
        joined_rows(parts, [2, 2])


def test_shapes_leave_the_number_of_samples_out():
    """So that what is remembered of a batch holds for the last, smaller one."""
    batch = {"x": torch.zeros(8, 3, 2), "y": torch.zeros(8, dtype=torch.int64), "also": 2}
    assert shapes_of(batch) == shapes_of(rows_of(batch, 0, 3)) == "float32[3, 2] int64[]"
