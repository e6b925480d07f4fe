"""A training loop of your own, with Esper beside it: breast cancer data, a small MLP.

Run it with ``python examples/own_loop.py``. What Esper adds are the lines with ``esper`` or
``grower`` in them. The task is nearly linear: at the plateau kernels are
tried, and the gates refuse them.
"""

import torch
import torch.nn.functional as F
from sklearn.datasets import load_breast_cancer
from torch import nn

import esper


def main(epochs: int = 120) -> str:
    """Train, grow where the evidence allows it, and return the report as text."""
    torch.manual_seed(0)
    raw = load_breast_cancer()
    x, y = torch.tensor(raw.data, dtype=torch.float32), torch.tensor(raw.target)
    train, gate, test = torch.randperm(len(y)).split([249, 200, 120])
    x = (x - x[train].mean(0)) / x[train].std(0)

    model = esper.wrap(nn.Sequential(nn.Linear(30, 8), nn.ReLU(), nn.Linear(8, 2)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    grower = esper.Grower(
        model,
        optimizer,
        compute_loss=lambda model, batch: F.cross_entropy(model(batch[0]), batch[1]),
        evaluate=lambda model: F.cross_entropy(model(x[gate]), y[gate], reduction="none"),
        horizon=epochs * 8,
        overhead=0.3,
    )
    for _ in range(epochs):
        for part in train[torch.randperm(249)].split(32):
            loss = F.cross_entropy(model(x[part]), y[part])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            grower.step(loss, batch=(x[part], y[part]))
        grower.end_epoch()
    grower.close()
    report = str(grower.report())
    plain = esper.unwrap(model)
    accuracy = (plain(x[test]).argmax(1) == y[test]).float().mean()
    return f"{report}\nTest accuracy: {accuracy:.1%}"


if __name__ == "__main__":
    print(main())
