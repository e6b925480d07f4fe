"""A run for every optimizer at every kind of layer: tried, taken over, held, and taken back.

As a program it serves ``[optimizer, kind, folder]``: it goes on from the checkpoint there to the
end.
"""

from __future__ import annotations

from pathlib import Path

import crafted_measures
import torch
from accelerate import Accelerator
from crafted_measures import Measure
from execution_hosts import KINDS, run
from fork_server import serve
from growing import SHORT, growing
from torch import nn
from torch.optim.swa_utils import AveragedModel

import esper
import esper.growth.sizing
from esper.compiler.catalog import Catalog, default_catalog
from esper.integrations.accelerate import esper_prepare
from esper.state.layer_call import LayerCall
from esper.state.site import describe_site

HOLD = 6
BEHIND = 4
"""Updates that a run is trained on after its kernel is permanent."""
CHECKPOINT, FOUND = "run.esper", "end.pt"


class Signed(torch.optim.SGD):
    """A class of an owner's, with a constructor of its own and a step that does more."""

    def __init__(self, module, strength):
        super().__init__(module.parameters(), lr=strength, momentum=0.5)

    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.grad = p.grad.sign()
        return super().step(closure)


class Lion(torch.optim.Optimizer):
    """One that torch does not have."""

    def __init__(self, params, lr):
        super().__init__(params, {"lr": lr, "beta": 0.9})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                moment = state.setdefault("moment", torch.zeros_like(p))
                p.sub_(group["lr"] * (0.5 * moment + 0.5 * p.grad).sign())
                moment.lerp_(p.grad, 1 - group["beta"])


class Holder:
    """What a package puts around an optimizer, under a name of its own."""

    def __init__(self, held):
        self.held = held

    def step(self):
        self.held.step()

    def zero_grad(self):
        self.held.zero_grad()


esper.register_optimizer(Holder, lambda holder: holder.held)


def one(cls, **settings):
    return lambda model: [cls(model.parameters(), **settings)]


def muon(model):
    """Return the matrices of the hosts under Muon, where there are any, and AdamW for the rest."""
    matrices = [p for p in model.parameters() if p.ndim == 2 and p is not model.mix]
    rest = [p for p in model.parameters() if p.ndim != 2 or p is model.mix]
    adamw = torch.optim.AdamW(rest, lr=1e-3)
    return [torch.optim.Muon(matrices, lr=1e-2), adamw] if matrices else [adamw]


def sparse(model):
    """Return a table under SparseAdam, and the rest under AdamW."""
    model.host.sparse = True
    rest = [p for name, p in model.named_parameters() if name != "host.weight"]
    return [
        torch.optim.SparseAdam([model.host.weight], lr=1e-3),
        torch.optim.AdamW(rest, lr=1e-3),
    ]


OPTIMIZERS = {
    "adadelta": one(torch.optim.Adadelta, lr=1.0),
    "adafactor": one(torch.optim.Adafactor, lr=1e-2),
    "adagrad": one(torch.optim.Adagrad, lr=1e-2),
    "adam": one(torch.optim.Adam, lr=1e-3, amsgrad=True),
    "adamax": one(torch.optim.Adamax, lr=1e-3),
    "adamw": one(torch.optim.AdamW, lr=1e-3),
    "adamw, foreach": one(torch.optim.AdamW, lr=1e-3, foreach=True),
    "adamw, fused": one(torch.optim.AdamW, lr=1e-3, fused=True),
    "asgd": one(torch.optim.ASGD, lr=1e-2),
    "muon": muon,
    "nadam": one(torch.optim.NAdam, lr=1e-3),
    "radam": one(torch.optim.RAdam, lr=1e-3),
    "rmsprop": one(torch.optim.RMSprop, lr=1e-3, momentum=0.9, centered=True),
    "rprop": one(torch.optim.Rprop, lr=1e-3),
    "sgd": one(torch.optim.SGD, lr=1e-2, momentum=0.9, nesterov=True),
    "sparse": sparse,
    "subclass": lambda model: [Signed(model, 1e-3)],
    "registered": lambda model: [Holder(Lion(model.parameters(), lr=1e-3))],
}


