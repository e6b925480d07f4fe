"""A loop of your own under Accelerate: handwritten digits, stopped half-way and resumed.

Run it with ``python examples/accelerate_digits.py``; ``pip install 'esper-morph[hf,demo]'``. The
lines that grow the model are ``esper_prepare``, where ``accelerator.prepare`` stood, and
``grower.step``. ``save_state`` and ``load_state`` take kernels, their moments and the state of
growth along with everything else.
"""

import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import set_seed
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset, TensorDataset

import esper
from esper.integrations.accelerate import esper_prepare


def splits() -> tuple[TensorDataset, list[Tensor]]:
    """Return the digits, and which are trained on, growing is decided on, and tested."""
    raw = load_digits()
    x, y = torch.tensor(raw.data / 16, dtype=torch.float32), torch.tensor(raw.target)
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))
    return TensorDataset(x, y), list(order.split([896, 450, 451]))


def compute_loss(model: nn.Module, batch: list[Tensor]) -> Tensor:
    """Return the loss of a batch."""
    return F.cross_entropy(model(batch[0]), batch[1])


def fit(epochs: int, folder: Path, *, stop_at: int | None = None) -> nn.Module:
    """Train a fresh model, or go on from the folder's state where it has one."""
    set_seed(0)
    data, (train, gate, _) = splits()
    accelerator = Accelerator(cpu=True)
    model = nn.Sequential(nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 10))
    gate_loader = DataLoader(Subset(data, gate.tolist()), batch_size=450)
    model, optimizer, loader, grower = esper_prepare(
        accelerator,
        model,
        torch.optim.AdamW(model.parameters(), lr=3e-3),
        DataLoader(Subset(data, train.tolist()), batch_size=32, shuffle=True),
        compute_loss=compute_loss,
        evaluate=esper.evaluate_on(gate_loader),
        horizon=epochs * 28,
    )
    done = 0
    if folder.exists():
        accelerator.load_state(folder)
        done = grower.updates // 28
    with grower:
        for epoch in range(done, epochs):
            if epoch == stop_at:
                print(f"the machine went down behind update {grower.updates}")
                return model
            for batch in loader:
                loss = compute_loss(model, batch)
                accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
                grower.step(loss, batch=batch)
            grower.end_epoch()
            accelerator.save_state(folder)
    print(grower.report())
    return model


def main(epochs: int = 40) -> float:
    """Train, stop half-way, resume, and return the test accuracy of what is plain torch then."""
    with tempfile.TemporaryDirectory() as folder:
        fit(epochs, Path(folder) / "state", stop_at=epochs // 2)
        model = fit(epochs, Path(folder) / "state")
    data, (_, _, test) = splits()
    x, y = data[test]
    accuracy = float((esper.unwrap(model).eval()(x).argmax(1) == y).float().mean())
    print(f"Test accuracy: {accuracy:.1%}")
    return accuracy


if __name__ == "__main__":
    main()
