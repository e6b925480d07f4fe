"""From a blueprint to a plan: every rule that needs no tensor, in Python integers.

A plan is the blueprint's operations in the one order in which they run: topological, ties broken
by the node's id, so that it does not depend on how the blueprint was listed.
"""

from __future__ import annotations

import hashlib
import heapq
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Final

from esper.compiler.operations import MAX_PARAMETERS, OPERATIONS, Operation, read_attributes
from esper.compiler.shape_rules import StepSettings
from esper.contracts import canonical_json
from esper.contracts.blueprint import INPUT, OUTPUT, BlueprintEdge, BlueprintIR, BlueprintNode
from esper.contracts.errors import BlueprintError

MAX_DEPTH: Final = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One operation of a plan.

    Attributes:
        id: The node's id.
        op_type: Its key in the table of operations.
        settings: All attributes, defaults filled in.
        inputs: Where its inputs come from: 0 is the kernel's input, i + 1 the output of step i.
    """

    id: str
    op_type: str
    settings: StepSettings
    inputs: tuple[int, ...]

    @property
    def operation(self) -> Operation:
        """The row of the table."""
        return OPERATIONS[self.op_type]

    def __str__(self) -> str:
        return f"node {self.id!r} ({self.op_type})"


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """A blueprint that keeps every rule that needs no shapes, in the order in which it runs.

    Attributes:
        blueprint: Where it comes from.
        steps: At least one; the last one's output is the kernel's.
        parameter_count: Elements of all parameters.
    """

    blueprint: BlueprintIR
    steps: tuple[Step, ...]
    parameter_count: int

    @property
    def graph_digest(self) -> str:
        """sha256 of what is computed, ids and initial weights left out.

        Two kernels with the same graph digest differ in their weights only.
        """
        rows = [[step.op_type, _without_numbers(step.settings), step.inputs] for step in self.steps]
        specs = [self.blueprint.input_spec, self.blueprint.output_spec]
        document = [rows, [spec.to_document() for spec in specs]]
        return hashlib.sha256(canonical_json.encode(document)).hexdigest()

    @property
    def zeroed_step(self) -> Step | None:
        """The step whose tensors begin as zeros, or None."""
        zeroed = (step for step in self.steps if step.settings.get("init") == "zeros")
        return next(zeroed, None)

    @property
    def is_affine(self) -> bool:
        """Whether the kernel is an affine function of its input, by its operations alone."""
        return all(step.operation.affine for step in self.steps)


def _without_numbers(settings: StepSettings) -> dict[str, object]:
    return {name: value for name, value in settings.items() if name != "init_after"}


@lru_cache(maxsize=256)
def plan(blueprint: BlueprintIR) -> Plan:
    """Order a blueprint's operations and check every rule that needs no shapes.

    Raises:
        BlueprintError: A rule is broken. The message names the node and says what to change.
    """
    nodes = _nodes_by_id(blueprint)
    sources = _sources_by_target(blueprint, nodes)
    settings = {node.id: _settings_of(node) for node in nodes.values()}
    for node in nodes.values():
        _check_inputs(node, sources[node.id])
    order = _topological_order(nodes, sources)
    _check_reachable(nodes, sources)
    _check_depth(order, sources)
    index = {INPUT: 0, **{node_id: i + 1 for i, node_id in enumerate(order)}}
    steps = tuple(
        Step(
            id=node_id,
            op_type=nodes[node_id].op_type,
            settings=settings[node_id],
            inputs=tuple(index[edge.source] for edge in sources[node_id]),
        )
        for node_id in order
    )
    _check_one_zeroed(steps)
    _check_numbers(steps)
    _check_randomness(blueprint, steps)
    _check_dtypes(blueprint)
    return Plan(blueprint=blueprint, steps=steps, parameter_count=_count_parameters(steps))


def _nodes_by_id(blueprint: BlueprintIR) -> dict[str, BlueprintNode]:
    nodes = {node.id: node for node in blueprint.nodes}
    if not nodes:
        msg = f"blueprint {blueprint.id!r} has no nodes; add at least one, for example 'identity'"
        raise BlueprintError(msg)
    if len(nodes) < len(blueprint.nodes):
        twice = [name for name, n in Counter(node.id for node in blueprint.nodes).items() if n > 1]
        msg = f"node {twice[0]!r} is listed twice; give each node an id of its own"
        raise BlueprintError(msg)
    return nodes


def _settings_of(node: BlueprintNode) -> StepSettings:
    operation = OPERATIONS.get(node.op_type)
    if operation is None:
        msg = f"node {node.id!r}: no operation {node.op_type!r}; known: {', '.join(OPERATIONS)}"
        raise BlueprintError(msg)
    try:
        return read_attributes(operation, node.attributes)
    except ValueError as error:
        msg = f"node {node.id!r} ({node.op_type}): {error}"
        raise BlueprintError(msg) from error


def _sources_by_target(
    blueprint: BlueprintIR, nodes: Mapping[str, BlueprintNode]
) -> dict[str, list[BlueprintEdge]]:
    """Return the edges into each node, in the order of their positions."""
    sources: dict[str, list[BlueprintEdge]] = defaultdict(list)
    for edge, count in Counter(blueprint.edges).items():
        where = f"edge {edge.source!r} -> {edge.target!r}"
        if edge.source not in nodes and edge.source != INPUT:
            msg = f"{where}: no node {edge.source!r}; edges start at a node or at {INPUT!r}"
            raise BlueprintError(msg)
        if edge.target not in nodes and edge.target != OUTPUT:
            msg = f"{where}: no node {edge.target!r}; edges end at a node or at {OUTPUT!r}"
            raise BlueprintError(msg)
        if count > 1:
            msg = f"{where} at position {edge.position} is listed twice; give each its position"
            raise BlueprintError(msg)
        sources[edge.target].append(edge)
    if len(sources[OUTPUT]) != 1:
        found = [edge.source for edge in sources[OUTPUT]]
        msg = (
            f"blueprint {blueprint.id!r}: exactly one edge ends at {OUTPUT!r}, found "
            f"{len(found)} from {found}; join them by an operation such as 'add'"
        )
        raise BlueprintError(msg)
    return sources


def _check_inputs(node: BlueprintNode, edges: list[BlueprintEdge]) -> None:
    operation = OPERATIONS[node.op_type]
    least, most = operation.num_inputs
    where = f"node {node.id!r} ({node.op_type})"
    if not least <= len(edges) <= most or (
        node.op_type == "multihead_attention" and len(edges) == 2
    ):
        wanted = str(least) if least == most else f"{least} to {most}"
        wanted = "1 or 3" if node.op_type == "multihead_attention" else wanted
        msg = f"{where} takes {wanted} inputs, found {len(edges)}; change the edges that end there"
        raise BlueprintError(msg)
    positions = [edge.position for edge in edges]
    if not operation.exchangeable and positions != list(range(len(edges))):
        msg = (
            f"{where}: the order of its inputs matters; give its {len(edges)} edges the positions "
            f"0 to {len(edges) - 1}, found {positions}"
        )
        raise BlueprintError(msg)


def _topological_order(
    nodes: Iterable[str], sources: Mapping[str, list[BlueprintEdge]]
) -> list[str]:
    missing = {name: len({e.source for e in sources[name]} - {INPUT}) for name in nodes}
    readers: dict[str, set[str]] = defaultdict(set)
    for target, edges in sources.items():
        for edge in edges:
            readers[edge.source].add(target)
    ready = [name for name, count in missing.items() if count == 0]
    heapq.heapify(ready)
    order: list[str] = []
    while ready:
        order.append(heapq.heappop(ready))
        for reader in readers[order[-1]] - {OUTPUT}:
            missing[reader] -= 1
            if missing[reader] == 0:
                heapq.heappush(ready, reader)
    if len(order) < len(missing):
        stuck = sorted(set(missing) - set(order))
        msg = f"nodes {stuck} wait for each other in a cycle; remove an edge between them"
        raise BlueprintError(msg)
    return order


def _check_reachable(
    nodes: Mapping[str, BlueprintNode], sources: Mapping[str, list[BlueprintEdge]]
) -> None:
    """Every node reaches the output; with no cycle and no missing input each is reached too."""
    seen: set[str] = set()
    waiting = [edge.source for edge in sources[OUTPUT]]
    while waiting:
        name = waiting.pop()
        if name not in seen:
            seen.add(name)
            waiting.extend(edge.source for edge in sources.get(name, ()))
    unused = sorted(nodes.keys() - seen)
    if unused:
        msg = f"node {unused[0]!r} does not reach {OUTPUT!r}; connect it or remove it"
        raise BlueprintError(msg)


def _check_depth(order: list[str], sources: Mapping[str, list[BlueprintEdge]]) -> None:
    depth = {INPUT: 0}
    for name in order:
        depth[name] = 1 + max(depth[edge.source] for edge in sources[name])
        if depth[name] > MAX_DEPTH:
            msg = f"node {name!r} is the {depth[name]}th in a row; a blueprint is {MAX_DEPTH} deep"
            raise BlueprintError(msg)


def _count_parameters(steps: tuple[Step, ...]) -> int:
    total = 0
    for step in steps:
        total += int(step.operation.weights(step.settings))
        if total > MAX_PARAMETERS:
            msg = (
                f"{step} brings the blueprint to {total} parameters; at most {MAX_PARAMETERS}: "
                f"make it narrower"
            )
            raise BlueprintError(msg)
    return total


def _check_one_zeroed(steps: tuple[Step, ...]) -> None:
    zeroed = [step.id for step in steps if step.settings.get("init") == "zeros"]
    if len(zeroed) > 1:
        msg = (
            f"nodes {zeroed} all have init 'zeros'; at most one may, or none of them ever gets a "
            f"gradient: leave it to the last one"
        )
        raise BlueprintError(msg)


def first_numbers(steps: tuple[Step, ...]) -> tuple[int, ...]:
    """Return for each step how many numbers of the kernel's random stream come before its own.

    A step that says nothing of it begins where the last one that drew any has ended.
    """
    firsts: list[int] = []
    end = 0
    for step in steps:
        said = int(step.settings.get("init_after", -1))
        firsts.append(end if said < 0 else said)
        if num_numbers(step):
            end = firsts[-1] + num_numbers(step)
    return tuple(firsts)


def num_numbers(step: Step) -> int:
    """Return how many random numbers a step's tensors begin with."""
    return 0 if step.settings.get("init") == "zeros" else step.operation.drawn(step.settings)


