"""An optimizer's state goes by names: to the same parameter, in whatever order things are made."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import esper

WIDTH = 4


def built():
    torch.manual_seed(0)
    return esper.wrap(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH)))


def graft(model, index):
    model[index].graft(0, f"mlp-{WIDTH}x{WIDTH}-w32", example=torch.randn(8, WIDTH))


def train(model, optimizer, num=3):
    for i in range(num):
        torch.manual_seed(i)
        optimizer.zero_grad()
        model(torch.randn(8, WIDTH)).square().mean().backward()
        optimizer.step()


def split(model):
    """Weights decay, the rest does not."""
    named = list(model.named_parameters())
    return [
        {"params": [p for _, p in named if p.ndim > 1], "weight_decay": 0.1},
        {"params": [p for _, p in named if p.ndim <= 1], "weight_decay": 0.0},
    ]


GROUPS = {
    "one group": lambda model: model.parameters(),
    "split by decay": split,
    "named": lambda model: model.named_parameters(),
}


def grown_run(groups="one group", make=torch.optim.AdamW):
    """Return a model whose first and then last layer grew while it trained, and its optimizer."""
    model = built()
    optimizer = make(GROUPS[groups](model), lr=1e-2)
    for index in (2, 0):
        graft(model, index)
        esper.sync_optimizer(model, optimizer)
        train(model, optimizer)
    return model, optimizer


def moments(model, optimizer):
    return {name: optimizer.state[p]["exp_avg"] for name, p in model.named_parameters()}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


@pytest.mark.parametrize("groups", GROUPS)
def test_state_is_in_the_models_order_with_its_names(groups):
    """As that of an optimizer which is made of the grown model, and its names beside."""
    model, optimizer = grown_run(groups)
    fresh = torch.optim.AdamW(GROUPS[groups](model), lr=1e-2)
    names = {id(p): name for name, p in model.named_parameters()}
    expected = [[names[id(p)] for p in group["params"]] for group in fresh.param_groups]
    saved = optimizer.state_dict()
    assert [group["param_names"] for group in saved["param_groups"]] == expected
    ids = [i for group in saved["param_groups"] for i in group["params"]]
    assert ids == list(range(len(ids)))


@pytest.mark.parametrize("groups", GROUPS)
def test_an_optimizer_made_after_the_model_is_loaded_gets_the_right_moments(groups):
    """Lightning's and the Trainer's order: model, optimizer, its state; nothing of Esper called."""
    model, optimizer = grown_run(groups)
    again = built()
    again.load_state_dict(model.state_dict())
    fresh = torch.optim.AdamW(GROUPS[groups](again), lr=1e-2)
    fresh.load_state_dict(optimizer.state_dict())
    assert same(moments(again, fresh), moments(model, optimizer))


@pytest.mark.parametrize("groups", GROUPS)
def test_an_optimizer_made_before_the_model_is_loaded_gets_the_right_moments(groups):
    """Accelerate's order: model and optimizer are made, then both are loaded."""
    model, optimizer = grown_run(groups)
    again = built()
    fresh = torch.optim.AdamW(GROUPS[groups](again), lr=1e-2)
    again.load_state_dict(copy.deepcopy(model.state_dict()))
    fresh.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert same(moments(again, fresh), moments(model, optimizer))


@pytest.mark.slow
@pytest.mark.parametrize("groups", GROUPS)
def test_a_resumed_run_goes_on_bit_for_bit(groups):
    """Whatever the order was in which its parts were made."""
    for after in (True, False):
        model, optimizer = grown_run(groups)
        states = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
        again = built()
        if after:
            again.load_state_dict(states[0])
        fresh = torch.optim.AdamW(GROUPS[groups](again), lr=1e-2)
        if not after:
            again.load_state_dict(states[0])
        fresh.load_state_dict(states[1])
        for each in ((model, optimizer), (again, fresh)):
            train(*each)
        assert same(again.state_dict(), model.state_dict())


def test_control_by_position_moments_are_mixed_up():
    """Without the hooks the state of the same run goes to other parameters, and nothing raises."""
    model, optimizer = grown_run()
    optimizer._optimizer_state_dict_pre_hooks.clear()
    optimizer._optimizer_state_dict_post_hooks.clear()
    own = {id(p) for name, p in model.named_parameters() if "_seeds" in name}
    optimizer.param_groups[0]["params"].sort(key=lambda p: id(p) in own)  # as they appeared
    again = built()
    again.load_state_dict(model.state_dict())
    fresh = torch.optim.AdamW(again.parameters(), lr=1e-2)
    fresh.load_state_dict(optimizer.state_dict())
    assert not same(moments(again, fresh), moments(model, optimizer))


