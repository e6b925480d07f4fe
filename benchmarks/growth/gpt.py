"""A GPT-2 that reads bytes, on a GPU where there is one, in bfloat16.

It is the class of transformers, with all of its blocks; the task says how many sleep at first.
"""

import functools
import importlib.util
from collections.abc import Mapping
from typing import Any

import byte_model
import torch
from byte_text import Batches, load_text, windows
from torch import Tensor, nn

Settings = Mapping[str, Any]
PATH = "gpt.transformer.h"
"""Where the blocks are."""


class ByteGpt(nn.Module):
    """GPT-2 over bytes, which gives logits alone.

    Args:
        num_blocks: How many blocks.
        width: Features; a head has 64 of them, or all where there are fewer.
        context: Positions.
    """

    def __init__(self, *, num_blocks: int, width: int, context: int) -> None:
        super().__init__()
        from transformers import GPT2Config, GPT2LMHeadModel  # an extra, and slow to import

        self.gpt = GPT2LMHeadModel(
            GPT2Config(
                vocab_size=256,
                n_positions=context,
                n_embd=width,
                n_layer=num_blocks,
                n_head=max(1, width // 64),
                resid_pdrop=0.0,
                embd_pdrop=0.0,
                attn_pdrop=0.0,
                bos_token_id=0,
                eos_token_id=0,
                use_cache=False,
            )
        )

    def forward(self, bytes_BL: Tensor) -> Tensor:
        """Return logits, shape (batch, length, 256)."""
        return self.gpt(input_ids=bytes_BL).logits


def device() -> torch.device:
    """Return where it is trained."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def no_gpu() -> str | None:
    """Say why it is not run here, or nothing."""
    if not torch.cuda.is_available():
        return "there is no CUDA device on this machine"
    if importlib.util.find_spec("transformers") is None:
        return "transformers is not installed (the extra hf has it)"
    return None


def build(settings: Settings, num_blocks: int) -> nn.Module:
    """Build it with the global generator, on the CPU, and put it where it is trained."""
    width, context = settings["width"], settings["context"]
    return ByteGpt(num_blocks=num_blocks, width=width, context=context).to(device())


def feed(settings: Settings, random_seed: int) -> Batches:
    """Return the batches of a random seed."""
    return Batches(load_text().train, random_seed, settings["batch"], settings["context"])


def compute_loss(model: nn.Module, batch: Tensor) -> Tensor:
    """Return the mean cross entropy in nats a byte, computed in bfloat16 where torch does so."""
    where = device()
    with torch.autocast(where.type, torch.bfloat16):
        return byte_model.compute_loss(model, batch.to(where))


def loss_on(part: str, settings: Settings) -> Any:
    """Return how the loss of the gate or the test split is read."""
    num = 256 if part == "gate" else settings["test_windows"]
    return functools.partial(_loss, windows(getattr(load_text(), part), num, settings["context"]))


@torch.no_grad()
def _loss(sequences_NL: Tensor, model: nn.Module) -> float:
    was_training = model.training
    model.eval()
    parts = sequences_NL.split(64)
    losses = [float(compute_loss(model, part)) * len(part) for part in parts]
    model.train(was_training)
    return sum(losses) / len(sequences_NL)
