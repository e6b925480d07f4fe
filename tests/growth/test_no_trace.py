"""Trials, auditions, rankings and evaluations leave no trace, wherever a model keeps something."""

from __future__ import annotations

import collections
import dataclasses
import functools
import itertools
import queue
import random

import numpy as np
import pytest
import torch
from growing import GATE_X, GATE_Y, SHORT, X, Y, batches, train, wrapped
from torch import nn

import esper
from esper.growth.evaluation import measuring
from esper.growth.policies import ByHand, EveryN
from esper.seeds.shadow import shadow_pass


class Gathered:
    """A metric that is no module, as torchmetrics' states are: plain attributes and lists."""

    def __init__(self):
        self.reset()

    def reset(self):
        self.total, self.parts, self.by_name = torch.zeros(()), [], {}

    def update(self, x):
        self.total += x.detach().mean()
        self.parts.append(float(x.detach().mean()))
        self.by_name[len(self.parts) % 5] = self.total.clone()


class Metric(nn.Module):
    """A metric that is a module, with states that are no buffers."""

    def __init__(self):
        super().__init__()
        self.total, self.count = torch.zeros(()), 0

    def forward(self, x):
        self.total = self.total + x.detach().mean()
        self.count += 1
        return x


@dataclasses.dataclass(slots=True)
class Slotted:
    count: int = 0


OF_FORWARD = torch.Generator()


class Keeper(nn.Module):
    """Keeps what modules keep, and lets every bit of it reach the output."""

    calls = 0

    def __init__(self, keeps):
        super().__init__()
        self.keeps = keeps
        self.counter, self.ids = 0, itertools.count()
        self.steps = iter(range(10**6))
        self.memory = torch.zeros(7)
        self.large = torch.zeros(40_000)
        self.array = np.zeros(5)
        self.generator = torch.Generator().manual_seed(1)
        self.python, self.numpy = random.Random(1), np.random.default_rng(1)
        self.legacy = np.random.RandomState(1)
        self.metric, self.module = Gathered(), Metric()
        self.recent, self.seen = collections.deque(maxlen=5), set()
        self.counts = collections.Counter()
        self.nested = {"a": [torch.zeros(2), {"b": 0}]}
        self.slotted = Slotted()
        self.lazy = None
        self.register_buffer("passes", torch.zeros(()))

    def forward(self, x):
        return x + 1e-3 * getattr(self, f"_{self.keeps}")(x)

    def _counter(self, x):
        self.counter += 1
        return self.counter % 7

    def _iterators(self, x):
        return (next(self.ids) + next(self.steps)) % 7

    def _memory(self, x):
        self.memory[self.counter % 7] += x.detach().mean()
        return self.memory.sum()

    def _by_data(self, x):
        self.memory.data.mul_(0.9).add_(x.detach().mean())
        return self.memory.sum()

    def _large(self, x):
        self.large[:4] += x.detach().mean()
        return self.large[:4].sum()

    def _array(self, x):
        self.array += float(x.detach().mean())
        return self.array.sum()

    def _generators(self, x):
        drawn = torch.rand(1, generator=self.generator).item() + self.python.random()
        return drawn + self.numpy.random() + self.legacy.rand()

    def _metric(self, x):
        self.metric.update(x)
        return self.metric.total + len(self.metric.parts)

    def _module(self, x):
        self.module(x)
        return self.module.total + self.module.count

    def _containers(self, x):
        value = round(float(x.detach().mean()), 3)
        self.recent.append(value)
        self.seen.add(value)
        self.counts[len(self.seen) % 3] += 1
        self.nested["a"][0].add_(value)
        self.nested["a"][1]["b"] += 1
        self.slotted.count += 1
        values = [*self.recent, self.counts[0], self.nested["a"][1]["b"], self.slotted.count]
        return sum(values) + self.nested["a"][0].sum()

    def _late(self, x):
        if self.lazy is None:
            self.lazy = nn.Identity()  # a module that was not there before
            self.since = []
        self.since.append(1)
        return len(self.since)

    def _buffer(self, x):
        self.passes.add_(1.0)
        return self.passes % 7

    def _class(self, x):
        Keeper.calls += 1
        return Keeper.calls % 7

    def _global(self, x):
        return torch.rand((), generator=OF_FORWARD)

    def _flags(self, x):
        self.module.train(not self.module.training)
        return float(self.module.training)

    def _weight(self, x):
        with torch.no_grad():
            self.drift.mul_(0.99)
        return self.drift.sum()


