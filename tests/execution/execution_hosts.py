"""Layer kinds for the conformance suite: add a row, and every promise is checked on it."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn


class Block(nn.Module):
    """A host of the user's own: two layers, a skip and a buffer that a forward changes."""

    def __init__(self):
        super().__init__()
        self.up = nn.Linear(6, 9)
        self.norm = nn.BatchNorm1d(9)
        self.down = nn.Linear(9, 6)

    def forward(self, x):
        return x + self.down(torch.relu(self.norm(self.up(x))))


@dataclass(frozen=True, kw_only=True)
class LayerKind:
    """A kind of layer.

    Attributes:
        make_host: Makes a host; random weights.
        make_input: Makes an input for it.
        make_kernel: Makes a parallel kernel with two trainable layers and a non-zero output.
        make_serial: Makes the same for the serial position.
    """

    make_host: Callable[[], nn.Module]
    make_input: Callable[[], torch.Tensor]
    make_kernel: Callable[[], nn.Module]
    make_serial: Callable[[], nn.Module]


def mlp(n_in, n_out):
    return nn.Sequential(nn.Linear(n_in, 5), nn.Tanh(), nn.Linear(5, n_out))


def _conv(axes):
    conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[axes - 1]
    return LayerKind(
        make_host=lambda: conv(2, 4, 3, stride=2, padding=1),
        make_input=lambda: torch.randn(3, 2, *(7,) * axes),
        make_kernel=lambda: nn.Sequential(
            conv(2, 5, 3, stride=2, padding=1), nn.Tanh(), conv(5, 4, 1)
        ),
        make_serial=lambda: nn.Sequential(conv(4, 5, 1), nn.Tanh(), conv(5, 4, 1)),
    )


def _square(make_host):
    return LayerKind(
        make_host=make_host,
        make_input=lambda: torch.randn(7, 6),
        make_kernel=lambda: mlp(6, 6),
        make_serial=lambda: mlp(6, 6),
    )


KINDS = {
    "linear": LayerKind(
        make_host=lambda: nn.Linear(6, 4),
        make_input=lambda: torch.randn(7, 6),
        make_kernel=lambda: mlp(6, 4),
        make_serial=lambda: mlp(4, 4),
    ),
    "linear_without_bias": _square(lambda: nn.Linear(6, 6, bias=False)),
    "conv1d": _conv(1),
    "conv2d": _conv(2),
    "conv3d": _conv(3),
    "block": _square(Block),
    "sequential": _square(lambda: nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 6))),
}


def zero_last_(kernel):
    """Zero the last layer of a kernel, so that it contributes nothing; return the kernel."""
    with torch.no_grad():
        for p in list(kernel.children())[-1].parameters():
            p.zero_()
    return kernel
