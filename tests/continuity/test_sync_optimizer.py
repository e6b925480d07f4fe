"""Grafts by hand: the optimizer follows the model, and skips a step that a kernel spoilt."""

import copy

import pytest
import torch
from torch import nn
from torch.optim import SGD, AdamW

import esper
from esper.continuity.optimizer import sync_optimizer
from esper.continuity.placement import Placement
from esper.execution.host_class import adopt
from esper.state.host_parts import host_parameters


class Kernel(nn.Module):
    """Adds nothing at birth, and a NaN to the gradient of its weights where it is told to."""

    def __init__(self):
        super().__init__()
        self.out = nn.Linear(4, 4)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)
        self.poison = False

    def forward(self, x):
        y = self.out(x)
        return y * float("nan") if self.poison else y


def wrapped():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
    for index in (0, 2):
        adopt(model[index], name=str(index))
    return model


def batch(seed=0):
    return torch.randn(8, 4, generator=torch.Generator().manual_seed(seed))


def names_in(optimizer, model):
    names = {id(p): name for name, p in model.named_parameters()}
    return [[names.get(id(p)) for p in group["params"]] for group in optimizer.param_groups]


def grouped(model):
    return SGD([{"params": model[0].parameters()}, {"params": model[2].parameters()}], lr=0.1)


def test_graft_joins_the_group_of_its_layer():
    """After a graft, one call brings the kernel's parameters to the group of its layer."""
    model = wrapped()
    optimizer = grouped(model)
    model[2].graft(0, Kernel(), alpha=1.0, example=batch())
    sync_optimizer(model, optimizer)
    first, second = names_in(optimizer, model)
    assert first == ["0.weight", "0.bias"]
    assert second[:2] == ["2.weight", "2.bias"]
    assert len(second) == 4
    assert all(name.startswith("2._seeds.0.") for name in second[2:])


def test_doing_it_twice_changes_nothing():
    """A second call finds everything in place."""
    model = wrapped()
    optimizer = grouped(model)
    model[2].graft(0, Kernel(), alpha=1.0, example=batch())
    sync_optimizer(model, optimizer)
    before = names_in(optimizer, model)
    sync_optimizer(model, optimizer)
    assert names_in(optimizer, model) == before
    assert len(optimizer._optimizer_step_pre_hooks) == 1


@pytest.mark.parametrize("built_after", [False, True], ids=["optimizer-first", "graft-first"])
def test_unloaded_kernel_goes_with_its_state(built_after):
    """What is unloaded is dropped, also where the optimizer was built with it."""
    model = wrapped()
    optimizer = None if built_after else grouped(model)
    model[2].graft(0, Kernel(), alpha=1.0, example=batch())
    optimizer = grouped(model) if built_after else optimizer
    sync_optimizer(model, optimizer)
    model(batch()).sum().backward()
    optimizer.step()
    model[2].unload_kernel(0)
    sync_optimizer(model, optimizer)
    assert names_in(optimizer, model) == [["0.weight", "0.bias"], ["2.weight", "2.bias"]]
    assert len(optimizer.state) <= 4


def test_parameters_of_the_owners_choice_stay_out():
    """Host layers that the owner left out, and frozen kernels, are not added."""
    model = wrapped()
    optimizer = SGD(model[0].parameters(), lr=0.1)
    frozen = Kernel().requires_grad_(requires_grad=False)
    model[2].graft(0, frozen, alpha=1.0, example=batch())
    sync_optimizer(model, optimizer)
    assert names_in(optimizer, model) == [["0.weight", "0.bias"]]


def test_parameters_of_other_models_stay():
    """What the optimizer trains besides the model is none of Esper's business."""
    model, other = wrapped(), nn.Parameter(torch.zeros(2))
    optimizer = SGD([*model.parameters(), other], lr=0.1)
    sync_optimizer(model, optimizer)
    assert any(p is other for p in optimizer.param_groups[0]["params"])


def test_host_and_kernel_parameters_are_told_apart():
    """A layer's own parameters and its kernels' are two lists without a common member."""
    model = wrapped()
    model[2].graft(0, Kernel(), alpha=1.0, example=batch())
    host = {id(p) for p in host_parameters(model[2])}
    kernel = {id(p) for p in model[2].seed_kernel(0).parameters()}
    assert host == {id(model[2].weight), id(model[2].bias)}
    assert len(kernel) == 2
    assert not host & kernel


