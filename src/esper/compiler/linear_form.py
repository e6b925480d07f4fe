"""The linear form of a kernel: the same blueprint with everything taken out that is not affine.

It has the shapes, the initial values and the zeroed end of the kernel, and so gets the same
treatment in training; what the kernel brings beyond it comes from its activations. What stands for
an operation is said in its row of the table.
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from typing import TYPE_CHECKING, Final

from esper.compiler.graph import first_numbers, num_numbers, plan
from esper.compiler.lowering import checked_plan
from esper.compiler.shapes import infer_all, probes
from esper.compiler.stand_ins import Place, StandIn, Value
from esper.contracts.blueprint import (
    INPUT,
    OUTPUT,
    BlueprintEdge,
    BlueprintIR,
    BlueprintNode,
)
from esper.contracts.errors import BlueprintError
from esper.contracts.run_records import LINEAR_SUFFIX

if TYPE_CHECKING:
    from esper.compiler.graph import Plan, Step

_LONGEST_ID: Final = 64


@lru_cache(maxsize=256)
def linear_form(blueprint: BlueprintIR) -> BlueprintIR:
    """Return a blueprint made linear; its kernel is an affine function of its input.

    Its id is the blueprint's with ``-linear`` behind it. Nodes keep their ids. Tensors that both
    have begin equal, bit for bit; those that nothing would read any more are dropped with their
    nodes, and of an attention the weights of queries and keys. It draws no random numbers in a
    forward, and claims no capacity.

    Raises:
        BlueprintError: The blueprint breaks a rule, or an operation has no stand-in in it; the
            message names the node.
    """
    made = checked_plan(blueprint)
    stand_ins = _stand_ins(made)
    ids = (INPUT, *(step.id for step in made.steps))
    own = {node.id: node for node in blueprint.nodes}
    nodes: list[BlueprintNode] = []
    edges = [BlueprintEdge(ids[-1], OUTPUT)]
    for i in sorted(_read(stand_ins)):
        node, stand_in = own[ids[i]], stand_ins[i - 1]
        if stand_in.op_type != node.op_type:
            node = BlueprintNode(node.id, stand_in.op_type, stand_in.attributes)
        nodes.append(node)
        edges += [BlueprintEdge(ids[j], node.id, at) for at, j in enumerate(stand_in.inputs)]
    form = replace(
        blueprint,
        id=blueprint.id[: _LONGEST_ID - len(LINEAR_SUFFIX)] + LINEAR_SUFFIX,
        nodes=tuple(nodes),
        edges=tuple(edges),
        draws_random=False,
        adds_capacity=False,
    )
    return _with_numbers_of(made, form)


def _stand_ins(made: Plan) -> list[StandIn]:
    """Return what stands for each step of a plan."""
    per_probe = [infer_all(made, p.shape_of(made.blueprint.input_spec)) for p in probes(made)]
    shapes = list(zip(*per_probe, strict=True))
    values = [Value(index=0, shapes=shapes[0])]
    curved: list[frozenset[int]] = [frozenset()]
    stand_ins = []
    for i, step in enumerate(made.steps, start=1):
        inputs = tuple(values[j] for j in step.inputs)
        place = Place(kernel_input=values[0], inputs=inputs, shapes=shapes[i])
        stand_ins.append(_stand_in(step, place))
        own = frozenset() if step.operation.affine else frozenset({i})
        curved.append(own.union(*(curved[j] for j in step.inputs)))
        has_zeroed = any(value.has_zeroed for value in inputs)
        values.append(
            Value(
                index=i,
                shapes=shapes[i],
                num_curved=len(curved[i]),
                has_zeroed=has_zeroed or step.settings.get("init") == "zeros",
            )
        )
    return stand_ins


def _stand_in(step: Step, place: Place) -> StandIn:
    if step.operation.affine:
        return StandIn(op_type=step.op_type, inputs=step.inputs)
    rule = step.operation.linear
    if rule is None:
        msg = (
            f"{step} has no linear form: its row of the table is not affine and names no affine "
            "operation that stands for it; give it one as linear="
        )
        raise BlueprintError(msg)
    try:
        return rule(step.settings, place)
    except ValueError as error:
        msg = f"{step} has no linear form: {error}"
        raise BlueprintError(msg) from error


def _read(stand_ins: list[StandIn]) -> set[int]:
    """Return the indices of the values, the kernel's input left out, that reach the output."""
    read: set[int] = set()
    waiting = [len(stand_ins)]
    while waiting:
        i = waiting.pop()
        if i and i not in read:
            read.add(i)
            waiting.extend(stand_ins[i - 1].inputs)
    return read


def _with_numbers_of(made: Plan, form: BlueprintIR) -> BlueprintIR:
    """Let each node that begins with random numbers begin with those that it has in a plan."""
    ids = [step.id for step in made.steps]
    wanted = dict(zip(ids, first_numbers(made.steps), strict=True))
    moved = {}
    end = 0
    for step in plan(form).steps:
        if not num_numbers(step):
            continue
        if wanted[step.id] != end:
            moved[step.id] = {"init_after": wanted[step.id]}
        end = wanted[step.id] + num_numbers(step)
    nodes = tuple(
        BlueprintNode(node.id, node.op_type, {**node.attributes, **moved.get(node.id, {})})
        for node in form.nodes
    )
    return replace(form, nodes=nodes)
