"""What ``torchrun`` starts for the tests of runs that are killed: a run that saves, and goes on.

    python -m torch.distributed.run ... elastic_runs.py FOLDER [KILL ...]

A KILL is ``RANK@UPDATE``, or ``RANK@switch`` for the moment of a taking over; with ``agent:``
before it the rank's agent dies with it. Each is done once. Every rank first makes the run without a
file and without being killed, and at the end holds what it came to against that; FOLDER then has
its outcome.
"""

import contextlib
import os
import random
import signal
import socket
import sys
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from growing import SHORT, batches
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from trial_hosts import Running, held_out, network

import esper
from esper.growth.rehearsal import run_digest
from esper.registry.memory import MemoryRegistry

SAVES = (30, 95)
"""Updates after which the run is saved: before its trial, and while its package is watched."""
GROW_AT = 32
UPDATES = 115
AGENT = os.getppid()
"""Asked for at once: a process whose parent died is another's child."""


class Counted(MemoryRegistry):
    """Writes down each fetch of the kernel that it has."""

    def __init__(self, file):
        super().__init__()
        self._file = file
        site = esper.SiteSpec(kind="linear", in_features=4, out_features=8)
        blueprint = esper.default_catalog().named("mlp-4x8-w32", site, where="'0'")
        self.digest = self.put(esper.compile_blueprint(blueprint).kernel_binary)

    def fetch(self, digest):
        with self._file.open("a") as out:
            out.write(f"rank {dist.get_rank()}\n")
        return super().fetch(digest)


class Killer:
    """Kills this process, or the node, where that was asked for; as a sink it sees the switch."""

    def __init__(self, folder, kills):
        self._folder, self._kills = folder, kills

    def publish(self, event):
        if type(event).__name__ == "TakenOver":
            self.at("switch")

    def at(self, moment):
        for kill in self._kills:
            rank, _, when = kill.removeprefix("agent:").partition("@")
            done = self._folder / f"killed {'agent' if kill.startswith('agent') else kill}"
            if int(rank) == dist.get_rank() and when == str(moment) and not done.exists():
                done.touch()
                if kill.startswith("agent:"):
                    os.kill(AGENT, signal.SIGKILL)
                os.kill(os.getpid(), signal.SIGKILL)


def made(folder, kills):
    """Return a run and its controller, the same on every rank but for draws."""
    run = Running(network(nn.BatchNorm1d(8), nn.Dropout(0.3)), given=_replicated)
    registry = Counted(folder / "fetches")
    grower = esper.Grower(
        run.given,
        run.optimizer,
        compute_loss=run.compute_loss,
        evaluate=held_out,
        registry=registry,
        sink=Killer(folder, kills),
        policy=esper.ByHand([("0", registry.digest, GROW_AT)]),
        **{**SHORT, "hold_updates": 16, "overhead": 1e6},
    )
    for seed in (random.seed, np.random.seed, torch.manual_seed):  # a process draws its own
        seed(dist.get_rank())
    return run, grower


def _replicated(model):
    return DistributedDataParallel(model, find_unused_parameters=True)


def course(folder, kills=(), path=None):
    """Train to the end, from a checkpoint where there is one; return the digest of the run."""
    run, grower = made(folder, kills)
    with contextlib.suppress(FileNotFoundError):
        if path is not None:
            esper.load_checkpoint(path, run.given, run.optimizer, grower=grower)
    own = batches(UPDATES, random_seed=10 + dist.get_rank())
    killer = Killer(folder, kills)
    with grower:
        for batch in own[grower.updates :]:
            run.update(batch, grower)
            assert_ranks_agree(run.model)
            killer.at(grower.updates)
            if path is not None and grower.updates in SAVES:
                esper.save_checkpoint(path, run.given, run.optimizer, grower=grower)
    (trial,) = grower.report().trials
    found = run_digest(type("Both", (), {"model": run.model, "optimizer": run.optimizer}))
    return {"verdict": trial.verdict, "evaluations": str(_told(grower)), **found}


def _told(grower):
    return [(e.update, e.gate_loss) for e in grower.report().evaluations]


def assert_ranks_agree(model):
    """Hold the parameters of the ranks against each other."""
    flat = torch.cat([p.detach().flatten() for p in model.parameters()])
    found = [torch.empty_like(flat) for _ in range(dist.get_world_size())]
    dist.all_gather(found, flat)
    assert all(torch.equal(each, flat) for each in found)


def main(folder, *kills):
    """Make the run twice, the second time killed, and say whether both came to the same."""
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = next(
        name for _, name in socket.if_nameindex() if name.startswith("lo")
    )
    dist.init_process_group("gloo")
    folder, rank = Path(folder), dist.get_rank()
    control = folder / f"control {rank}"
    if not all(_gathered(control.exists())):
        control.write_text(repr(course(folder)))
        dist.barrier()
        (folder / "fetches").unlink(missing_ok=True)
    found = repr(course(folder, kills, folder / "run.esper"))
    dist.barrier()
    outcome = "equal" if found == control.read_text() else f"{control.read_text()}\n{found}"
    (folder / f"outcome {rank}").write_text(outcome)
    dist.barrier()
    os._exit(0)  # an interpreter that ends may take threads of torch down while they run: abort


def _gathered(value):
    found = [None] * dist.get_world_size()
    dist.all_gather_object(found, value)
    return found


if __name__ == "__main__":
    main(*sys.argv[1:])