def applies(optimizer, kind):
    """Say whether an optimizer can train a host at all."""
    return optimizer != "sparse" or kind.startswith("embedding")


class AtKind(nn.Module):
    """A host, and behind it a product, whose FLOPs torch counts."""

    def __init__(self, kind):
        super().__init__()
        torch.manual_seed(0)
        self.host = KINDS[kind].make_host()
        self.mix = nn.Parameter(torch.eye(2))

    def forward(self, x):
        return run(self.host, x).reshape(-1, 2) @ self.mix


def only(*names):
    return Catalog(entries=tuple(e for e in default_catalog().entries if e.name in names))


class Trained:
    """What runs have in common: a model, what trains it, and perhaps an average."""

    ema = None

    @property
    def bare(self):
        """The optimizers that do the work."""
        inner = [getattr(each, "optimizer", each) for each in self.optimizers]
        return [getattr(each, "held", each) for each in inner]

    def update(self, x):
        """Make one update; return the loss."""
        for each in self.optimizers:
            each.zero_grad()
        loss = compute_loss(self.model, x)
        loss.backward()
        for each in self.optimizers:
            each.step()
        return loss.detach()

    def picture(self):
        """Return weights, buffers, moments, averages and draws, by name."""
        moments = {
            f"{name}: {key}": value.clone() if isinstance(value, torch.Tensor) else value
            for name, p in self.model.named_parameters()
            for each in self.bare
            for key, value in each.state.get(p, {}).items()
        }
        weights = {name: value.clone() for name, value in self.model.state_dict().items()}
        averages = {} if self.ema is None else self.ema.state_dict()
        averages = {f"ema {name}": value.clone() for name, value in averages.items()}
        return {**weights, **moments, **averages, "draws": torch.get_rng_state()}


class MatrixRun(Trained):
    """A run that grows; built, it is at its first update."""

    def __init__(self, optimizer, kind, **settings):
        self.model = AtKind(kind)
        torch.manual_seed(1)
        self.inputs = [KINDS[kind].make_input() for _ in range(5)]
        esper.wrap(self.model, select=["host"])
        self.optimizers = OPTIMIZERS[optimizer](self.model)
        self.ema = esper.follow(self.model, AveragedModel(self.model))
        self.measure = Measure(lambda on: 5.0 - len(on))
        catalog = only(KINDS[kind].kind.kernels[0])
        options = {
            "compute_loss": compute_loss,
            "evaluate": self.measure,
            "policy": esper.ByHand([("host", self.first_kernel(catalog))]),
            "catalog": catalog,
            "budget": esper.Budget(packages=1),
            "hold_updates": HOLD,
            "warmup_updates": 30,
            "evaluate_every": 1000,
            **settings,
        }
        self.begin(options)
        trial_updates = crafted_measures.TRIAL_UPDATES
        object.__setattr__(self.grower._run.settings, "trial_updates", trial_updates)
        torch.manual_seed(2)

    def begin(self, options):
        """Make the Grower."""
        self.grower = growing(self.model, self.optimizers, **options)

    def first_kernel(self, catalog):
        """Return the name of what is offered at the host first, whether or not it is frozen."""
        x = LayerCall.of(self.inputs[0])
        with torch.no_grad(), torch.random.fork_rng():
            site = describe_site(self.model.host, x.x, run(self.model.host, x))
        return catalog.blueprints_for(site, capacity_only=False)[0].id

    @property
    def switch(self):
        """Update at which the package was taken over; None before."""
        taken = [t.decided_at for t in self.grower.report().trials if t.taken]
        return taken[0] if taken else None

    def train_to_the_switch(self):
        """Train until the package is taken over."""
        while self.switch is None and self.grower.updates < 30:
            self.train(self.grower.updates + 1)
        return self

    def train_to_the_end(self):
        """Train on after the kernel became permanent."""
        return self.train(self.switch + HOLD + BEHIND)

    def train(self, until):
        """Train up to an update."""
        while self.grower.updates < until:
            x = self.inputs[self.grower.updates % len(self.inputs)]
            loss = self.update(x)
            self.ema.update_parameters(self.model)
            self.grower.step(loss, batch=x)
        return self

    def save(self, path):
        """Save as esper.save_checkpoint does."""
        esper.save_checkpoint(path, self.model, self.optimizers, ema=self.ema, grower=self.grower)

    def load(self, path):
        """Load what :meth:`save` wrote."""
        esper.load_checkpoint(path, self.model, self.optimizers, ema=self.ema, grower=self.grower)
        return self

    def save_parts(self, path):
        """Save as frameworks do, each part's ``state_dict``."""
        parts = {
            "model": self.model.state_dict(),
            "ema": self.ema.state_dict(),
            "optimizers": [each.state_dict() for each in self.bare],
            "grower": self.grower.state_dict(),
            "random": torch.get_rng_state(),
        }
        torch.save(parts, path)

    def load_parts(self, path):
        """Load what :meth:`save_parts` wrote."""
        parts = torch.load(path, weights_only=True)
        self.model.load_state_dict(parts["model"])
        self.ema.load_state_dict(parts["ema"])
        for each, state in zip(self.bare, parts["optimizers"], strict=True):
            each.load_state_dict(state)
        self.grower.load_state_dict(parts["grower"])
        torch.set_rng_state(parts["random"])
        return self


