"""A lowered kernel is an ordinary module: it trains, copies, moves and compiles."""

from __future__ import annotations

import pytest
import torch
import torch._dynamo.testing
from torch import nn

from esper.compiler.compile import compile_blueprint
from esper.compiler.lowering import (
    LoweredKernel,
    duplicate,
    instantiate,
    kernel_tensors,
    load_tensors_,
    lower,
)
from esper.contracts.blueprint import BlueprintEdge, BlueprintIR, BlueprintNode, TensorSpec
from esper.contracts.errors import BlueprintError

HOSTILE_IDS = ["type", "items", "weight", "forward", "a.b", "__class__", "steps", "0"]


def _gated(init_seed=0, width=8, nodes_reversed=False, ids=("value", "gate", "act", "mix", "out")):
    """(x A) * sigmoid(x B), read out by a last layer: several inputs, several paths."""
    value, gate, act, mix, out = ids
    linear = {"in_features": 4, "out_features": width}
    nodes = [
        BlueprintNode(value, "linear", linear),
        BlueprintNode(gate, "linear", linear),
        BlueprintNode(act, "activation", {"type": "sigmoid"}),
        BlueprintNode(mix, "mul"),
        BlueprintNode(out, "linear", {"in_features": width, "out_features": 3}),
    ]
    edges = [
        BlueprintEdge("input", value),
        BlueprintEdge("input", gate),
        BlueprintEdge(gate, act),
        BlueprintEdge(value, mix, 0),
        BlueprintEdge(act, mix, 1),
        BlueprintEdge(mix, out),
        BlueprintEdge(out, "output"),
    ]
    return BlueprintIR(
        id="gated",
        nodes=tuple(nodes[::-1] if nodes_reversed else nodes),
        edges=tuple(edges[::-1] if nodes_reversed else edges),
        input_spec=TensorSpec(("*", 4)),
        output_spec=TensorSpec(("*", 3)),
        init_seed=init_seed,
    )


def _x(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def _same(a, b):
    pairs = zip(a.state_dict().items(), b.state_dict().items(), strict=True)
    return all(ka == kb and torch.equal(va, vb) for (ka, va), (kb, vb) in pairs)


def test_a_kernel_computes_its_graph():
    """The output equals the formula written out by hand."""
    kernel = lower(_gated())
    t = kernel_tensors(kernel)
    x = _x(5, 4)
    value = nn.functional.linear(x, t["value.weight"], t["value.bias"])
    gate = nn.functional.linear(x, t["gate.weight"], t["gate.bias"]).sigmoid()
    by_hand = nn.functional.linear(value * gate, t["out.weight"], t["out.bias"])
    assert torch.equal(kernel(x), by_hand)


def test_the_order_of_subtraction_is_kept():
    """3x - 2x is x, and with the positions exchanged it is -x."""
    nodes = (
        BlueprintNode("two", "scale", {"factor": 2.0}),
        BlueprintNode("three", "scale", {"factor": 3.0}),
        BlueprintNode("diff", "sub"),
    )
    for sign, positions in ((1, (1, 0)), (-1, (0, 1))):
        edges = (
            BlueprintEdge("input", "two"),
            BlueprintEdge("input", "three"),
            BlueprintEdge("two", "diff", positions[0]),
            BlueprintEdge("three", "diff", positions[1]),
            BlueprintEdge("diff", "output"),
        )
        spec = TensorSpec(("*", 4))
        kernel = lower(
            BlueprintIR(id="d", nodes=nodes, edges=edges, input_spec=spec, output_spec=spec)
        )
        assert torch.equal(kernel(torch.ones(2, 4)), sign * torch.ones(2, 4))


def test_the_same_blueprint_gives_the_same_weights_and_another_seed_others():
    """Listing order changes nothing; init_seed changes everything."""
    assert _same(lower(_gated()), lower(_gated(nodes_reversed=True)))
    assert not _same(lower(_gated()), lower(_gated(init_seed=1)))


def test_no_two_hidden_units_and_no_two_layers_begin_equal():
    """Equal units would get equal gradients for ever."""
    tensors = kernel_tensors(lower(_gated()))
    assert len(torch.unique(tensors["value.weight"], dim=0)) == 8
    assert not torch.equal(tensors["value.weight"], tensors["gate.weight"])


def test_lowering_leaves_the_global_random_state_alone():
    """Neither lower nor instantiate reads or moves the generator that the user seeded."""
    artifact = compile_blueprint(_gated())
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = lower(_gated(init_seed=7))
    instantiate(artifact)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    assert _same(first, lower(_gated(init_seed=7)))


def test_names_of_module_attributes_are_fine_as_node_ids():
    """Ids such as "type", "items" or "forward" compile, run, and name their weights."""
    for start in range(len(HOSTILE_IDS) - 4):
        ids = HOSTILE_IDS[start : start + 5]
        artifact = compile_blueprint(_gated(ids=ids))
        kernel = instantiate(artifact)
        assert kernel(_x(2, 4)).shape == (2, 3)
        assert {name.rpartition(".")[0] for name in kernel_tensors(kernel)} == {*ids[:2], ids[4]}


def test_every_instance_has_parameters_of_its_own():
    """Training one instance of an artifact changes neither the other nor the artifact."""
    artifact = compile_blueprint(_gated())
    one, other = instantiate(artifact), instantiate(artifact)
    with torch.no_grad():
        for parameter in one.parameters():
            parameter.add_(1)
    assert not _same(one, other)
    assert _same(other, instantiate(artifact))


def test_a_duplicate_is_equal_and_shares_nothing():
    """What is written into one of the two, or hung on it, does not reach the other."""
    kernel = lower(_gated())
    twin = duplicate(kernel)
    before = {name: tensor.clone() for name, tensor in kernel.state_dict().items()}
    assert all(torch.equal(before[name], t) for name, t in twin.state_dict().items())
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.add_(1.0)
    twin.steps[0].register_forward_hook(lambda *_: None)
    assert all(torch.equal(before[name], t) for name, t in kernel.state_dict().items())
    assert not kernel.steps[0]._forward_hooks


def test_a_kernel_trains():
    """Every parameter gets a gradient, also if it was built under inference_mode."""
    with torch.inference_mode():
        kernels = [lower(_gated()), instantiate(compile_blueprint(_gated()))]
    for kernel in kernels:
        kernel(_x(5, 4)).square().sum().backward()
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in kernel.parameters())


