"""Something new to learn: the digits 0 to 4 first, then all ten, and what is left of the old.

Run it with ``python examples/new_classes.py``. A network that knows five digits goes on to ten, its
hidden layer frozen or free, with growth and without it. A frozen layer takes no gradient, and may
grow all the same: what its output lacks is recorded there, and kernels learn it beside it; one that
is kept in its linear form is folded into the frozen weights.
Fine-tuning without growth stands beside each, since growth rescues what cannot learn otherwise and
is no better where the old network simply can.
"""

import copy

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

import esper

NUM_OLD = 5
"""Digits that are known first: 0 to 4."""


def splits() -> dict[str, tuple[Tensor, Tensor]]:
    """Return the data to train on, to decide on, and to test."""
    raw = load_digits()
    x, y = torch.tensor(raw.data / 16, dtype=torch.float32), torch.tensor(raw.target)
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))
    parts = order.split([896, 450, 451])
    return {name: (x[i], y[i]) for name, i in zip(("train", "gate", "test"), parts, strict=True)}


def old(split: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Return the samples of the digits that are known first."""
    x, y = split
    return x[y < NUM_OLD], y[y < NUM_OLD]


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    split: tuple[Tensor, Tensor],
    epochs: int,
    grower: esper.Grower | None = None,
) -> None:
    """Train on batches of 32; a Grower is told of each."""
    x, y = split
    for _ in range(epochs):
        for part in torch.randperm(len(y)).split(32):
            loss = F.cross_entropy(model(x[part]), y[part])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if grower is not None:
                grower.step(loss, batch=(x[part], y[part]))
        if grower is not None:
            grower.end_epoch()


def accuracy(model: nn.Module, split: tuple[Tensor, Tensor]) -> float:
    """Return the share of digits that are told right."""
    x, y = split
    with torch.no_grad():
        return float((model.eval()(x).argmax(1) == y).float().mean())


def go_on(known: nn.Module, epochs: int, *, frozen: bool, grows: bool) -> dict[str, float]:
    """Let a network that knows five digits learn ten, and return what it knows then."""
    torch.manual_seed(1)
    data, model = splits(), copy.deepcopy(known)
    model[0].requires_grad_(not frozen)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    if grows:
        esper.wrap(model, select="0")
        with esper.Grower(
            model,
            optimizer,
            compute_loss=lambda model, batch: F.cross_entropy(model(batch[0]), batch[1]),
            evaluate=esper.evaluate_on([data["gate"]]),
            horizon=epochs * 28,
            overhead=2.0,
        ) as grower:
            train(model, optimizer, data["train"], epochs, grower)
        model = esper.unwrap(model)
    else:
        train(model, optimizer, data["train"], epochs)
    return {
        "old digits": accuracy(model, old(data["test"])),
        "all digits": accuracy(model, data["test"]),
        "parameters": sum(p.numel() for p in model.parameters()),
    }


def main(epochs: int = 40) -> dict[tuple[bool, bool], dict[str, float]]:
    """Print and return what was learned, by (hidden layer frozen, grown)."""
    torch.manual_seed(0)
    data = splits()
    known = nn.Sequential(nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 10))
    train(known, torch.optim.AdamW(known.parameters(), lr=3e-3), old(data["train"]), epochs)
    print(f"before: {accuracy(known, old(data['test'])):.1%} of the old digits")
    found = {}
    for frozen in (True, False):
        for grows in (False, True):
            found[frozen, grows] = result = go_on(known, epochs, frozen=frozen, grows=grows)
            print(
                f"{'frozen' if frozen else 'free':>6} hidden layer, "
                f"{'grown' if grows else 'fine-tuned':>10}: {result['old digits']:.1%} of the old "
                f"digits, {result['all digits']:.1%} of all, {result['parameters']:,} parameters"
            )
    return found


if __name__ == "__main__":
    main()
