"""A small language model by stages of depth: a live run, and what longer ones came to.

The live run shows the mechanism. It is far too short to say whether depth pays, and claims nothing;
the recorded arms are those of ``make bench-growth``.
"""

from __future__ import annotations

import json
import sysconfig
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from esper.contracts.intervals import Interval
from esper.contracts.report import StageArm
from esper.growth.flops import update_flops
from esper.growth.grower import Grower
from esper.growth.staged import Staged
from esper.seeds.shallow import shallow

if TYPE_CHECKING:
    from collections.abc import Callable

BLOCKS: Final = 4
AT_FIRST: Final = 2
WIDTH: Final = 48
CONTEXT: Final = 48
BATCH: Final = 16
UPDATES: Final = 300
WAKES_AT: Final = 0.8
RATE: Final = 4e-3
RECORDED: Final = "recorded_stages.json"
_FILES: Final = 40
_HELD_OUT: Final = 64


class ByteModel(nn.Module):
    """Bytes to logits of the next byte, through blocks of attention and MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(256, WIDTH)
        self.position = nn.Embedding(CONTEXT, WIDTH)
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(
                WIDTH, 4, 4 * WIDTH, 0.0, "gelu", batch_first=True, norm_first=True
            )
            for _ in range(BLOCKS)
        )
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, 256)

    def forward(self, x_BL: Tensor) -> Tensor:
        """Return logits, shape (batch, length, 256), for bytes of shape (batch, length)."""
        length = x_BL.shape[1]
        mask_LL = nn.Transformer.generate_square_subsequent_mask(length)
        h_BLD = self.embedding(x_BL) + self.position.weight[:length]
        for block in self.blocks:
            h_BLD = block(h_BLD, src_mask=mask_LL, is_causal=True)
        logits: Tensor = self.head(self.norm(h_BLD))
        return logits


def compute_loss(model: nn.Module, x_BL: Tensor) -> Tensor:
    """Return the mean cross entropy of each next byte, in nats."""
    logits_BLV = model(x_BL[:, :-1])
    return F.cross_entropy(logits_BLV.flatten(0, 1), x_BL[:, 1:].flatten())


def live_stages(random_seed: int, tell: Callable[[], None]) -> tuple[StageArm, ...]:
    """Train a model by stages, its shallow form for as much work, and the whole from the start.

    Args:
        random_seed: Starts weights and batches.
        tell: Called now and then; may raise.
    """
    text = _text()
    grown, work = _arm(text, random_seed, tell, depth=AT_FIRST, staged=True)
    small, small_work = _arm(text, random_seed, tell, depth=AT_FIRST, work=work)
    scratch, scratch_work = _arm(text, random_seed, tell, depth=BLOCKS)
    return (
        StageArm(name=f"{AT_FIRST} blocks, {BLOCKS} awake from 80 %", loss=grown, flops=work),
        StageArm(name=f"{AT_FIRST} blocks, as much work", loss=small, flops=small_work),
        StageArm(name=f"{BLOCKS} blocks from the start", loss=scratch, flops=scratch_work),
    )


def recorded_stages() -> tuple[StageArm, ...]:
    """Return the arms that ``make bench-growth`` has run, from the file that it writes."""
    text = files("esper.services").joinpath(RECORDED).read_text(encoding="utf-8")
    return tuple(
        StageArm(
            name=arm["name"],
            loss=arm["loss"],
            flops=arm["flops"],
            saved_at_equal_loss=Interval(**arm["saved"]),
            recorded=True,
        )
        for arm in json.loads(text)
    )


def _arm(
    text: Tensor,
    random_seed: int,
    tell: Callable[[], None],
    *,
    depth: int,
    staged: bool = False,
    work: float | None = None,
) -> tuple[float, float]:
    """Train one arm; return its held-out loss and its FLOPs.

    ``work`` says for how many FLOPs it is trained, where that is not as many updates as usual.
    """
    torch.manual_seed(random_seed)
    model = ByteModel()
    if depth < BLOCKS:
        shallow(model, "blocks", depth=depth)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE)
    draws = torch.Generator().manual_seed(random_seed)
    train = text[: -_HELD_OUT * (CONTEXT + 1)]
    each = update_flops(model, compute_loss, _batch(train, draws))
    updates = UPDATES if work is None else round(work / each)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda done: min(1.0, (updates - done) / (0.2 * updates))
    )
    grower = None
    if staged:
        policy = Staged({WAKES_AT: BLOCKS})
        grower = Grower(model, optimizer, horizon=updates, policy=policy)
    flops = 0.0
    for update in range(updates):
        batch = _batch(train, draws)
        loss = compute_loss(model, batch)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call] # torch leaves it untyped
        optimizer.step()
        schedule.step()
        if grower is not None:
            grower.step(loss)
            if update == round(WAKES_AT * updates) + 1:
                each = update_flops(model, compute_loss, batch)
        flops += each
        if update % 20 == 0:
            tell()
    if grower is not None:
        grower.close()
    held_out = text[-_HELD_OUT * (CONTEXT + 1) :].view(_HELD_OUT, CONTEXT + 1)
    with torch.no_grad():
        return float(compute_loss(model.train(), held_out)), flops


def _batch(train: Tensor, draws: torch.Generator) -> Tensor:
    starts_B = torch.randint(len(train) - CONTEXT, (BATCH,), generator=draws)
    return torch.stack([train[start : start + CONTEXT + 1] for start in starts_B.tolist()])


def _text() -> Tensor:
    """Return some of the standard library's own sources, as bytes."""
    root = Path(sysconfig.get_path("stdlib"))
    data = b"".join(path.read_bytes() for path in sorted(root.glob("*.py"))[:_FILES])
    return torch.frombuffer(bytearray(data), dtype=torch.uint8).long()
