"""Hosts on which the promises of wrapping are checked, with a kernel and the formula by hand."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

import esper


class Bottleneck(nn.Module):
    """A kernel with two trainable layers, over the last axis."""

    def __init__(self, n_in, n_out):
        super().__init__()
        self.down = nn.Linear(n_in, 3)
        self.up = nn.Linear(3, n_out)

    def forward(self, x):
        return self.up(torch.tanh(self.down(x)))


class Convolutions(nn.Module):
    """A kernel with two trainable layers, over images."""

    def __init__(self, n_in, n_out):
        super().__init__()
        self.down = nn.Conv2d(n_in, 3, 3, padding=1)
        self.up = nn.Conv2d(3, n_out, 1)

    def forward(self, x):
        return self.up(torch.tanh(self.down(x)))


class Block(nn.Module):
    """A host of the user's own, with a child that is called twice."""

    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(6)
        self.fc = nn.Linear(6, 6)

    def forward(self, x, scale=0.5):
        return x + scale * self.fc(torch.tanh(self.fc(self.norm(x))))


@dataclass(frozen=True, kw_only=True)
class Host:
    """A host.

    Attributes:
        make: Makes it, with random weights.
        make_call: Makes the positional arguments of a call.
        make_kernel: Makes a kernel that contributes something.
        position: Where the kernel reads.
        takes_integers: Whether the host's input can have no gradient.
        can_be_mapped: Whether torch can map over it.
    """

    make: Callable[[], nn.Module]
    make_call: Callable[[], tuple[torch.Tensor, ...]]
    make_kernel: Callable[[], nn.Module]
    position: str = "parallel"
    takes_integers: bool = False
    can_be_mapped: bool = True


def _vectors():
    return (torch.randn(5, 6),)


def _images():
    return (torch.randn(2, 4, 5, 5),)


def _sequences():
    """Query, key and value of one sample: a batch can be mapped over."""
    return tuple(torch.randn(1, 5, 6) for _ in range(3))


HOSTS = {
    "linear": Host(
        make=lambda: nn.Linear(6, 4), make_call=_vectors, make_kernel=lambda: Bottleneck(6, 4)
    ),
    "conv2d": Host(
        make=lambda: nn.Conv2d(4, 2, 3, padding=1),
        make_call=_images,
        make_kernel=lambda: Convolutions(4, 2),
    ),
    "transposed_conv2d": Host(
        make=lambda: nn.ConvTranspose2d(4, 2, 3, padding=1),
        make_call=_images,
        make_kernel=lambda: Convolutions(4, 2),
    ),
    "attention": Host(
        make=lambda: nn.MultiheadAttention(6, 2, batch_first=True),
        make_call=_sequences,
        make_kernel=lambda: Bottleneck(6, 6),
    ),
    "embedding": Host(
        make=lambda: nn.Embedding(9, 6),
        make_call=lambda: (torch.randint(9, (2, 5)),),
        make_kernel=lambda: Bottleneck(6, 6),
        position="serial",
        takes_integers=True,
    ),
    "gru": Host(
        make=lambda: nn.GRU(6, 6),
        make_call=lambda: (torch.randn(5, 2, 6),),
        make_kernel=lambda: Bottleneck(6, 6),
        position="serial",
        can_be_mapped=False,
    ),
    "layer_norm": Host(
        make=lambda: nn.LayerNorm(6), make_call=_vectors, make_kernel=lambda: Bottleneck(6, 6)
    ),
    "batch_norm": Host(
        make=lambda: nn.BatchNorm2d(4),
        make_call=_images,
        make_kernel=lambda: Convolutions(4, 4),
        position="serial",
    ),
    "block": Host(make=Block, make_call=_vectors, make_kernel=lambda: Bottleneck(6, 6)),
    "sequential": Host(
        make=lambda: nn.Sequential(nn.Linear(6, 6), nn.Tanh()),
        make_call=_vectors,
        make_kernel=lambda: Bottleneck(6, 6),
    ),
}
"""Add a row, and every promise is checked on it."""

DIFFERENTIABLE = [name for name, host in HOSTS.items() if not host.takes_integers]


def result(output):
    """Return the tensor of an output that grafts act on."""
    return output[0] if isinstance(output, tuple) else output


def cast(call, dtype):
    """Return a call with its floating tensors in another dtype."""
    return tuple(x.to(dtype) if x.is_floating_point() else x for x in call)


def wrapped(host, **options):
    """Return a fresh host, wrapped as one site."""
    return esper.wrap(host.make(), select="", **options)


def graft(layer, host, alpha=0.5, **options):
    """Put a kernel of the host into seed 0 of a layer; return the layer."""
    layer.graft(
        0,
        host.make_kernel().to(next(layer.parameters()).dtype),
        alpha=alpha,
        position=host.position,
        example=host.make_call(),
        **options,
    )
    return layer


class ByHand(nn.Module):
    """The formula, written as anybody would: ``h + alpha k``."""

    def __init__(self, host, kernel, alpha, position):
        super().__init__()
        self.host = host
        self.kernel = kernel
        self.alpha = torch.tensor(alpha)
        self.is_serial = position == "serial"

    def forward(self, *args, **kwargs):
        output = self.host(*args, **kwargs)
        h = result(output)
        y = h + self.alpha * self.kernel(h if self.is_serial else args[0])
        return (y, *output[1:]) if isinstance(output, tuple) else y
