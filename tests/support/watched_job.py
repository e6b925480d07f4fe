"""A job whose weights tell whether anybody else drew from a random generator of the process."""

from __future__ import annotations

import random

import torch
from growing import GATE_X, GATE_Y, SHORT, X, Y, host

from esper import Budget, EveryN, GrowthJob


class Jittered:
    """Batches that are moved a little by Python's own generator, as augmentations do."""

    def __iter__(self):
        for _ in range(5):
            for x, y in zip(X.split(32), Y.split(32), strict=True):
                yield x + 0.01 * random.random(), y


def job(sink=None):
    torch.manual_seed(0)
    model = host(dropout=0.1)
    return GrowthJob(
        model=model,
        optimizer=torch.optim.AdamW(model.parameters(), lr=1e-2),
        train=Jittered(),
        gate=[(GATE_X, GATE_Y)],
        loss=lambda model, batch: (model(batch[0]) - batch[1]).square(),
        metrics=lambda model, batch: {"mae": (model(batch[0]) - batch[1]).abs()},
        epochs=1,
        grower={
            **SHORT,
            "policy": EveryN(60),
            "budget": Budget(packages=1),
            "horizon": None,
            "sink": sink,
        },
    )
