"""Small models that the tests of this room wrap."""

import torch
from torch import nn


def cnn():
    """Two convolutions, a batch norm and a linear head; (N, 1, 8, 8) to (N, 3)."""
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1, bias=False),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Conv2d(4, 4, 3, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Dropout(0.1),
        nn.Linear(16, 3),
    )


class Mlp(nn.Module):
    """Two linear layers and a dropout; (N, 6) to (N, 3)."""

    def __init__(self):
        super().__init__()
        self.fc1 = nn.Linear(6, 8)
        self.drop = nn.Dropout(0.2)
        self.fc2 = nn.Linear(8, 3)

    def forward(self, x):
        return self.fc2(self.drop(torch.relu(self.fc1(x))))


class Bottleneck(nn.Module):
    """A kernel by hand, (.., size) to (.., size), that contributes something."""

    def __init__(self, size, out=None):
        super().__init__()
        self.down = nn.Linear(size, 2)
        self.up = nn.Linear(2, out or size)

    def forward(self, x):
        return self.up(torch.tanh(self.down(x)))


class Block(nn.Module):
    """A residual block of linear layers, taken whole as one site."""

    def __init__(self, size):
        super().__init__()
        self.norm = nn.LayerNorm(size)
        self.fc = nn.Linear(size, size)

    def forward(self, x, scale=1.0):
        return x + scale * self.fc(self.norm(x))


class Stack(nn.Module):
    """Two blocks and a head; (N, 6) to (N, 2)."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([Block(6), Block(6)])
        self.head = nn.Linear(6, 2)

    def forward(self, x):
        for block in self.blocks:
            x = block(x, scale=0.5)
        return self.head(x)
