"""Runs that are killed, and started again from their last checkpoint.

As a program it serves ``[kind, folder, start, kill, without]``; a kill is None, or an update, a
function, and how many calls from its first one on are let pass.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
from contextlib import suppress
from pathlib import Path

import crafted_measures
import numpy as np
import torch
from crafted_measures import Course, Measure
from fork_server import serve
from growing import compute_loss, host
from sleepers import HOSTS, made
from torch.optim.lr_scheduler import OneCycleLR
from torch.optim.swa_utils import AveragedModel

import esper
import esper.growth.sizing
from esper.continuity.checkpoint import read_checkpoint

UPDATES = 44
SAVE_EVERY = 2
START = 4
"""Updates after which a run decides to grow, where it is not said otherwise."""
NEVER = 10**9
RECORDED = 4
TRIED = 10
"""Updates that a recording takes, and a trial or an audition behind it."""
_CHECKPOINT, _END = "run.esper", "end.pt"


class Once(esper.Policy):
    """Grows at one update, and where what it began was cut off, no more."""

    def __init__(self, update):
        self.update, self.is_done = update, False

    def decide(self, reading):
        grow = not self.is_done and reading.update >= self.update
        return esper.Decision(grow=grow, verdict="scheduled", reason="once")

    def germinated(self, update, choice):
        self.is_done = True

    def state_dict(self):
        return {"is_done": self.is_done}

    def load_state_dict(self, state):
        self.is_done = state["is_done"]


class Growing:
    """A run with all that can be saved: kernels are tried in twins, or in shadow."""

    def __init__(self, start, **settings):
        seed_all(0)
        self.model = esper.wrap(host(dropout=0.3))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3)
        scheduler = OneCycleLR(self.optimizer, max_lr=1e-2, total_steps=100)
        scaler = torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=7)
        ema = esper.follow(self.model, AveragedModel(self.model))
        measure = Measure(lambda on: 5.0 - sum(kind == "real" for kind in on.values()))
        course = Course(
            self.model,
            self.optimizer,
            measure=measure,
            sites=("0", "4"),
            policy=Once(start),
            warmup_updates=30,
            **{"hold_updates": 8, **settings},
        )
        self.grower = course.grower
        self.parts = {"scheduler": scheduler, "scaler": scaler, "ema": ema, "grower": self.grower}

    def update(self):
        """Make one update on a batch that is drawn from all three generators."""
        numbers = [random.randrange(900), *np.random.randint(900, size=15)]
        batch = torch.cat([torch.tensor(numbers), torch.randint(900, (16,))])
        scaler = self.parts["scaler"]
        loss = compute_loss(self.model, batch)
        self.optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(self.optimizer)
        scaler.update()
        self.parts["scheduler"].step()
        self.parts["ema"].update_parameters(self.model)
        self.grower.step(loss.detach(), batch=batch)


class Waking:
    """A run of planned depth: of six blocks four sleep, and wake from update 10 and 30 on."""

    def __init__(self, _start):
        seed_all(1)
        self.model = esper.shallow(made("list"), HOSTS["list"].path, depth=2)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3)
        policy = esper.Staged({0.25: 4, 0.7: 6}, ramp=0.5)
        self.grower = esper.Grower(self.model, self.optimizer, horizon=UPDATES, policy=policy)
        self.parts = {"grower": self.grower}

    def update(self):
        """Make one update on drawn data."""
        x = torch.randn(16, 4)
        loss = (self.model(x) - x[:, :3]).square().mean()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.grower.step(loss.detach())


RUNS = {
    "twin": Growing,
    "shadow": lambda start: Growing(start, trial="shadow", audition_updates=TRIED, ramp_updates=4),
    "depth": Waking,
}


def seed_all(number):
    random.seed(number)
    np.random.seed(number)
    torch.manual_seed(number)


class Killer:
    """Ends its process with SIGKILL at the n-th call, of Python or of C.

    Args:
        name: Of the function from whose first call on it counts; None counts from now on.
        number: How many calls it lets pass.
    """

    def __init__(self, name, number):
        self._name, self._left = name, number

    def __call__(self, frame, event, _):
        if self._name is not None:
            if frame.f_code.co_name != self._name:
                return
            self._name = None
        if event in ("call", "c_call"):
            if not self._left:
                os.kill(os.getpid(), signal.SIGKILL)
            self._left -= 1


class _Without:
    """A Grower that is not told how far first steps are: the control."""

    __qualname__ = "Grower"  # what a checkpoint knows it by

    def __init__(self, grower):
        self.state_dict, self._load = grower.state_dict, grower.load_state_dict

    def load_state_dict(self, state):
        self._load({**state, "warmup": {}})


def live(kind, folder, start, kill, without):
    """Begin a run or go on with it, to the end or until it is killed."""
    run, path = RUNS[kind](start), Path(folder) / _CHECKPOINT
    if path.exists():
        grower = _Without(run.grower) if without == "warm-up" else run.grower
        esper.load_checkpoint(path, run.model, run.optimizer, **{**run.parts, "grower": grower})
    if without == "draws":
        seed_all(2)
    while run.grower.updates < UPDATES:
        if kill and kill[0] == run.grower.updates + 1:
            sys.setprofile(Killer(*kill[1:]))
        run.update()
        if run.grower.updates % SAVE_EVERY == 0:
            extra = {"update": run.grower.updates}
            esper.save_checkpoint(path, run.model, run.optimizer, **run.parts, extra=extra)
    torch.save(pictured(run), path.parent / _END)


def pictured(run):
    """Return weights, moments, averages, rates, scale, draws and report, as plain values."""
    optimizer = run.optimizer.state_dict()
    return {
        "model": run.model.state_dict(),
        "moments": optimizer["state"],
        "groups": optimizer["param_groups"],
        **{n: p.state_dict() for n, p in run.parts.items() if n != "grower"},
        "draws": [torch.get_rng_state(), repr(random.getstate()), repr(np.random.get_state())],
        "report": told(run.grower),
    }


def told(grower):
    """Return a report without its name and what a clock read."""
    report = json.loads(grower.report().to_json())
    del report["run_id"], report["seconds"]
    for trial in report["trials"]:
        del trial["seconds"]
    return report


def saved_at(folder):
    """Return the update of the checkpoint in a folder, which is whole; 0 where there is none."""
    with suppress(FileNotFoundError):
        return read_checkpoint(folder / _CHECKPOINT)["extra"]["update"]
    return 0


def end_of(folder):
    """Return how a run ended."""
    return torch.load(folder / _END, weights_only=True)


def begin():
    """Load at once what is loaded at its first use, and serve."""
    torch.set_num_threads(1)
    esper.growth.sizing.MIN_TRIAL = crafted_measures.TRIAL_UPDATES
    warm = RUNS["twin"](START)
    while warm.grower.updates < START + RECORDED + TRIED + 1:
        warm.update()
    serve(live)


if __name__ == "__main__":
    begin()
