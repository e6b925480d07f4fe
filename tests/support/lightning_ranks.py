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
from pytorch_lightning.strategies import ModelParallelStrategy
from torch import nn
from torch.distributed.fsdp import fully_shard

import esper
from esper.integrations.lightning import EsperCallback
from esper.state.shards import whole

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


class Sharded(Module):
    """The same in shards, as a module says that for Lightning's ModelParallelStrategy."""

    def forward(self, x):
        return self.net(x) + 0.0  # FSDP2 warns of an output that is a view

    def configure_model(self):
        fully_shard(self.net[0], mesh=self.device_mesh["data_parallel"])
        fully_shard(self, mesh=self.device_mesh["data_parallel"])


class Held(pl.Callback):
    """Holds the ranks against each other behind every batch, and saves at the end of an epoch."""

    def __init__(self, path):
        self.path, self.num_apart, self.num_seen, self.val_loss = path, 0, 0, None

    def on_train_batch_end(self, trainer, pl_module, *_):
        told = [None] * trainer.world_size
        dist.all_gather_object(told, [whole(p).tolist() for p in pl_module.parameters()])
        self.num_apart += any(each != told[0] for each in told)
        self.num_seen += 1

    def on_train_epoch_end(self, trainer, pl_module):
        if trainer.current_epoch == 5:
            self.val_loss = float(trainer.callback_metrics["val_loss"])
            trainer.save_checkpoint(self.path)
            if isinstance(trainer.strategy, ModelParallelStrategy):
                trainer.strategy._save_distributed_checkpoint = False  # as its argument does
                trainer.save_checkpoint(self.path.with_suffix(".file"))


def loader(x, y, **options):
    return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), **options)


def in_shards():
    """Return what shards the module over both ranks."""
    return ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1)


def trainer_of(folder, *callbacks, strategy):
    """Return a Trainer of two ranks that is silent."""
    return pl.Trainer(
        default_root_dir=folder,
        callbacks=[*callbacks],
        strategy=strategy,
        devices=2,
        max_epochs=7,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        num_sanity_val_steps=0,
    )


def gate_loader():
    """Return what is held out."""
    return loader(growing.GATE_X, growing.GATE_Y, batch_size=50)


def fit(path, module, part="net", ckpt_path=None, strategy="ddp"):
    """Fit, and save at the path; return what the rank has seen, as JSON has it."""
    grows = EsperCallback(
        loss="mse",
        policy=esper.EveryN(20),
        module=part,
        twin=Module if isinstance(module, Sharded) else None,
        horizon=None,
        **growing.SHORT,
    )
    held = Held(path)
    trainer = trainer_of(path.parent, grows, held, strategy=strategy)
    data = loader(growing.X, growing.Y, batch_size=30, shuffle=False)
    trainer.fit(module, data, gate_loader(), ckpt_path=ckpt_path)
    report = grows.grower.report()
    return {
        "apart": held.num_apart,
        "trials": [(each.verdict, each.samples) for each in report.trials],
        "grafts": [(each.site, each.blueprint, each.verdict) for each in report.grafts],
        "val_loss": held.val_loss,
        "end": {name: whole(value).tolist() for name, value in module.named_parameters()},
    }


def validated(path):
    """Return the loss of a fresh module that a checkpoint is loaded into."""
    trainer = trainer_of(path.parent, EsperCallback(module="net"), strategy=in_shards())
    return trainer.validate(Sharded(), gate_loader(), ckpt_path=path, verbose=False)[0]["val_loss"]


class Leaving(pl.Callback):
    """Ends the fit of one rank; the other is in a backward then, and waits for its gradients."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_rank == 1 and batch_idx == 5:
            raise RuntimeError("rank 1 has had enough")


def left(folder):
    """Fit until one rank raises; return the error that this one ends with."""
    grows = EsperCallback(loss="mse", policy=esper.Never(), horizon=None)
    trainer = trainer_of(folder, grows, Leaving(), strategy="ddp")
    data = loader(growing.X, growing.Y, batch_size=30)
    try:
        trainer.fit(Module(), data, gate_loader())
    except RuntimeError as error:
        return str(error)
    return "none"


def main(folder):
    """Fit a part of a module, and go on from its checkpoint: replicated, and in shards."""
    path = folder / "held.ckpt"
    found = {"whole": fit(path, Module()), "resumed": fit(path, Module(), ckpt_path=path)}
    path = folder / "sharded"
    found["sharded whole"] = fit(path, Sharded(), strategy=in_shards())
    for kind, saved in (("folder", path), ("file", path.with_suffix(".file"))):
        found[f"{kind} validated"] = validated(saved)
    again = fit(folder / "again", Sharded(), ckpt_path=path, strategy=in_shards())
    found["folder resumed"] = again
    said = folder / f"rank {dist.get_rank()}"
    found["left"] = left(folder)
    dist.destroy_process_group()  # ends the waiting of the rank that has not left
    said.write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
