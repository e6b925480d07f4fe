"""The linear form of a kernel: affine, and otherwise the same."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from catalog_sites import ALL, SMALL, example_of, host_of, name_of
from operation_cases import CASES, IDS, blueprint_of
from operation_cases import example_of as example_of_spec
from torch import nn

from esper.compiler.catalog import default_catalog, noise, noop, random_features
from esper.compiler.codec import decode_artifact
from esper.compiler.compile import compile_blueprint
from esper.compiler.graph import plan
from esper.compiler.linear_form import linear_form
from esper.compiler.lowering import instantiate, kernel_tensors, lower
from esper.compiler.operations import OPERATIONS, Operation
from esper.contracts.blueprint import BlueprintEdge, BlueprintIR, BlueprintNode, TensorSpec
from esper.contracts.errors import BlueprintError
from esper.registry.memory import MemoryRegistry


def _all(site):
    return default_catalog().blueprints_for(site, capacity_only=False)


def _with_random_weights(kernel):
    """Fill every parameter: at birth the zeroed layer makes any kernel affine."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in kernel.parameters():
            drawn = torch.randn(p.shape, generator=generator)
            p.copy_(drawn / math.sqrt(math.prod(p.shape[1:])))
    return kernel.double()


@torch.no_grad()
def _miss(kernel, x):
    """Return how far f(x) + f(y) - f(0) is from f(x + y), over the largest output."""
    x = x.double()
    y = 3 * torch.randn(x.shape, dtype=x.dtype, generator=torch.Generator().manual_seed(1))
    joint = kernel(x + y)
    apart = kernel(x) + kernel(y) - kernel(torch.zeros_like(x))
    return float((joint - apart).abs().max() / joint.abs().max().clamp_min(1e-12))


def _graph(nodes, edges, shape_in, shape_out=None, **more):
    """Nodes as (id, op_type, attributes), edges as (source, target[, position])."""
    return BlueprintIR(
        id="graph",
        nodes=tuple(BlueprintNode(*node) for node in nodes),
        edges=tuple(BlueprintEdge(*edge) for edge in edges),
        input_spec=TensorSpec(shape_in),
        output_spec=TensorSpec(shape_out or shape_in),
        **more,
    )


def _linear(name, **more):
    return name, "linear", {"in_features": 4, "out_features": 4, **more}


def _begins_as(form, original):
    """Say whether the tensors that two kernels have by one name are equal, and that some are."""
    ours, theirs = kernel_tensors(lower(form)), kernel_tensors(lower(original))
    shared = ours.keys() & theirs.keys()
    return bool(shared) and all(torch.equal(ours[name], theirs[name]) for name in shared)


@pytest.mark.parametrize("op", OPERATIONS)
def test_every_operation_is_affine_or_names_what_stands_for_it(op):
    """A row of the table says one of both, and not both."""
    row = OPERATIONS[op]
    assert row.affine != (row.linear is not None)


def test_an_operation_that_names_no_stand_in_is_refused_by_name(monkeypatch):
    """The control: a row that is added without one is found where a linear form is asked for."""
    monkeypatch.setitem(OPERATIONS, "softsign", Operation(build=nn.Softsign))
    kernel = _graph(
        [("act", "softsign")], [("input", "act"), ("act", "output")], ("*", 4), init_seed=99
    )
    with pytest.raises(BlueprintError, match=r"'act' \(softsign\) has no linear form.*linear="):
        linear_form(kernel)


@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_the_stand_in_of_every_operation_is_affine_and_of_its_shape(case):
    """Beside every setting of every operation, in training as in evaluation."""
    blueprint = blueprint_of(*case)
    form = linear_form(blueprint)
    x = example_of_spec(blueprint.input_spec)
    kernel = lower(form)
    assert plan(form).is_affine
    assert not form.draws_random
    assert kernel(x).shape == lower(blueprint)(x).shape
    assert _miss(_with_random_weights(kernel), x) < 1e-9


