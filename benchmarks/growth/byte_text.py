"""The text of the byte models: the standard library's own sources, split by files.

What is installed decides what is in it, so a digest of it stands beside every figure, and arms are
compared only where it is the same.
"""

import functools
import hashlib
import sysconfig
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from byte_model import compute_loss
from torch import Tensor, nn

_LEAST_BYTES = 2_000
_LEFT_OUT = ("site-packages", "__pycache__", "lib2to3", "idlelib", "encodings", "test")


@dataclass(frozen=True, slots=True, kw_only=True)
class Text:
    """Three parts of the text, by files.

    Attributes:
        train: Bytes to train on, int64, shape (n,).
        gate: Held out, for a controller's eyes.
        test: Read at the end.
        digest: First eight digits of the sha256 of all of it.
    """

    train: Tensor
    gate: Tensor
    test: Tensor
    digest: str


@functools.cache
def load_text() -> Text:
    """Read the sources: of ten files eight train, one is the gate's, one the test's."""
    root = Path(sysconfig.get_path("stdlib"))
    files = [p for p in sorted(root.rglob("*.py")) if _is_taken(p.relative_to(root))]
    contents = [data for p in files if len(data := p.read_bytes()) >= _LEAST_BYTES]
    parts: dict[str, list[bytes]] = {"train": [], "gate": [], "test": []}
    for number, data in enumerate(contents):
        parts[{8: "gate", 9: "test"}.get(number % 10, "train")].append(data)
    tensors = {
        name: torch.from_numpy(np.frombuffer(b"".join(files), dtype=np.uint8).astype(np.int64))
        for name, files in parts.items()
    }
    digest = hashlib.sha256(b"".join(contents)).hexdigest()[:8]
    return Text(**tensors, digest=digest)


def _is_taken(path: Path) -> bool:
    return not any(part in _LEFT_OUT for part in path.parts)


class Batches:
    """Sequences at random places; the same for every arm of a random seed.

    Args:
        text: Bytes, shape (n,).
        random_seed: Of the places.
        batch_size: Sequences of a batch.
        context: Positions of a sequence; one byte more is taken, to be predicted.
    """

    def __init__(self, text: Tensor, random_seed: int, batch_size: int, context: int) -> None:
        self._text, self._batch_size, self._length = text, batch_size, context + 1
        self._random_seed = random_seed

    def of_update(self, update: int) -> Tensor:
        """Return the batch of an update, from 0, shape (batch, context + 1)."""
        generator = torch.Generator().manual_seed(self._random_seed * 1_000_003 + update)
        highest = len(self._text) - self._length
        starts_B = torch.randint(highest, (self._batch_size,), generator=generator)
        return self._text[starts_B[:, None] + torch.arange(self._length)]


def windows(text: Tensor, num: int, context: int) -> Tensor:
    """Return sequences that lie evenly over a text, shape (num, context + 1)."""
    starts_N = torch.linspace(0, len(text) - context - 2, num).long()
    return text[starts_N[:, None] + torch.arange(context + 1)]


@torch.no_grad()
def loss_on(model: nn.Module, sequences_NL: Tensor) -> float:
    """Return nats a byte over sequences, in evaluation mode; the mode is put back."""
    was_training = model.training
    model.eval()
    parts = [compute_loss(model, part) for part in sequences_NL.split(64)]
    sizes = torch.tensor([len(part) for part in sequences_NL.split(64)], dtype=torch.float64)
    model.train(was_training)
    return float((torch.stack(parts).double() * sizes).sum() / sizes.sum())


def sample_losses(sequences_NL: Tensor) -> Callable[[nn.Module], Tensor]:
    """Return the measure of a split: nats a byte of each sequence, shape (N,)."""

    def evaluate(model: nn.Module) -> Tensor:
        found = []
        for part in sequences_NL.split(64):
            logits_BCL = model(part[:, :-1]).transpose(1, 2)
            found.append(nn.functional.cross_entropy(logits_BCL, part[:, 1:], reduction="none"))
        return torch.cat(found).mean(1)

    return evaluate
