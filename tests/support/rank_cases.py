"""Cases that each rank of a group runs, and how they went."""

import os
import socket
import traceback

import torch
import torch.distributed as dist


def outcome(case):
    """Run a case; return "passed", or what went wrong."""
    try:
        case()
    except Exception:  # noqa: BLE001 - the test shows it
        return traceback.format_exc(limit=-4)
    return "passed"


def run_cases(cases, rank, world_size, rendezvous, outcomes):
    """Run every case in one process of a group, and put how it went on a queue."""
    torch.set_num_threads(1)
    loopback = next(name for _, name in socket.if_nameindex() if name.startswith("lo"))
    os.environ["GLOO_SOCKET_IFNAME"] = loopback  # not whatever the host's name resolves to
    dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=world_size)
    for name, case in cases.items():
        outcomes.put((name, outcome(case)))
        dist.barrier()
    dist.destroy_process_group()
    os._exit(0)  # an interpreter that ends may take threads of torch down while they run: abort
