"""Snapshots give back exactly what was, and twins do exactly what the run does."""

from __future__ import annotations

import pytest
import torch
from growing import batches, compute_loss, equal_states, state_of, train, wrapped

from esper.continuity.snapshot import RunSnapshot
from esper.continuity.warmup import UpdateFactor
from esper.contracts.errors import GrowthError
from esper.growth.twins import Twin, lockstep_update, owner_update, tau_of


@pytest.mark.parametrize("optimizer_class", [torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW])
@pytest.mark.parametrize("random_seed", range(3))
def test_run_goes_on_from_a_restored_snapshot_bit_for_bit(optimizer_class, random_seed):
    """Weights, running statistics, moments and the random state are those of the snapshot."""
    model, optimizer = wrapped(random_seed, dropout=0.3, optimizer_class=optimizer_class)
    torch.manual_seed(random_seed)
    train(model, optimizer, 5, random_seed=random_seed)
    snapshot = RunSnapshot(model, optimizer, update=5)
    finals = []
    for _ in range(3):  # twice from the snapshot: restoring must not wear it out
        train(model, optimizer, 5, random_seed=random_seed + 1)
        finals.append(state_of(model))
        snapshot.restore(optimizer)
    assert equal_states(finals[0], finals[1])
    assert equal_states(finals[1], finals[2])


def test_snapshot_without_moments_does_not_repeat():
    """The control: weights alone are not the run."""
    model, optimizer = wrapped()
    train(model, optimizer, 5)
    snapshot = RunSnapshot(model, optimizer, update=5)
    train(model, optimizer, 5, random_seed=1)
    final = state_of(model)
    snapshot._state.clear()
    snapshot.restore(optimizer)
    train(model, optimizer, 5, random_seed=1)
    assert not equal_states(final, state_of(model))


@pytest.mark.parametrize("optimizer_class", [torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW])
def test_twin_without_a_graft_stays_bit_equal_to_the_run(optimizer_class):
    """Same batches and rates, own random state: dropout included, the twin is the run."""
    model, optimizer = wrapped(dropout=0.3, optimizer_class=optimizer_class)
    torch.manual_seed(3)
    train(model, optimizer, 5)
    twin = Twin(model, optimizer, UpdateFactor(optimizer), lockstep_update(compute_loss))
    for index, batch in enumerate(batches(8, random_seed=1)):
        rate = 1e-2 / (1 + index)
        optimizer.param_groups[0]["lr"] = rate
        loss = compute_loss(model, batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        twin.update([batch], [rate])
    assert equal_states(state_of(model), state_of(twin.model))


def test_perturbed_twin_is_another_run():
    """The control: a relative perturbation of 1e-3 does not vanish."""
    model, optimizer = wrapped()
    train(model, optimizer, 5)
    twin = Twin(model, optimizer, UpdateFactor(optimizer), lockstep_update(compute_loss))
    twin.perturb(0)
    assert not equal_states(state_of(model), state_of(twin.model))
    for p, q in zip(model.parameters(), twin.model.parameters(), strict=True):
        assert torch.allclose(p, q, rtol=1e-2)


def test_updating_a_twin_leaves_the_random_state():
    """A twin with dropout draws from a state of its own."""
    model, optimizer = wrapped(dropout=0.5)
    twin = Twin(model, optimizer, UpdateFactor(optimizer), lockstep_update(compute_loss))
    before = torch.get_rng_state()
    twin.update(batches(1), [1e-2])
    assert torch.equal(before, torch.get_rng_state())


def test_twin_of_a_foreign_parameter_is_refused():
    """An optimizer that holds what the model does not have cannot be copied with it."""
    model, optimizer = wrapped()
    optimizer.param_groups[0]["params"].append(torch.nn.Parameter(torch.zeros(3)))
    with pytest.raises(GrowthError, match=r"1 parameters that the model does not have.*\(3,\)"):
        Twin(model, optimizer, UpdateFactor(optimizer), lockstep_update(compute_loss))


def test_owners_update_takes_one_batch():
    """Only the owner knows how micro-batches are weighed."""
    called = []
    update = owner_update(lambda *args: called.append(args))
    update("model", "optimizer", ["batch"])
    assert called == [("model", "optimizer", "batch")]
    with pytest.raises(GrowthError, match="2 micro-batches"):
        update("model", "optimizer", ["one", "other"])


def test_tau_of_what_was_not_measured_is_infinite():
    """Then no gate passes."""
    assert tau_of(0.25, 0.5) == 0.25
    assert tau_of(None, 0.5) == float("inf")
