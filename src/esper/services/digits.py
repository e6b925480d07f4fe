"""The demo's data and its host: scikit-learn's digits and a small convolutional network.

Both were fixed before the first growth run and are the same for every arm.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import torch
from torch import nn

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

NUM_TRAIN: Final = 640
NUM_GATE: Final = 500
BATCH_SIZE: Final = 32
UPDATES_PER_EPOCH: Final = NUM_TRAIN // BATCH_SIZE
SPLIT_RANDOM_SEED: Final = 0
LEARNING_RATE: Final = 5e-3
"""Of AdamW, constant: the host's best on the gate split among 3e-3, 5e-3, 1e-2 and 2e-2."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Split:
    """One part of a data set.

    Attributes:
        x_N1HW: Images, float32, shape (samples, 1, 8, 8), values in [0, 1].
        y_N: Labels, int64, shape (samples,), values 0 to 9.
    """

    x_N1HW: Tensor
    y_N: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Digits:
    """The three splits: 640 images to train on, 500 for the gates, the other 657 to test.

    Attributes:
        train: For training, and for ranking.
        gate: Held out, for the gates.
        test: Read once, at the end.
    """

    train: Split
    gate: Split
    test: Split


def load_digits() -> Digits:
    """Load the digits that scikit-learn ships and split them, the same way every time.

    Raises:
        ModuleNotFoundError: scikit-learn is not installed (extra ``demo``).
    """
    from sklearn.datasets import load_digits as sklearn_digits

    raw = sklearn_digits()
    x_N1HW = torch.tensor(raw.images, dtype=torch.float32).unsqueeze(1) / 16.0
    y_N = torch.tensor(raw.target, dtype=torch.int64)
    order = torch.randperm(len(y_N), generator=torch.Generator().manual_seed(SPLIT_RANDOM_SEED))
    parts = order.tensor_split([NUM_TRAIN, NUM_TRAIN + NUM_GATE])
    train, gate, test = (Split(x_N1HW=x_N1HW[part], y_N=y_N[part]) for part in parts)
    return Digits(train=train, gate=gate, test=test)


def demo_host(random_seed: int) -> nn.Sequential:
    """Build the host: two 3x3 convolutions of four channels and a linear readout.

    Args:
        random_seed: Starts the generator of the initial weights; the global one is left alone.

    Returns:
        A network of 358 parameters: (N, 1, 8, 8) images to (N, 10) logits.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(random_seed)
        return nn.Sequential(
            nn.Conv2d(1, 4, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(4, 4, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(16, 10),
        )


def batches(split: Split, random_seed: int, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield one epoch of shuffled batches; the order depends on the two numbers only."""
    generator = torch.Generator().manual_seed(random_seed * 100_003 + epoch)
    order = torch.randperm(len(split.y_N), generator=generator)
    for part in torch.split(order, BATCH_SIZE):
        if len(part) == BATCH_SIZE:
            yield split.x_N1HW[part], split.y_N[part]
