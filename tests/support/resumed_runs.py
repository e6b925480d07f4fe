"""Runs that are cut in the middle: built anew, they must go on as if nobody had stopped them.

As a program it loads checkpoints in a process of its own: ``resumed_runs.py FOLDER NAME...``.
"""

from __future__ import annotations

import random
import sys
from pathlib import Path

import numpy as np
import torch
from kernel_blueprints import linear_blueprint
from torch import nn
from torch.optim.lr_scheduler import OneCycleLR
from torch.optim.swa_utils import AveragedModel

import esper

UPDATES = 20
WIDTH = 8


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.dropout = nn.Dropout(0.2)

    def forward(self, x):
        return x + self.dropout(torch.tanh(self.linear(x)))


def mlp():
    return nn.Sequential(
        nn.Linear(6, WIDTH),
        nn.BatchNorm1d(WIDTH),
        nn.ReLU(),
        nn.Dropout(0.3),
        nn.Linear(WIDTH, WIDTH),
        nn.ReLU(),
        nn.Linear(WIDTH, 3),
    )


def adamw(model):
    return torch.optim.AdamW(model.parameters(), lr=1e-2)


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=1e-2, momentum=0.9)


class Run:
    """A run with everything that can be saved; built, it is at its first update."""

    def __init__(self, make=adamw, *, is_scaled=False, blocks=False):
        torch.manual_seed(0)
        random.seed(0)
        np.random.seed(0)
        model = mlp()
        if blocks:
            model = nn.Sequential(nn.Linear(6, WIDTH), nn.Sequential(*[Block() for _ in range(4)]))
            esper.shallow(model, "1", depth=2)
        self.model = esper.wrap(model)
        self.optimizer = make(self.model)
        self.scheduler = OneCycleLR(self.optimizer, max_lr=0.05, total_steps=100)
        self.scaler = torch.amp.GradScaler("cpu", enabled=is_scaled, growth_interval=4)
        self.ema = esper.follow(self.model, AveragedModel(self.model))

    def train(self, num):
        for _ in range(num):
            x = torch.randn(16, 6) * random.random() + float(np.random.rand())
            output = self.model(x)
            loss = output.square().mean() + output.mean()
            self.optimizer.zero_grad()
            self.scaler.scale(loss).backward()
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.model.parameters(), 0.05)
            self.scaler.step(self.optimizer)
            self.scaler.update()
            self.scheduler.step()
            self.ema.update_parameters(self.model)
        return self

    def graft(self, index, size, seed_idx=0, **options):
        self.model[index].graft(
            seed_idx, f"mlp-{size}x{WIDTH}-w32", example=torch.randn(4, size), **options
        )
        esper.sync_optimizer(self.model, self.optimizer)

    @property
    def parts(self):
        return {"scheduler": self.scheduler, "scaler": self.scaler, "ema": self.ema}

    def save(self, path, **options):
        esper.save_checkpoint(path, self.model, self.optimizer, **self.parts, **options)

    def load(self, path, **options):
        return esper.load_checkpoint(path, self.model, self.optimizer, **self.parts, **options)

    def state(self):
        """Return all that two equal runs have in common, by name."""
        named = list(self.model.named_parameters())
        moments = {
            f"{name} {key}": value
            for name, p in named
            for key, value in self.optimizer.state[p].items()
            if isinstance(value, torch.Tensor)
        }
        averaged = {f"ema {name}": value for name, value in self.ema.state_dict().items()}
        rates = {f"rate {i}": torch.tensor(g["lr"]) for i, g in enumerate(self.groups)}
        scale = {"scale": torch.tensor(self.scaler.get_scale())}
        draws = {"draw": torch.get_rng_state()}
        return {**self.model.state_dict(), **moments, **averaged, **rates, **scale, **draws}

    @property
    def groups(self):
        return self.optimizer.param_groups


def same(one, other):
    """Say whether two runs are equal bit by bit, the order of their parameters included."""
    mine, theirs = one.state() if isinstance(one, Run) else one, other.state()
    return list(mine) == list(theirs) and all(torch.equal(mine[k], theirs[k]) for k in mine)


def two_grafts(**options):
    run = Run(**options).train(3)
    run.graft(4, WIDTH)
    run.train(3)
    run.graft(0, 6)
    return run.train(3)


def waking():
    run = Run(blocks=True).train(3)
    esper.deepen(run.model, run.optimizer, depth=4, ramp_updates=12)
    return run.train(5)


def fossil(mode):
    """Return a run with a kernel that was made permanent: folded, or left where it stands."""
    run = Run().train(2)
    if mode == "folded":
        kernel, example = linear_blueprint(WIDTH), torch.randn(4, WIDTH)
        run.model[4].graft(0, kernel, alpha=0.5, example=example)
        esper.sync_optimizer(run.model, run.optimizer)
    else:
        run.graft(4, WIDTH)
    run.train(3)
    certificate = run.model[4].fossilize(0)
    assert certificate.folded is (mode == "folded"), certificate
    esper.sync_optimizer(run.model, run.optimizer)
    return run.train(2)


def guarded():
    run = Run().train(2)
    esper.sync_optimizer(run.model, run.optimizer)
    run.graft(4, WIDTH, guard="step")
    return run.train(3)


RUNS = {
    "adamw": two_grafts,
    "sgd": lambda: two_grafts(make=sgd),
    "scaled": lambda: two_grafts(is_scaled=True),
    "waking": waking,
    "folded": lambda: fossil("folded"),
    "unfolded": lambda: fossil("unfolded"),
    "guarded": guarded,
}
FRESH = {
    "sgd": lambda: Run(make=sgd),
    "scaled": lambda: Run(is_scaled=True),
    "waking": lambda: Run(blocks=True),
}


def fresh(name):
    """Return a run as its owner's program builds it before it loads a checkpoint."""
    return FRESH.get(name, Run)()


def resume(folder, names):
    for name in names:
        torch.manual_seed(99)
        run = fresh(name)
        run.load(folder / f"{name}.esper")
        torch.save(run.train(UPDATES).state(), folder / f"{name}.resumed")


if __name__ == "__main__":
    resume(Path(sys.argv[1]), sys.argv[2:])
