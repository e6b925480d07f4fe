"""What appears late under DistributedDataParallel, on two ranks of this machine."""

import tempfile
import warnings
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from comparison import Bottleneck, Comparison
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import esper

RANKS = 2


def late_under_ranks() -> Comparison:
    """Train an adapter that appeared after DDP for a few updates, and compare the ranks."""
    found = {which: _apart(which) for which in ("peft", "esper")}
    words = {which: "equal" if not far else f"{far:.1e} apart" for which, far in found.items()}
    return Comparison(
        asked="what appears late is averaged over the ranks of DDP",
        source="peft#899",
        peer=f"after 5 updates the two ranks are {words['peft']}",
        esper=f"after 5 updates the two ranks are {words['esper']}",
    )


def _apart(which: str) -> float:
    """Return how far the late parameters of two ranks are apart after five updates."""
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_train, args=(which, folder), nprocs=RANKS)
        one, other = (torch.load(f"{folder}/{rank}", weights_only=True) for rank in range(RANKS))
    return max(float((a - b).abs().max()) for a, b in zip(one, other, strict=True))


def _train(rank: int, which: str, folder: str) -> None:
    warnings.simplefilter("ignore")
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=RANKS
    )
    torch.manual_seed(0)
    model, late = {"peft": _with_peft, "esper": _with_esper}[which]()
    generator = torch.Generator().manual_seed(rank)
    for _ in range(5):
        x = torch.randn(8, 16, generator=generator)
        late.zero_grad()
        model(x).square().mean().backward()
        late.step()
    kept = [p.detach() for group in late.param_groups for p in group["params"]]
    torch.save(kept, f"{folder}/{rank}")
    dist.destroy_process_group()


def _with_peft() -> tuple[nn.Module, torch.optim.Optimizer]:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=4, target_modules=["0"])
    inner: Any = get_peft_model(nn.Sequential(nn.Linear(16, 16)), config)
    model = DistributedDataParallel(inner)
    inner.add_adapter("late", config)
    inner.set_adapter("late")
    late = [p for name, p in inner.named_parameters() if ".late." in name]
    return model, torch.optim.SGD(late, lr=0.1)


def _with_esper() -> tuple[nn.Module, torch.optim.Optimizer]:
    inner = esper.wrap(nn.Sequential(nn.Linear(16, 16)))
    model = DistributedDataParallel(inner)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    esper.sync_optimizer(model, optimizer)
    esper.layers(inner)["0"].graft(0, Bottleneck(16), alpha=1.0, guard="step")
    esper.sync_optimizer(model, optimizer)
    return model, optimizer
