"""What each rank runs for the tests of Lightning under ``torchrun``; a folder is its argument."""

import json
import logging
import sys
import warnings
from pathlib import Path

import growing
import pytorch_lightning as pl
import torch
import torch.distributed as dist
from torch import nn

import esper
from esper.integrations.lightning import EsperCallback

logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
warnings.filterwarnings("ignore", ".*(does not have many workers|LeafSpec)")


class Module(pl.LightningModule):
    """The small host of tests.growing, without its norm, of which each rank has its own figures."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(*(p for p in growing.host() if not isinstance(p, nn.BatchNorm1d)))

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch):
        return (self(batch[0]) - batch[1]).square().mean()

    def validation_step(self, batch):
        self.log("val_loss", (self(batch[0]) - batch[1]).square().mean(), sync_dist=True)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


class Held(pl.Callback):
    """Holds the ranks against each other behind every batch, and saves at the end of an epoch."""

    def __init__(self, path):
        self.path, self.num_apart, self.num_seen = path, 0, 0

    def on_train_batch_end(self, trainer, pl_module, *_):
        told = [None] * trainer.world_size
        dist.all_gather_object(told, [p.tolist() for p in pl_module.parameters()])
        self.num_apart += any(each != told[0] for each in told)
        self.num_seen += 1

    def on_train_epoch_end(self, trainer, pl_module):
        if trainer.current_epoch == 5:
            trainer.save_checkpoint(self.path)


def loader(x, y, **options):
    return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), **options)


def fit(folder, module, part, ckpt_path=None):
    """Fit under DDP; return what the rank has seen, as JSON has it."""
    grows = EsperCallback(
        loss="mse", policy=esper.EveryN(20), module=part, horizon=None, **growing.SHORT
    )
    held = Held(folder / "held.ckpt")
    trainer = pl.Trainer(
        default_root_dir=folder,
        callbacks=[grows, held],
        strategy="ddp",
        devices=2,
        max_epochs=7,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        num_sanity_val_steps=0,
    )
    gate = loader(growing.GATE_X, growing.GATE_Y, batch_size=50)
    data = loader(growing.X, growing.Y, batch_size=30, shuffle=False)
    trainer.fit(module, data, gate, ckpt_path=ckpt_path)
    report = grows.grower.report()
    return {
        "apart": held.num_apart,
        "trials": [(each.verdict, each.samples) for each in report.trials],
        "grafts": [(each.site, each.blueprint, each.verdict) for each in report.grafts],
        "end": {name: value.tolist() for name, value in module.named_parameters()},
    }


def main(folder):
    """Fit a part of a module, and go on from its checkpoint."""
    found = {"whole": fit(folder, Module(), "net")}
    found["resumed"] = fit(folder, Module(), "net", folder / "held.ckpt")
    (folder / f"rank {dist.get_rank()}").write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
