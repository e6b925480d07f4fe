"""A linear null leaves no trace exactly where it folds, and where not the reason is told."""

import copy
import itertools

import pytest
import torch
from execution_hosts import KINDS, run
from torch import nn

import esper
from esper.compiler.catalog import default_catalog, own_shape_zeroed
from esper.compiler.linear_form import linear_form
from esper.contracts.blueprint import BlueprintEdge, BlueprintIR, BlueprintNode, TensorSpec
from esper.execution.host_class import adopt
from esper.seeds.linear_null import why_null_adds
from esper.state.kernel import prepare_kernel
from esper.state.layer_call import LayerCall
from esper.state.site import describe_site


def families(layer, x):
    """Return the linear form of the smallest kernel of each family of the catalog, by its name."""
    with torch.no_grad():
        h = run(layer, x)
    site = describe_site(layer, LayerCall.of(x).x, h)
    found = [(entry.name, entry.blueprints_for(site)) for entry in default_catalog().entries]
    return {name: linear_form(blueprints[0]) for name, blueprints in found if blueprints}


def reason_for(layer, blueprint):
    return why_null_adds(layer, prepare_kernel(layer, blueprint))


def trained(layer, null, x):
    """Graft a null, train host and null for a few updates, and return the layer."""
    layer.graft(0, null, example=x)
    optimizer = torch.optim.SGD([p for p in layer.parameters() if p.requires_grad], lr=0.05)
    target = None
    for _ in range(4):
        y = run(layer, x)
        target = torch.randn_like(y) if target is None else target
        (y - target).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return layer


def assert_folds(layer, x):
    """The host alone gives what host and null gave, to 1e-6 of the largest output."""
    with torch.no_grad():
        before = run(layer, x)
        certificate = layer.fossilize(0)
        after = run(layer, x)
    assert certificate.folded, certificate.reason
    assert float((after - before).abs().max() / before.abs().max()) < 1e-6
    assert not any("_seeds" in key for key in layer.state_dict())


def check_every_family(kind):
    torch.manual_seed(0)
    x = kind.make_input()
    for null in families(adopt(kind.make_host().eval(), name="site"), x).values():
        layer = adopt(kind.make_host().eval(), name="site")
        reason = reason_for(layer, null)
        trained(layer, null, x)
        if reason is None:
            assert_folds(layer, x)
        else:
            assert layer.fossilize(0).reason == reason


@pytest.mark.torture
def test_a_null_leaves_no_trace_exactly_where_it_folds(kind):
    """At every kind of layer, for every family: folded after training, or refused as foretold."""
    check_every_family(kind)


@pytest.mark.parametrize("name", ["linear", "attention", "layer_norm", "sequential"])
def test_a_null_folds_at_a_few_kinds_as_foretold(name):
    """The same where it is quick: at a matrix, an attention, a norm and a block."""
    check_every_family(KINDS[name])


PADDED = {"padding": 1}
CONVOLUTIONS = {
    "padded": (lambda: nn.Conv2d(4, 6, 3, padding=1), {"bottleneck": "pads by zeros"}),
    "unpadded": (lambda: nn.Conv2d(4, 6, 3), {}),
    "strided": (lambda: nn.Conv2d(4, 6, 3, stride=2, dilation=2), {}),
    "circular": (lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular"), {}),
    "reflecting": (lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"), {}),
    "1x1": (lambda: nn.Conv2d(4, 6, 1), {}),
    "without_bias": (
        lambda: nn.Conv2d(4, 6, 3, bias=False),
        dict.fromkeys(("bottleneck", "conv-block", "separable"), "host has none"),
    ),
    "grouped": (
        lambda: nn.Conv2d(4, 6, 3, padding=1, groups=2),
        {
            "bottleneck": "pads by zeros",
            **dict.fromkeys(("conv-block", "separable", "pointwise"), "groups keep apart"),
        },
    ),
    "transposed": (
        lambda: nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, output_padding=1),
        {"bottleneck": "overlap unequally"},
    ),
}


QUICK = ("padded", "unpadded", "without_bias", "grouped", "transposed")


@pytest.mark.torture
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(n, marks=pytest.mark.slow if n in QUICK else pytest.mark.torture)
        for n in CONVOLUTIONS
    ],
)
def test_what_a_null_adds_at_a_convolution(name):
    """A bias that padding cuts off, a bias for a host without, channels between groups."""
    make, reasons = CONVOLUTIONS[name]
    torch.manual_seed(0)
    x = torch.randn(2, 4, 9, 9)
    nulls = families(adopt(make(), name="site"), x)
    assert reasons.keys() <= nulls.keys()
    for family, null in nulls.items():
        layer = adopt(make(), name="site")
        reason = reason_for(layer, null)
        trained(layer, null, x)
        if family in reasons:
            assert reasons[family] in reason
            assert layer.fossilize(0).reason == reason
        else:
            assert reason is None, (family, reason)
            assert_folds(layer, x)


def conv(name, channels_in, channels_out, size, **more):
    sizes = {"in_channels": channels_in, "out_channels": channels_out, "kernel_size": size}
    return BlueprintNode(name, "conv2d", {**sizes, **more})


def in_a_row(*nodes, position="parallel"):
    ids = ["input", *(node.id for node in nodes), "output"]
    return BlueprintIR(
        id="row",
        nodes=nodes,
        edges=tuple(BlueprintEdge(a, b) for a, b in itertools.pairwise(ids)),
        input_spec=TensorSpec((4, "H", "W")),
        output_spec=TensorSpec((4, "H", "W")),
        position=position,
    )


