"""A run on several processes that grows, saves, and goes on by itself: handwritten digits.

    torchrun --nproc-per-node 2 --max-restarts 3 examples/ddp.py

Every process trains on a share of the digits and measures on a share of those held out. They grow
together, by one verdict. Kill one, or stop and start all: the run goes on from ``ddp.esper``.
"""

import os
import sys

import torch
import torch.distributed as dist
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import esper


def main(path: str = "ddp.esper", epochs: int = 60) -> str:
    """Train, grow where the evidence allows it, and return the report as text."""
    rank, size = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)  # the same host and the same split on every rank
    raw = load_digits()
    x, y = torch.tensor(raw.data / 16, dtype=torch.float32), torch.tensor(raw.target)
    train, gate, test = torch.randperm(len(y)).split([896, 450, 451])
    train, gate = train[rank::size], gate[rank::size]

    model = esper.wrap(nn.Sequential(nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 10)))
    replicated = DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(replicated.parameters(), lr=3e-3)
    grower = esper.Grower(
        replicated,
        optimizer,
        compute_loss=lambda model, batch: F.cross_entropy(model(batch[0]), batch[1]),
        evaluate=lambda model: F.cross_entropy(model(x[gate]), y[gate], reduction="none"),
        horizon=epochs * 28,
    )
    torch.manual_seed(1 + rank)  # batches of its own
    try:
        begin = esper.load_checkpoint(path, replicated, optimizer, grower=grower)
    except FileNotFoundError:  # on no rank
        begin = 0
    for epoch in range(begin, epochs):
        for part in train[torch.randperm(len(train))].split(32 // size):
            loss = F.cross_entropy(replicated(x[part]), y[part])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            grower.step(loss, batch=(x[part], y[part]))
        grower.end_epoch()
        esper.save_checkpoint(path, replicated, optimizer, grower=grower, extra=epoch + 1)
    grower.close()
    plain = esper.unwrap(model)
    accuracy = (plain(x[test]).argmax(1) == y[test]).float().mean()
    return f"{grower.report()}\nBegan at epoch {begin}. Test accuracy: {accuracy:.1%}"


if __name__ == "__main__":
    dist.init_process_group("gloo")
    report = main(*sys.argv[1:2], *map(int, sys.argv[2:3]))
    if dist.get_rank() == 0:
        print(report, flush=True)
    dist.barrier()
    os._exit(0)  # an interpreter that ends may take threads of torch down while they run
