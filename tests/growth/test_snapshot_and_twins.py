"""Snapshots give back exactly what was, and twins do exactly what the run does."""

from __future__ import annotations

import gc

import pytest
import torch
from crafted_measures import Course, chain
from growing import batches, equal_states, growing, host, state_of, train, wrapped
from torch import nn
from torch.optim.swa_utils import AveragedModel

import esper
from esper.continuity.snapshot import RunSnapshot
from esper.contracts.errors import GrowthError
from esper.growth.live_step import LiveStep
from esper.growth.policies import Never
from esper.growth.twins import Twin, owner_update
from esper.wrapping.wrap import layers, wrap


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


def snapshots_beside(others):
    gc.collect()
    found = [each for each in gc.get_objects() if type(each) is RunSnapshot]
    return [each for each in found if id(each) not in others]


@pytest.mark.slow
@pytest.mark.usefixtures("short_trials")
def test_one_snapshot_is_kept_and_its_size_was_told():
    """While a package is under watch, with the average that follows; none before, none behind."""
    others = {id(each): each for each in snapshots_beside(())}  # what other tests have left
    model, optimizer = chain()
    averaged = esper.follow(model, AveragedModel(model))
    course = Course(model, optimizer, after=lambda: averaged.update_parameters(model))
    course.to_the_verdict()
    told = course.run.trial_memory(0).snapshot
    own = sum(p.numel() * p.element_size() for p in model.parameters())
    assert told > 4 * own  # weights, two moments, and those of the average
    assert snapshots_beside(others) == []
    course.update()
    (kept,) = snapshots_beside(others)
    assert kept.size_bytes == told
    del kept
    for _ in range(30):
        course.update()
    assert not course.grower.stages
    assert snapshots_beside(others) == []


def run_of(model, optimizer, num=5, **options):
    """Train a few updates; return the run, which grows nothing, and its Grower."""
    grower = growing(model, optimizer, policy=Never(), **options)
    train(model, optimizer, num, grower)
    return grower._run, grower


@pytest.mark.parametrize("optimizer_class", [torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW])
def test_twin_without_a_package_stays_bit_equal_to_the_run(optimizer_class):
    """Same batches and rates, own random state: dropout included, the twin is the run."""
    model, optimizer = wrapped(dropout=0.3, optimizer_class=optimizer_class)
    torch.manual_seed(3)
    run, grower = run_of(model, optimizer)
    twin = Twin(run)
    for index in range(8):
        optimizer.param_groups[0]["lr"] = 1e-2 / (1 + index)
        train(model, optimizer, 1, grower, random_seed=index)
        twin.update(batches(1, random_seed=index), run.live_step())
    assert equal_states(state_of(model), state_of(twin.model))


def test_perturbed_twin_is_another_run():
    """The control: a relative perturbation of 1e-3 does not vanish, and draws other numbers."""
    model, optimizer = wrapped(dropout=0.3)
    run, _ = run_of(model, optimizer)
    twin, other = Twin(run), Twin(run)
    twin.perturb(0)
    assert not equal_states(state_of(model), state_of(twin.model))
    for p, q in zip(model.parameters(), twin.model.parameters(), strict=True):
        assert torch.allclose(p, q, rtol=1e-2)
    twin.model.load_state_dict(other.model.state_dict())  # only the draws differ now
    for each in (twin, other):
        each.update(batches(1), run.live_step())
    assert not equal_states(state_of(twin.model), state_of(other.model))


def test_updating_a_twin_leaves_the_random_state():
    """A twin with dropout draws from a state of its own."""
    run, _ = run_of(*wrapped(dropout=0.5))
    twin = Twin(run)
    before = torch.get_rng_state()
    twin.update(batches(1), LiveStep(settings=[{"lr": 1e-2}]))
    assert torch.equal(before, torch.get_rng_state())


def test_twin_of_a_foreign_parameter_is_refused():
    """An optimizer that holds what the model does not have cannot be copied with it."""
    model, optimizer = wrapped()
    run, _ = run_of(model, optimizer)
    optimizer.param_groups[0]["params"].append(nn.Parameter(torch.zeros(3)))
    with pytest.raises(GrowthError, match=r"1 parameters that the model does not have.*\(3,\)"):
        Twin(run)