@pytest.mark.parametrize("site", ALL, ids=name_of)
def test_every_kernel_of_the_catalog_has_a_linear_form(site):
    """It begins as the kernel does, is the identity at birth like it, and is affine for ever."""
    for blueprint in _all(site):
        form, x = linear_form(blueprint), example_of(site)
        assert form.id == f"{blueprint.id}-linear"
        assert (form.mode, form.position) == (blueprint.mode, blueprint.position)
        assert (form.input_spec, form.output_spec) == (blueprint.input_spec, blueprint.output_spec)
        assert not form.adds_capacity
        assert _begins_as(form, blueprint)
        kernel = lower(form)
        assert not kernel(x).any()
        assert _miss(_with_random_weights(kernel), x) < 1e-9
        is_curved = not plan(blueprint).is_affine
        assert (_miss(_with_random_weights(lower(blueprint)), x) > 1e-3) == is_curved


@pytest.mark.parametrize("site", ALL, ids=name_of)
def test_a_linear_form_has_all_tensors_that_something_reads(site):
    """Shapes are the kernel's; only a gate, and queries and keys, have nobody left."""
    for blueprint in _all(site):
        shapes = [
            {name: tuple(t.shape) for name, t in kernel_tensors(lower(b)).items()}
            for b in (blueprint, linear_form(blueprint))
        ]
        before = {k: v for k, v in shapes[0].items() if k.partition(".")[0] not in DROPPED}
        assert {k: v for k, v in shapes[1].items() if not k.startswith("attention")} == before


DROPPED = ("gate", "attention")


@pytest.mark.parametrize("bias", [True, False])
def test_an_attention_keeps_its_values_and_its_output(bias):
    """The weights are those that the attention begins with, bit for bit."""
    attributes = {"embed_dim": 6, "num_heads": 2, "bias": bias}
    case = ("multihead_attention", attributes, ("L", 6), ("L", 6), 1)
    blueprint = blueprint_of(*case, init_seed=5)
    whole = lower(blueprint).steps[0].attention
    mean = lower(linear_form(blueprint)).steps[0]
    assert torch.equal(mean.value.weight, whole.in_proj_weight[12:])
    assert torch.equal(mean.out.weight, whole.out_proj.weight)
    assert [b is None or not b.any() for b in (mean.value.bias, mean.out.bias)] == [True, True]
    assert (mean.value.bias is None) == (not bias)