def test_state_of_kernels_that_are_not_there_is_refused():
    """An optimizer that is loaded before its model says what is missing, and keeps its own."""
    _, optimizer = grown_run()
    again = built()
    fresh = torch.optim.AdamW(again.parameters(), lr=1e-2)
    esper.sync_optimizer(again, fresh)
    with pytest.raises(
        ValueError, match=r"not in this optimizer: 0\._seeds.*load the model's state"
    ):
        fresh.load_state_dict(optimizer.state_dict())
    assert not fresh.state


def test_state_of_another_model_is_refused():
    """A host parameter that the state has nothing of is named."""
    _, optimizer = grown_run()
    saved = optimizer.state_dict()
    group = saved["param_groups"][0]
    for values in (group["params"], group["param_names"]):
        del values[0]
    with pytest.raises(ValueError, match=r"nothing of 0\.weight"):
        optimizer.load_state_dict(saved)


def test_a_hosts_state_loads_into_a_grown_run(caplog):
    """Its moments are the host's; kernels begin without, and that is said."""
    model = built()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    esper.sync_optimizer(model, optimizer)
    train(model, optimizer)
    expected, saved = moments(model, optimizer), optimizer.state_dict()
    again = built()
    fresh = torch.optim.AdamW(again.parameters(), lr=1e-2)
    graft(again, 0)
    esper.sync_optimizer(again, fresh)
    fresh.load_state_dict(saved)
    found = {n: fresh.state[p]["exp_avg"] for n, p in again.named_parameters() if p in fresh.state}
    assert same(found, expected)
    assert "begin without" in caplog.text


def test_groups_stay_without_names_where_they_had_none():
    """So that a group without names can be added, as those who thaw layers do."""
    model, optimizer = grown_run()
    optimizer.load_state_dict(optimizer.state_dict())
    again = built()
    again.load_state_dict(model.state_dict())
    fresh = torch.optim.AdamW(again.parameters(), lr=1e-2)
    fresh.load_state_dict(optimizer.state_dict())
    esper.sync_optimizer(again, fresh)
    for each in (optimizer, fresh):
        each.add_param_group({"params": [nn.Parameter(torch.zeros(2))]})


def test_several_optimizers_get_their_own():
    """Muon has the weights and AdamW the rest; each loads what is its."""
    parts = []
    for _ in range(2):
        model = built()
        weights = torch.optim.Muon([p for p in model.parameters() if p.ndim == 2], lr=1e-2)
        rest = torch.optim.AdamW([p for p in model.parameters() if p.ndim != 2], lr=1e-2)
        parts.append((model, weights, rest))
    (model, *optimizers), (again, *fresh) = parts
    graft(model, 0)
    esper.sync_optimizer(model, optimizers)
    for each in optimizers:
        train(model, each)
    esper.sync_optimizer(again, fresh)
    again.load_state_dict(model.state_dict())
    for one, other in zip(optimizers, fresh, strict=True):
        other.load_state_dict(one.state_dict())
    for name, p in model.named_parameters():
        one = next(o.state[p] for o in optimizers if p in o.state)
        other = next(
            o.state[again.get_parameter(name)]
            for o in fresh
            if again.get_parameter(name) in o.state
        )
        assert all(torch.equal(torch.as_tensor(one[k]), torch.as_tensor(other[k])) for k in one)


def isolate(model, optimizer):
    """Let the first kernel give NaN until it is out of use."""
    fault = model[0].seed_kernel(0).register_forward_hook(lambda *_: torch.tensor(torch.nan))
    for _ in range(4):
        train(model, optimizer)
        esper.maintain(model)
    fault.remove()


def isolated_run(optimizer_first, groups="one group"):
    """A run whose kernel has been isolated, after it was trained with its host."""
    model = built()
    optimizer = torch.optim.AdamW(GROUPS[groups](model), lr=1e-2) if optimizer_first else None
    graft(model, 0)
    optimizer = optimizer or torch.optim.AdamW(GROUPS[groups](model), lr=1e-2)
    esper.sync_optimizer(model, optimizer)
    train(model, optimizer)
    isolate(model, optimizer)
    assert not any("_seeds" in name for name in model.state_dict())
    return model, optimizer


