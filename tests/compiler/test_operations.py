"""Every operation of the table keeps the promises of the table."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
from operation_cases import CASES, CONV, HW, IDS, blueprint_of, example_of
from torch import nn

from esper.compiler.compile import compile_blueprint
from esper.compiler.graph import plan
from esper.compiler.lowering import instantiate, lower
from esper.compiler.operations import OPERATIONS
from esper.contracts.blueprint import BlueprintEdge, BlueprintIR, BlueprintNode, TensorSpec
from esper.contracts.errors import BlueprintError


def test_every_operation_is_tried_here():
    """No row of the table is left out of these tests."""
    assert {op for op, *_ in CASES} == OPERATIONS.keys()


@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_an_operation_keeps_the_promises_of_its_row(case):
    """Parameter count, affinity, output shape and a finite gradient are as the table says."""
    blueprint = blueprint_of(*case)
    kernel = lower(blueprint).eval()
    made = plan(blueprint)
    assert sum(p.numel() for p in kernel.parameters()) == made.parameter_count
    x = example_of(blueprint.input_spec).requires_grad_()
    out = kernel(x)
    sizes = dict.fromkeys(blueprint.input_spec.free_sizes, 7)
    expected = blueprint.output_spec.resolve((3, 2), {
        name: sizes.get(name, out.shape[-1]) for name in blueprint.output_spec.free_sizes
    })  # fmt: skip
    assert len(out.shape) == len(expected)
    assert out.dtype == torch.float32
    gradients = torch.autograd.grad(out.sum(), [x, *kernel.parameters()], allow_unused=True)
    assert all(g is None or bool(g.isfinite().all()) for g in gradients)


@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_an_operation_is_affine_exactly_where_the_table_says(case):
    """Affine means f((x + y) / 2) = (f(x) + f(y)) / 2; the others break it somewhere."""
    blueprint = blueprint_of(*case)
    kernel = lower(blueprint).double().eval()
    x = example_of(blueprint.input_spec).double()
    y = torch.randn(x.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) * 3
    middle = kernel((x + y) / 2)
    holds = torch.allclose(middle, (kernel(x) + kernel(y)) / 2, rtol=1e-9, atol=1e-9)
    if OPERATIONS[case[0]].affine:
        assert holds
    elif case[0] not in ("batch_norm", "dropout"):  # these are affine in evaluation only
        assert not holds


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_an_operation_survives_the_life_of_a_module(case):
    """Compiling to bytes and back, deepcopy, pickle, train and eval keep what it computes."""
    blueprint = blueprint_of(*case)
    kernel = lower(blueprint)
    loaded = instantiate(compile_blueprint(blueprint))
    x = example_of(blueprint.input_spec)
    copies = [kernel, loaded, copy.deepcopy(kernel), pickle.loads(pickle.dumps(kernel))]
    for training in (True, False):
        outs = []
        for each in copies:
            each.train(training)
            torch.manual_seed(0)
            outs.append(each(x))
        assert all(torch.equal(out, outs[0]) for out in outs)


@pytest.mark.slow
@pytest.mark.parametrize("case", [c for c in CASES if OPERATIONS[c[0]].has_tensors])
def test_trainable_false_freezes_every_tensor(case):
    """With the default every parameter is trainable, with false none is, after loading too."""
    op, attributes, *rest = case
    frozen = blueprint_of(op, {**attributes, "trainable": False}, *rest)
    for kernel in (lower(frozen), instantiate(compile_blueprint(frozen))):
        assert not any(p.requires_grad for p in kernel.parameters())
    assert all(p.requires_grad for p in lower(blueprint_of(*case)).parameters())


@pytest.mark.parametrize("case", [c for c in CASES if "init" in OPERATIONS[c[0]].attributes])
def test_init_zeros_makes_every_tensor_of_the_layer_zero(case):
    """Such a layer is exactly zero, and trainable; with the default it is not zero."""
    op, attributes, *rest = case
    zeroed = lower(blueprint_of(op, {**attributes, "init": "zeros"}, *rest))
    assert all(not p.any() and p.requires_grad for p in zeroed.parameters())
    assert any(p.any() for p in lower(blueprint_of(*case)).parameters())


@pytest.mark.parametrize(
    ("op", "attributes", "factory"),
    [
        ("linear", {"in_features": 400, "out_features": 300}, lambda: nn.Linear(400, 300)),
        (
            "conv2d",
            {"in_channels": 40, "out_channels": 60, "kernel_size": 3, "groups": 2},
            lambda: nn.Conv2d(40, 60, 3, groups=2),
        ),
        (
            "multihead_attention",
            {"embed_dim": 128, "num_heads": 2},
            lambda: _attention(128, 2),
        ),
    ],
)
def test_initial_weights_follow_torchs_distributions(op, attributes, factory):
    """Bounds and spread of every tensor are those of torch.nn's own initialisation.

    Two samples of n numbers from one uniform distribution: their spreads differ by a standard error
    of sqrt(0.4 / n), and the largest of one is less than 1 / (1 + 12 / n) of the bound once in
    160,000.
    """
    shape = {"linear": ("*", 400), "conv2d": (40, "H", "W")}.get(op, ("L", 128))
    out = {"linear": ("*", 300), "conv2d": (60, "OH", "OW")}.get(op, ("L", 128))
    ours = dict(lower(blueprint_of(op, attributes, shape, out, 1)).steps[0].state_dict())
    theirs = factory().state_dict()
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        n, spread = tensor.numel(), (tensor.std(), theirs[name].std())
        assert math.isclose(*spread, rel_tol=5 * math.sqrt(0.4 / n)), name
        assert tensor.abs().max() <= theirs[name].abs().max() * (1 + 12 / n)


def test_causal_attention_does_not_look_ahead():
    """An output depends on its own place and those before; without the attribute on all."""
    for causal in (True, False):
        attributes = {"embed_dim": 4, "num_heads": 2, "causal": causal}
        kernel = lower(
            blueprint_of("multihead_attention", attributes, ("L", 4), ("L", 4), 1)
        ).eval()
        x = torch.randn(2, 5, 4, generator=torch.Generator().manual_seed(0))
        changed = x.clone()
        changed[:, -1] += 1.0
        assert torch.equal(kernel(x)[:, :-1], kernel(changed)[:, :-1]) == causal
        assert not torch.equal(kernel(x)[:, -1], kernel(changed)[:, -1])


def _attention(embed_dim, num_heads):
    """Torch's attention under the names that a kernel's step has."""
    return nn.ModuleDict({"attention": nn.MultiheadAttention(embed_dim, num_heads)})


@pytest.mark.parametrize(
    ("op", "attributes", "word"),
    [
        ("linear", {"in_features": 4}, "'out_features' is missing"),
        ("linear", {"in_features": 4, "out_features": 0}, "from 1 to 65536"),
        ("linear", {"in_features": 4, "out_features": True}, "from 1 to 65536"),
        ("linear", {"in_features": 4, "out_features": 4.0}, "from 1 to 65536"),
        (
            "linear",
            {"in_features": 4, "out_features": 4, "device": "cuda"},
            "'device' is not known",
        ),
        ("linear", {"in_features": 4, "out_features": 4, "init": "ones"}, "default, zeros"),
        ("activation", {"type": "exec"}, "one of relu"),
        ("conv2d", {**CONV, "kernel_size": (3, 3, 3)}, "2 integers"),
        ("conv2d", {**CONV, "padding": "reflect"}, "'same'"),
        ("conv2d", {**CONV, "groups": 3}, "contradict"),
        ("conv2d", {**CONV, "padding": "same", "stride": 2}, "contradict"),
        ("dropout", {"p": 1.5}, "from 0 to 0.99"),
        ("group_norm", {"num_groups": 3, "num_channels": 4}, "contradict"),
        ("multihead_attention", {"embed_dim": 4, "num_heads": 3}, "contradict"),
        ("scale", {"factor": "2"}, "a number"),
        ("noise", {"std": 0.0}, "a number"),
        ("concat", {"dim": 0}, "other than the batch"),
    ],
)
def test_a_wrong_attribute_is_named_with_what_is_expected(op, attributes, word):
    """The message names the node, the attribute and its range."""
    num_inputs = OPERATIONS[op].num_inputs[0]
    spec = TensorSpec(("L", 4) if op == "multihead_attention" else HW)
    edges = [BlueprintEdge("input", "op", i) for i in range(num_inputs)]
    blueprint = BlueprintIR(
        id="wrong",
        nodes=(BlueprintNode("op", op, attributes),),
        edges=(*edges, BlueprintEdge("op", "output")),
        input_spec=spec,
        output_spec=spec,
        draws_random=op in ("dropout", "noise"),
    )
    with pytest.raises(BlueprintError, match=f"node 'op'.*{word}"):
        lower(blueprint)
