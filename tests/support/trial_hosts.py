"""Runs that a trial has to leave alone: hosts, losses that keep something, and ways to train."""

from __future__ import annotations

import collections
import itertools

import numpy as np
import torch
from growing import X, Y
from torch import nn

from esper.wrapping.wrap import wrap


class Running:
    """A run: what is trained, and how its owner makes an update.

    Args:
        model: The wrapped model.
        optimizer: What trains it: one, or several.
        given: What the owner calls; the model where None.
        compute_loss: ``(model, batch)`` to the loss.
        after: What the owner does behind each update.
        before_step: What the owner does with the gradients.
    """

    def __init__(self, model, optimizer=None, *, given=None, compute_loss=None, **hooks):
        self.model = wrap(model)
        if optimizer is None:
            optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-2)
        self.optimizers = optimizer if isinstance(optimizer, list) else [optimizer]
        self.optimizer = optimizer
        self.given = self.model if given is None else given(self.model)
        self.compute_loss = compute_loss or mean_loss
        self.before_step = hooks.pop("before_step", lambda run: None)
        self.after = hooks.pop("after", lambda run: None)

    def update(self, batch, grower=None):
        """Make one update, and tell the controller."""
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        loss = self.compute_loss(self.given, batch)
        loss.backward()
        self.before_step(self)
        for optimizer in self.optimizers:
            optimizer.step()
        self.after(self)
        if grower is not None:
            grower.step(loss.detach(), batch=batch)


class Scaled(Running):
    """A run under GradScaler, whose scale grows until steps are skipped, and half precision."""

    def __init__(self, model, **settings):
        super().__init__(model, **settings)
        self.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**15, growth_interval=4)
        self.own_loss, self.compute_loss = self.compute_loss, under_autocast(torch.float16)

    def update(self, batch, grower=None):
        """Make one update, or none where a gradient overflows."""
        self.optimizer.zero_grad()
        loss = self.compute_loss(self.given, batch)
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if grower is not None:
            grower.step(loss.detach(), batch=batch)