@pytest.mark.parametrize("optimizer_first", [True, False])
@pytest.mark.parametrize("groups", GROUPS)
def test_a_kernel_that_is_out_of_use_has_its_own_moments_in_a_checkpoint(
    groups, optimizer_first, tmp_path
):
    """And where it is in use again, both runs are the same."""
    model, optimizer = isolated_run(optimizer_first, groups)
    esper.save_checkpoint(tmp_path / "run", model, optimizer)
    again = built()
    other = torch.optim.AdamW(GROUPS[groups](again), lr=1e-2)
    esper.load_checkpoint(tmp_path / "run", again, other)
    for run in ((model, optimizer), (again, other)):
        for _ in range(4):
            train(*run)
            for _ in range(3):
                esper.maintain(run[0])
    assert "0._seeds.0.kernel.steps.0.weight" in dict(again.named_parameters())
    assert same(model.state_dict(), again.state_dict())
    assert same(moments(model, optimizer), moments(again, other))


@pytest.mark.parametrize("optimizer_first", [True, False])
@pytest.mark.parametrize("groups", GROUPS)
def test_the_hosts_moments_load_where_the_models_state_has_no_kernel(groups, optimizer_first):
    """A kernel that is out of use is in no state of the model; its moments are nobody else's."""
    model, optimizer = isolated_run(optimizer_first, groups)
    again = built()
    other = torch.optim.AdamW(GROUPS[groups](again), lr=1e-2)
    esper.sync_optimizer(again, other)
    again.load_state_dict(model.state_dict())
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert same(moments(again, other), moments(model, optimizer))
    assert len(other.state) == 4
    train(model, optimizer)
    train(again, other)
    assert same(model.state_dict(), again.state_dict())


def partly(named, *, grown=(0,)):
    """A run whose optimizer trains a scale, too, that is no part of the model."""
    model, scale = built(), nn.Parameter(torch.tensor(0.5))
    own = [("scale", scale), *model.named_parameters()]
    optimizer = torch.optim.AdamW(own if named else [p for _, p in own], lr=1e-2)
    for index in grown:
        graft(model, index)
    esper.sync_optimizer(model, optimizer)
    for i in range(3):
        torch.manual_seed(i)
        optimizer.zero_grad()
        (scale * model(torch.randn(8, WIDTH)).square().mean()).backward()
        optimizer.step()
    return model, optimizer, scale


@pytest.mark.parametrize("named", [True, False])
def test_what_is_no_part_of_the_model_has_its_place(named, tmp_path):
    """An owner's scale in the same group gets its own moments, and so does all else."""
    model, optimizer, scale = partly(named)
    esper.save_checkpoint(tmp_path / "run", model, optimizer)
    saved = copy.deepcopy(optimizer.state_dict())
    for load in (
        lambda again, other: esper.load_checkpoint(tmp_path / "run", again, other),
        lambda again, other: (
            again.load_state_dict(model.state_dict()),
            other.load_state_dict(saved),
        ),
    ):
        again, other, its = partly(named, grown=())
        load(again, other)
        assert same(moments(again, other), moments(model, optimizer))
        assert torch.equal(other.state[its]["exp_avg"], optimizer.state[scale]["exp_avg"])


@pytest.mark.parametrize("named", [True, False])
def test_beside_what_is_no_part_of_the_model_other_kernels_are_refused(named):
    """As many parameters as were saved, in another order."""
    run, another = partly(named), partly(named, grown=(2,))
    with pytest.raises(ValueError, match=r"not in this optimizer: 0\._seeds"):
        another[1].load_state_dict(run[1].state_dict())


def test_an_owners_names_stay(tmp_path):
    """As in an optimizer of a larger module, of which a part grows."""
    runs = []
    for _ in range(3):
        outer = nn.ModuleDict({"net": built()})
        runs.append((outer["net"], torch.optim.AdamW(outer.named_parameters(), lr=1e-2)))
    (model, optimizer), (again, other), (third, fresh) = runs
    optimizer.add_param_group({"params": [("mine", nn.Parameter(torch.ones(1)))], "lr": 1e-3})
    other.add_param_group({"params": [("mine", nn.Parameter(torch.ones(1)))], "lr": 1e-3})
    fresh.add_param_group({"params": [("mine", nn.Parameter(torch.ones(1)))], "lr": 1e-3})
    graft(model, 0)
    esper.sync_optimizer(model, optimizer, group_for=lambda *_: 1)
    train(model, optimizer)
    esper.save_checkpoint(tmp_path / "run", model, optimizer)
    esper.load_checkpoint(tmp_path / "run", again, other)
    third.load_state_dict(model.state_dict())
    esper.sync_optimizer(third, fresh, group_for=lambda *_: 1)
    fresh.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for found, its in ((again, other), (third, fresh)):
        assert same(moments(found, its), moments(model, optimizer))
        assert [g["param_names"] for g in its.param_groups] == [
            g["param_names"] for g in optimizer.param_groups
        ]
    assert "net.0._seeds.0.kernel.steps.0.weight" in other.param_groups[1]["param_names"]


