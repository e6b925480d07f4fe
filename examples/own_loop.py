"""A training loop of your own, with Esper beside it: handwritten digits, a small MLP.

Run it with ``python examples/own_loop.py``. What Esper adds are the lines with ``esper`` or
``grower`` in them. On so small a host growing may take as much work as training does; a package of
kernels that is taken over has beaten the run itself on held-out digits.
"""

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn

import esper


def main(epochs: int = 60) -> str:
    """Train, grow where the evidence allows it, and return the report as text."""
    torch.manual_seed(0)
    raw = load_digits()
    x, y = torch.tensor(raw.data / 16, dtype=torch.float32), torch.tensor(raw.target)
    train, gate, test = torch.randperm(len(y)).split([896, 450, 451])

    model = esper.wrap(nn.Sequential(nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 10)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    grower = esper.Grower(
        model,
        optimizer,
        compute_loss=lambda model, batch: F.cross_entropy(model(batch[0]), batch[1]),
        evaluate=lambda model: F.cross_entropy(model(x[gate]), y[gate], reduction="none"),
        horizon=epochs * 28,
    )
    for _ in range(epochs):
        for part in train[torch.randperm(len(train))].split(32):
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
