"""A small task on which growth helps, and a run of it, for the tests of the controller."""

from __future__ import annotations

import torch
from torch import nn

from esper.growth.grower import Grower
from esper.wrapping.wrap import wrap

SHORT = {
    "trial_updates": 50,
    "hold_updates": 10,
    "warmup_updates": 10,
    "record_updates": 4,
    "evaluate_every": 10,
    "attribution": "none",  # what tests it asks for it
    "overhead": 1000.0,  # kernels are large beside the small host
    "audition_updates": 60,  # of trial="shadow" alone, as is the ramp
    "ramp_updates": 10,
}


def task(num=900, random_seed=0):
    """Products of inputs, which the linear first layer of a narrow host cannot take apart."""
    generator = torch.Generator().manual_seed(random_seed)
    x = torch.randn(num, 4, generator=generator)
    return x, x[:, 0] * x[:, 1] + x[:, 2] * x[:, 3]


def host(random_seed=0, *, dropout=0.0):
    """A host with running statistics, and dropout where asked for."""
    with torch.random.fork_rng():
        torch.manual_seed(random_seed)
        return nn.Sequential(
            nn.Linear(4, 4),
            nn.BatchNorm1d(4),
            nn.ReLU(),
            nn.Dropout(dropout),
            nn.Linear(4, 1),
            nn.Flatten(0),
        )


X, Y = task()
GATE_X, GATE_Y = task(400, random_seed=1)


def compute_loss(model, batch):
    return (model(X[batch]) - Y[batch]).square().mean()


def evaluate(model):
    return (model(GATE_X) - GATE_Y).square()


def batches(num, random_seed=0):
    generator = torch.Generator().manual_seed(random_seed)
    return [torch.randint(len(X), (32,), generator=generator) for _ in range(num)]


def train(model, optimizer, num, grower=None, random_seed=0):
    """Train for ``num`` updates, with a controller or without one."""
    for batch in batches(num, random_seed):
        loss = compute_loss(model, batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if grower is not None:
            grower.step(loss, batch=batch)


def wrapped(random_seed=0, *, dropout=0.0, optimizer_class=torch.optim.AdamW, lr=1e-2):
    """Return a wrapped host and its optimizer."""
    model = wrap(host(random_seed, dropout=dropout))
    return model, optimizer_class(model.parameters(), lr=lr)


def growing(model, optimizer, **settings):
    """Return a controller with short stages."""
    defaults = {"compute_loss": compute_loss, "evaluate": evaluate, **SHORT}
    return Grower(model, optimizer, **{**defaults, **settings})


def state_of(model):
    """Everything of a model that a graft could change."""
    return {name: value.clone() for name, value in model.state_dict().items()}


def equal_states(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)
