"""What the optimizer does with a step that a kernel under ``guard="step"`` has spoiled."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from esper.growth.continuity import sync_optimizer
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
