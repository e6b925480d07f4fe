"""A small transformer that predicts the next byte: what the arms of depth and width train."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

NUM_BYTES = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """The shape of a model.

    Attributes:
        num_blocks: Blocks of attention and MLP.
        width: Features of a position; a multiple of ``num_heads``.
        num_heads: Heads of each attention.
        hidden: Units of each MLP.
        context: Positions that a model looks at, at most.
    """

    num_blocks: int
    width: int = 64
    num_heads: int = 4
    hidden: int = 256
    context: int = 64


class Attention(nn.Module):
    """Causal attention of several heads, as products of matrices, which FLOP counters know."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.num_heads = shape.num_heads
        self.qkv = nn.Linear(shape.width, 3 * shape.width)
        self.out = nn.Linear(shape.width, shape.width)
        mask_LL = torch.full((shape.context, shape.context), -math.inf).triu(1)
        self.register_buffer("mask_LL", mask_LL, persistent=False)

    def forward(self, x_BLD: Tensor) -> Tensor:
        """Mix each position with those before it."""
        num, length, width = x_BLD.shape
        qkv = self.qkv(x_BLD).view(num, length, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        q_BHLd, k_BHLd, v_BHLd = qkv.unbind(0)
        scores_BHLL = (q_BHLd * q_BHLd.shape[-1] ** -0.5) @ k_BHLd.transpose(-2, -1)
        weights_BHLL = (scores_BHLL + self.mask_LL[:length, :length]).softmax(-1)
        mixed_BLD = (weights_BHLL @ v_BHLd).transpose(1, 2).reshape(num, length, width)
        return self.out(mixed_BLD)


class Mlp(nn.Module):
    """Two linear layers around a GELU."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.up = nn.Linear(shape.width, shape.hidden)
        self.act = nn.GELU()
        self.down = nn.Linear(shape.hidden, shape.width)

    def forward(self, x_BLD: Tensor) -> Tensor:
        """Transform each position."""
        return self.down(self.act(self.up(x_BLD)))


class Block(nn.Module):
    """Attention, then an MLP, each behind a norm and beside the stream."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.norm_attention = nn.LayerNorm(shape.width)
        self.attention = Attention(shape)
        self.norm_mlp = nn.LayerNorm(shape.width)
        self.mlp = Mlp(shape)

    def forward(self, x_BLD: Tensor) -> Tensor:
        """Add what attention and MLP find."""
        x_BLD = x_BLD + self.attention(self.norm_attention(x_BLD))
        return x_BLD + self.mlp(self.norm_mlp(x_BLD))


class ByteModel(nn.Module):
    """Bytes to logits of the next byte.

    Args:
        shape: Its shape.
    """

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.bytes = nn.Embedding(NUM_BYTES, shape.width)
        self.positions = nn.Embedding(shape.context, shape.width)
        self.blocks = nn.ModuleList(Block(shape) for _ in range(shape.num_blocks))
        self.norm = nn.LayerNorm(shape.width)
        self.head = nn.Linear(shape.width, NUM_BYTES)
        self.apply(_initialize)
        for block in self.blocks:  # what every block adds stays of one size in deeper models too
            for last in (block.attention.out, block.mlp.down):
                nn.init.normal_(last.weight, std=0.02 / math.sqrt(2 * shape.num_blocks))

    def forward(self, bytes_BL: Tensor) -> Tensor:
        """Return logits, shape (batch, length, 256)."""
        positions_L = torch.arange(bytes_BL.shape[1], device=bytes_BL.device)
        x_BLD = self.bytes(bytes_BL) + self.positions(positions_L)
        for block in self.blocks:
            x_BLD = block(x_BLD)
        return self.head(self.norm(x_BLD))


def _initialize(module: nn.Module) -> None:
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)
    if isinstance(module, nn.Linear):
        nn.init.zeros_(module.bias)


def build(shape: Shape, random_seed: int) -> ByteModel:
    """Build a model from a random seed; the global generator is left alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(random_seed)
        return ByteModel(shape)


def compute_loss(model: nn.Module, batch: Tensor) -> Tensor:
    """Return the mean cross entropy in nats a byte of a batch of sequences, shape (B, L + 1)."""
    logits_BLC = model(batch[:, :-1])
    return F.cross_entropy(logits_BLC.flatten(0, 1), batch[:, 1:].flatten())
