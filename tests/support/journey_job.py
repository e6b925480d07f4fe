"""What ``esper grow`` trains in the journey: a small run that is held before some of its batches.

``ESPER_JOURNEY`` is a folder, and ``ESPER_JOURNEY_RUN`` the run's name. At a gate a run leaves a
file ``NAME-at-GATE`` there, and goes on when there is ``go-GATE``. At one it trains meanwhile.
"""

from __future__ import annotations

import itertools
import os
import time
from pathlib import Path

import torch
from growing import GATE_X, GATE_Y, SHORT, host
from growing import task as samples

import esper
from esper.compiler.catalog import Catalog

START, DECIDES, OUTAGE, DONE = GATES = ("start", "decides", "outage", "done")
"""Before the first batch; before it decides to grow; in its trial; when that is decided."""
BATCHES = {START: 30, DECIDES: 50, OUTAGE: 50, DONE: 10}
"""Behind each gate."""
PATIENCE_S = 100.0
BATCH_S = 0.01
"""How long a batch takes that comes while a gate is closed."""


class Gates:
    """What a run waits for.

    Args:
        folder: Of the journey.
        name: The run's.
    """

    def __init__(self, folder, name):
        self._folder, self._name = folder, name

    def is_open(self, gate):
        return (self._folder / f"go-{gate}").exists()

    def passes(self, gate):
        """Yield once for each look at a gate that is closed."""
        (self._folder / f"{self._name}-at-{gate}").touch()
        end_s = time.monotonic() + PATIENCE_S
        while not self.is_open(gate):
            assert time.monotonic() < end_s, f"the gate {gate!r} was never opened"
            time.sleep(BATCH_S)
            yield


class Held:
    """Batches, some of which come when their gate is open; before DECIDES others come meanwhile."""

    def __init__(self, gates):
        self._gates = gates
        x, y = samples(32 * 20)
        self._batches = list(zip(x.split(32), y.split(32), strict=True))

    def __iter__(self):
        batches = itertools.cycle(self._batches)
        for gate, num_batches in BATCHES.items():
            for _ in self._gates.passes(gate):
                if gate == DECIDES:
                    yield next(batches)
            yield from itertools.islice(batches, num_batches)


class WhenOpened(esper.Policy):
    """Grows once the gate DECIDES is open."""

    def __init__(self, gates):
        self._gates = gates

    def decide(self, reading):
        is_open = self._gates.is_open(DECIDES)
        verdict, reason = ("scheduled", "it is open") if is_open else ("waiting", "it is closed")
        return esper.Decision(grow=is_open, verdict=verdict, reason=f"of the gate: {reason}")


def growing_job(**options):
    """Return the job of a run that tries one package."""
    model = host()
    gates = Gates(Path(os.environ["ESPER_JOURNEY"]), os.environ["ESPER_JOURNEY_RUN"])
    return esper.GrowthJob(
        model=model,
        optimizer=torch.optim.AdamW(model.parameters(), lr=1e-2),
        train=Held(gates),
        gate=[(GATE_X, GATE_Y)],
        loss=lambda model, batch: (model(batch[0]) - batch[1]).square(),
        epochs=1,
        grower={
            **SHORT,
            "policy": WhenOpened(gates),
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
