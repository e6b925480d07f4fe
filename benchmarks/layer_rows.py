"""Rows 1 to 4 and 11: what a layer costs in a forward and a backward."""

import os
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import torch
from measure import US, Figure, take_turns
from peers import Lora
from subjects import (
    BATCH,
    FEATURES,
    ByHand,
    bottleneck,
    compiled_passes,
    grafted,
    sharing,
    training_pass,
)
from torch import Tensor, nn
from torch.utils.benchmark import Timer

from esper.execution.host_class import adopt
from esper.seeds.step_guard import read_step_flags

_SETUP = """
import torch
from torch import nn
from esper.execution.host_class import adopt
layer, x = nn.Linear(8, 8), torch.randn(1, 8)
"""


def dormant(rounds: int) -> Iterator[Figure]:
    """Rows 1 and 2: a forward of a layer without a kernel, beside PEFT with its adapter off."""
    for key, features, batch, number in (
        ("dormant", 8, 1, 400),
        ("dormant wide", FEATURES, 32, 20),
    ):
        host, x = nn.Linear(features, features), torch.randn(batch, features)
        layers: dict[str, Callable[[Tensor], Tensor]] = {
            "bare": sharing(host),
            "dormant": adopt(sharing(host), name="dormant"),
            "telemetry": adopt(sharing(host), name="telemetry", telemetry_enabled=True),
            "peft": Lora(host, rank=4).disabled().layer,
        }
        calls = {name: (lambda layer=layer, x=x: layer(x)) for name, layer in layers.items()}
        took = take_turns(calls, rounds=8 * rounds, number=number)
        bare = took["bare"]
        added = (took["peft"].median_s - bare.median_s) * US
        ratio = took["peft"].median_s / bare.median_s
        beside = f"PEFT disabled {ratio:.2f}x, +{added:.1f} us"
        yield took["dormant"].ratio(bare, key, beside=beside)
        if key == "dormant":
            yield took["telemetry"].added(bare, "telemetry", US)


def instructions(number: int) -> Figure:
    """Row 1: instructions of a forward, counted by valgrind where there is one."""
    if shutil.which("valgrind") is None:
        return Figure(key="instructions", value=None, note="no valgrind on this machine")
    first = os.environ.get("PATH", "")
    here = Path(sys.executable).parent
    os.environ["PATH"] = f"{here}{os.pathsep}{first}"  # torch's timer runs the first python there
    try:
        bare = _counted("", number)
        dormant_layer = _counted("adopt(layer, name='counted')\n", number)
    finally:
        os.environ["PATH"] = first
    return Figure(
        key="instructions",
        value=dormant_layer / bare,
        note=f"{bare / number:,.0f} a call of the bare module",
    )


def _counted(setup: str, number: int) -> int:
    stats = Timer("layer(x)", setup=_SETUP + setup).collect_callgrind(
        number=number, collect_baseline=False
    )
    return int(stats.counts(denoise=True))


def active(rounds: int) -> Iterator[Figure]:
    """Row 3, eager: forward and backward of a layer with a kernel, under both guards."""
    host, kernel = nn.Linear(FEATURES, FEATURES), bottleneck()
    x = torch.randn(BATCH, FEATURES, requires_grad=True)
    lora = Lora(host)
    layers = {
        "hand": ByHand(sharing(host), kernel),
        "step": grafted(host, kernel, "step"),
        "always": grafted(host, kernel, "always"),
        "peft": lora.layer,
        "lora by hand": lora.by_hand(),
    }
    took = take_turns(
        {name: training_pass(layer, x) for name, layer in layers.items()},
        rounds=4 * rounds,
        number=25,
    )
    peft = took["peft"].median_s / took["lora by hand"].median_s
    for guard in ("step", "always"):
        beside = f"PEFT LoRA {peft:.2f}x of LoRA by hand"
        yield took[guard].ratio(took["hand"], guard, beside=beside)
    yield _flags(layers["step"], x, rounds)


def _flags(layer: nn.Module, x: Tensor, rounds: int) -> Figure:
    layer(x).sum().backward()
    took = take_turns({"read": lambda: read_step_flags([layer])}, rounds=rounds, number=100)
    return took["read"].took("flags", US)


def active_compiled(rounds: int) -> Figure:
    """Row 3, compiled: the same, each under ``torch.compile``."""
    host, kernel = nn.Linear(FEATURES, FEATURES), bottleneck()
    x = torch.randn(BATCH, FEATURES, requires_grad=True)
    layers = {
        "hand": ByHand(sharing(host), kernel),
        "always": grafted(host, kernel, "always"),
    }
    calls, how = compiled_passes(layers, x)
    took = take_turns(calls, rounds=4 * rounds, number=25)
    return replace(took["always"].ratio(took["hand"], "always compiled"), note=how)


def folded(rounds: int) -> Figure:
    """Row 4: a layer after its seed was folded, beside an adapter that PEFT merged."""
    host, x = nn.Linear(FEATURES, FEATURES), torch.randn(BATCH, FEATURES)
    layer = adopt(sharing(host), name="folded")
    layer.weight, layer.bias = (nn.Parameter(p.detach().clone()) for p in host.parameters())
    layer.graft(0, nn.Linear(FEATURES, FEATURES), alpha=0.5, example=x)
    certificate = layer.fossilize(0)
    assert certificate.folded, certificate.reason
    bare = nn.Linear(FEATURES, FEATURES)
    bare.weight, bare.bias = layer.weight, layer.bias
    merged = Lora(bare).merged()
    layers: dict[str, Callable[[Tensor], Tensor]] = {
        "bare": bare,
        "folded": layer,
        "peft": merged.layer,
    }
    calls = {name: (lambda layer=layer: layer(x)) for name, layer in layers.items()}
    took = take_turns(calls, rounds=8 * rounds, number=20)
    ratio = took["peft"].median_s / took["bare"].median_s
    return took["folded"].ratio(took["bare"], "folded", beside=f"PEFT merged {ratio:.2f}x")


class Breakable(nn.Module):
    """A kernel that works until it is broken."""

    def __init__(self) -> None:
        super().__init__()
        self.body = bottleneck()
        self.is_broken = False

    def forward(self, x: Tensor) -> Tensor:
        """Run the body, or raise."""
        if self.is_broken:
            msg = "this kernel was broken on purpose"
            raise RuntimeError(msg)
        output: Tensor = self.body(x)
        return output


def failing(rounds: int) -> Figure:
    """Row 11: a forward whose kernel raises, over the host's alone."""
    host, kernel = nn.Linear(FEATURES, FEATURES), Breakable()
    x = torch.randn(BATCH, FEATURES)
    layer = adopt(sharing(host), name="failing")
    layer.graft(0, kernel, alpha=1.0, example=x)
    kernel.is_broken = True
    assert torch.equal(layer(x), host(x)), "a kernel that raises must not change the output"
    calls = {"host": lambda: host(x), "failing": lambda: layer(x)}
    took = take_turns(calls, rounds=4 * rounds, number=25)
    return took["failing"].added(took["host"], "failing", US)