def _check_numbers(steps: tuple[Step, ...]) -> None:
    """No two layers begin with the same numbers: their units would stay alike."""
    rows = zip(first_numbers(steps), steps, strict=True)
    drawing = sorted((first, step.id, num_numbers(step)) for first, step in rows)
    for (first, before, number), (second, after, _) in pairwise(r for r in drawing if r[2]):
        if first + number > second:
            msg = (
                f"nodes {before!r} and {after!r} would begin with the same random numbers; give "
                f"{after!r} an init_after of {first + number} at least, or none"
            )
            raise BlueprintError(msg)


def _check_randomness(blueprint: BlueprintIR, steps: tuple[Step, ...]) -> None:
    drawing = [str(step) for step in steps if step.operation.draws_random(step.settings)]
    if bool(drawing) != blueprint.draws_random:
        found = f"{drawing[0]} draws" if drawing else "no node draws"
        msg = (
            f"blueprint {blueprint.id!r} declares draws_random={blueprint.draws_random}, but "
            f"{found} random numbers; set draws_random={bool(drawing)}"
        )
        raise BlueprintError(msg)


def _check_dtypes(blueprint: BlueprintIR) -> None:
    found, expected = blueprint.output_spec.dtype, blueprint.input_spec.dtype
    if found != expected:
        msg = (
            f"blueprint {blueprint.id!r}: output_spec has dtype {found}, input_spec {expected}; "
            f"no operation changes the dtype, so make them equal"
        )
        raise BlueprintError(msg)
