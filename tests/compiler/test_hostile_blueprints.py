"""Generated blueprints: a valid one works to the end, a hostile one is refused, nothing else."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from esper.compiler.codec import decode_artifact, encode_kernel
from esper.compiler.linear_form import linear_form
from esper.compiler.lowering import instantiate, kernel_tensors, lower
from esper.compiler.operations import OPERATIONS
from esper.contracts.blueprint import BlueprintEdge, BlueprintIR, BlueprintNode, TensorSpec
from esper.contracts.errors import BlueprintError

SETTINGS = {
    "max_examples": 400,
    "deadline": None,
    "derandomize": True,
    "database": None,
    "suppress_health_check": list(HealthCheck),
}
LONG = {**SETTINGS, "max_examples": 100_000}
WIDTH = 4
SAME_SHAPE = [
    ("linear", {"in_features": WIDTH, "out_features": WIDTH}),
    ("linear", {"in_features": WIDTH, "out_features": WIDTH, "trainable": False}),
    ("activation", {"type": "gelu"}),
    ("layer_norm", {"normalized_shape": WIDTH}),
    ("rms_norm", {"normalized_shape": (WIDTH,)}),
    ("scale", {"factor": -0.5}),
    ("identity", {}),
    ("dropout", {"p": 0.0}),
    ("add", {}),
    ("sub", {}),
    ("mul", {}),
]


@st.composite
def valid_blueprints(draw):
    """A graph of shape-preserving operations in which every node reads any earlier ones."""
    names = draw(
        st.lists(
            st.from_regex(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,8}", fullmatch=True).filter(
                lambda name: name not in ("input", "output")
            ),
            min_size=1,
            max_size=7,
            unique=True,
        )
    )
    nodes, edges, unused = [], [], []
    for i, name in enumerate(names):
        op, attributes = draw(st.sampled_from(SAME_SHAPE))
        nodes.append(BlueprintNode(name, op, attributes))
        for position in range(OPERATIONS[op].num_inputs[0]):
            source = draw(st.sampled_from(["input", *names[:i]]))
            edges.append(BlueprintEdge(source, name, position))
    used = {edge.source for edge in edges}
    unused = [name for name in names if name not in used]
    last = unused[0]
    if len(unused) > 1:
        nodes.append(BlueprintNode("joined-output", "add"))
        edges += [BlueprintEdge(name, "joined-output", i) for i, name in enumerate(unused)]
        last = "joined-output"
    return BlueprintIR(
        id="generated",
        nodes=tuple(draw(st.permutations(nodes))),
        edges=(*draw(st.permutations(edges)), BlueprintEdge(last, "output")),
        input_spec=TensorSpec(("*", WIDTH)),
        output_spec=TensorSpec(("*", WIDTH)),
        init_seed=draw(st.integers(0, 2**63 - 1)),
    )


def check_valid(blueprint):
    """It lowers, encodes, decodes to the same bytes, and computes the same as before."""
    kernel = lower(blueprint)
    data = encode_kernel(kernel)
    artifact = decode_artifact(data)
    assert artifact.blueprint == BlueprintIR.from_json(blueprint.to_json()) == blueprint
    loaded = instantiate(artifact)
    assert encode_kernel(loaded) == data
    x = torch.ones(2, WIDTH)
    assert torch.equal(loaded(x), kernel(x))


@pytest.mark.slow
@given(valid_blueprints())
@settings(**SETTINGS)
def test_a_valid_blueprint_goes_to_bytes_and_back(blueprint):
    """It is the same there and back, and computes the same."""
    check_valid(blueprint)


@pytest.mark.torture
@given(valid_blueprints())
@settings(**LONG)
def test_100_000_valid_blueprints_go_to_bytes_and_back(blueprint):
    """The same, for as long as it takes."""
    check_valid(blueprint)


@pytest.mark.slow
@given(valid_blueprints())
@settings(**SETTINGS)
def test_a_valid_blueprint_has_an_affine_form_that_begins_as_it_does(blueprint):
    """Whatever is dropped, what is left has the same numbers, and is affine."""
    form = linear_form(blueprint)
    kernel = lower(form).double()
    ours, theirs = kernel_tensors(lower(form)), kernel_tensors(lower(blueprint))
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
    x, y = torch.randn(2, 3, WIDTH, dtype=torch.float64)
    joint, apart = kernel(x + y), kernel(x) + kernel(y) - kernel(0 * x)
    assert torch.allclose(joint, apart, rtol=1e-6, atol=1e-6 * float(joint.detach().abs().max()))


_SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-3, 2**70)
    | st.floats(allow_nan=False)
    | st.text(max_size=5)
    | st.sampled_from(["linear", "__class__", "*", "N", "H", "float32", 10**9])
)
_JUNK = st.recursive(
    _SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=6,
)


def _paths(document, path=()):
    yield path
    if isinstance(document, dict | list):
        keys = document if isinstance(document, dict) else range(len(document))
        for key in keys:
            yield from _paths(document[key], (*path, key))


@st.composite
def hostile_documents(draw):
    """A valid document in which one to three places were replaced, removed or added to."""
    document = json.loads(draw(valid_blueprints()).to_json())
    for _ in range(draw(st.integers(1, 3))):
        path = draw(st.sampled_from([p for p in _paths(document) if p]))
        holder = document
        for key in path[:-1]:
            holder = holder[key]
        kind = draw(st.sampled_from(["replace", "remove", "repeat"]))
        if kind == "replace":
            holder[path[-1]] = draw(_JUNK)
        elif kind == "remove":
            del holder[path[-1]]
        elif isinstance(holder, list):
            holder.append(holder[path[-1]])
        else:
            holder[draw(st.text(max_size=5))] = holder[path[-1]]
    return json.dumps(document).encode()


def check_hostile(data, read=BlueprintIR.from_json):
    """Nothing but BlueprintError comes out, and what is accepted really runs."""
    try:
        kernel = lower(read(data))
    except BlueprintError:
        return
    assert decode_artifact(encode_kernel(kernel)).blueprint == kernel.blueprint


@pytest.mark.slow
@given(hostile_documents())
@settings(**SETTINGS)
def test_a_hostile_document_is_refused_or_is_a_working_blueprint(data):
    """It is an error of the blueprint's, or no error at all."""
    check_hostile(data)


@pytest.mark.torture
@given(hostile_documents())
@settings(**LONG)
def test_100_000_hostile_documents_are_refused_or_work(data):
    """The same, for as long as it takes."""
    check_hostile(data)


def believing(data):
    """Read a blueprint as it is written, and look at nothing."""
    found = json.loads(data)
    specs = (TensorSpec(tuple(found[key]["shape"])) for key in ("input_spec", "output_spec"))
    return BlueprintIR(
        found["id"],
        tuple(BlueprintNode(**node) for node in found["nodes"]),
        tuple(BlueprintEdge(**edge) for edge in found["edges"]),
        *specs,
    )


def test_control_reading_without_a_look_is_found():
    """The same documents break a reader that believes them."""

    @given(hostile_documents())
    @settings(**{**SETTINGS, "phases": [Phase.generate]})
    def each(data):
        check_hostile(data, believing)

    with pytest.raises((BaseExceptionGroup, KeyError, TypeError, AttributeError)):
        each()
