"""Measures that say what a test wants of each arrangement of kernels, and packages to be tried."""

from __future__ import annotations

import itertools

import torch
from growing import batches, compute_loss, growing
from torch import nn

from esper.compiler.catalog import Catalog, default_catalog
from esper.growth.budget import Budget
from esper.growth.policies import EveryN
from esper.growth.ranking import RankedCandidate, in_order
from esper.state.layer_record import record_of
from esper.wrapping.wrap import layers, wrap

SAMPLES = 600
NOISE = torch.randn(SAMPLES, generator=torch.Generator().manual_seed(0)).double()
TRIAL_UPDATES = 10
"""Updates of a trial of :class:`Course`; what it tries need not learn anything."""
ONE_FAMILY = Catalog(entries=tuple(e for e in default_catalog().entries if e.name == "mlp"))
"""Few kernels are ranked quickly."""


def kernels_on(model):
    """Return the kernel at each site that contributes: ``"real"``, or ``"linear"``."""
    found = {}
    for name, layer in layers(model).items():
        record = record_of(layer)
        for seed in (*record.seeds.values(), *record.shadows.values()):
            if seed.slot.alpha > 0:
                made = seed.kernel.blueprint.id
                found[name] = "linear" if made.endswith("-linear") else "real"
    return found


class Measure:
    """Says ``loss_of(kernels_on(model))`` with a little of each sample's own in it.

    Args:
        loss_of: From kernels by site to the mean loss.
        wiggle: How much samples differ in what a kernel brings them, as a share of it.

    Attributes:
        seen: The kernels of every model that was measured in a trial or under watch.
        shift: Added to each loss of a model with a kernel from now on.
    """

    def __init__(self, loss_of, *, wiggle=0.5):
        self.loss_of = loss_of
        self.wiggle = wiggle
        self.seen = []
        self.shift = 0.0
        self.without = loss_of({})

    def __call__(self, model):
        """Return one loss per sample."""
        on = kernels_on(model)
        self.seen.append(on)
        gain = self.without - self.loss_of(on)
        losses = self.without + NOISE.abs() - gain * (1 + self.wiggle * NOISE.flip(0))
        return losses + (self.shift if on else 0.0)


def helps(by_site):
    """Return what a model loses whose kernels help by so much each, whatever stands beside."""
    return lambda on: 5.0 - sum(by_site.get(site, 0.0) for site in on)


class Chosen:
    """A ranking that takes one kernel at each of some sites, in their order."""

    def __init__(self, *sites):
        self.sites = sites

    def rank(self, observations, candidates):
        """Give the first kernel of each site a gain."""
        firsts = {}
        for candidate in candidates:
            firsts.setdefault(candidate.site, candidate)
        gains = {site: float(len(self.sites) - i) for i, site in enumerate(self.sites)}
        return in_order(
            RankedCandidate(
                candidate=c,
                gain=gains.get(c.site, 0.0) if c is firsts[c.site] else 0.0,
                stderr=None,
            )
            for c in candidates
        )


def chain(random_seed=0, optimizer_class=torch.optim.AdamW):
    """Return a wrapped chain of three linear layers, in which linear kernels fold."""
    torch.manual_seed(random_seed)
    model = nn.Sequential(
        nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 1), nn.Flatten(0)
    )
    wrap(model)
    return model, optimizer_class(model.parameters(), lr=1e-3)


def trying(model, optimizer, measure, *sites, **settings):
    """Return a controller that tries a package at some sites, which the measure judges."""
    options = {
        "policy": EveryN(4),
        "ranking": Chosen(*sites),
        "catalog": ONE_FAMILY,
        "budget": Budget(packages=1),
        "hold_updates": 20,
        "evaluate_every": 1000,
        **settings,
    }
    return growing(model, optimizer, evaluate=measure, **options)


class Course:
    """A run on its way to the verdict of a package, and beyond; for ``short_trials``.

    Args:
        model: A wrapped model; a chain where None.
        optimizer: What trains it.
        measure: Judges the package; one that helps at two sites where None.
        sites: Where its kernels are.
        after: Called behind each update.
        settings: Of the controller.
    """

    def __init__(
        self,
        model=None,
        optimizer=None,
        *,
        measure=None,
        sites=("0", "2"),
        after=lambda: None,
        **settings,
    ):
        if model is None:
            model, optimizer = chain()
        self.model, self.optimizer, self.after = model, optimizer, after
        self.measure = Measure(helps({"0": 1.0, "2": 1.0})) if measure is None else measure
        self.grower = trying(model, optimizer, self.measure, *sites, **settings)
        object.__setattr__(self.run.settings, "trial_updates", TRIAL_UPDATES)
        self.batches = itertools.cycle(batches(50))

    @property
    def run(self):
        """What the controller knows of the run."""
        return self.grower._run

    def update(self, factor=1.0):
        """Make one update; the loss that the controller hears is multiplied."""
        batch = next(self.batches)
        loss = compute_loss(self.model, batch)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.after()
        self.grower.step(factor * loss.detach(), batch=batch)

    def to_the_verdict(self):
        """Train up to the update before the verdict; return the candidate's arm."""
        while not self.trials or self.updates_left > 1:
            self.update()
        return self.grower._stage._arms[0]

    def to_the_switch(self):
        """Train up to the taking over, or the refusal; return what is known of the package."""
        self.to_the_verdict()
        self.update()
        return self.trials[0]

    def to_the_end(self, num=40):
        """Train until nothing is under way; return what is known of the package."""
        self.to_the_switch()
        for _ in range(num):
            if self.grower.stages:
                self.update()
        assert not self.grower.stages
        return self.trials[0]

    @property
    def trials(self):
        """What is known of the packages."""
        return self.grower.report().trials

    @property
    def updates_left(self):
        """Updates until the verdict."""
        (trial,) = self.trials
        return trial.started_at + trial.trial_updates - self.grower.updates