KEPT = [name[1:] for name in vars(Keeper) if name.startswith("_") and name[1] != "_"]


def begin_anew():
    Keeper.calls = 0
    OF_FORWARD.manual_seed(9)


def model_that(keeps):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        keeper = Keeper(keeps)
        keeper.drift = nn.Parameter(torch.ones(3), requires_grad=False)
        return nn.Sequential(nn.Linear(4, 4), keeper, nn.ReLU(), nn.Linear(4, 1), nn.Flatten(0))


def mean_loss(model, batch):
    return (model(X[batch]) - Y[batch]).square().mean()


def held_out(model):
    return (model(GATE_X) - GATE_Y).square()


TRIALS = {
    "twin": lambda: {"policy": ByHand([("0", "mlp-4x4-w32", 2)])},
    "shadow": lambda: {"policy": EveryN(5), "audition_updates": 5},
}
UPDATES = {"twin": 14, "shadow": 18}
"""So many leave a trace, where a pass does: eight of a trial, or a whole audition."""


def trained(model, compute_loss, *, grows, evaluate=held_out, trial="twin"):
    """Train with a controller that refuses whatever it tried, or without one."""
    esper.wrap(model, select=["0"])
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    grower = None
    if grows:
        grower = esper.Grower(
            model,
            optimizer,
            compute_loss=compute_loss,
            evaluate=evaluate,
            min_effect=1e9,
            trial=trial,
            **{**SHORT, **TRIALS[trial]()},
        )
    for batch in batches(UPDATES[trial]):
        loss = compute_loss(model, batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if grower is not None:
            grower.step(loss.detach(), batch=batch)
    if grower is not None:
        verdicts = {graft.verdict for graft in grower.report().grafts}
        assert verdicts & {"in progress", "culled at admission"}
        if trial == "shadow":
            grower.suggest()
        grower.close()
    return [p.detach().clone() for p in model.parameters()]


def equal(one, other):
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("trial", UPDATES)
@pytest.mark.parametrize("keeps", KEPT)
def test_what_a_module_keeps_is_as_in_a_run_without_a_controller(keeps, trial):
    """It reaches the outputs here, so that one pass too many would change the weights."""
    finals = []
    for grows in (False, True):
        begin_anew()
        finals.append(trained(model_that(keeps), mean_loss, grows=grows, trial=trial))
    assert equal(*finals)


@pytest.mark.parametrize("keeps", KEPT)
def test_every_keeper_would_notice_a_pass(keeps):
    """The control: one forward beside the training is seen in the weights."""
    finals = []
    for beside in (0, 1):
        begin_anew()
        model = model_that(keeps)
        for _ in range(beside):
            model(X[:8])
        finals.append(trained(model, mean_loss, grows=False))
    assert not equal(*finals)


def closure_with_generators():
    torch_, numpy_ = torch.Generator().manual_seed(3), np.random.default_rng(3)
    python = random.Random(3)

    def loss(model, batch):
        noise = torch.randn(len(batch), 4, generator=torch_)
        scale = numpy_.random() * python.random()
        return (model(X[batch] + 0.1 * scale * noise) - Y[batch]).square().mean()

    return loss


def closure_that_yields():
    def noise(random_seed):
        own = random.Random(random_seed)
        while True:
            yield own.random()

    drawn = noise(3)
    return lambda model, batch: mean_loss(model, batch) * (1 + next(drawn))


def closure_with_counters():
    count, state, average = 0, {"n": 0}, torch.zeros(())

    def loss(model, batch):
        nonlocal count
        count += 1
        state["n"] += 1
        found = mean_loss(model, batch)
        average.mul_(0.9).add_(0.1 * found.detach())
        return found * (1 + 0.01 * ((count + state["n"]) % 5)) / (1 + average)

    return loss


class Objective:
    def __init__(self):
        self.generator = torch.Generator().manual_seed(3)
        self.metric = Gathered()

    def loss(self, model, batch):
        self.metric.update(Y[batch])
        drawn = torch.rand(1, generator=self.generator)
        return mean_loss(model, batch) * (1 + drawn + 0.01 * len(self.metric.parts))

    def __call__(self, model, batch):
        return self.loss(model, batch).sum()


class Centred(nn.Module):
    """A criterion with a buffer that a forward writes."""

    def __init__(self):
        super().__init__()
        self.register_buffer("centre", torch.zeros(()))

    def forward(self, found, wanted):
        self.centre.lerp_(wanted.mean(), 0.1)
        return (found - wanted - self.centre).square().mean()


def criterion_with_a_buffer():
    criterion = Centred()
    return lambda model, batch: criterion(model(X[batch]), Y[batch])


OF_THE_FILE = torch.Generator()


def loss_with_a_global(model, batch):
    return mean_loss(model, batch) * (1 + torch.rand((), generator=OF_THE_FILE))


def with_argument(model, batch, *, generator):
    return mean_loss(model, batch) * (1 + torch.rand((), generator=generator))


def global_random(model, batch):
    drawn = random.random() + np.random.rand() + torch.rand(()).item()
    return mean_loss(model, batch) * (1 + drawn)


LOSSES = {
    "generators": closure_with_generators,
    "yields": closure_that_yields,
    "counters": closure_with_counters,
    "method": lambda: Objective().loss,
    "object": Objective,
    "criterion": criterion_with_a_buffer,
    "global": lambda: loss_with_a_global,
    "partial": lambda: functools.partial(with_argument, generator=torch.Generator()),
    "random": lambda: global_random,
}


@pytest.mark.slow
@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize(("evaluates", "trial"), [(True, "twin"), (False, "shadow")])
def test_what_a_loss_keeps_is_as_in_a_run_without_a_controller(name, evaluates, trial):
    """Also where the measure draws from the same generators, and calls the loss."""
    finals = []
    for grows in (False, True):
        OF_THE_FILE.manual_seed(5)
        torch.manual_seed(0)
        random.seed(0)
        np.random.seed(0)
        loss = LOSSES[name]()

        def evaluate(model, loss=loss):
            if evaluates:
                loss(model, torch.arange(8))
            return held_out(model)

        settings = {"grows": grows, "evaluate": evaluate, "trial": trial}
        finals.append(trained(model_that("counter"), loss, **settings))
    assert equal(*finals)


def test_batch_that_a_loss_changes_is_put_back():
    """In place, by key, and in an object of a library: every contender sees what the run saw."""
    model, optimizer = wrapped()
    given = {"x": X[:32].clone(), "y": Y[:32].clone(), "rest": [1, 2]}
    user = collections.UserDict(given)

    def loss(model, batch):
        batch["x"].mul_(1.5)
        batch["rest"].append(3)
        found = (model(batch["x"]) - batch.pop("y")).square().mean()
        batch["more"] = 1
        return found

    for batch in (given, user):
        with shadow_pass(model, functions=(loss,), values=(batch,)):
            loss(model, batch)
        assert torch.equal(batch["x"], X[:32])
        assert torch.equal(batch["y"], Y[:32])
        assert dict(batch)["rest"] == [1, 2]
        assert "more" not in batch
    del optimizer


@pytest.mark.parametrize("is_changed", [True, False])
def test_a_batch_may_hold_an_expanded_tensor(is_changed):
    """Of which many elements are one in memory, so that torch writes to none of them in place."""
    column = torch.randn(8, 1)
    batch = {"x": X[:8], "mask": column.expand(8, 4), "turned": torch.ones(3).expand(8, 3).T}
    before = column.clone()

    def compute_loss(model, batch):
        if is_changed:
            column.add_(1.0)
        return (model(batch["x"] * batch["mask"]) * batch["turned"][0]).square().mean()

    model = esper.wrap(nn.Sequential(nn.Linear(4, 1), nn.Flatten(0)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    options = {"compute_loss": compute_loss, "policy": EveryN(100), **SHORT}
    options["evaluate"] = lambda model: (model(GATE_X) - GATE_Y).square()
    with esper.Grower(model, optimizer, **options) as g:
        g.step(torch.ones(()), batch=batch)
        assert torch.equal(column, before)
    assert torch.equal(batch["turned"], torch.ones(3, 8))


def test_hooks_of_the_owner_keep_nothing_of_a_pass():
    """What they gathered in training is what they hold afterwards."""
    model, optimizer = wrapped()
    seen, counted = {}, [0]

    def keep(module, args, output):
        seen["last"] = output.detach()
        counted[0] += 1

    model[0].register_forward_hook(keep)
    train(model, optimizer, 1)
    last, num = seen["last"], counted[0]
    with shadow_pass(model):
        model(X[:8])
    with measuring(model):
        model(X[:8])
    assert seen["last"] is last
    assert counted[0] == num


def test_flags_and_gradients_come_back():
    """Whatever a loss switches: modes, what requires a gradient, and the gradients themselves."""
    model, optimizer = wrapped()
    train(model, optimizer, 1)
    model[1].eval()
    grads = [p.grad for p in model.parameters()]

    def loss(model, batch):
        model.train()
        model.requires_grad_(False)
        model.zero_grad()

    with shadow_pass(model, functions=(loss,)):
        loss(model, None)
    with measuring(model):
        loss(model, None)
    assert [m.training for m in model.children()] == [True, False, True, True, True, True]
    assert all(p.requires_grad for p in model.parameters())
    assert all(p.grad is grad for p, grad in zip(model.parameters(), grads, strict=True))


def test_evaluation_leaves_numpys_and_pythons_random_state():
    """As it leaves torch's."""
    model, _ = wrapped()
    before = random.getstate(), np.random.get_state(legacy=False)["state"]["key"].copy()
    with measuring(model):
        random.random()
        np.random.rand(700)
    assert random.getstate() == before[0]
    assert np.array_equal(np.random.get_state(legacy=False)["state"]["key"], before[1])


def test_what_a_measure_gathers_is_its_owners():
    """A history that evaluate writes is not undone; its generator is."""
    history, generator = [], torch.Generator().manual_seed(0)
    state = generator.get_state()

    def measure(model):
        history.append(float(torch.rand((), generator=generator)))
        return held_out(model)

    model, _ = wrapped()
    with measuring(model, measures=(measure,)):
        measure(model)
    assert len(history) == 1
    assert torch.equal(generator.get_state(), state)


@pytest.mark.parametrize("kind", ["generator", "object of a library"])
def test_what_cannot_be_kept_apart_is_found_out_and_named(kind):
    """At the first pass, with the attribute's name."""
    model, _ = wrapped()
    if kind == "generator":
        model[2].source = (i for i in itertools.count())
        use = functools.partial(next, model[2].source)
    else:
        model[2].source = queue.Queue()
        use = functools.partial(model[2].source.put, 1)

    def loss(model, batch):
        use()

    with pytest.warns(UserWarning, match=r"model\.2\.source"), shadow_pass(model):
        loss(model, None)


def test_large_tensor_is_cloned_until_it_was_seen_to_stay():
    """What is never written costs one clone in a run; one that is written later is named."""
    model, _ = wrapped()
    model[2].bank = torch.zeros(100_000)
    for _ in range(2):
        with shadow_pass(model):
            model(X[:8])
    with pytest.warns(UserWarning, match=r"model\.2\.bank"), shadow_pass(model):
        model[2].bank.add_(1)
    with shadow_pass(model):
        model[2].bank.add_(1)
    assert torch.equal(model[2].bank, torch.ones(100_000))