def test_gradients_agree_with_finite_differences():
    """Gradcheck in float64 through several paths."""
    kernel = lower(_gated(width=3)).double()
    assert torch.autograd.gradcheck(kernel, _x(2, 4).double().requires_grad_())


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
def test_parameters_have_the_dtype_of_the_input_spec(dtype):
    """The dtype of the blueprint is the dtype of the weights, through bytes too."""
    blueprint = _gated()
    spec_in, spec_out = TensorSpec(("*", 4), dtype), TensorSpec(("*", 3), dtype)
    fields = {"id": "x", "nodes": blueprint.nodes, "edges": blueprint.edges}
    typed = BlueprintIR(**fields, input_spec=spec_in, output_spec=spec_out)
    kernel = instantiate(compile_blueprint(typed))
    assert _same(kernel, lower(typed))
    assert kernel(_x(2, 4).to(getattr(torch, dtype))).dtype == getattr(torch, dtype)
    widened = instantiate(compile_blueprint(typed), dtype=torch.float32)
    assert {p.dtype for p in widened.parameters()} == {torch.float32}


def test_autocast_applies_inside_a_kernel():
    """Under autocast the products run in bfloat16."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert lower(_gated())(_x(2, 4)).dtype == torch.bfloat16


def test_weights_by_artifact_name_are_taken_whole_or_not_at_all():
    """load_tensors_ takes exactly the kernel's tensors; a missing or misshapen one is refused."""
    source, target = lower(_gated(init_seed=1)), lower(_gated())
    tensors = kernel_tensors(source)
    load_tensors_(target, tensors)
    assert _same(source, target)
    for wrong in (
        {k: v for k, v in tensors.items() if k != "out.bias"},
        {**tensors, "out.bias": torch.zeros(4)},
        {**tensors, "more": torch.zeros(1)},
    ):
        with pytest.raises(BlueprintError, match="tensors"):
            load_tensors_(target, wrong)


class _Host(nn.Module):
    def __init__(self, kernel):
        super().__init__()
        self.kernel = kernel

    def forward(self, x):
        return x.sum(-1, keepdim=True) + self.kernel(x)


@pytest.mark.slow
def test_another_kernel_of_the_same_graph_does_not_recompile():
    """One graph for all kernels of a structure; another structure is the control: one more."""
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounter()
    host = _Host(lower(_gated()))
    compiled = torch.compile(host, backend=counter, fullgraph=True)
    for seed in range(3):
        host.kernel = instantiate(compile_blueprint(_gated(init_seed=seed)))
        x = _x(5, 4)
        torch.testing.assert_close(compiled(x), host(x))
        assert counter.frame_count == 1
    host.kernel = lower(_gated(width=9))
    compiled(_x(5, 4))
    assert counter.frame_count == 2


def test_all_kernels_are_of_one_class():
    """Kernels differ in their wiring and weights, never in their class."""
    assert type(lower(_gated())) is type(instantiate(compile_blueprint(_gated(width=9))))
    assert type(lower(_gated())) is LoweredKernel


def test_what_is_no_blueprint_is_refused_by_name():
    """A name is no blueprint, and compiling it says what is one."""
    with pytest.raises(TypeError, match=r"blueprint is an esper\.BlueprintIR; got 'mlp-4x4-w8'"):
        compile_blueprint("mlp-4x4-w8")
