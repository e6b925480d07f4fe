"""Avalanche's growing classifier beside Esper's widening."""

import warnings
from types import SimpleNamespace

import torch
from avalanche.models.dynamic_modules import IncrementalClassifier
from avalanche.models.dynamic_optimizers import update_optimizer
from comparison import Comparison, told
from torch import nn

import esper

X = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))


def moments() -> Comparison:
    """Let a layer that was trained grow, and count what of its moments the optimizer keeps."""
    model = IncrementalClassifier(8, 2)
    optimizer = torch.optim.Adam(model.parameters())
    known = update_optimizer(optimizer, dict(model.named_parameters()), None)
    _train(model, optimizer)
    model.adaptation(SimpleNamespace(classes_in_this_experience=[0, 1, 2, 3]))
    update_optimizer(optimizer, dict(model.named_parameters()), known)

    mlp = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8))
    own = torch.optim.Adam(mlp.parameters())
    _train(mlp, own)
    esper.widen(mlp, own, "", intermediate=24)
    return Comparison(
        asked="a layer that grows keeps its moments",
        source="avalanche#725",
        peer=f"{_kept(optimizer, model)} grown tensors have moments",
        esper=f"{_kept(own, mlp)} of a widened MLP have moments, padded for the new units",
    )


def _train(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    model(X).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()


def _kept(optimizer: torch.optim.Optimizer, model: nn.Module) -> str:
    found = ["exp_avg" in optimizer.state.get(p, {}) for p in model.parameters()]
    return f"{sum(found)} of {len(found)}"


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    told([moments])
