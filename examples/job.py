"""A job for ``esper grow examples.job:job``: regression on generated data, default settings.

The target is Friedman's first function: ``10 sin(pi x0 x1) + 20 (x2 - 0.5)^2 + 10 x3 + 5 x4`` of
ten inputs of which five matter, with noise of standard deviation 1.
"""

import torch
from sklearn.datasets import make_friedman1
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import esper

SIZES = {"train": 1500, "gate": 500, "test": 1000}


def per_sample_loss(model: nn.Module, batch: list[Tensor]) -> Tensor:
    """Return the squared error of each sample."""
    x, y = batch
    return (model(x) - y).square().squeeze(1)


def job(epochs: int = 60) -> esper.GrowthJob:
    """Return the job: an MLP of two hidden layers, each of sixteen units."""
    torch.manual_seed(0)
    x, y = make_friedman1(sum(SIZES.values()), noise=1.0, random_state=0)
    whole = torch.tensor(x, dtype=torch.float32), torch.tensor(y, dtype=torch.float32)[:, None]
    train, gate, test = (
        TensorDataset(*parts)
        for parts in zip(*(t.split(list(SIZES.values())) for t in whole), strict=True)
    )
    hidden = [nn.Linear(10, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU()]
    model = nn.Sequential(*hidden, nn.Linear(16, 1))
    return esper.GrowthJob(
        model=model,
        optimizer=torch.optim.AdamW(model.parameters(), lr=3e-3),
        train=DataLoader(train, batch_size=32, shuffle=True),
        gate=DataLoader(gate, batch_size=500),
        test=DataLoader(test, batch_size=1000),
        loss=per_sample_loss,
        epochs=epochs,
    )
