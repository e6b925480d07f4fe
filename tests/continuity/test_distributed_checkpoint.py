"""Folders of torch.distributed.checkpoint, and models and optimizers that have grown."""

import logging

import pytest
import torch
import torch.distributed.checkpoint as dcp
from kernel_blueprints import mlp_blueprint
from torch import nn
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.state_dict import (
    get_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)

import esper
from esper.compiler.lowering import lower
from esper.state.layer_record import record_of

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.distributed is.*:UserWarning")


def run(*, select=None, num_updates=2):
    """Return a model and its optimizer, at the beginning or a few updates on."""
    torch.manual_seed(0)
    model = esper.wrap(nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6)), select=select)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    train(model, optimizer, num_updates)
    return model, optimizer


def train(model, optimizer, num_updates):
    for step in range(num_updates):
        torch.manual_seed(step)
        optimizer.zero_grad()
        model(torch.randn(4, 6)).square().mean().backward()
        optimizer.step()


def grown():
    """Return a run with a kernel in it."""
    model, optimizer = run()
    model[0].graft(0, lower(mlp_blueprint()), alpha=0.5, example=torch.randn(3, 6))
    esper.sync_optimizer(model, optimizer)
    train(model, optimizer, 2)
    return model, optimizer


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A grown run, the state that was saved of it, and its folder."""
    model, optimizer = grown()
    folder = tmp_path_factory.mktemp("dcp")
    model_state, optim_state = get_state_dict(model, optimizer)
    dcp.save({"model": model_state, "optim": optim_state}, checkpoint_id=folder)
    return model, optimizer, folder


def assert_same(one, other):
    """Hold weights and moments of two runs against each other."""
    for mine, theirs in zip(
        one[0].state_dict().items(), other[0].state_dict().items(), strict=True
    ):
        assert mine[0] == theirs[0]
        assert torch.equal(mine[1], theirs[1])
    for p, q in zip(one[0].parameters(), other[0].parameters(), strict=True):
        mine, theirs = one[1].state[p], other[1].state[q]
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[name], theirs[name]) for name in mine)


def loaded(model, optimizer, folder):
    """Load in place, as torch's tutorials do."""
    model_state, optim_state = get_state_dict(model, optimizer)
    state = {"model": model_state, "optim": optim_state}
    dcp.load(state, checkpoint_id=folder)
    set_state_dict(
        model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optim"]
    )


@pytest.mark.parametrize(
    "make", [grown, lambda: run(num_updates=0), run], ids=["grown", "fresh", "trained"]
)
def test_what_was_saved_is_loaded_in_place(saved, make):
    """Whatever a run was before, its kernels, weights and moments are those of the folder."""
    model, optimizer = make()
    esper.build_as_saved(saved[2], model, optimizer)
    loaded(model, optimizer, saved[2])
    assert_same((model, optimizer), saved)
    train(model, optimizer, 1)


def test_the_same_grafts_need_no_building(saved):
    """What a model asks for it gets."""
    model, optimizer = grown()
    train(model, optimizer, 1)
    loaded(model, optimizer, saved[2])
    assert_same((model, optimizer), saved)


def test_kernels_that_the_folder_does_not_have_go(tmp_path):
    """The model is the smaller one that was saved."""
    dcp.save({"model": run()[0].state_dict()}, checkpoint_id=tmp_path)
    model, optimizer = grown()
    esper.build_as_saved(tmp_path, model, optimizer)
    assert model[0].seed_kernel(0) is None
    assert len(optimizer.param_groups[0]["params"]) == 4


def test_a_state_that_was_cut_is_refused(saved):
    """An optimizer that asked without its kernels is told what was left out, and how to have it."""
    model, optimizer = run()
    esper.sync_optimizer(model, optimizer)
    _, theirs = get_state_dict(*saved[:2])
    with pytest.raises(
        ValueError, match=r"_seeds\.0.*left them out.*build_as_saved.*load_checkpoint"
    ):
        set_optimizer_state_dict(model, optimizer, theirs)


