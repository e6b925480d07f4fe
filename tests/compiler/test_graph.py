"""The rules of a blueprint's graph, and what the message says when one is broken."""

from __future__ import annotations

import time
from dataclasses import replace
from itertools import pairwise

import pytest

from esper.compiler.graph import plan
from esper.compiler.lowering import checked_plan
from esper.contracts.blueprint import BlueprintEdge, BlueprintIR, BlueprintNode, TensorSpec
from esper.contracts.errors import BlueprintError

SPEC = TensorSpec(("*", 4))


def _blueprint(nodes, edges, **changes):
    """Nodes as (id, op_type, attributes), edges as (source, target[, position])."""
    fields = {
        "id": "graph",
        "nodes": tuple(BlueprintNode(*node) for node in nodes),
        "edges": tuple(BlueprintEdge(*edge) for edge in edges),
        "input_spec": SPEC,
        "output_spec": SPEC,
    }
    return BlueprintIR(**{**fields, **changes})


def _chain(*nodes, **changes):
    ids = ["input", *(node[0] for node in nodes), "output"]
    return _blueprint(nodes, list(pairwise(ids)), **changes)


def _linear(name, width_in=4, width_out=4, **more):
    return name, "linear", {"in_features": width_in, "out_features": width_out, **more}


def test_steps_run_in_an_order_that_does_not_depend_on_the_listing():
    """The plan is topological with ties by id, and the same for a blueprint listed backwards."""
    nodes = [("z", "identity"), ("a", "scale"), ("m", "add")]
    edges = [("input", "z"), ("input", "a"), ("z", "m", 0), ("a", "m", 1), ("m", "output")]
    for blueprint in (_blueprint(nodes, edges), _blueprint(nodes[::-1], edges[::-1])):
        made = plan(blueprint)
        assert [step.id for step in made.steps] == ["a", "z", "m"]
        assert made.steps[-1].inputs == (2, 1)


def test_the_graph_digest_is_about_structure_only():
    """Other ids and another random start keep it; another width or activation changes it."""
    base = _chain(_linear("a"), ("b", "activation", {"type": "relu"}))
    renamed = _chain(_linear("x"), ("y", "activation", {"type": "relu"}), init_seed=5)
    gelu = _chain(_linear("a"), ("b", "activation", {"type": "gelu"}))
    digests = [plan(blueprint).graph_digest for blueprint in (base, renamed, gelu)]
    assert digests[0] == digests[1] != digests[2]


