"""State that lives in a Grower: what it leaves behind is told, and two do not share a model."""

from __future__ import annotations

import copy
import gc
import io

import pytest
import torch
from growing import SHORT, growing, train, wrapped
from torch import nn

from esper.contracts.errors import GrowthError
from esper.growth.policies import ByHand

BY_HAND = [("0", "mlp-4x4-w32", 5)]
UNTIL_TAKEN_OVER = 5 + 4 + SHORT["trial_updates"] + 4


def held(num=UNTIL_TAKEN_OVER):
    model, optimizer = wrapped()
    grower = growing(model, optimizer, policy=ByHand(BY_HAND), hold_updates=50)
    train(model, optimizer, num, grower)
    return model, optimizer, grower


def taken_up(model):
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    with growing(model, optimizer) as grower:
        return [note for note in grower.report().notes if "belongs to no Grower" in note]


@pytest.mark.slow
@pytest.mark.parametrize("how", ["dropped", "copied", "saved"])
def test_a_graft_without_a_verdict_is_told_of(how):
    """By the next Grower, whatever became of the one that began it."""
    model, _, grower = held()
    assert model[0].state_layout.state(0).name == "ACTIVE"
    if how == "saved":
        state = io.BytesIO()
        torch.save(model, state)
        state.seek(0)
        other = torch.load(state, weights_only=False)
    elif how == "copied":
        other = copy.deepcopy(model)
    else:
        other = model
        del grower
        gc.collect()
    (note,) = taken_up(other)
    assert note.startswith("seed 0 of '0' is ACTIVE at alpha")
    assert "layer.fossilize(0)" in note
    assert "layer.unload_kernel(0)" in note


def test_a_trial_that_was_left_is_told_of():
    """Its seed is taken, and no kernel stands in it; a copy has nobody's trial."""
    model, _, grower = held(20)
    assert model[0].state_layout.state(0).name == "LOADING"
    assert taken_up(copy.deepcopy(model)) == []
    del grower
    gc.collect()
    (note,) = taken_up(model)
    assert note.startswith("seed 0 of '0' is LOADING")
    model[0].unload_kernel(0)
    assert taken_up(model) == []


def test_a_fossil_needs_no_owner():
    """It has its verdict; and what was closed is gone."""
    model, _, grower = held()
    grower.close()
    model[0].graft(1, nn.Linear(4, 4), alpha=0.5, example=torch.randn(3, 4))
    model[0].fossilize(1)
    assert taken_up(model) == []


@pytest.mark.parametrize("shared", ["model", "part", "optimizer"])
def test_two_growers_on_one_model_or_optimizer_are_refused(shared):
    """The error says what to do; the first goes on, and once it is closed the second may begin."""
    model, optimizer = wrapped()
    other, _ = wrapped()
    optimizer.add_param_group({"params": list(other.parameters())})
    first = growing(model, optimizer, trial="shadow")  # no twin has the other's parameters
    second = {
        "model": (model, torch.optim.SGD(model.parameters(), lr=0.1)),
        "part": (model[0], torch.optim.SGD(model[0].parameters(), lr=0.1)),
        "optimizer": (other, optimizer),
    }[shared]
    with pytest.raises(GrowthError, match=r"another Grower.*close\(\)"):
        growing(*second)
    train(model, optimizer, 2, first)
    assert first.updates == 2
    first.close()
    growing(*second).close()


def test_two_models_may_grow_at_once():
    """Each with its own optimizer."""
    with growing(*wrapped()) as one, growing(*wrapped()) as two:
        assert one.updates == two.updates == 0


def test_a_grower_that_was_refused_claims_nothing():
    """Its constructor failed, so there is none to close."""
    model, optimizer = wrapped()
    with pytest.raises(ValueError, match="hold_updates"):
        growing(model, optimizer, hold_updates=-1)
    growing(model, optimizer).close()
