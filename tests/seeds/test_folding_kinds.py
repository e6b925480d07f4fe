"""Folding into attention, norms, embeddings, transposed convolutions: exact, or with a reason."""

import itertools

import pytest
import torch
from folding_checks import assert_folded, assert_kept, fossilize
from torch import nn

from esper.compiler.lowering import lower
from esper.contracts.blueprint import BlueprintEdge, BlueprintIR, BlueprintNode, TensorSpec
from esper.execution.host_class import adopt

pytestmark = pytest.mark.slow  # test_folding.py holds the same of linear hosts and convolutions


def serial(shape, *steps):
    """Return a serial kernel of nodes in a row, all of its tensors random."""
    nodes = [BlueprintNode(f"n{i}", op, attributes) for i, (op, attributes) in enumerate(steps)]
    ids = ["input", *(node.id for node in nodes), "output"]
    edges = tuple(BlueprintEdge(a, b) for a, b in itertools.pairwise(ids))
    spec = TensorSpec(shape)
    kernel = lower(
        BlueprintIR(
            id="serial",
            nodes=tuple(nodes),
            edges=edges,
            input_spec=spec,
            output_spec=spec,
            position="serial",
        )
    )
    with torch.no_grad():
        for p in kernel.parameters():
            p.normal_()
    return kernel


def diagonal(shape, features, **more):
    return serial(shape, ("diagonal", {"num_features": features, **more}))


def randomised(host):
    """Return a host with weights and biases that are not ones and zeros."""
    with torch.no_grad():
        for p in host.parameters():
            p.normal_()
    return host


HW = (4, "H", "W")
NORMS = {
    "layer_norm": (lambda: nn.LayerNorm(6), (3, 5, 6), lambda: diagonal(("*", 6), 6)),
    "layer_norm_2d": (lambda: nn.LayerNorm((5, 6)), (3, 5, 6), lambda: diagonal(("*", 6), 6)),
    "rms_norm": (lambda: nn.RMSNorm(6), (3, 6), lambda: diagonal(("*", 6), 6, bias=False)),
    "group_norm": (lambda: nn.GroupNorm(2, 4), (3, 4, 5, 5), lambda: diagonal(HW, 4, dim=1)),
    "batch_norm1d": (lambda: nn.BatchNorm1d(4), (3, 4), lambda: diagonal((4,), 4, dim=1)),
    "batch_norm1d_of_sequences": (
        lambda: nn.BatchNorm1d(4),
        (3, 4, 7),
        lambda: diagonal((4, "L"), 4, dim=1),
    ),
    "batch_norm2d": (lambda: nn.BatchNorm2d(4), (3, 4, 5, 5), lambda: diagonal(HW, 4, dim=1)),
    "depthwise": (
        lambda: nn.BatchNorm2d(4),
        (3, 4, 5, 5),
        lambda: serial(HW, ("conv2d", {**ONE, "groups": 4})),
    ),
}
ONE = {"in_channels": 4, "out_channels": 4, "kernel_size": 1}


def replacing(kernel):
    """Return a kernel's operations as a module by hand, which may be grafted in any mode."""
    (step,) = kernel.steps
    return step


@pytest.mark.parametrize("mode", ["add", "replace"])
@pytest.mark.parametrize("name", sorted(NORMS))
def test_a_factor_and_a_term_fold_into_a_norm(name, mode):
    """In evaluation the norm alone gives what norm and kernel gave."""
    make, shape, make_kernel = NORMS[name]
    host, x = randomised(make()).eval(), torch.randn(shape)
    weight = host.weight
    folded = fossilize(host, replacing(make_kernel()), x, mode=mode, position="serial")
    assert_folded(*folded)
    assert folded[0].weight is weight


def test_a_fold_into_a_batch_norm_leaves_the_running_statistics():
    """They are what goes in, and a fold changes what comes out."""
    host, x = randomised(nn.BatchNorm2d(4)), torch.randn(3, 4, 5, 5)
    host(x)
    before = host.running_mean.clone(), host.running_var.clone(), int(host.num_batches_tracked)
    layer = adopt(host.eval(), name="site")
    layer.graft(0, diagonal(HW, 4, dim=1), alpha=0.5, example=x)
    assert layer.fossilize(0).folded
    assert torch.equal(layer.running_mean, before[0])
    assert torch.equal(layer.running_var, before[1])
    assert int(layer.num_batches_tracked) == before[2]