@pytest.mark.parametrize("causal", [True, False])
def test_an_attention_becomes_the_mean_over_the_places_that_it_may_look_at(causal):
    """That is what it gives where all keys are equal, so that all scores are."""
    attributes = {"embed_dim": 6, "num_heads": 2, "causal": causal}
    blueprint = blueprint_of("multihead_attention", attributes, ("L", 6), ("L", 6), 1)
    attention, mean = lower(blueprint), lower(linear_form(blueprint))
    with torch.no_grad():
        attention.steps[0].attention.in_proj_weight[6:12] = 0.0
    x = torch.randn(3, 7, 6, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(mean(x), attention(x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("site", SMALL, ids=name_of)
def test_linear_forms_learn(site):
    """The last layer gets a gradient at birth and every other layer after one update."""
    for blueprint in _all(site):
        kernel, x = lower(linear_form(blueprint)), example_of(site)
        target = torch.randn(host_of(site)(x).shape, generator=torch.Generator().manual_seed(1))
        for names in ({"out.weight"}, kernel_tensors(kernel).keys()):
            (kernel(x) - target).square().mean().backward()
            tensors = kernel_tensors(kernel)
            assert all(tensors[name].grad.abs().sum() > 0 for name in names), blueprint.id
            with torch.no_grad():
                for parameter in kernel.parameters():
                    parameter.sub_(0.5 * parameter.grad)
                    parameter.grad = None


FAMILIES = {b.id.partition("-w")[0]: b for site in SMALL for b in _all(site)}


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_a_linear_form_is_compiled_kept_and_loaded(name):
    """Through a registry it comes back with the weights that it was lowered with."""
    form = linear_form(FAMILIES[name])
    registry = MemoryRegistry()
    digest = registry.put(compile_blueprint(form).kernel_binary)
    loaded = instantiate(decode_artifact(registry.get(digest), artifact_id=digest))
    assert loaded.blueprint == form
    theirs = lower(form).state_dict()
    assert all(torch.equal(t, theirs[name]) for name, t in loaded.state_dict().items())


def test_controls_have_linear_forms():
    """Noise is taken out, what is off stays off, and what is frozen stays frozen."""
    site = SMALL[0]
    x = example_of(site)
    assert not lower(linear_form(noop(site)))(host_of(site)(x)).any()
    quiet = lower(linear_form(noise(site)))
    assert not quiet(host_of(site)(x)).any()
    frozen = lower(linear_form(random_features(site)))
    assert not any(p.requires_grad for p in frozen.parameters())


def _gated(positions, zeroed=None):
    """value(x) * silu(gate(x)), with a readout behind it unless something else is zero."""
    zeros = {"init": "zeros"}
    nodes = [
        _linear("a_gate", **(zeros if zeroed == "gate" else {})),
        _linear("value", **(zeros if zeroed == "value" else {})),
        ("act", "activation", {"type": "silu"}),
        ("mix", "mul"),
        _linear("out", **({} if zeroed else zeros)),
    ]
    edges = [
        ("input", "a_gate"),
        ("input", "value"),
        ("a_gate", "act"),
        ("value", "mix", positions[0]),
        ("act", "mix", positions[1]),
        ("mix", "out"),
        ("out", "output"),
    ]
    return _graph(nodes, edges, ("*", 4))


@pytest.mark.parametrize("positions", [(0, 1), (1, 0), (0, 0)])
def test_of_a_gated_product_the_value_is_left(positions):
    """In whatever order the factors are listed, with the weights that it has behind the gate."""
    blueprint = _gated(positions)
    form = linear_form(blueprint)
    assert [node.id for node in form.nodes] == ["mix", "out", "value"]
    assert _begins_as(form, blueprint)


def test_a_factor_that_is_zero_at_birth_is_left():
    """It is what makes the kernel the identity, wherever it stands in the product."""
    form = linear_form(_gated((0, 1), zeroed="gate"))
    assert [node.id for node in form.nodes] == ["a_gate", "act", "mix", "out"]
    form = linear_form(_gated((0, 1), zeroed="value"))
    assert [node.id for node in form.nodes] == ["mix", "out", "value"]


def _weighed(gate, **more):
    """Maps times a sigmoid of their means, one factor a channel."""
    nodes = [
        ("pool", "adaptive_avg_pool", {"output_size": 1}),
        ("gate", "conv2d", {"in_channels": 4, "out_channels": gate, "kernel_size": 1, **more}),
        ("act", "activation", {"type": "sigmoid"}),
        ("mix", "mul"),
    ]
    edges = [
        ("input", "pool"),
        ("pool", "gate"),
        ("gate", "act"),
        ("act", "mix", 0),
        ("input", "mix", 1),
        ("mix", "output"),
    ]
    return _graph(nodes, edges, (4, "H", "W"))


def test_of_a_product_that_broadcasts_the_factor_of_its_shape_is_left():
    """Weights for each channel are dropped, and the maps are what remains."""
    form = linear_form(_weighed(4))
    x = torch.randn(2, 4, 5, 6, generator=torch.Generator().manual_seed(0))
    assert [node.id for node in form.nodes] == ["mix"]
    assert torch.equal(lower(form)(x), x)


def test_where_no_factor_has_the_shape_of_the_product_their_sum_has():
    """Rows times columns become rows plus columns; no weight is dropped."""
    nodes = [
        ("rows", "reshape", {"shape": (4, 1)}),
        ("columns", "reshape", {"shape": (1, 4)}),
        ("mix", "mul"),
    ]
    edges = [
        ("input", "rows"),
        ("input", "columns"),
        ("rows", "mix", 0),
        ("columns", "mix", 1),
        ("mix", "output"),
    ]
    form = linear_form(_graph(nodes, edges, (4,), (4, 4)))
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    assert torch.equal(lower(form)(x), x[:, :, None] + x[:, None, :])


def _product(**more):
    nodes = [_linear("left", **more), _linear("right"), ("mix", "matmul")]
    edges = [
        ("input", "left"),
        ("input", "right"),
        ("left", "mix", 0),
        ("right", "mix", 1),
        ("mix", "output"),
    ]
    return _graph(nodes, edges, (4, 4))


def test_a_matrix_product_becomes_the_sum_of_the_means():
    """Both factors go on learning, each through its mean over the axis that they share."""
    blueprint = _product()
    kernel = lower(linear_form(blueprint))
    x = torch.randn(2, 4, 4, generator=torch.Generator().manual_seed(0))
    left, right = kernel.steps[0](x), kernel.steps[1](x)
    expected = left.mean(2)[:, :, None] + right.mean(1)[:, None, :]
    torch.testing.assert_close(kernel(x), expected)
    assert _begins_as(linear_form(blueprint), blueprint)


@pytest.mark.parametrize(
    "blueprint",
    [_weighed(4, init="zeros"), _product(init="zeros")],
    ids=["product that broadcasts", "matrix product"],
)
def test_a_zero_that_would_be_lost_is_refused(blueprint):
    """No affine kernel of both factors would be the identity at birth; the message says why."""
    with pytest.raises(BlueprintError, match=r"'mix'.*has no linear form: one of its factors"):
        linear_form(blueprint)


def _reading(*more):
    """An attention whose queries are the input and whose keys and values are ten positions."""
    nodes = [
        ("key", "linear", {"in_features": 6, "out_features": 6}),
        ("wide", "permute", {"dims": (2, 1)}),
        ("pool", "adaptive_avg_pool", {"output_size": 10, "dims": 1}),
        ("back", "permute", {"dims": (2, 1)}),
        ("query", "linear", {"in_features": 6, "out_features": 6}),
        ("look", "multihead_attention", {"embed_dim": 6, "num_heads": 2}),
    ]
    edges = [
        ("input", "wide"),
        ("wide", "pool"),
        ("pool", "back"),
        ("back", "key"),
        ("input", "query"),
        ("query", "look", 0),
        ("key", "look", 1),
        ("back", "look", 2),
        ("look", "output"),
    ]
    return _graph(nodes, edges, ("L", 6))


def test_values_of_another_length_keep_no_weight_for_the_length():
    """Queries and keys are dropped; the kernel's input says how many positions there are."""
    blueprint = _reading()
    form = linear_form(blueprint)
    assert [node.id for node in form.nodes] == ["back", "look", "pool", "wide"]
    x = torch.randn(2, 7, 6, generator=torch.Generator().manual_seed(0))
    kernel = lower(form)
    assert kernel(x).shape == (2, 7, 6)
    assert torch.equal(kernel(x), kernel(x)[:, :1].expand(-1, 7, -1))
    whole = lower(blueprint).get_submodule("steps.5.attention")
    assert torch.equal(kernel.steps[-1].value.weight, whole.in_proj_weight[12:])


def test_a_maximum_becomes_the_mean_of_what_it_is_taken_of():
    """A constant goes through both alike, at padded borders and in windows cut short too."""
    attributes = {"kernel_size": 3, "stride": 2, "padding": 1, "dilation": 2, "ceil_mode": True}
    blueprint = blueprint_of("max_pool", attributes, (4, "H", "W"), (4, "OH", "OW"), 1)
    x = torch.full((2, 4, 9, 10), -3.0)
    assert torch.equal(lower(linear_form(blueprint))(x), lower(blueprint)(x))


def test_the_widest_window_has_a_mean():
    """A maximum may span 4,033 elements, and so may the mean that stands for it."""
    attributes = {"kernel_size": 64, "dilation": 64, "dims": 1}
    blueprint = blueprint_of("max_pool", attributes, (1, "L"), (1, "OL"), 1)
    x = torch.zeros(1, 1, 4200)
    assert lower(linear_form(blueprint))(x).shape == lower(blueprint)(x).shape


def test_the_linear_form_of_a_linear_form_is_the_same_graph():
    """There is nothing more to take out."""
    form = linear_form(FAMILIES["gated-mlp-16x10"])
    again = linear_form(form)
    assert (again.nodes, again.edges) == (form.nodes, form.edges)
    assert again.id == f"{form.id}-linear"


def test_a_name_that_is_too_long_is_cut():
    """A blueprint's id has 64 characters at most, and so has its linear form's."""
    blueprint = replace(FAMILIES["gated-mlp-16x10"], id="k" * 64)
    assert linear_form(blueprint).id == "k" * 57 + "-linear"


def test_a_broken_blueprint_is_refused_as_by_lowering():
    """The message is that of the rule."""
    broken = _graph([_linear("a"), ("b", "identity")], [("input", "a"), ("a", "output")], ("*", 4))
    with pytest.raises(BlueprintError, match="node 'b'"):
        linear_form(broken)