@pytest.mark.parametrize("is_synced", [True, False])
@pytest.mark.parametrize("with_closure", [False, True])
def test_step_that_a_kernel_spoilt_is_skipped(with_closure, is_synced):
    """Under guard="step", a step with a kernel that is not finite changes no weight."""
    model = wrapped()
    optimizer = AdamW(model.parameters(), lr=0.1)
    sync_optimizer(model, optimizer)

    def closure():
        optimizer.zero_grad()
        loss = model(batch()).square().sum()
        loss.backward()
        return loss

    def update():
        if with_closure:
            optimizer.step(closure)
        else:
            closure()
            optimizer.step()

    update()  # in which there is nothing to look at
    model[2].graft(0, Kernel(), alpha=1.0, guard="step", example=batch())
    if is_synced:
        sync_optimizer(model, optimizer)
    update()
    before = copy.deepcopy({name: p.detach() for name, p in model.named_parameters()})
    model[2].seed_kernel(0).poison = True
    update()
    after = {name: p for name, p in model.named_parameters() if name in before}
    assert all(torch.equal(before[name], p) for name, p in after.items())
    update()
    assert not torch.equal(before["0.weight"], model[0].weight)


def test_without_the_hook_a_kernel_spoils_the_step():
    """The control: with the optimizer's hook taken away the same step ruins the host."""
    model = wrapped()
    optimizer = AdamW(model.parameters(), lr=0.1)
    sync_optimizer(model, optimizer)
    model[2].graft(0, Kernel(), alpha=1.0, guard="step", example=batch())
    optimizer._optimizer_step_pre_hooks.clear()
    model[2].seed_kernel(0).poison = True
    model(batch()).square().sum().backward()
    optimizer.step()
    assert not model[0].weight.isfinite().all()


def test_the_model_is_looked_through_once_however_many_kernels_it_has(monkeypatch):
    """A sync of many kernels takes work in proportion to them."""
    made = []

    class Counted(Placement):
        def __init__(self, *args):
            made.append(args)
            super().__init__(*args)

    monkeypatch.setattr("esper.continuity.optimizer.Placement", Counted)
    model = wrapped()
    optimizer = SGD(model.parameters(), lr=0.1)
    for layer in (model[0], model[2]):
        layer.graft(0, Kernel(), alpha=1.0, example=batch())
        layer.graft(1, Kernel(), alpha=1.0, example=batch())
    sync_optimizer(model, optimizer)
    assert len(made) == 1
    assert len(optimizer.param_groups[0]["params"]) == 4 + 8


def test_a_parameter_of_two_kernels_joins_once():
    """The second finds it in the group that the first one joined."""
    model, shared = wrapped(), nn.Linear(4, 4)
    optimizer = SGD(model.parameters(), lr=0.1)
    for index in (0, 2):
        model[index].graft(0, nn.Sequential(shared), alpha=0.5, example=batch())
    sync_optimizer(model, optimizer)
    held = [id(p) for p in optimizer.param_groups[0]["params"]]
    assert len(held) == len(set(held)) == 4 + 2


@pytest.mark.parametrize("within_a_step", [False, True])
def test_optimizers_that_come_together_read_the_flags_once_a_step(monkeypatch, within_a_step):
    """Synced apart, then together: what each had of its own goes, also during a step of theirs."""
    model, reads = wrapped(), []
    monkeypatch.setattr(
        "esper.continuity.optimizer.read_step_flags", lambda *_: reads.append(1) or []
    )
    first, second = (SGD(model[index].parameters(), lr=0.1) for index in (0, 2))
    model[0].graft(0, nn.Linear(4, 4), alpha=0.5, example=batch())
    for optimizer in (first, second):
        sync_optimizer(model, optimizer)
    if within_a_step:
        handle = first.register_step_post_hook(lambda *_: sync_optimizer(model, (first, second)))
        first.step()
        handle.remove()
    else:
        sync_optimizer(model, (first, second))
    reads.clear()
    first.step()
    assert len(reads) == 1
    second.step()
    assert len(reads) == 2


def test_kernels_in_two_modules_of_one_optimizer_are_refused():
    """Syncing the second would drop those of the first; with both in one module all stay."""
    both = nn.ModuleList(esper.wrap(nn.Sequential(nn.Linear(4, 4))) for _ in range(2))
    optimizer = torch.optim.Adam(both.parameters())
    for model in both:
        model[0].graft(0, nn.Linear(4, 4), example=torch.randn(2, 4))
    esper.sync_optimizer(both[0], optimizer)
    with pytest.raises(ValueError, match=r"kernels in another module.*would lose them"):
        esper.sync_optimizer(both[1], optimizer)
    esper.sync_optimizer(both, optimizer)
    assert len(optimizer.param_groups[0]["params"]) == 8
    with pytest.raises(ValueError, match="kernels in another module"):
        esper.sync_optimizer(both[0], optimizer)
    both[1][0].unload_kernel(0)
    esper.sync_optimizer(both[0], optimizer)
    assert len(optimizer.param_groups[0]["params"]) == 6
