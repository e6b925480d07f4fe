"""Rows 3 and 4: seeds that run as one, and fossils that stay in the plan without a guard."""

import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from measure import Figure, take_turns
from subjects import BATCH, FEATURES, HIDDEN, ByHand, bottleneck, grafted, sharing
from torch import Tensor, nn

from esper.execution.host_class import adopt
from esper.execution.kasmina_layer import KasminaLayer
from esper.forward.class_change import become

NUMBERS = (4, 8)
CHANNELS, SIDE = 16, 8

MakeKernel = Callable[[int], nn.Module]
"""Makes a kernel so many times as wide as that of one seed."""


def fused(rounds: int) -> Iterator[Figure]:
    """Row 3: seeds of one form over one kernel as wide as all of them, under ``guard="step"``."""
    for num_seeds in NUMBERS:
        host, x = nn.Linear(FEATURES, FEATURES), torch.randn(BATCH, FEATURES)
        yield _beside(host, x, _mlp, num_seeds, f"fused {num_seeds}", 2 * rounds)
    host = nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1)
    x = torch.randn(8, CHANNELS, SIDE, SIDE)
    yield _beside(host, x, _conv_block, NUMBERS[-1], "fused convolutions", 2 * rounds)


def _mlp(width: int) -> nn.Module:
    return bottleneck(FEATURES, width * HIDDEN)


def _conv_block(width: int) -> nn.Module:
    between = width * CHANNELS // 2
    ends = nn.Conv2d(CHANNELS, between, 3, padding=1), nn.Conv2d(between, CHANNELS, 1)
    return nn.Sequential(ends[0], nn.ReLU(), ends[1])


def _beside(
    host: nn.Module, x: Tensor, make: MakeKernel, num_seeds: int, key: str, rounds: int
) -> Figure:
    x.requires_grad_()
    layers = {
        "wide": _grown(host, x, [make(num_seeds)]),
        "fused": _grown(host, x, [make(1) for _ in range(num_seeds)]),
        "one by one": _grown(host, x, [make(1) for _ in range(num_seeds)]),
    }
    become(layers["one by one"], "active")
    calls = {name: _pass(layer, x) for name, layer in layers.items()}
    took = take_turns(calls, rounds=rounds, number=25)
    singly = took["one by one"].median_s / took["wide"].median_s
    return took["fused"].ratio(took["wide"], key, beside=f"one by one {singly:.2f}x")


def _grown(host: nn.Module, x: Tensor, kernels: list[nn.Module]) -> KasminaLayer:
    layer = adopt(sharing(host), name="fused", num_seeds=len(kernels))
    layer.enable_step_guard()
    for i, kernel in enumerate(kernels):
        layer.graft(i, kernel, alpha=1.0, guard="step", example=x.detach())
    return layer


def _pass(layer: Callable[[Tensor], Tensor], x: Tensor) -> Callable[[], None]:
    return lambda: layer(x).sum().backward()


def fused_compiled(rounds: int) -> Figure:
    """Row 3, compiled: a fused plan over the same plan one by one; it is the same graph."""
    has_compiler = any(shutil.which(name) for name in ("g++", "clang++", "c++"))
    backend = "inductor" if has_compiler else "aot_eager"
    host, x = nn.Linear(FEATURES, FEATURES), torch.randn(BATCH, FEATURES, requires_grad=True)
    layers = {
        name: _grown(host, x, [_mlp(1) for _ in range(NUMBERS[-1])]) for name in ("fused", "singly")
    }
    become(layers["singly"], "active")
    calls = {
        name: _pass(torch.compile(layer, fullgraph=True, backend=backend), x)
        for name, layer in layers.items()
    }
    for call in calls.values():
        call()
        call()
    took = take_turns(calls, rounds=2 * rounds, number=25)
    figure = took["fused"].ratio(took["singly"], "fused compiled")
    return replace(figure, note=f"backend {backend}")


def fossil(rounds: int) -> Figure:
    """Row 4: a fossil that does not fold, without a guard, over the same arithmetic by hand."""
    host, kernel = nn.Linear(FEATURES, FEATURES), bottleneck()
    x = torch.randn(BATCH, FEATURES, requires_grad=True)
    layer = grafted(host, kernel, "off")
    certificate = layer.fossilize(0)
    assert not certificate.folded, "a kernel with an activation in it cannot be folded"
    calls = {
        "hand": _pass(ByHand(sharing(host), kernel), x),
        "fossil": _pass(layer, x),
    }
    took = take_turns(calls, rounds=4 * rounds, number=25)
    return took["fossil"].ratio(took["hand"], "fossil")
