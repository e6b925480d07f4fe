"""A twin is tried at the first update: what stands against it is named, with the cure."""

from __future__ import annotations

import threading
import warnings

import torch
from growing import GATE_X, X, Y, compute_loss, growing, host, train, wrapped
from torch import nn

import esper
from esper.growth.policies import ByHand, EveryN
from esper.growth.tries import tries_spent

BY_HAND = [("0", "mlp-4x4-w32")]


def said_of(model, optimizer, num=1, **settings):
    """Train an update; return what the owner was warned of, and the Grower."""
    grower = growing(model, optimizer, **{"policy": ByHand(BY_HAND), **settings})
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train(model, optimizer, num, grower)
    (text,) = [t for t in (str(w.message) for w in caught) if "nothing can grow" in t]
    return text, grower


def test_loss_that_uses_the_live_model_is_named():
    """It forgets its argument, and the twin would never learn."""
    model, optimizer = wrapped()

    def forgets(_model, batch):
        return (model(X[batch]) - Y[batch]).square().mean()

    text, grower = said_of(model, optimizer, compute_loss=forgets)
    assert "calls the model in training in place of the one that it is given" in text
    assert "compute_loss(model, batch)" in text
    assert tries_spent(model) == 0
    train(model, optimizer, 30, grower)
    assert not grower.report().trials


def test_update_that_uses_the_live_model_is_named():
    """The same, of a function of the owner's that does the whole update."""
    model, optimizer = wrapped()

    def forgets(_model, twins, batch):
        twins.zero_grad()
        compute_loss(model, batch).backward()
        twins.step()

    text, _ = said_of(model, optimizer, update=forgets)
    assert "calls the model in training in place of the one that it is given" in text


class KeepsActivations(nn.Module):
    """Keeps what it gave last, graph and all, which no copy can be made of."""

    def forward(self, x):
        """Return twice the input."""
        self.last = 2 * x
        return self.last


def with_activations():
    model = host()
    model[2] = KeepsActivations()
    return model


def test_model_that_cannot_be_copied_is_named_with_the_cure():
    """Twin= builds it anew, and an audition makes no copy."""
    model = esper.wrap(with_activations())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    text, grower = said_of(model, optimizer)
    assert "the model cannot be copied for a twin" in text
    assert "twin=" in text
    assert "trial='shadow'" in text
    train(model, optimizer, 30, grower)
    assert not grower.report().trials


def test_twin_that_the_owner_builds_cures_it():
    """The package is tried, and taken over."""
    model = esper.wrap(with_activations())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    settings = {"policy": ByHand(BY_HAND), "twin": with_activations}
    grower = growing(model, optimizer, hold_updates=50, **settings)
    train(model, optimizer, 60, grower)
    assert [status.stage.value for status in grower.stages] == ["holding"]


def test_audition_cures_it_as_well():
    """No copy is made for one."""
    model = esper.wrap(with_activations())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    grower = growing(model, optimizer, policy=ByHand(BY_HAND), trial="shadow")
    train(model, optimizer, 10, grower)
    assert [status.stage.value for status in grower.stages] == ["audition"]


def test_model_with_what_no_process_can_copy_is_named():
    """A lock, say."""
    model, optimizer = wrapped()
    model[2].lock = threading.Lock()
    text, _ = said_of(model, optimizer)
    assert "cannot be copied" in text
    assert "lock" in text


def test_optimizer_that_holds_foreign_parameters_is_named():
    """What a twin of them would be nobody can say."""
    model, _ = wrapped()
    head = nn.Linear(3, 2)
    optimizer = torch.optim.AdamW([*model.parameters(), *head.parameters()])
    text, _ = said_of(model, optimizer)
    assert "2 parameters that the model does not have" in text
    assert "(2, 3)" in text
    assert "the module that owns them all" in text


class Shares(nn.Module):
    """Shares a table with every copy of itself, and writes to it."""

    def __init__(self):
        super().__init__()
        self.table = torch.zeros(4)

    def __deepcopy__(self, memo):
        made = type(self)()
        memo[id(self)] = made
        made.table = self.table
        return made

    def forward(self, x):
        """Return the input, and count it."""
        with torch.no_grad():
            self.table += 1
        return x


def test_what_an_update_of_a_copy_changes_in_the_run_is_named():
    """By the name of what was changed."""
    model = host()
    model.append(Shares())
    esper.wrap(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    text, _ = said_of(model, optimizer)
    assert "an update of a copy of the model changes the live run (6.table)" in text


def test_loss_that_does_not_use_its_model_is_named():
    """Its copy learns nothing: every verdict would be the same."""
    model, optimizer = wrapped()
    before = compute_loss

    def update(twin, _optimizer, batch):
        before(twin, batch)

    text, _ = said_of(model, optimizer, update=update)
    assert "changed none of its weights" in text


def test_copy_that_cannot_be_trained_is_named():
    """With what it raised."""
    model, optimizer = wrapped()

    def update(twin, _optimizer, batch):
        raise ZeroDivisionError("by you")

    text, _ = said_of(model, optimizer, update=update)
    assert "could not be trained (ZeroDivisionError: by you)" in text


def test_owner_who_grows_nothing_is_spared_the_copy():
    """Nothing is copied, and nothing said, where the policy never grows."""
    model, optimizer = wrapped()
    model[2].lock = threading.Lock()
    grower = growing(model, optimizer, policy=esper.Never())
    train(model, optimizer, 3, grower)
    assert grower.report().seconds["trial"] == 0.0


def test_rehearsal_leaves_the_run_and_its_hooks():
    """Bit for bit, with the hooks of the owner uncalled."""
    finals = []
    for grows in (False, True):
        model, optimizer = wrapped(dropout=0.3)
        called = []
        model[0].register_forward_hook(lambda *_, called=called: called.append(1))
        torch.manual_seed(0)
        grower = growing(model, optimizer, policy=EveryN(100)) if grows else None
        train(model, optimizer, 3, grower)
        num_called = len(called)
        finals.append(([p.detach().clone() for p in model.parameters()], num_called))
        model.eval()
        finals[-1] += (model(GATE_X).detach(),)
    assert all(torch.equal(a, b) for a, b in zip(finals[0][0], finals[1][0], strict=True))
    assert finals[0][1] == finals[1][1]
    assert torch.equal(finals[0][2], finals[1][2])


def test_what_can_no_longer_be_copied_at_a_decision_is_a_note_and_no_end():
    """It could at the first update; the run goes on, and no try is spent."""
    model, optimizer = wrapped()
    grower = growing(model, optimizer, policy=ByHand([("0", "mlp-4x4-w32", 6)]))
    train(model, optimizer, 5, grower)
    model[2].lock = threading.Lock()
    train(model, optimizer, 20, grower)
    assert grower.updates == 25
    assert not grower.report().trials
    assert any("no trial could begin" in note for note in grower.report().notes)
    assert esper.layers(model)["0"].state_layout.state(0).name == "DORMANT"
