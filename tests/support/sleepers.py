"""Models with a stack of blocks, and each built with fewer of them, for tests of depth."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

WIDTH = 8


class Residual(nn.Module):
    """A block with dropout, and running statistics that a forward writes to."""

    def __init__(self, width=WIDTH):
        super().__init__()
        self.norm = nn.BatchNorm1d(width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def change(self, x):
        h = F.dropout(F.gelu(self.up(self.norm(x))), 0.1, self.training)
        return x + self.down(h)

    def forward(self, x):
        return self.change(x)


class TupleBlock(Residual):
    """Gives its output, a mask that it was given, a loss of its own, and nothing."""

    def forward(self, x, mask=None, *, wants_norm=False):
        y = self.change(x)
        return (y, mask, y.square().mean(), y.norm() if wants_norm else None)


class Pair(NamedTuple):
    hidden: torch.Tensor
    mask: torch.Tensor | None = None


class NamedBlock(Residual):
    def forward(self, x, mask=None):
        return Pair(self.change(x), mask)


@dataclass
class Output:
    hidden: torch.Tensor
    mask: torch.Tensor | None = None


class DataBlock(Residual):
    def forward(self, *, hidden, mask=None):
        return Output(hidden=self.change(hidden), mask=mask)


class MappingBlock(Residual):
    def forward(self, x, mask=None):
        return {"hidden": self.change(x), "mask": mask}


class Listed(nn.Module):
    """Blocks in a ModuleList, called by a loop that reads their output in its form."""

    def __init__(self, num, block=Residual, call=lambda block, x: block(x)):
        super().__init__()
        self.inner = nn.Linear(4, WIDTH)
        self.blocks = nn.ModuleList([block() for _ in range(num)])
        self.head = nn.Linear(WIDTH, 3)
        self.call = call

    def forward(self, x):
        h = self.inner(x)
        for block in self.blocks:
            h = self.call(block, h)
        return self.head(h)


def _of_tuple(block, x):
    y, mask, loss, nothing = block(x, torch.ones(2))
    assert mask is not None
    assert nothing is None
    return y + 1e-3 * loss


class Basic(nn.Module):
    """A residual block of a ResNet."""

    def __init__(self, channels_in, channels, stride=1):
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        changes = stride > 1 or channels_in != channels
        self.short = nn.Conv2d(channels_in, channels, 1, stride) if changes else nn.Identity()

    def forward(self, x):
        h = self.bn2(self.conv2(self.bn1(self.conv1(x)).relu()))
        return (h + self.short(x)).relu()


class ResNet(nn.Module):
    """A stage whose first block halves the image."""

    def __init__(self, num):
        super().__init__()
        blocks = [Basic(3, 6, 2), *(Basic(6, 6) for _ in range(num - 1))]
        self.stage, self.head = nn.Sequential(*blocks), nn.Linear(6, 3)

    def forward(self, x):
        return self.head(self.stage(x).mean((2, 3)))


class Encoder(nn.Module):
    """torch's own encoder; in evaluation it packs what is not padded into nested tensors."""

    def __init__(self, num):
        super().__init__()
        layer = nn.TransformerEncoderLayer(WIDTH, 2, 16, 0.1, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, num, enable_nested_tensor=True)
        for parameter in self.encoder.parameters():  # which are all copies of one layer's
            nn.init.normal_(parameter, std=0.3)
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, x):
        padding = torch.zeros(x.shape[:2], dtype=torch.bool)
        padding[0, 3:] = True
        return self.head(self.encoder(x, src_key_padding_mask=padding)[:, 0])


def _rows():
    return torch.randn(5, 4)


@dataclass(frozen=True, kw_only=True)
class Host:
    """A model with a stack.

    Attributes:
        make: Makes it with so many blocks.
        path: Where the stack is.
        make_input: Makes an input.
    """

    make: Callable[[int], nn.Module]
    path: str = "blocks"
    make_input: Callable[[], torch.Tensor] = _rows


HOSTS = {
    "list": Host(make=Listed),
    "sequential": Host(
        make=lambda num: nn.Sequential(
            nn.Linear(4, WIDTH), nn.Sequential(*(Residual() for _ in range(num)))
        ),
        path="1",
    ),
    "tuple": Host(make=lambda num: Listed(num, TupleBlock, _of_tuple)),
    "named_tuple": Host(
        make=lambda num: Listed(num, NamedBlock, lambda block, x: block(x, None).hidden)
    ),
    "dataclass": Host(
        make=lambda num: Listed(num, DataBlock, lambda block, x: block(hidden=x).hidden)
    ),
    "mapping": Host(
        make=lambda num: Listed(num, MappingBlock, lambda block, x: block(x)["hidden"])
    ),
    "resnet": Host(make=ResNet, path="stage", make_input=lambda: torch.randn(4, 3, 8, 8)),
    "encoder": Host(
        make=Encoder, path="encoder.layers", make_input=lambda: torch.randn(3, 5, WIDTH)
    ),
}
"""Add a row, and every promise is checked on it."""


def made(name, num=6):
    """Return a host, the same at every call, in training mode."""
    torch.manual_seed(0)
    return HOSTS[name].make(num).train()


def renamed(name, path, kept):
    """Return the name in the deep model of what has a name in one that is built with ``kept``."""
    if not name.startswith(f"{path}."):
        return name
    number, _, rest = name.removeprefix(f"{path}.").partition(".")
    return f"{path}.{kept[int(number)]}.{rest}"


def smaller(model, name, kept):
    """Return the host built with fewer blocks, with the weights of those that are kept."""
    host = HOSTS[name]
    built, state = host.make(len(kept)).train(), model.state_dict()
    own = {key: state[renamed(key, host.path, kept)] for key in built.state_dict()}
    built.load_state_dict(own)
    return built


def step(model, x):
    """Return output, gradients and buffers of a training step with a fixed random state."""
    torch.manual_seed(1)
    model.zero_grad()
    y = model(x)
    y.square().mean().backward()
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return {"output": y.detach()} | found | {n: b.clone() for n, b in model.named_buffers()}


def update(model, optimizer, x, y=None):
    """Make one update; return its loss."""
    loss = (model(x) - (0.0 if y is None else y)).square().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss
