"""``make bench-ranks``: what ranks take to agree, to share a kernel, and to average it.

Starts 2, 4 and 8 processes on this machine, which talk over loopback by gloo, and prints medians of
rounds. Writes ``benchmarks/results/ranks/<environment>.json``. Processes beyond the machine's cores
wait for one another: the figures are upper bounds of what as many machines would take.
"""

import argparse
import contextlib
import functools
import json
import logging
import os
import platform
import socket
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from torch import multiprocessing, nn
from torch.nn.parallel import DistributedDataParallel

import esper
from esper.continuity.replicas import ranks_of
from esper.registry.directory import DirectoryRegistry

MB = 2**20
HELD_OUT = 10_000
WIDTH, KERNELS = 512, 8
MANY = 1000


def timed(call: Callable[[], object], rounds: int) -> float:
    """Return the median of rounds, which all ranks begin together, in seconds."""
    took = []
    for _ in range(rounds + 1):
        dist.barrier()
        start_s = time.perf_counter()
        call()
        took.append(time.perf_counter() - start_s)
    return statistics.median(took[1:])


def agreement(rounds: int) -> Iterator[tuple[str, float]]:
    """Yield what ranks take to vote, to tell one another a decision, and to gather losses."""
    ranks = ranks_of(DistributedDataParallel(nn.Linear(2, 2)))
    losses = torch.rand(HELD_OUT // dist.get_world_size()).double().numpy()
    calls = {"vote": ranks.vote, "decision": lambda: ranks.each(lambda: ("site", "mlp", 0.5))}
    for name, call in calls.items():
        yield f"{name}, us", 1e6 * timed(call, 20 * rounds)
    took = timed(lambda: ranks.each(lambda: losses), rounds)
    yield f"{HELD_OUT:,} losses gathered, ms", 1e3 * took
    for size in (1, 16):
        data = bytes(size * MB)
        took = timed(lambda data=data: ranks.of_one(0, lambda: data), rounds)
        yield f"package of {size} MB sent, ms", 1e3 * took


def host() -> nn.Module:
    """Return a wrapped model of as many layers as kernels."""
    torch.manual_seed(0)
    return esper.wrap(nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(KERNELS))))


def grown(model: nn.Module) -> nn.Module:
    """Put a kernel of two layers beside each layer."""
    for layer in esper.layers(model).values():
        kernel = nn.Sequential(nn.Linear(WIDTH, WIDTH // 2), nn.Linear(WIDTH // 2, WIDTH))
        layer.graft(0, kernel, alpha=0.5, guard="off", example=torch.randn(2, WIDTH))
    return model


def averaging(rounds: int) -> Iterator[tuple[str, float]]:
    """Yield a step with kernels that DDP knows and with late ones, and what it takes to re-wrap."""
    known = DistributedDataParallel(grown(host()))
    late = DistributedDataParallel(host())
    grown(late.module)
    x, steps = torch.randn(8, WIDTH), {}
    for name, model in {"known to DDP": known, "averaged by Esper": late}.items():
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
        esper.sync_optimizer(model, optimizer)

        def step(model: nn.Module = model, optimizer: torch.optim.Optimizer = optimizer) -> None:
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()

        steps[name] = 1e3 * timed(step, rounds)
        yield f"step, kernels {name}, ms", steps[name]
    took = timed(lambda: DistributedDataParallel(late.module), rounds)
    yield "re-wrapping in DDP, ms", 1e3 * took
    size = sum(p.nbytes for n, p in late.named_parameters() if "_seeds" in n) / MB
    yield "late parameters, MB", size


def fetching(folder: str, rounds: int) -> Iterator[tuple[str, float]]:
    """Yield what a fetch takes where every rank makes one, and where one does and sends it."""
    ranks = ranks_of(DistributedDataParallel(nn.Linear(2, 2)))
    site = esper.SiteSpec(kind="linear", in_features=WIDTH, out_features=WIDTH)
    offered = esper.default_catalog().blueprints_for(site)
    artifacts = [esper.compile_blueprint(each) for each in offered]
    largest = max(artifacts, key=lambda each: len(each.kernel_binary))
    with contextlib.closing(DirectoryRegistry(Path(folder))) as registry:
        if dist.get_rank() == 0:
            registry.put(largest.kernel_binary)
        dist.barrier()
        fetch = functools.partial(registry.fetch, largest.artifact_id)
        yield "largest kernel of the catalog, MB", len(largest.kernel_binary) / MB
        yield "fetched by every rank, ms", 1e3 * timed(fetch, rounds)
        yield "fetched by one and sent, ms", 1e3 * timed(lambda: ranks.of_one(0, fetch), rounds)
        dist.barrier()


def rank(number: int, size: int, folder: str, rounds: int) -> None:
    """Measure as one of several ranks; the first writes what it found."""
    torch.set_num_threads(1)
    loopback = next(name for _, name in socket.if_nameindex() if name.startswith("lo"))
    os.environ["GLOO_SOCKET_IFNAME"] = loopback
    logging.disable(logging.WARNING)
    dist.init_process_group("gloo", f"file://{folder}/meeting", rank=number, world_size=size)
    found = (
        dict(agreement(rounds))
        | dict(averaging(rounds))
        | dict(fetching(f"{folder}/kernels", rounds))
    )
    if number == 0:
        Path(folder, "found").write_text(json.dumps(found))
    dist.barrier()
    os._exit(0)


def measured(size: int, rounds: int) -> dict[str, float]:
    """Return the figures of so many ranks, by name."""
    with tempfile.TemporaryDirectory() as folder:
        multiprocessing.spawn(rank, (size, folder, rounds), nprocs=size)
        return json.loads(Path(folder, "found").read_text())


def worked_out(by_size: dict[str, dict[str, float]]) -> dict[str, float]:
    """Return what follows from the figures for many ranks, and for re-wrapping."""
    largest = by_size[max(by_size, key=int)]
    late, known = (f"step, kernels {by}, ms" for by in ("averaged by Esper", "known to DDP"))
    megabytes = largest["largest kernel of the catalog, MB"]
    return {
        "saved by re-wrapping a step at most, ms": max(
            found[late] - found[known] for found in by_size.values()
        ),
        f"served where {MANY:,} ranks fetch, MB": MANY * megabytes,
        "served where one fetches, MB": megabytes,
        f"losses that {MANY:,} ranks gather at a reading, MB": HELD_OUT * 8 / MB,
    }


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4, 8])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--no-file", action="store_true", help="only print")
    options = parser.parse_args()
    by_size = {str(size): measured(size, options.rounds) for size in options.ranks}
    print(f"{'ranks':44}" + "".join(f"{size:>10}" for size in by_size))
    for name in next(iter(by_size.values())):
        print(f"{name:44}" + "".join(f"{found[name]:10.3g}" for found in by_size.values()))
    derived = worked_out(by_size)
    print("\n" + "\n".join(f"{name:58}{value:10.3g}" for name, value in derived.items()))
    where = f"{platform.system()}-{platform.machine()}-{os.cpu_count()}-torch-{torch.__version__}"
    if not options.no_file:
        path = Path(__file__).parent / "results" / "ranks" / f"{where.lower()}.json"
        path.parent.mkdir(exist_ok=True)
        document = {"ranks": by_size, "worked_out": derived}
        path.write_text(json.dumps(document, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
