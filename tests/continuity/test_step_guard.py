"""What the optimizer does with a step that a kernel under ``guard="step"`` has spoiled."""

from __future__ import annotations

import contextlib

import pytest
import torch
from torch import nn

from esper.continuity.optimizer import sync_optimizer
from esper.contracts.errors import KernelExecutionError
from esper.seeds.maintenance import maintain
from esper.seeds.shadow import shadow_pass
from esper.state.kernel import prepare_kernel
from esper.wrapping.wrap import layers, wrap


class Spoils(nn.Module):
    """A kernel that gives NaN once it is told to."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(4))
        self.is_bad = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.weight + (float("nan") if self.is_bad else 0.0)


@pytest.mark.parametrize("guarded", [True, False])
def test_spoiled_step_leaves_weights_and_running_statistics(guarded: bool) -> None:
    """A step with a NaN kernel changes nothing under the guard; without it, it does."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
    wrap(model, select="0")
    optimizer = torch.optim.AdamW(model.parameters())
    sync_optimizer(model, optimizer)
    kernel = Spoils()
    guard = "step" if guarded else "off"
    layers(model)["0"].graft(0, kernel, alpha=1.0, guard=guard, example=torch.randn(8, 4))
    sync_optimizer(model, optimizer)

    def update() -> None:
        model(torch.randn(8, 4)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    update()
    before = {name: value.clone() for name, value in model[1].state_dict().items()}
    weights = [p.detach().clone() for p in model[2].parameters()]
    kernel.is_bad = True
    update()
    after = model[1].state_dict()
    unchanged = all(torch.equal(before[name], after[name]) for name in before)
    same = all(torch.equal(a, b) for a, b in zip(weights, model[2].parameters(), strict=True))
    assert (unchanged and same) is guarded


def stepping(kernel, *, guard="step", frozen=False):
    """A wrapped host with a kernel, its optimizer, and one update on given data."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 1))
    wrap(model, select="0")
    for p in model[0].parameters():
        p.requires_grad_(not frozen)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    sync_optimizer(model, optimizer)
    layer = layers(model)["0"]
    layer.graft(0, kernel, alpha=1.0, guard=guard, example=torch.randn(8, 4))
    sync_optimizer(model, optimizer)

    def update(x):
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        maintain(model)

    return layer, update


@pytest.mark.parametrize("frozen", [False, True])
def test_bad_batch_is_not_the_kernels_fault(frozen):
    """Where the host's own output is not finite, nothing is counted against the seed."""
    layer, update = stepping(Spoils(), frozen=frozen)
    update(torch.randn(8, 4))
    update(torch.full((8, 4), float("nan")))
    assert layer.state_layout.state(0).name == "ACTIVE"


def test_fossil_that_keeps_failing_raises():
    """Three dropped steps in a row are an error at the next maintain; a clean one ends the row."""
    kernel = Spoils()
    layer, update = stepping(kernel)
    update(torch.randn(8, 4))
    layer.fossilize(0)
    for failures in (2, 2):
        kernel.is_bad = True
        for _ in range(failures):
            update(torch.randn(8, 4))
        kernel.is_bad = False
        update(torch.randn(8, 4))
    kernel.is_bad = True
    update(torch.randn(8, 4))
    update(torch.randn(8, 4))
    with pytest.raises(KernelExecutionError, match="3 times in a row"):
        update(torch.randn(8, 4))


def test_shadow_kernel_upstream_leaves_no_fault_in_a_seed():
    """What an audition feeds to the seeds after it says nothing about them."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 1))
    wrap(model)
    first, second = layers(model).values()
    second.graft(0, nn.Sequential(Powers(), nn.Linear(4, 1)), alpha=1.0, example=torch.randn(8, 4))
    huge = nn.Linear(4, 4)
    nn.init.constant_(huge.weight, 1e10)
    x = torch.randn(8, 4)
    for in_shadow in (True, False):
        for _ in range(3):
            kernel = prepare_kernel(first, huge)
            inner = shadow_pass(model) if in_shadow else contextlib.nullcontext()
            with inner, first.shadow(0, kernel):
                model(x)
        maintain(model)
        isolated = second.state_layout.state(0).name == "ERROR_RECOVERY"
        assert isolated is not in_shadow  # outside of a shadow pass it counts: the control


class Powers(nn.Module):
    """Finite for small inputs only."""

    def forward(self, x):
        return x.pow(6)


def test_seed_survives_a_move_of_its_model():
    """What was observed on the old device is forgotten, not mixed with the new one's."""
    model = nn.Sequential(nn.Linear(4, 4))
    wrap(model)
    layers(model)["0"].graft(0, nn.Linear(4, 4), alpha=1.0, example=torch.randn(8, 4))
    model(torch.randn(8, 4))
    model.to("meta")
    seed = layers(model)["0"]._kasmina.seeds[0]
    seed.follow_device()
    model(torch.randn(8, 4, device="meta"))
    assert seed.seen.rows().device.type == "meta"


def test_what_was_observed_before_a_shadow_pass_is_kept():
    """A fault that was not read yet is still there after an audition."""
    model = wrap(nn.Sequential(nn.Linear(4, 4)))
    layer = layers(model)["0"]
    layer.graft(0, nn.Linear(4, 4), alpha=1.0, example=torch.randn(8, 4))
    model(torch.randn(8, 4))
    before = list(layer._kasmina.seeds[0].seen.calls)
    with shadow_pass(model):
        model(torch.randn(8, 4))
    after = list(layer._kasmina.seeds[0].seen.calls)
    assert len(before) == len(after) == 1
    assert before[0] is after[0]


def test_the_first_step_under_the_guard_can_be_undone() -> None:
    """Running statistics come back though no good step went before, and nobody synced since."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
    wrap(model, select="0")
    optimizer = torch.optim.AdamW(model.parameters())
    sync_optimizer(model, optimizer)
    kernel = Spoils()
    layers(model)["0"].graft(0, kernel, alpha=1.0, guard="always", example=torch.randn(8, 4))
    layers(model)["0"].set_guard(0, "step")
    kernel.is_bad = True
    model(torch.randn(8, 4)).square().mean().backward()
    assert model[1].running_mean.isnan().any()
    optimizer.step()
    assert torch.equal(model[1].running_mean, torch.zeros(4))


def test_a_remainder_of_one_sample_does_not_isolate_a_norm_kernel() -> None:
    """It works on several samples, and statistics over one are none; it is told as skipped."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 1))
    wrap(model, select="0")
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    sync_optimizer(model, optimizer)
    kernel = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    layer = layers(model)["0"]
    layer.graft(0, kernel, alpha=0.5, guard="step", example=torch.randn(8, 4))
    sync_optimizer(model, optimizer)
    for _ in range(30):
        for size in (8, 8, 8, 1):
            optimizer.zero_grad()
            model(torch.randn(size, 4)).square().mean().backward()
            optimizer.step()
            maintain(model)
    assert layer.state_layout.state(0).name == "ACTIVE"
