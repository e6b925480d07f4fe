"""What is trained by stages: a byte model, a vision transformer, a residual network and GPT-2.

Each is a class of its own with a stack of blocks of one shape, in ``blocks`` but for GPT-2.
"""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import byte_model
import gpt
import torch
import torch.nn.functional as F
from byte_text import Batches, load_text, loss_on, windows
from images import Images, digits_splits, fashion_splits
from torch import Tensor, nn

Settings = Mapping[str, Any]
Measure = Callable[[nn.Module], float]
MLP_RATIO = 4
"""Units of a byte model's MLP for each feature, where the settings name no ``mlp_ratio``."""


class Feed(Protocol):
    """Batches by the number of an update."""

    def of_update(self, update: int) -> Any:
        """Return the batch of an update, from 0; the same for every arm."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Learner:
    """A model with its data.

    Attributes:
        build: Of the settings and a number of blocks, with the global generator.
        feed: Of the settings and a random seed, the batches.
        compute_loss: Model and batch to the loss.
        gate: Of the settings, the loss on held-out data, for curves.
        test: Of the settings, the loss that is told.
        digest: What tells the data apart where it depends on the machine.
    """

    build: Callable[[Settings, int], nn.Module]
    feed: Callable[[Settings, int], Feed]
    compute_loss: Callable[[nn.Module, Any], Tensor]
    gate: Callable[[Settings], Measure]
    test: Callable[[Settings], Measure]
    digest: Callable[[], str] = lambda: ""


def _bytes(settings: Settings, num_blocks: int) -> nn.Module:
    width = settings["width"]
    hidden = settings.get("mlp_ratio", MLP_RATIO) * width
    shape = byte_model.Shape(
        num_blocks=num_blocks, width=width, hidden=hidden, context=settings["context"]
    )
    return byte_model.ByteModel(shape)


def _feed_of_bytes(settings: Settings, random_seed: int) -> Feed:
    return Batches(load_text().train, random_seed, settings["batch"], settings["context"])


def _bytes_on(part: str, settings: Settings) -> Measure:
    text = load_text()
    num = 256 if part == "gate" else settings["test_windows"]
    sequences = windows(getattr(text, part), num, settings["context"])
    return lambda model: loss_on(model, sequences)


class VisionTransformer(nn.Module):
    """Images in patches, blocks of attention and MLP, and the mean of all positions."""

    def __init__(self, *, num_blocks: int, width: int, size: int, patch: int) -> None:
        super().__init__()
        num_patches = (size // patch) ** 2
        shape = byte_model.Shape(
            num_blocks=num_blocks, width=width, hidden=2 * width, context=num_patches
        )
        self.patches = nn.Conv2d(1, width, patch, stride=patch)
        self.positions = nn.Parameter(0.02 * torch.randn(num_patches, width))
        self.blocks = nn.ModuleList(byte_model.Block(shape) for _ in range(num_blocks))
        for block in self.blocks:
            block.attention.mask_LL.zero_()  # every position sees all others
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 10)

    def forward(self, x_N1HW: Tensor) -> Tensor:
        """Return logits, shape (N, 10)."""
        x_NPD = self.patches(x_N1HW).flatten(2).transpose(1, 2) + self.positions
        for block in self.blocks:
            x_NPD = block(x_NPD)
        return self.head(self.norm(x_NPD).mean(1))


class ResidualBlock(nn.Module):
    """Two convolutions with batch norm beside the stream."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(width)

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """Add what the convolutions find, and cut below 0."""
        h_NCHW = self.norm1(self.conv1(x_NCHW)).relu()
        return (x_NCHW + self.norm2(self.conv2(h_NCHW))).relu()


class ResidualNetwork(nn.Module):
    """A convolution, residual blocks of one width, and the mean of all positions."""

    def __init__(self, *, num_blocks: int, width: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, width, 3, stride=2, padding=1)
        self.blocks = nn.Sequential(*(ResidualBlock(width) for _ in range(num_blocks)))
        self.head = nn.Linear(width, 10)

    def forward(self, x_N1HW: Tensor) -> Tensor:
        """Return logits, shape (N, 10)."""
        return self.head(self.blocks(self.stem(x_N1HW).relu()).mean((2, 3)))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Rows:
    """Images at random places."""

    split: Images
    random_seed: int
    batch: int

    def of_update(self, update: int) -> tuple[Tensor, Tensor]:
        """Return the batch of an update."""
        generator = torch.Generator().manual_seed(self.random_seed * 1_000_003 + update)
        rows = torch.randint(len(self.split.y), (self.batch,), generator=generator)
        return self.split.x[rows], self.split.y[rows]


@functools.cache
def _splits(name: str, sizes: tuple[int, int, int]) -> Any:
    if name == "digits":
        return digits_splits({})
    names = ("train_images", "gate_images", "test_images")
    return fashion_splits(dict(zip(names, sizes, strict=True)))


def _images(settings: Settings) -> Any:
    return _splits(settings["data"], tuple(settings["images"]))


def _feed_of_images(settings: Settings, random_seed: int) -> Feed:
    return _Rows(split=_images(settings).train, random_seed=random_seed, batch=settings["batch"])


def _images_on(part: str, settings: Settings) -> Measure:
    split = getattr(_images(settings), part)

    def measure(model: nn.Module) -> float:
        was_training = model.training
        model.eval()
        with torch.no_grad():
            loss = float(F.cross_entropy(model(split.x), split.y))
        model.train(was_training)
        return loss

    return measure


def _on_images(build: Callable[[Settings, int], nn.Module]) -> Learner:
    return Learner(
        build=build,
        feed=_feed_of_images,
        compute_loss=lambda model, batch: F.cross_entropy(model(batch[0]), batch[1]),
        gate=functools.partial(_images_on, "gate"),
        test=functools.partial(_images_on, "test"),
    )


def _transformer(settings: Settings, num_blocks: int) -> nn.Module:
    return VisionTransformer(
        num_blocks=num_blocks,
        width=settings["width"],
        size=settings["size"],
        patch=settings["patch"],
    )


def _residual(settings: Settings, num_blocks: int) -> nn.Module:
    return ResidualNetwork(num_blocks=num_blocks, width=settings["width"])


LEARNERS: Mapping[str, Learner] = {
    "bytes": Learner(
        build=_bytes,
        feed=_feed_of_bytes,
        compute_loss=byte_model.compute_loss,
        gate=functools.partial(_bytes_on, "gate"),
        test=functools.partial(_bytes_on, "test"),
        digest=lambda: load_text().digest,
    ),
    "vision transformer": _on_images(_transformer),
    "residual network": _on_images(_residual),
    "GPT-2": Learner(
        build=gpt.build,
        feed=gpt.feed,
        compute_loss=gpt.compute_loss,
        gate=functools.partial(gpt.loss_on, "gate"),
        test=functools.partial(gpt.loss_on, "test"),
        digest=lambda: load_text().digest,
    ),
}


def learner_of(settings: Settings) -> Learner:
    """Return what some settings train; the byte model where they name nothing."""
    return LEARNERS[settings.get("model", "bytes")]
