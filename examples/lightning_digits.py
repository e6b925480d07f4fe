"""Lightning, with Esper as one more callback: handwritten digits, stopped half-way and resumed.

Run it with ``python examples/lightning_digits.py``; ``pip install 'esper-morph[lightning,demo]'``.
The line that grows the model is the one with ``EsperCallback`` in it. A checkpoint of Lightning's
own takes kernels, their moments and the state of growth along, and ``ckpt_path=`` brings them back.
"""

import tempfile
from pathlib import Path

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from pytorch_lightning.callbacks import ModelCheckpoint
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset, TensorDataset

import esper
from esper.integrations.lightning import EsperCallback


class Digits(pl.LightningModule):
    """A small MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 10))

    def forward(self, x: Tensor) -> Tensor:
        """Return scores, shape (samples, 10)."""
        return self.net(x)

    def training_step(self, batch: list[Tensor]) -> Tensor:
        """Return the loss of a batch."""
        return F.cross_entropy(self(batch[0]), batch[1])

    validation_step = training_step

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return AdamW."""
        return torch.optim.AdamW(self.parameters(), lr=3e-3)


class Crash(pl.Callback):
    """Ends a fit as a machine that goes down does.

    Args:
        epoch: When.
    """

    def __init__(self, epoch: int) -> None:
        self.epoch = epoch

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Raise at the epoch."""
        del pl_module
        if trainer.current_epoch == self.epoch:
            raise ConnectionError("the machine went down")


def loaders() -> tuple[DataLoader, DataLoader, tuple[Tensor, Tensor]]:
    """Return batches to train on, batches that growing is decided on, and a test split."""
    raw = load_digits()
    x, y = torch.tensor(raw.data / 16, dtype=torch.float32), torch.tensor(raw.target)
    train, gate, test = torch.randperm(len(y), generator=torch.Generator().manual_seed(0)).split(
        [896, 450, 451]
    )
    data = TensorDataset(x, y)
    return (
        DataLoader(Subset(data, train.tolist()), batch_size=32, shuffle=True),
        DataLoader(Subset(data, gate.tolist()), batch_size=450),
        (x[test], y[test]),
    )


def fit(epochs: int, folder: Path, *others: pl.Callback, ckpt_path: str | None = None) -> Digits:
    """Fit a fresh module, or go on from a checkpoint, and print what growth did."""
    pl.seed_everything(0, verbose=False)
    module, (train, gate, _) = Digits(), loaders()
    grows = EsperCallback(loss="cross_entropy")
    saves = ModelCheckpoint(folder, save_last=True)
    trainer = pl.Trainer(
        max_epochs=epochs,
        callbacks=[grows, saves, *others],
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    try:
        trainer.fit(module, train, gate, ckpt_path=ckpt_path)
    except ConnectionError as error:
        print(f"{error} behind update {grows.grower.updates}")
    else:
        print(grows.grower.report())
    return module


def main(epochs: int = 40) -> float:
    """Train, crash half-way, resume, and return the test accuracy of what is plain torch then."""
    with tempfile.TemporaryDirectory() as folder:
        fit(epochs, Path(folder), Crash(epochs // 2))
        module = fit(epochs, Path(folder), ckpt_path=f"{folder}/last.ckpt")
    plain, (_, _, (x, y)) = esper.unwrap(module).eval(), loaders()
    accuracy = float((plain(x).argmax(1) == y).float().mean())
    print(f"Test accuracy: {accuracy:.1%}")
    return accuracy


if __name__ == "__main__":
    main()
