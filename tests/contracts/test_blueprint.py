"""Blueprints are frozen values with one text, one digest and strict reading."""

from __future__ import annotations

import copy
import pickle
from dataclasses import FrozenInstanceError, replace

import pytest

from esper.contracts import canonical_json
from esper.contracts.blueprint import (
    BlueprintEdge,
    BlueprintIR,
    BlueprintNode,
    TensorSpec,
)
from esper.contracts.errors import BlueprintError

NODES = (
    BlueprintNode("a", "scale", {"factor": 2.0}),
    BlueprintNode("b", "scale", {"factor": 3.0}),
    BlueprintNode("diff", "sub"),
)


def _difference(first="a", second="b", nodes=NODES, **changes):
    edges = (
        BlueprintEdge("input", "a"),
        BlueprintEdge("input", "b"),
        BlueprintEdge(first, "diff", 0),
        BlueprintEdge(second, "diff", 1),
        BlueprintEdge("diff", "output"),
    )
    spec = TensorSpec(("*", 4))
    fields = {"id": "diff", "nodes": nodes, "edges": edges, "input_spec": spec, "output_spec": spec}
    return BlueprintIR(**{**fields, **changes})


def test_the_digest_does_not_depend_on_the_order_of_listing():
    """The same nodes and edges listed backwards are an equal blueprint with the same digest."""
    forward, backward = _difference(), _difference(nodes=NODES[::-1])
    backward = replace(backward, edges=forward.edges[::-1])
    assert forward.digest == backward.digest
    assert forward == backward
    assert forward.to_json() == backward.to_json()


def test_the_digest_tells_a_minus_b_from_b_minus_a():
    """Exchanging the inputs of a difference changes the digest."""
    assert _difference("a", "b").digest != _difference("b", "a").digest


@pytest.mark.parametrize(
    "change",
    [
        {"id": "other"},
        {"mode": "replace"},
        {"position": "serial"},
        {"init_seed": 1},
        {"draws_random": True},
        {"adds_capacity": False},
        {"input_spec": TensorSpec(("*", 5))},
        {"output_spec": TensorSpec(("*", 4), "float64")},
        {"nodes": (*NODES[:2], BlueprintNode("diff", "matmul"))},
    ],
)
def test_every_field_is_in_the_digest(change):
    """Changing any one field changes the digest."""
    assert _difference(**change).digest != _difference().digest


def test_json_reads_back_exactly():
    """from_json is the inverse of to_json, and accepts text that is not canonical."""
    blueprint = _difference()
    text = blueprint.to_json()
    assert BlueprintIR.from_json(text) == blueprint
    assert BlueprintIR.from_json(text.replace(b",", b" , ")) == blueprint


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda b: pickle.loads(pickle.dumps(b))])
def test_a_blueprint_survives_copying(duplicate):
    """A deep copy and a pickle are equal and hash the same."""
    blueprint = _difference()
    assert duplicate(blueprint) == blueprint
    assert hash(duplicate(blueprint)) == hash(blueprint)


def test_a_blueprint_cannot_be_changed():
    """Neither fields nor attributes can be assigned, and the caller's dict is no way in."""
    attributes = {"factor": 2.0, "axes": [1, 2]}
    node = BlueprintNode("a", "scale", attributes)
    attributes["factor"] = 3.0
    attributes["axes"].append(3)
    assert dict(node.attributes) == {"factor": 2.0, "axes": (1, 2)}
    with pytest.raises(TypeError, match="item assignment"):
        node.attributes["factor"] = 4.0
    with pytest.raises(FrozenInstanceError):
        node.op_type = "add"


def _document(**changes):
    return {**_difference().to_document(), **changes}


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"format_version": 2}, "newer"),
        ({"format_version": 0}, "format_version"),
        ({"format_version": True}, "format_version"),
        ({"format_version": "1"}, "format_version"),
        ({"init_seed": True}, "init_seed"),
        ({"init_seed": -1}, "init_seed"),
        ({"init_seed": 1.0}, "init_seed"),
        ({"draws_random": 0}, "draws_random"),
        ({"mode": "multiply"}, "mode"),
        ({"position": "behind"}, "position"),
        ({"id": "../etc"}, "id"),
        ({"id": "A" * 3}, "id"),
        ({"id": 7}, "id"),
        ({"nodes": {}}, "nodes"),
        ({"nodes": [{"id": "a", "op_type": "scale"}]}, "attributes"),
        ({"nodes": [{"id": "a", "op_type": 3, "attributes": {}}]}, "op_type"),
        ({"nodes": [{"id": "input", "op_type": "scale", "attributes": {}}]}, "reserved"),
        ({"nodes": [{"id": "", "op_type": "scale", "attributes": {}}]}, "id"),
        ({"edges": [{"source": "a", "target": "b", "position": True}]}, "position"),
        ({"edges": [{"source": "a", "target": "b", "position": -1}]}, "position"),
        ({"edges": [{"source": 1, "target": "b", "position": 0}]}, "source"),
        ({"input_spec": {"shape": [4, "*"], "dtype": "float32"}}, "axis 1"),
        ({"input_spec": {"shape": [4, "N"], "dtype": "float32"}}, "axis 1"),
        ({"input_spec": {"shape": [0], "dtype": "float32"}}, "axis 0"),
        ({"input_spec": {"shape": [True], "dtype": "float32"}}, "axis 0"),
        ({"input_spec": {"shape": [1] * 9, "dtype": "float32"}}, "1 to 8"),
        ({"input_spec": {"shape": [65_537], "dtype": "float32"}}, "65536"),
        ({"input_spec": {"shape": [4], "dtype": "int64"}}, "dtype"),
        ({"extra": 1}, "extra"),
    ],
)
def test_a_document_that_is_no_blueprint_is_refused(changes, word):
    """Every field is checked for its exact type and range, and the message names it."""
    with pytest.raises(BlueprintError, match=word):
        BlueprintIR.from_json(canonical_json.encode(_document(**changes)))


def test_the_unchanged_document_is_read():
    """The control of the test above: with no change the document is a blueprint."""
    assert BlueprintIR.from_json(canonical_json.encode(_document())) == _difference()


@pytest.mark.parametrize("value", [float("nan"), {1: 2}, object(), 2**64])
def test_an_attribute_that_is_not_json_is_refused(value):
    """The message names the node."""
    with pytest.raises(BlueprintError, match="node 'n'"):
        BlueprintNode("n", "scale", {"factor": value})


def test_more_nodes_than_the_limit_are_refused():
    """256 nodes are a blueprint, 257 are not."""
    nodes = tuple(BlueprintNode(f"n{i}", "identity") for i in range(257))
    _difference(nodes=nodes[:256])
    with pytest.raises(BlueprintError, match="256"):
        _difference(nodes=nodes)


def test_a_spec_resolves_the_batch_and_any_leading_axes():
    """A plain spec gets a batch, "N" is that batch, "*" takes all leading axes."""
    sizes = {"H": 5, "W": 6}
    assert TensorSpec((3, "H", "W")).resolve((2, 7), sizes) == (2, 3, 5, 6)
    assert TensorSpec(("N", 3)).resolve((2, 7), {}) == (2, 3)
    assert TensorSpec(("*", 3)).resolve((2, 7), {}) == (2, 7, 3)
