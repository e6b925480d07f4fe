"""What ``esper grow`` trains in the journey: a small run that is held before some of its batches.

``ESPER_JOURNEY`` is a folder, and ``ESPER_JOURNEY_RUN`` the run's name. Before a batch that is in
``GATES`` a run leaves a file ``NAME-at-NUMBER`` there, and goes on when there is ``go-NUMBER``.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

import torch
from growing import GATE_X, GATE_Y, SHORT, host
from growing import task as samples

import esper
from esper.compiler.catalog import Catalog

START, DECIDES, OUTAGE, DONE, UPDATES = 0, 30, 80, 130, 140
GATES = (START, DECIDES, OUTAGE, DONE)
"""Batches: before the first, before it decides to grow, in its trial, and when that is decided."""
PATIENCE_S = 100.0


class Held:
    """Batches, some of which come when their gate is open."""

    def __init__(self, folder, name):
        self._folder, self._name = folder, name
        x, y = samples(32 * UPDATES)
        self._batches = list(zip(x.split(32), y.split(32), strict=True))

    def __len__(self):
        return len(self._batches)

    def __iter__(self):
        for number, batch in enumerate(self._batches):
            if number in GATES:
                self._wait_at(number)
            yield batch

    def _wait_at(self, number):
        (self._folder / f"{self._name}-at-{number}").touch()
        end_s = time.monotonic() + PATIENCE_S
        while not (self._folder / f"go-{number}").exists():
            assert time.monotonic() < end_s, f"gate {number} was never opened"
            time.sleep(0.01)


def growing_job(**options):
    """Return the job of a run that tries one package."""
    model = host()
    held = Held(Path(os.environ["ESPER_JOURNEY"]), os.environ["ESPER_JOURNEY_RUN"])
    return esper.GrowthJob(
        model=model,
        optimizer=torch.optim.AdamW(model.parameters(), lr=1e-2),
        train=held,
        gate=[(GATE_X, GATE_Y)],
        loss=lambda model, batch: (model(batch[0]) - batch[1]).square(),
        epochs=1,
        grower={
            **SHORT,
            "policy": esper.EveryN(DECIDES + 5),
            "budget": esper.Budget(packages=1),
            "horizon": None,
            **options,
        },
    )


def own_kernels():
    """A run that has the catalog of this version."""
    return growing_job()


def kernels_of_others():
    """A run that has none of its own: what grows in it is a registry's."""
    return growing_job(catalog=Catalog(entries=()))