REFUSED = {
    "matrix": (nn.LayerNorm(6), (3, 6), lambda: serial(("*", 6), LINEAR), "each feature"),
    "no_bias": (nn.LayerNorm(6, bias=False), (3, 6), lambda: diagonal(("*", 6), 6), "none"),
    "rms_has_no_bias": (nn.RMSNorm(6), (3, 6), lambda: diagonal(("*", 6), 6), "none"),
    "no_affine": (
        nn.LayerNorm(6, elementwise_affine=False),
        (3, 6),
        lambda: diagonal(("*", 6), 6),
        "absent",
    ),
    "the_other_axis": (
        nn.BatchNorm1d(4),
        (3, 4, 4),
        lambda: diagonal(("*", 4), 4),
        "exceeds",
    ),
}
LINEAR = ("linear", {"in_features": 6, "out_features": 6})


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_what_a_norm_cannot_hold_is_kept(name):
    """A matrix, a term without a bias to hold it, another axis: in the plan, with the reason."""
    host, shape, make_kernel, reason = REFUSED[name]
    assert_kept(*fossilize(host.eval(), make_kernel(), torch.randn(shape)), reason)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("mode", ["add", "replace"])
def test_a_serial_matrix_folds_into_the_output_projection(bias, mode):
    """What attention returns is unchanged to 1e-5, output and weights, and so is its signature."""
    host = nn.MultiheadAttention(6, 2, bias=bias, batch_first=True, kdim=5)
    layer = adopt(randomised(host), name="site")
    q, k, v = torch.randn(3, 4, 6), torch.randn(3, 7, 5), torch.randn(3, 7, 6)
    kernel = nn.Linear(6, 6, bias=bias)
    layer.graft(0, kernel, alpha=0.5, mode=mode, position="serial", example=(q, k, v))
    with torch.no_grad():
        before = layer(q, k, v)
        certificate = layer.fossilize(0)
        after = layer(q, k, v)
    assert certificate.folded, certificate.reason
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-5)


def test_a_kernel_beside_an_attention_is_kept():
    """What reads the query is no part of any matrix of the host."""
    layer = adopt(nn.MultiheadAttention(6, 2, batch_first=True), name="site")
    x = torch.randn(3, 4, 6)
    layer.graft(0, nn.Linear(6, 6), alpha=0.5, example=(x, x, x))
    assert "only serial" in layer.fossilize(0).reason


MLP = (LINEAR, ("activation", {"type": "gelu"}), ("layer_norm", {"normalized_shape": 6}), LINEAR)


def test_any_kernel_that_works_row_by_row_folds_into_a_table():
    """The table holds what the kernel makes of each row, activations and norms included."""
    folded = fossilize(nn.Embedding(11, 6), serial(("*", 6), *MLP), torch.randint(11, (4, 5)))
    assert_folded(*folded)


@pytest.mark.parametrize("mode", ["add", "replace"])
def test_a_matrix_folds_into_a_table(mode):
    """Also one that takes the host's place by half."""
    x = torch.randint(11, (4, 5))
    assert_folded(*fossilize(nn.Embedding(11, 6), nn.Linear(6, 6), x, mode=mode))


def test_a_norm_that_was_never_called_keeps_its_kernel():
    """After loading nobody knows which axis a kernel read, so nothing is folded."""
    layer, x = adopt(nn.BatchNorm1d(4).eval(), name="site"), torch.randn(3, 4)
    layer.graft(0, diagonal((4,), 4, dim=1), alpha=0.5, example=x)
    other = adopt(nn.BatchNorm1d(4).eval(), name="site")
    other.load_state_dict(layer.state_dict())
    assert layer.fossilize(0).folded
    assert "was seen" in other.fossilize(0).reason


def test_a_padding_row_folds_to_what_the_kernel_gave_for_it():
    """It is a row like any other in the forward; the gradient goes on passing it over."""
    host = nn.Embedding(11, 6, padding_idx=0)
    layer, _, before, after = fossilize(host, serial(("*", 6), *MLP), torch.tensor([[0, 3]]))
    torch.testing.assert_close(after, before)
    layer(torch.tensor([0, 3])).sum().backward()
    assert not layer.weight.grad[0].any()
    assert layer.weight.grad[3].any()


TABLES = {
    "max_norm": (
        lambda: nn.Embedding(11, 6, max_norm=1.0),
        lambda: serial(("*", 6), LINEAR),
        "max",
    ),
    "attention": (
        lambda: nn.Embedding(11, 6),
        lambda: serial(("L", 6), ("multihead_attention", {"embed_dim": 6, "num_heads": 2})),
        "row by row",
    ),
    "by_hand": (
        lambda: nn.Embedding(11, 6),
        lambda: nn.Sequential(nn.Linear(6, 6), nn.Tanh()),
        "row by row",
    ),
}