ROWS = {
    "two_padded_convolutions": (
        in_a_row(conv("a", 4, 4, 3, **PADDED), conv("b", 4, 4, 3, **PADDED)),
        "geometry of its own",
    ),
    "serial_3x3": (in_a_row(conv("a", 4, 4, 3, **PADDED), position="serial"), "1x1"),
    "serial_1x1": (in_a_row(conv("a", 4, 4, 1), conv("b", 4, 4, 1), position="serial"), None),
    "frozen_bias_of_zero": (
        in_a_row(conv("a", 4, 4, 1, trainable=False, bias=False), conv("b", 4, 4, 3, **PADDED)),
        None,
    ),
    "activation": (
        in_a_row(conv("a", 4, 4, 1), BlueprintNode("act", "activation", {"type": "relu"})),
        "ReLU is no affine operation",
    ),
}


@pytest.mark.parametrize("name", ROWS)
def test_what_compositions_of_convolutions_add(name):
    """Borders, positions and activations are looked at, whatever the kernel begins with."""
    kernel, reason = ROWS[name]
    found = reason_for(adopt(nn.Conv2d(4, 4, 5, padding=2), name="site"), kernel)
    assert (found is None) == (reason is None)
    assert reason is None or reason in found


def mlp_null(layer):
    return families(layer, torch.randn(5, 6))["mlp"]


def test_a_frozen_host_cannot_be_what_a_null_becomes():
    """It folds there all the same, and yet it has learnt what the host could not."""
    layer, x = adopt(nn.Linear(6, 4).requires_grad_(False), name="site"), torch.randn(5, 6)
    null = mlp_null(layer)
    assert "weight is frozen" in reason_for(layer, null)
    assert_folds(trained(layer, null, x), x)


def test_a_frozen_bias_cannot_become_another():
    """A null with a bias adds one; with none it adds nothing."""
    layer = adopt(nn.Linear(6, 4), name="site")
    layer.bias.requires_grad_(False)
    assert "bias is frozen" in reason_for(layer, mlp_null(layer))
    own = nn.Sequential(nn.Linear(6, 4, bias=False))[0]
    assert why_null_adds(layer, prepare_kernel(layer, own)) is None


def test_a_weight_that_another_module_has_too_cannot_take_a_null_in():
    """What folds there would change the other module."""
    layer, other = adopt(nn.Linear(6, 4), name="site"), nn.Linear(6, 4)
    other.weight = layer.weight
    assert "shared" in reason_for(layer, mlp_null(layer))


def test_a_weight_that_is_computed_cannot_take_a_null_in():
    """Nobody could write it."""
    layer = adopt(nn.utils.parametrizations.weight_norm(nn.Linear(6, 4)), name="site")
    reason = reason_for(layer, families(adopt(nn.Linear(6, 4), name="x"), torch.randn(5, 6))["mlp"])
    assert reason is not None


def test_beside_a_serial_seed_a_null_leaves_a_trace():
    """The other kernel would read what the null has become part of."""
    layer, x = adopt(nn.Linear(6, 4), name="site"), torch.randn(5, 6)
    null = mlp_null(layer)
    assert reason_for(layer, null) is None
    layer.graft(1, nn.Linear(4, 4), alpha=0.5, position="serial", example=x)
    assert "another contributing seed" in reason_for(layer, null)


NORMS = {
    "layer_norm": lambda: nn.LayerNorm(6),
    "batch_norm": lambda: nn.BatchNorm2d(6),
    "group_norm": lambda: nn.GroupNorm(2, 6),
}


@pytest.mark.parametrize("name", NORMS)
def test_a_factor_and_a_term_leave_no_trace_behind_a_norm(name):
    """A norm has them, so a kernel of them adds nothing; a matrix does."""
    layer = adopt(NORMS[name]().eval(), name="site")
    x = torch.randn(2, 6) if isinstance(layer, nn.LayerNorm) else torch.randn(2, 6, 5, 5)
    with torch.no_grad():
        site = describe_site(layer, x, layer(x))
    assert reason_for(layer, own_shape_zeroed(site)) is None
    assert "each feature" in reason_for(layer, families(layer, x)["mlp-behind"])


def test_a_kernel_that_cannot_be_copied_leaves_a_trace():
    """Whatever a stranger's module raises is the reason."""
    layer, kernel = adopt(nn.Linear(6, 6), name="site"), nn.Linear(6, 6)

    def no_copies(memo):
        raise RuntimeError("not to be copied")

    kernel.__deepcopy__ = no_copies
    assert "not to be copied" in why_null_adds(layer, prepare_kernel(layer, kernel))


def test_asking_changes_nothing():
    """Neither layer, nor kernel, nor random state, nor what the next forward gives."""
    net, x = esper.wrap(nn.Sequential(nn.Linear(6, 4))), torch.randn(5, 6)
    kernel = prepare_kernel(net[0], mlp_null(net[0]))
    before = copy.deepcopy((net.state_dict(), kernel.module.state_dict()))
    state, y = torch.get_rng_state(), net(x)
    assert why_null_adds(net[0], kernel) is None
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(net(x), y)
    for ours, theirs in zip(before, (net.state_dict(), kernel.module.state_dict()), strict=True):
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