def test_a_kernel_that_went_leaves_its_moments_to_nobody():
    """Also where another has come, and the optimizer has not been told of either."""
    model = built()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    graft(model, 0)
    esper.sync_optimizer(model, optimizer)
    train(model, optimizer)
    model[0].unload_kernel(0)
    graft(model, 2)
    saved = copy.deepcopy(optimizer.state_dict())
    again = built()
    other = torch.optim.AdamW(again.parameters(), lr=1e-2)
    again.load_state_dict(model.state_dict())
    other.load_state_dict(saved)
    found = {n: other.state[p]["exp_avg"] for n, p in again.named_parameters() if p in other.state}
    hosts = {n: p for n, p in model.named_parameters() if "_seeds" not in n}
    assert same(found, {n: optimizer.state[p]["exp_avg"] for n, p in hosts.items()})


def test_state_without_names_of_other_kernels_is_refused():
    """Nobody told Esper of its optimizer; by position it would go to parameters of other shapes."""
    model, again = built(), built()
    graft(model, 0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    train(model, optimizer)
    graft(again, 2)
    other = torch.optim.AdamW(again.parameters(), lr=1e-2)
    esper.sync_optimizer(again, other)
    with pytest.raises(ValueError, match=r"by its place .* a model with other kernels"):
        other.load_state_dict(optimizer.state_dict())
    alike = built()
    alike.load_state_dict(model.state_dict())
    fresh = torch.optim.AdamW(alike.parameters(), lr=1e-2)
    esper.sync_optimizer(alike, fresh)
    fresh.load_state_dict(optimizer.state_dict())
    assert same(moments(alike, fresh), moments(model, optimizer))


def test_another_kernel_of_the_same_name_is_refused():
    """A wider one has come into the seed since the state was saved."""
    model, optimizer = grown_run()
    saved = copy.deepcopy(optimizer.state_dict())
    model[0].unload_kernel(0)
    model[0].graft(0, f"mlp-{WIDTH}x{WIDTH}-w64", example=torch.randn(8, WIDTH))
    esper.sync_optimizer(model, optimizer)
    expected = len(optimizer.state)
    with pytest.raises(ValueError, match=r"would go to 0\._seeds.*with other kernels"):
        optimizer.load_state_dict(saved)
    assert len(optimizer.state) == expected


class Projected(torch.optim.Optimizer):
    """Keeps its moments in fewer numbers, under a name that torch's optimizers use too."""

    def __init__(self, params):
        super().__init__(params, {"lr": 1e-2})

    @torch.no_grad()
    def step(self, closure=None):
        for p in self.param_groups[0]["params"]:
            state = self.state[p]
            state.setdefault("exp_avg", torch.zeros(1)).lerp_(p.grad.mean().view(1), 0.5)
            p.sub_(self.param_groups[0]["lr"] * state["exp_avg"])


def test_moments_may_have_shapes_of_their_own():
    """What one of torch's would not have, another package's may."""
    runs = []
    for _ in range(2):
        model = built()
        optimizer = Projected(model.parameters())
        graft(model, 0)
        esper.sync_optimizer(model, optimizer)
        runs.append((model, optimizer))
    (model, optimizer), (again, other) = runs
    train(model, optimizer)
    again.load_state_dict(model.state_dict())
    other.load_state_dict(optimizer.state_dict())
    assert same(moments(again, other), moments(model, optimizer))


class Around(nn.Module):
    """A model with a part called ``module``, and a layer of its own of the same name as there."""

    def __init__(self):
        super().__init__()
        self.module = nn.ModuleDict({"fc": nn.Linear(WIDTH, WIDTH)})
        self.fc = nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        return self.fc(torch.relu(self.module["fc"](x)))


@pytest.mark.parametrize("groups", ["one group", "named"])
def test_a_part_called_module_is_no_wrapper(groups, tmp_path):
    """Its layers have their own moments, not those of layers named alike outside of it."""
    runs = []
    for _ in range(3):
        torch.manual_seed(0)
        model = esper.wrap(Around())
        runs.append((model, torch.optim.AdamW(GROUPS[groups](model), lr=1e-2)))
    (model, optimizer), (again, other), (third, fresh) = runs
    model.fc.graft(0, f"mlp-{WIDTH}x{WIDTH}-w32", example=torch.randn(8, WIDTH))
    esper.sync_optimizer(model, optimizer)
    train(model, optimizer)
    esper.save_checkpoint(tmp_path / "run", model, optimizer)
    esper.load_checkpoint(tmp_path / "run", again, other)
    third.load_state_dict(model.state_dict())
    fresh.load_state_dict(optimizer.state_dict())
    assert same(moments(again, other), moments(model, optimizer))
    assert same(moments(third, fresh), moments(model, optimizer))


def with_two_seeds(order):
    """A model of which one layer has unlike kernels of one shape, grafted in this order."""
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH))
    model = esper.wrap(layers, num_seeds=2)
    for seed_idx in order:
        model[0].graft(seed_idx, f"mlp-{WIDTH}x{WIDTH}-w32", example=torch.randn(8, WIDTH))
        with torch.no_grad():
            for p in model[0].seed_kernel(seed_idx).parameters():
                p.add_(0.1 * torch.randn_like(p))
    return model