class AcceleratedRun(MatrixRun):
    """The same run under Accelerate, whose own ``save_state`` keeps it."""

    def begin(self, options):
        """Let Accelerate prepare everything, and make the Grower."""
        if not isinstance(self.optimizers[0], torch.optim.Optimizer):
            self.optimizers = self.bare  # what is no optimizer of torch's it does not prepare
        self.accelerator = Accelerator(cpu=True)
        self.model, self.optimizers, self.grower = esper_prepare(
            self.accelerator, self.model, self.optimizers, **{**SHORT, **options}
        )
        self.accelerator.register_for_checkpointing(self.ema)

    def save(self, path):
        """Save as Accelerate does, into a folder."""
        self.accelerator.save_state(str(path))

    def load(self, path):
        """Load what :meth:`save` wrote."""
        self.accelerator.load_state(str(path))
        return self


SQUARE = [
    "linear_without_bias",
    "layer_norm",
    "rms_norm",
    "group_norm",
    "batch_norm1d",
    "batch_norm2d",
    "batch_norm3d",
    "block",
    "sequential",
    "encoder_layer",
]
"""Kinds of layers that give the shape that they take, of which blocks of a stack may consist."""


class Block(nn.Module):
    """A host, and what goes past it."""

    def __init__(self, kind):
        super().__init__()
        self.host = KINDS[kind].make_host()

    def forward(self, x):
        return x + self.host(x)


class Stack(nn.Module):
    """Three blocks, one behind the other."""

    def __init__(self, kind):
        super().__init__()
        self.blocks = nn.ModuleList([Block(kind) for _ in range(3)])
        self.mix = nn.Parameter(torch.eye(2))

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x.reshape(-1, 2) @ self.mix


class WakingRun(Trained):
    """A run of three blocks of which two sleep, until they are woken by hand."""

    def __init__(self, optimizer, kind):
        torch.manual_seed(0)
        self.model = Stack(kind)
        self.inputs = [KINDS[kind].make_input() for _ in range(5)]
        esper.shallow(self.model, "blocks", depth=1)
        self.optimizers = OPTIMIZERS[optimizer](self.model)

    def train(self, num):
        """Train for as many updates."""
        for i in range(num):
            self.update(self.inputs[i % len(self.inputs)])
        return self

    def wake(self):
        """Let the blocks that sleep wake."""
        esper.deepen(self.model, self.optimizers, depth=3, ramp_updates=6)
        return self


def compute_loss(model, x):
    return (model(x) - 0.5).square().mean()


def go_on(optimizer, kind, folder):
    """Go on from a checkpoint in a process that has built nothing before."""
    folder = Path(folder)
    found = MatrixRun(optimizer, kind).load(folder / CHECKPOINT).train_to_the_end().picture()
    torch.save(found, folder / FOUND)


if __name__ == "__main__":
    torch.set_num_threads(1)
    esper.growth.sizing.MIN_TRIAL = crafted_measures.TRIAL_UPDATES
    serve(go_on)