BROKEN = {
    "no nodes": (_blueprint([], [("input", "output")]), "no nodes"),
    "unknown operation": (_chain(("a", "eval")), "node 'a': no operation 'eval'"),
    "same id twice": (
        _blueprint([("a", "identity"), ("a", "scale")], [("input", "a"), ("a", "output")]),
        "'a' is listed twice",
    ),
    "edge from nowhere": (
        _blueprint([("a", "identity")], [("b", "a"), ("a", "output")]),
        "no node 'b'",
    ),
    "edge to nowhere": (
        _blueprint([("a", "identity")], [("input", "a"), ("a", "b"), ("a", "output")]),
        "no node 'b'",
    ),
    "edge from the output": (
        _blueprint([("a", "identity")], [("output", "a"), ("a", "output")]),
        "no node 'output'",
    ),
    "edge into the input": (
        _blueprint([("a", "identity")], [("input", "a"), ("a", "input"), ("a", "output")]),
        "no node 'input'",
    ),
    "same edge twice": (
        _blueprint([("a", "add")], [("input", "a"), ("input", "a"), ("a", "output")]),
        "listed twice",
    ),
    "two outputs": (
        _blueprint(
            [("a", "identity"), ("b", "identity")],
            [("input", "a"), ("input", "b"), ("a", "output"), ("b", "output", 1)],
        ),
        "exactly one edge ends at 'output', found 2",
    ),
    "no output": (_blueprint([("a", "identity")], [("input", "a")]), "found 0"),
    "too few inputs": (_chain(("a", "sub")), "node 'a' .sub. takes 2 inputs, found 1"),
    "too many inputs": (
        _blueprint([("a", "scale")], [("input", "a", 0), ("input", "a", 1), ("a", "output")]),
        "takes 1 inputs, found 2",
    ),
    "two inputs of attention": (
        _blueprint(
            [("a", "multihead_attention", {"embed_dim": 4, "num_heads": 2})],
            [("input", "a", 0), ("input", "a", 1), ("a", "output")],
        ),
        "takes 1 or 3 inputs, found 2",
    ),
    "positions left out": (
        _blueprint(
            [("a", "scale"), ("b", "sub")],
            [("input", "a"), ("a", "b"), ("input", "b"), ("b", "output")],
        ),
        "node 'b' .sub.: the order of its inputs matters.*0 to 1",
    ),
    "cycle": (
        _blueprint(
            [("a", "add"), ("b", "identity")],
            [("input", "a", 0), ("b", "a", 1), ("a", "b"), ("b", "output")],
        ),
        r"\['a', 'b'\] wait for each other",
    ),
    "no input at all": (
        _blueprint([("a", "identity"), ("b", "identity")], [("a", "output"), ("input", "b")]),
        "node 'a' .identity. takes 1 inputs, found 0",
    ),
    "does not reach the output": (
        _blueprint(
            [("a", "identity"), ("dead", "identity")],
            [("input", "a"), ("input", "dead"), ("a", "output")],
        ),
        "node 'dead' does not reach 'output'",
    ),
    "too deep": (
        _chain(*[(f"n{i:02}", "identity") for i in range(65)]),
        "node 'n64' is the 65th in a row",
    ),
    "too many parameters": (
        _chain(_linear("a", 4, 8192), _linear("b", 8192, 8192), _linear("c", 8192, 4)),
        "node 'b' .linear. brings the blueprint to .* at most 67108864",
    ),
    "two zeroed layers": (
        _chain(_linear("a", init="zeros"), _linear("b", init="zeros")),
        "at most one",
    ),
    "undeclared randomness": (
        _chain(("a", "noise", {"std": 1.0})),
        "node 'a' .noise. draws random numbers; set draws_random=True",
    ),
    "undeclared dropout": (_chain(("a", "dropout")), "set draws_random=True"),
    "randomness declared for nothing": (
        _chain(("a", "dropout", {"p": 0.0}), draws_random=True),
        "set draws_random=False",
    ),
    "other dtype at the output": (
        _chain(_linear("a"), output_spec=TensorSpec(("*", 4), "float64")),
        "output_spec has dtype float64",
    ),
    "wrong width": (_chain(_linear("a", 5)), "node 'a' .linear. does not take"),
    "wrong output": (_chain(_linear("a", 4, 5)), "node 'a': its output.*output_spec"),
    "works for one size only": (
        _chain(
            ("a", "reshape", {"shape": (4, 64)}),
            input_spec=TensorSpec((4, "L")),
            output_spec=TensorSpec((4, 64)),
        ),
        "node 'a' .reshape. does not take",
    ),
    "convolution without a batch": (
        _chain(("a", "conv1d", {"in_channels": 4, "out_channels": 4, "kernel_size": 1})),
        "with 3 axes, the batch among them",
    ),
    "attention across the batch": (
        _chain(("a", "multihead_attention", {"embed_dim": 4, "num_heads": 2})),
        "with 3 axes, the batch among them",
    ),
    "too many axes": (
        _chain(
            ("a", "reshape", {"shape": (2,) * 8}),
            input_spec=TensorSpec((256,)),
            output_spec=TensorSpec((2,) * 8),
        ),
        "node 'a' .reshape. has the shape",
    ),
    "huge dimension": (
        _chain(
            ("a", "flatten"),
            input_spec=TensorSpec((512, 512)),
            output_spec=TensorSpec(("L",)),
        ),
        "node 'a' .flatten. has the shape",
    ),
    "huge activation": (
        _chain(
            ("a", "identity"),
            input_spec=TensorSpec((65_536, 65_536)),
            output_spec=TensorSpec((65_536, 65_536)),
        ),
        "the input has .* elements",
    ),
    "huge activation inside": (
        _chain(
            (
                "a",
                "conv3d",
                {"in_channels": 4, "out_channels": 4, "kernel_size": 1, "padding": 4096},
            ),
            input_spec=TensorSpec((4, "D", "H", "W")),
            output_spec=TensorSpec((4, "A", "B", "C")),
        ),
        "node 'a' .conv3d. has .* elements",
    ),
    "too much work": (
        _chain(
            *[_linear(f"n{i}", 4096, 4096, bias=False) for i in range(4)],
            input_spec=TensorSpec((16_384, 4096)),
            output_spec=TensorSpec((16_384, 4096)),
        ),
        "multiply-adds",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_rule_is_refused_with_the_node_and_the_cure(name):
    """Each broken blueprint is refused by its own rule."""
    blueprint, words = BROKEN[name]
    with pytest.raises(BlueprintError, match=words):
        checked_plan(blueprint)


def test_names_of_the_language_are_fine_as_node_ids():
    """Ids that would collide with attributes of a module or a dict work."""
    ids = ["type", "items", "weight", "keys", "forward", "train", "0", "a.b", "__class__", "steps"]
    checked_plan(_chain(*[_linear(name) for name in ids]))


def test_the_limits_themselves_are_allowed():
    """64 in a row and the largest number of parameters pass: the limits are not off by one."""
    checked_plan(_chain(*[(f"n{i:02}", "identity") for i in range(64)]))
    checked_plan(
        _chain(
            _linear("a", 8192, 8192, bias=False),
            input_spec=TensorSpec((8192,)),
            output_spec=TensorSpec((8192,)),
        )
    )


def test_a_free_size_of_the_output_that_the_input_has_is_bound():
    """A stride of 2 may give OH but not H."""
    conv = ("a", "conv1d", {"in_channels": 4, "out_channels": 4, "kernel_size": 3, "stride": 2})
    blueprint = _chain(conv, input_spec=TensorSpec((4, "L")), output_spec=TensorSpec((4, "OL")))
    checked_plan(blueprint)
    with pytest.raises(BlueprintError, match="output_spec"):
        checked_plan(replace(blueprint, output_spec=TensorSpec((4, "L"))))


@pytest.mark.slow
@pytest.mark.parametrize("last", [_linear("n999"), _linear("n999", 4, 5)], ids=["valid", "broken"])
def test_the_verdict_on_the_largest_graph_takes_at_most_50_ms(last):
    """256 nodes in 15 lanes that are summed, in the processor's time, the best of five."""
    nodes = [_linear(f"n{i:03}") for i in range(254)] + [last]
    edges = [(nodes[i - 15][0] if i >= 15 else "input", node[0]) for i, node in enumerate(nodes)]
    edges += [*((node[0], "sum", i) for i, node in enumerate(nodes[-15:])), ("sum", "output")]
    nodes.append(("sum", "add"))
    times_s = []
    for i in range(5):
        blueprint = _blueprint(nodes, edges, init_seed=i)
        start = time.process_time()
        try:
            checked_plan(blueprint)
            verdict = "valid"
        except BlueprintError:
            verdict = "broken"
        times_s.append(time.process_time() - start)
        assert verdict == ("valid" if last == _linear("n999") else "broken")
    assert min(times_s) <= 0.050