def test_seeds_that_were_grafted_in_any_order_have_their_own_moments():
    """Also in an optimizer that Esper has not seen when it loads: it goes by position."""
    model = with_two_seeds([1, 0])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    esper.sync_optimizer(model, optimizer)
    train(model, optimizer)
    again = with_two_seeds([])
    again.load_state_dict(model.state_dict())
    fresh = torch.optim.AdamW(again.parameters(), lr=1e-2)
    fresh.load_state_dict(optimizer.state_dict())
    assert same(moments(again, fresh), moments(model, optimizer))


@pytest.mark.parametrize("isolated", [0, 1])
def test_a_kernel_comes_back_to_its_place(isolated):
    """Parameters are in the order that they had before it was out of use."""
    model = with_two_seeds([0, 1])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    esper.sync_optimizer(model, optimizer)
    before = list(model.state_dict())
    hook = lambda *_: torch.tensor(torch.nan)  # noqa: E731 - one line
    fault = model[0].seed_kernel(isolated).register_forward_hook(hook)
    for _ in range(4):
        train(model, optimizer)
        esper.maintain(model)
    fault.remove()
    assert len(model.state_dict()) < len(before)
    esper.sync_optimizer(model, optimizer)
    trained = [id(p) for p in optimizer.param_groups[0]["params"]]
    for _ in range(12):
        esper.maintain(model)
    assert list(model.state_dict()) == before
    assert trained == [id(p) for p in model.parameters()]


@pytest.mark.parametrize("optimizer_first", [True, False])
@pytest.mark.parametrize("groups", GROUPS)
def test_a_state_has_what_the_models_state_has(groups, optimizer_first):
    """Without kernels that are out of use it fits an optimizer that Esper has not seen."""
    model, optimizer = isolated_run(optimizer_first, groups)
    saved = copy.deepcopy(optimizer.state_dict())
    again = built()
    again.load_state_dict(model.state_dict())
    other = torch.optim.AdamW(GROUPS[groups](again), lr=1e-2)
    other.load_state_dict(saved)
    assert same(moments(again, other), moments(model, optimizer))


@pytest.mark.parametrize("groups", GROUPS)
def test_a_kernel_that_is_out_of_use_keeps_its_moments_through_a_load(groups, caplog):
    """A state has nothing of it, and it does not begin without; one that has, is loaded."""
    model, optimizer = isolated_run(optimizer_first=True, groups=groups)
    own = list(model[0].seed_kernel(0).parameters())
    before = [optimizer.state[p]["exp_avg"].clone() for p in own]
    assert all(each.any() for each in before)
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert all(
        torch.equal(optimizer.state[p]["exp_avg"], m) for p, m in zip(own, before, strict=True)
    )
    assert "begin without" not in caplog.text
    assert all(isinstance(key, torch.Tensor) for key in optimizer.state)


class Tied(nn.Module):
    """A kernel with another layer's weight, and a scale of its own."""

    def __init__(self, weight):
        super().__init__()
        self.weight, self.scale = weight, nn.Parameter(torch.zeros(WIDTH))

    def forward(self, x):
        return nn.functional.linear(x, self.weight) * self.scale


def test_what_is_tied_into_a_kernel_is_its_hosts():
    """With its moments in a state while the kernel is out of use."""
    model = built()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    model[0].graft(0, Tied(model[2].weight), example=torch.randn(8, WIDTH))
    esper.sync_optimizer(model, optimizer)
    train(model, optimizer)
    isolate(model, optimizer)
    again = built()
    other = torch.optim.AdamW(again.parameters(), lr=1e-2)
    esper.sync_optimizer(again, other)
    other.load_state_dict(optimizer.state_dict())
    assert same(moments(again, other), moments(model, optimizer))