class Accumulating(Running):
    """A run whose updates are of two micro-batches."""

    def update(self, batch, grower=None):
        """Make one update, and tell the controller of each micro-batch."""
        self.optimizer.zero_grad()
        parts = batch.split(len(batch) // 2)
        for i, part in enumerate(parts):
            loss = self.compute_loss(self.given, part)
            (loss / len(parts)).backward()
            if i == len(parts) - 1:
                self.optimizer.step()
            if grower is not None:
                grower.step(loss.detach(), batch=part)


def mean_loss(model, batch):
    """Return the mean squared error."""
    return (model(X[batch]).float() - Y[batch]).square().mean()


def under_autocast(dtype):
    """Return the loss of a model that runs in a lower precision."""

    def loss(model, batch):
        with torch.autocast("cpu", dtype):
            found = model(X[batch])
        return (found.float() - Y[batch]).square().mean()

    return loss


in_bfloat16 = under_autocast(torch.bfloat16)


def held_out(model):
    """Return the squared errors of 400 samples."""
    return (model(X[500:]).float() - Y[500:]).square()


def network(*middle, width=8):
    """Return a network with a few modules between its two linear layers."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(4, width), *middle, nn.ReLU(), nn.Linear(width, 1), nn.Flatten(0)
    )


class Keeps(nn.Module):
    """Keeps whatever modules keep, and lets all of it reach the output."""

    num_calls = 0

    def __init__(self):
        super().__init__()
        self.counter, self.recent = 0, collections.deque(maxlen=5)
        self.ids, self.steps = itertools.count(), iter(range(10**6))
        self.generator = torch.Generator().manual_seed(1)
        self.numpy = np.random.default_rng(1)
        self.kept = {"means": [torch.zeros(2)]}

    def forward(self, x):
        """Shift the input by what is kept, and keep more."""
        if not self.training:
            return x
        self.counter += 1
        Keeps.num_calls += 1
        self.recent.append(float(x.detach().mean()))
        self.kept["means"][0].lerp_(x.detach().mean().expand(2), 0.1)
        drawn = torch.rand((), generator=self.generator) + self.numpy.random()
        counted = (self.counter + next(self.ids) + next(self.steps) + Keeps.num_calls) % 7
        return x + 1e-2 * (drawn + counted + sum(self.recent) + self.kept["means"][0].sum())


def of_keeper():
    """Return a run of a module that keeps something."""
    Keeps.num_calls = 0
    return Running(network(Keeps()))


def of_closure():
    """Return a run whose loss counts, averages and draws in its closure."""
    count, state = 0, {"average": torch.zeros(()), "seen": []}
    generator, ids = torch.Generator().manual_seed(3), itertools.count()

    def loss(model, batch):
        nonlocal count
        count += 1
        state["seen"].append(next(ids))
        noise = torch.randn(len(batch), 4, generator=generator)
        found = (model(X[batch] + 0.1 * noise) - Y[batch]).square().mean()
        state["average"].lerp_(found.detach(), 0.1)
        return found * (1 + 0.01 * ((count + len(state["seen"])) % 5)) / (1 + state["average"])

    return Running(network(), compute_loss=loss)


def of_schedule():
    """Return a run under momentum and a schedule per update."""
    model = network(nn.Dropout(0.2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, nesterov=True)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.05, total_steps=200)
    return Running(model, optimizer, after=lambda run: scheduler.step())


def of_groups():
    """Return a run with two groups, one of which does not decay, and a fused step."""
    model = network(nn.BatchNorm1d(8))
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    return Running(model, torch.optim.AdamW(groups, lr=1e-2, amsgrad=True))


def of_pair():
    """Return a run under Muon and AdamW."""
    model = network(nn.Dropout(0.2))
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim == 1]
    return Running(model, [torch.optim.Muon(matrices, lr=1e-2), torch.optim.AdamW(vectors)])


def clips_norm(limit=1.0):
    """Return what an owner does who limits the norm of the gradients."""
    return lambda run: nn.utils.clip_grad_norm_(run.model.parameters(), limit)


def clips_value(limit=0.1):
    """Return what an owner does who limits each element of the gradients."""
    return lambda run: nn.utils.clip_grad_value_(run.model.parameters(), limit)


class Images(nn.Module):
    """A convolution with statistics, which reads four inputs as an image of two by two."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.norm = nn.Conv2d(1, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.drop, self.head = nn.Dropout2d(0.2), nn.Linear(24, 1)

    def forward(self, x):
        """Return one number for each sample."""
        found = self.drop(self.norm(self.conv(x.view(-1, 1, 2, 2))).relu())
        return self.head(found.flatten(1)).flatten()


class Sequences(nn.Module):
    """An encoder layer and a recurrent one, which read four inputs as a sequence."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.up = nn.Linear(1, 8)
        self.encoder = nn.TransformerEncoderLayer(8, 2, 16, 0.1, batch_first=True)
        self.rnn, self.head = nn.GRU(8, 8, batch_first=True), nn.Linear(8, 1)

    def forward(self, x):
        """Return one number for each sample."""
        found, _ = self.rnn(self.encoder(self.up(x[..., None])))
        return self.head(found[:, -1]).flatten()


HOSTS = {
    "plain": lambda: Running(network()),
    "dropout": lambda: Running(network(nn.Dropout(0.3))),
    "batch norm": lambda: Running(network(nn.BatchNorm1d(8))),
    "keeper": of_keeper,
    "closure": of_closure,
    "schedule": of_schedule,
    "groups": of_groups,
    "two optimizers": of_pair,
    "bfloat16": lambda: Running(network(nn.Dropout(0.3)), compute_loss=in_bfloat16),
    "loss scale": lambda: Scaled(network()),  # what a skipped step draws, a twin does not
    "micro-batches": lambda: Accumulating(network(nn.Dropout(0.3))),
    "clipped norm": lambda: Running(network(nn.Dropout(0.3)), before_step=clips_norm()),
    "clipped value": lambda: Running(network(nn.Dropout(0.3)), before_step=clips_value()),
    "images": lambda: Running(Images()),
    "sequences": lambda: Running(Sequences()),
}
"""Each host by its name; a call makes a run of it, which begins the same every time."""

SITES = {"images": ("head", "mlp-24x1-w32"), "sequences": ("head", "mlp-8x1-w32")}
"""Where a kernel is named by hand, where that is not the first layer of a network."""


def site_of(name):
    """Return the site and the blueprint to be named by hand in a host."""
    return SITES.get(name, ("0", "mlp-4x8-w32"))