def test_a_state_that_came_before_the_kernels_is_told_of(saved, caplog):
    """set_state_dict loads the optimizer first, and nobody can refuse what it has cut."""
    model, _optimizer = run()
    ours, _ = get_state_dict(*saved[:2])
    with caplog.at_level(logging.WARNING, logger="esper"):
        set_model_state_dict(model, ours)
    assert "build_as_saved" in caplog.text


@pytest.mark.parametrize(
    ("options", "prefix", "said"),
    [
        ({"select": ["2"]}, "model.", r"'0' below 'model\.'.*select="),
        ({}, "net.", r"'model\.0\._seeds\.0'.*prefix='net\.'"),
    ],
    ids=["not wrapped", "another prefix"],
)
def test_what_does_not_fit_is_refused(saved, options, prefix, said):
    """A kernel that has no place in the model is named, and nothing is built."""
    model, optimizer = run(**options)
    with pytest.raises(ValueError, match=said):
        esper.build_as_saved(saved[2], model, optimizer, prefix=prefix)
    assert len(optimizer.param_groups[0]["params"]) == 4


@pytest.mark.parametrize("with_optimizer", [True, False])
def test_kernels_under_a_step_guard_come_back(tmp_path, with_optimizer):
    """As a Grower leaves them: the folder fits what was built, also without an optimizer."""
    model, _ = grown()
    model[0].set_guard(0, "step")
    dcp.save({"model": model.state_dict()}, checkpoint_id=tmp_path)
    fresh, other = run(num_updates=0)
    esper.build_as_saved(tmp_path, fresh, other if with_optimizer else None)
    state = {"model": fresh.state_dict()}
    dcp.load(state, checkpoint_id=tmp_path)
    fresh.load_state_dict(state["model"])

    x = torch.randn(3, 6)
    assert torch.equal(fresh(x), model(x))
    assert record_of(fresh[0]).seeds[0].guard == ("step" if with_optimizer else "always")


def test_a_kernel_without_moments_yet_comes_back_where_torch_is_told(tmp_path):
    """Grafted behind the last step: what the folder lacks begins anew, the rest is as it was."""
    model, optimizer = grown()
    model[2].graft(0, lower(mlp_blueprint()), example=torch.randn(3, 6))
    esper.sync_optimizer(model, optimizer)
    model_state, optim_state = get_state_dict(model, optimizer)
    dcp.save({"model": model_state, "optim": optim_state}, checkpoint_id=tmp_path)
    fresh, other = run(num_updates=0)
    esper.build_as_saved(tmp_path, fresh, other)
    of_model, of_optimizer = get_state_dict(fresh, other)
    state = {"model": of_model, "optim": of_optimizer}
    dcp.load(state, checkpoint_id=tmp_path, planner=DefaultLoadPlanner(allow_partial_load=True))
    set_state_dict(fresh, other, model_state_dict=state["model"], optim_state_dict=state["optim"])

    assert torch.equal(_first(fresh), _first(model))
    moments = other.state[fresh[0].weight]["exp_avg"]
    assert torch.equal(moments, optimizer.state[model[0].weight]["exp_avg"])
    assert not other.state[_first(fresh)]["exp_avg"].any()


def _first(model):
    """Return the first weight of the later kernel."""
    return next(model[2].seed_kernel(0).parameters())


def test_a_run_with_a_kernel_that_is_out_of_use_is_saved(tmp_path):
    """Without it, in the model's state and the optimizer's alike; the rest comes back."""
    model, optimizer = grown()
    fault = model[0].seed_kernel(0).register_forward_hook(lambda *_: torch.tensor(torch.nan))
    while any("_seeds" in name for name in model.state_dict()):
        train(model, optimizer, 2)
        esper.maintain(model)
    fault.remove()
    model_state, optim_state = get_state_dict(model, optimizer)
    dcp.save({"model": model_state, "optim": optim_state}, checkpoint_id=tmp_path)
    again = run()
    esper.build_as_saved(tmp_path, *again)
    loaded(*again, tmp_path)
    assert_same((model, optimizer), again)