@pytest.mark.parametrize("name", sorted(TABLES))
def test_what_mixes_rows_is_kept(name):
    """Attention looks at other tokens, and what a module by hand does nobody knows."""
    make, make_kernel, reason = TABLES[name]
    layer = adopt(make(), name="site")
    layer.graft(0, make_kernel(), alpha=0.5, position="serial", example=torch.randint(11, (4, 5)))
    assert reason in layer.fossilize(0).reason


@pytest.mark.parametrize(("stride", "groups"), [(1, 1), (2, 1), (2, 2)])
@pytest.mark.parametrize("mode", ["add", "replace"])
def test_transposed_convolutions_of_the_same_settings_fold(stride, groups, mode):
    """Stride, padding, output padding and groups alike, the weights add up."""
    more = {"stride": stride, "padding": 1, "output_padding": stride - 1, "groups": groups}
    host, kernel = (nn.ConvTranspose2d(4, 6, 3, **more) for _ in range(2))
    assert_folded(*fossilize(host, kernel, torch.randn(2, 4, 5, 5), mode=mode))


def test_a_serial_1x1_folds_into_a_transposed_convolution():
    """A matrix on the channels of what comes out is a matrix on the weight's outputs."""
    host, x = nn.ConvTranspose2d(4, 6, 3, stride=2), torch.randn(2, 4, 5, 5)
    assert_folded(*fossilize(host, nn.Conv2d(6, 6, 1), x, position="serial"))


def test_a_kernel_behind_a_1x1_folds_into_a_transposed_convolution():
    """A matrix on the inputs goes into the weight; a bias there would act unequally."""
    for bias in (False, True):
        host, x = nn.ConvTranspose2d(4, 6, 3), torch.randn(2, 4, 5, 5)
        squeeze = ("conv2d", {"in_channels": 4, "out_channels": 3, "kernel_size": 1, "bias": bias})
        lift = ("conv_transpose2d", {"in_channels": 3, "out_channels": 6, "kernel_size": 3})
        nodes = (BlueprintNode("a", *squeeze), BlueprintNode("b", *lift))
        edges = [BlueprintEdge("input", "a"), BlueprintEdge("a", "b"), BlueprintEdge("b", "output")]
        kernel = BlueprintIR(
            id="lift",
            nodes=nodes,
            edges=tuple(edges),
            input_spec=TensorSpec(HW),
            output_spec=TensorSpec((6, "OH", "OW")),
        )
        folded = fossilize(host, kernel, x)
        if bias:
            assert_kept(*folded, "overlap")
        else:
            assert_folded(*folded)


def test_another_transposed_convolution_is_kept():
    """Equal sizes of the output do not make equal taps: 2n - 1 both times."""
    wide = nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1)
    narrow = nn.ConvTranspose2d(4, 6, 1, stride=2)
    x = torch.randn(2, 4, 5, 5)
    assert_kept(*fossilize(wide, narrow, x), "same settings")
    assert_kept(*fossilize(narrow, nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1), x), "same")
    dilated = nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, dilation=2)
    assert_kept(*fossilize(nn.ConvTranspose2d(4, 6, 3, stride=2), dilated, x), "same settings")


class Conv1D(nn.Module):
    """A linear layer as transformers writes it."""

    def __init__(self, num_out, num_in):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(num_in, num_out))
        self.bias = nn.Parameter(torch.randn(num_out))

    def forward(self, x):
        return x @ self.weight + self.bias


Conv1D.__module__ = "transformers.pytorch_utils"


@pytest.mark.parametrize("position", ["parallel", "serial"])
def test_a_matrix_folds_into_the_conv1d_of_transformers(position):
    """Its weight has the inputs first."""
    kernel = nn.Linear(4 if position == "parallel" else 6, 6)
    assert_folded(*fossilize(Conv1D(6, 4), kernel, torch.randn(5, 4), position=position))


def test_a_kernel_that_cannot_be_measured_is_kept():
    """A linear layer on the width of an image works for that width; a fold would not."""
    x = torch.randn(2, 3, 6, 4)
    folded = fossilize(nn.Conv2d(3, 4, 1), nn.Linear(4, 4), x, position="serial")
    assert_kept(*folded, "does not take")