def test_twin_has_none_of_the_owners_hooks_and_those_of_libraries():
    """A hook that watches the run is not called for a copy; one that computes a weight is."""
    model = host()
    nn.utils.spectral_norm(model[4])
    wrap(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    run, _ = run_of(model, optimizer, num=0)
    called = []
    model[0].register_forward_hook(lambda *_: called.append("forward"))
    model[0].register_forward_pre_hook(lambda *_, **__: called.append("pre"), with_kwargs=True)
    model[0].register_full_backward_hook(lambda *_: called.append("backward"))
    optimizer.register_step_post_hook(lambda *_: called.append("step"))
    twin = Twin(run)
    twin.update(batches(1), LiveStep(settings=[{"lr": 1e-2}]))
    assert called == []
    assert [len(m._forward_pre_hooks) for m in twin.model] == [0, 0, 0, 0, 1, 0]
    assert len(model[0]._forward_hooks) == len(model[0]._forward_pre_hooks) == 1


def test_twin_that_the_owner_builds_is_a_copy_of_the_run():
    """Its values, modes and seeds are the live model's, and to build it draws nothing of its."""
    model, optimizer = wrapped()
    run, _ = run_of(model, optimizer, twin=lambda: host(7))
    model[0].graft(1, "mlp-4x4-w32", alpha=0.5, example=torch.randn(3, 4))
    model[1].eval()
    model[4].bias.requires_grad_(False)
    before = torch.get_rng_state()
    twin = Twin(run)
    assert torch.equal(before, torch.get_rng_state())
    assert equal_states(state_of(model), state_of(twin.model))
    assert [m.training for m in twin.model.modules()] == [m.training for m in model.modules()]
    wants = [[p.requires_grad for p in each.parameters()] for each in (model, twin.model)]
    assert wants[0] == wants[1]
    assert layers(twin.model)["0"].alpha(1) == 0.5
    twin.update(batches(1), LiveStep(settings=[{"lr": 1e-2}]))
    assert not equal_states(state_of(model), state_of(twin.model))


def test_twin_that_the_owner_builds_has_each_seeds_own_values():
    """Whichever of two kernels of one shape was there first."""
    model, optimizer = wrapped()
    run, _ = run_of(model, optimizer, twin=lambda: host(7))
    for seed_idx in (1, 0):
        model[0].graft(seed_idx, "mlp-4x4-w32", example=torch.randn(3, 4))
        with torch.no_grad():
            for p in model[0].seed_kernel(seed_idx).parameters():
                p.add_(torch.randn_like(p))
    twin = Twin(run)
    assert all(torch.equal(p, twin.copy_of(p)) for p in model.parameters())


@pytest.mark.parametrize("make", [None, lambda: host(7)], ids=["copied", "built"])
def test_twin_has_a_kernel_that_is_out_of_use(make):
    """With its values and moments; it is saved and comes back."""
    model, optimizer = wrapped()
    run, _ = run_of(model, optimizer, twin=make)
    model[0].graft(1, "mlp-4x4-w32", example=torch.randn(3, 4))
    esper.sync_optimizer(model, optimizer)
    train(model, optimizer, 2)
    own = list(model[0].seed_kernel(1).parameters())
    fault = model[0].seed_kernel(1).register_forward_hook(lambda *_: torch.tensor(torch.nan))
    while len(list(model[0].parameters())) > 2:
        train(model, optimizer, 3)
        esper.maintain(model)
    fault.remove()
    twin = Twin(run)
    for each in (twin, Twin.from_state_dict(twin.state_dict(), run)):
        copies = list(each.model[0].seed_kernel(1).parameters())
        for p, copied in zip(own, copies, strict=True):
            assert torch.equal(p, copied)
            moments = optimizer.state[p]
            its = each.optimizer.state[copied]
            assert moments
            assert all(torch.equal(moments[k], its[k]) for k in moments)


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda model: "a model", "returns a torch.nn.Module like the model, got str"),
        (lambda model: model, "shares parameters with the model"),
        (lambda model: nn.Sequential(nn.Linear(3, 3)), "is not like the model: select="),
        (
            lambda model: nn.Sequential(*map(nn.Linear, range(1, 7), range(1, 7))),
            "is not like the model",
        ),
    ],
    ids=["no module", "the model", "fewer modules", "other shapes"],
)
def test_what_is_no_copy_is_refused_with_what_twin_returns(build, words):
    """At the first update, before anything depends on it."""
    model, optimizer = wrapped()
    grower = growing(model, optimizer, twin=lambda: build(model))
    with pytest.warns(UserWarning, match=f"nothing can grow.*{words}"):
        train(model, optimizer, 1, grower)


def test_owners_update_takes_one_batch():
    """Only the owner knows how micro-batches are weighed."""
    called = []
    update = owner_update(lambda *args: called.append(args))
    update("model", "optimizer", ["batch"], LiveStep(settings=[]))
    assert called == [("model", "optimizer", "batch")]
    with pytest.raises(GrowthError, match="2 micro-batches"):
        update("model", "optimizer", ["one", "other"], LiveStep(settings=[]))
