"""Layers begin with the numbers of the kernel's random stream that they ask for."""

from __future__ import annotations

import pytest
import torch
from operation_cases import CASES, IDS

from esper.compiler.lowering import kernel_tensors, lower
from esper.compiler.operations import OPERATIONS, read_attributes
from esper.contracts.blueprint import BlueprintEdge, BlueprintIR, BlueprintNode, TensorSpec
from esper.contracts.errors import BlueprintError

DRAWING = {
    name: case
    for name, case in zip(IDS, CASES, strict=True)
    if "init_after" in OPERATIONS[case[0]].attributes and case[-1] == 1
}


def _sum_of(case, *nodes, dtype="float32"):
    """Add up the outputs of operations of one kind, given as (id, further attributes)."""
    op, attributes, shape_in, shape_out, _ = case
    made = [BlueprintNode(name, op, {**attributes, **more}) for name, more in nodes]
    edges = [BlueprintEdge("input", node.id) for node in made]
    edges += [BlueprintEdge(node.id, "sum", i) for i, node in enumerate(made)]
    if len(made) == 1:
        edges.append(BlueprintEdge(made[0].id, "sum", 1))
    return BlueprintIR(
        id="sum",
        nodes=(*made, BlueprintNode("sum", "add")),
        edges=(*edges, BlueprintEdge("sum", "output")),
        input_spec=TensorSpec(shape_in, dtype),
        output_spec=TensorSpec(shape_out, dtype),
    )


def _own(kernel, node):
    return [t for name, t in kernel_tensors(kernel).items() if name.startswith(f"{node}.")]


def _equal(ours, theirs):
    return all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
@pytest.mark.parametrize("name", DRAWING)
def test_a_layer_alone_can_begin_as_it_does_behind_another(name, dtype):
    """What the row says that a layer draws is what it draws: one number less is another weight."""
    case = DRAWING[name]
    operation = OPERATIONS[case[0]]
    count = operation.drawn(read_attributes(operation, case[1]))
    behind = lower(_sum_of(case, ("a", {}), ("z", {}), dtype=dtype))
    alone = lower(_sum_of(case, ("z", {"init_after": count}), dtype=dtype))
    assert _equal(_own(alone, "z"), _own(behind, "z"))
    sooner = lower(_sum_of(case, ("z", {"init_after": count - 1}), dtype=dtype))
    assert not _equal(_own(sooner, "z"), _own(behind, "z"))


LINEAR = DRAWING["linear-0"]


def test_layers_may_begin_in_another_order_than_they_run():
    """The first in the plan gets the later numbers, and the last one the first ones."""
    plain = lower(_sum_of(LINEAR, ("a", {}), ("z", {})))
    crossed = lower(_sum_of(LINEAR, ("a", {"init_after": 30}), ("z", {"init_after": 0})))
    assert _equal(_own(crossed, "a"), _own(plain, "z"))
    assert _equal(_own(crossed, "z"), _own(plain, "a"))


def test_a_layer_that_says_nothing_begins_where_the_one_before_it_ends():
    """The numbers that were passed over stay unused."""
    plain = lower(_sum_of(LINEAR, ("a", {}), ("b", {}), ("z", {})))
    moved = lower(_sum_of(LINEAR, ("a", {"init_after": 30}), ("z", {})))
    assert _equal(_own(moved, "a"), _own(plain, "b"))
    assert _equal(_own(moved, "z"), _own(plain, "z"))


def test_two_layers_never_begin_with_the_same_numbers():
    """The message names both and says from where on the second may begin; there it works."""
    overlapping = _sum_of(LINEAR, ("a", {}), ("z", {"init_after": 29}))
    with pytest.raises(BlueprintError, match=r"'a' and 'z' would.*init_after of 30 at least"):
        lower(overlapping)
    lower(_sum_of(LINEAR, ("a", {}), ("z", {"init_after": 30})))
    lower(_sum_of(LINEAR, ("a", {}), ("z", {"init_after": 0, "init": "zeros"})))
