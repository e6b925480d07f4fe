"""A fold that is not exact is declined with a reason: any kernel on any axis, without an error."""

import itertools

import pytest
import torch
from torch import nn

import esper
from esper.contracts.errors import KernelRefusedError

HOSTS = {
    "linear": (lambda: nn.Linear(6, 6), (3, 6)),
    "linear_on_sequences": (lambda: nn.Linear(6, 6), (3, 3, 6)),
    "conv1d": (lambda: nn.Conv1d(6, 6, 3, padding=1), (2, 6, 6)),
    "conv2d": (lambda: nn.Conv2d(6, 6, 3, padding=1), (2, 6, 6, 6)),
    "conv_transpose2d": (lambda: nn.ConvTranspose2d(6, 6, 1), (2, 6, 6, 6)),
    "layer_norm": (lambda: nn.LayerNorm(6), (3, 6, 6)),
    "layer_norm_of_two_axes": (lambda: nn.LayerNorm((6, 6)), (3, 6, 6)),
    "rms_norm": (lambda: nn.RMSNorm(6), (3, 6)),
    "group_norm": (lambda: nn.GroupNorm(2, 6), (3, 6, 6)),
    "batch_norm": (lambda: nn.BatchNorm1d(6), (3, 6, 6)),
    "batch_norm2d": (lambda: nn.BatchNorm2d(6), (3, 6, 6, 6)),
}


KERNELS = {
    "linear": lambda: nn.Linear(6, 6),
    "without_bias": lambda: nn.Linear(6, 6, bias=False),
    "conv1d": lambda: nn.Conv1d(6, 6, 1),
    "conv1d_of_three": lambda: nn.Conv1d(6, 6, 3, padding=1),
    "conv1d_on_another_axis": lambda: nn.Conv1d(3, 3, 1),
    "conv2d_of_three": lambda: nn.Conv2d(6, 6, 3, padding=1),
    "depthwise": lambda: nn.Conv2d(6, 6, 3, padding=1, groups=6),
    "dilated": lambda: nn.Conv2d(6, 6, 3, padding=2, dilation=2),
    "circular": lambda: nn.Conv2d(6, 6, 3, padding=1, padding_mode="circular"),
    "transposed": lambda: nn.ConvTranspose2d(6, 6, 1),
    "transposed1d": lambda: nn.ConvTranspose1d(6, 6, 1),
    "norm": lambda: nn.LayerNorm((6, 6)),
    "parametrized": lambda: nn.utils.parametrizations.weight_norm(nn.Linear(6, 6)),
    "block": lambda: nn.Sequential(nn.Linear(6, 6), nn.Tanh()),
}


OFTEN = ("linear", "conv1d", "conv2d_of_three", "depthwise", "norm", "block")
"""Kernels of each way in which a fold is made or declined; the others take long together."""

ALIKE = ("linear_on_sequences", "conv_transpose2d")
"""Hosts that differ little from others."""


@pytest.mark.parametrize(
    "kernel",
    [
        pytest.param(n, marks=pytest.mark.slow if n in OFTEN else pytest.mark.torture)
        for n in KERNELS
    ],
)
@pytest.mark.parametrize(
    "host",
    [pytest.param(n, marks=pytest.mark.torture if n in ALIKE else []) for n in HOSTS],
)
def test_any_kernel_on_any_axis_gets_a_certificate(host, kernel):
    """The layer gives after the fold what it gave before, and a reason where it is not folded."""
    make, shape = HOSTS[host]
    for position, mode in itertools.product(("parallel", "serial"), ("add", "replace")):
        torch.manual_seed(0)
        net = esper.wrap(nn.Sequential(make())).eval()
        layer, x = net[0], torch.randn(shape)
        try:
            layer.graft(0, KERNELS[kernel](), alpha=0.5, mode=mode, position=position, example=x)
        except (KernelRefusedError, ValueError):
            continue  # it does not fit there
        with torch.no_grad():
            before = layer(x)
            weight = layer.weight.clone()
            certificate = layer.fossilize(0)
            torch.testing.assert_close(layer(x), before, atol=1e-5, rtol=1e-5)
        says_why = bool(certificate.reason) and not certificate.stale_moments
        assert certificate.folded != says_why
        assert certificate.folded or torch.equal(layer.weight, weight)


def test_a_kernel_that_raises_where_it_is_copied_is_no_error():
    """What a stranger's kernel raises in a fold is the reason of the certificate."""
    net = esper.wrap(nn.Sequential(nn.Linear(6, 6))).eval()
    kernel = nn.Linear(6, 6)
    net[0].graft(0, kernel, alpha=0.5, example=torch.randn(3, 6))

    def no_copies(memo):
        raise RuntimeError("this kernel is not to be copied")

    kernel.__deepcopy__ = no_copies
    certificate = net[0].fossilize(0)
    assert not certificate.folded
    assert "this kernel is not to be copied" in certificate.reason
    assert net[0].state_layout.state(0).name == "FOSSILIZED"
