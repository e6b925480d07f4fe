"""Rows 3 and 4: seeds that run as one, and fossils that stay in the plan without a guard.

Among them are two ways that are not used, since they lose where kernels are as they usually are.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import torch
from measure import Figure, take_turns
from subjects import (
    BATCH,
    FEATURES,
    HIDDEN,
    ByHand,
    bottleneck,
    compiled_passes,
    grafted,
    sharing,
    training_pass,
)
from torch import Tensor, nn

from esper.execution.host_class import adopt
from esper.execution.kasmina_layer import KasminaLayer
from esper.forward.class_change import become

NUMBERS = (4, 8)
MANY = 512
"""Rows of a large batch."""

CHANNELS, SIDE = 16, 8

MakeKernel = Callable[[int], nn.Module]
"""Makes a kernel so many times as wide as that of one seed."""


def fused(rounds: int) -> Iterator[Figure]:
    """Row 3: seeds of one form over one kernel as wide as all of them, under ``guard="step"``."""
    for num_seeds in NUMBERS:
        host, x = nn.Linear(FEATURES, FEATURES), torch.randn(BATCH, FEATURES)
        yield _beside(host, x, _mlp, num_seeds, f"fused {num_seeds}", 2 * rounds)
    host, x = nn.Linear(FEATURES, FEATURES), torch.randn(MANY, FEATURES)
    yield _beside(host, x, _mlp, NUMBERS[-1], "fused many", rounds)
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
    calls = {name: training_pass(layer, x) for name, layer in layers.items()}
    took = take_turns(calls, rounds=rounds, number=25)
    singly = took["one by one"].median_s / took["wide"].median_s
    return took["fused"].ratio(took["wide"], key, beside=f"one by one {singly:.2f}x")


def _grown(host: nn.Module, x: Tensor, kernels: list[nn.Module]) -> KasminaLayer:
    layer = adopt(sharing(host), name="fused", num_seeds=len(kernels))
    layer.enable_step_guard()
    for i, kernel in enumerate(kernels):
        layer.graft(i, kernel, alpha=1.0, guard="step", example=x.detach())
    return layer


def fused_compiled(rounds: int) -> Figure:
    """Row 3, compiled: a fused plan over the same plan one by one; it is the same graph."""
    host, x = nn.Linear(FEATURES, FEATURES), torch.randn(BATCH, FEATURES, requires_grad=True)
    layers = {
        name: _grown(host, x, [_mlp(1) for _ in range(NUMBERS[-1])]) for name in ("fused", "singly")
    }
    become(layers["singly"], "active")
    calls, how = compiled_passes(layers, x)
    took = take_turns(calls, rounds=2 * rounds, number=25)
    return replace(took["fused"].ratio(took["singly"], "fused compiled"), note=how)


class Attention(nn.Module):
    """A kernel that no rule of ours knows: attention between two narrow layers."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(FEATURES, HIDDEN), nn.Linear(HIDDEN, FEATURES)
        self.read = nn.Linear(HIDDEN, 3 * HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        """Let the rows of a sample read each other, in four heads."""
        heads = self.read(self.down(x)).unflatten(-1, (3, 4, -1)).transpose(-4, -2)
        query, key, value = heads.unbind(-3)
        read = nn.functional.scaled_dot_product_attention(query, key, value)
        output: Tensor = self.up(read.transpose(-3, -2).flatten(-2))
        return output


def stacked(rounds: int) -> Figure:
    """Row 3: kernels of any graph by ``torch.func``, their parameters stacked in each forward."""
    x = torch.randn(4, BATCH // 4, FEATURES, requires_grad=True)
    took = {
        num: take_turns(_singly_and_stacked(num, x), rounds=2 * rounds, number=10)
        for num in NUMBERS
    }
    few, many = (took[num]["stacked"].ratio(took[num]["singly"], "stacked") for num in NUMBERS)
    return replace(many, beside=f"{NUMBERS[0]} kernels {few.value:.2f}x")


def _singly_and_stacked(num_kernels: int, x: Tensor) -> dict[str, Callable[[], object]]:
    kernels = [Attention() for _ in range(num_kernels)]
    names = [name for name, _ in kernels[0].named_parameters()]
    run_all = torch.func.vmap(partial(torch.func.functional_call, kernels[0]), in_dims=(0, None))

    def as_one(x: Tensor) -> Tensor:
        own = [dict(kernel.named_parameters()) for kernel in kernels]
        joined = {name: torch.stack([each[name] for each in own]) for name in names}
        total: Tensor = run_all(joined, x).sum(0)
        return total

    def singly(x: Tensor) -> Tensor:
        return sum((kernel(x) for kernel in kernels[1:]), kernels[0](x))

    largest = float(singly(x).abs().max())
    assert float((as_one(x) - singly(x)).abs().max()) < 1e-5 * largest
    return {"singly": training_pass(singly, x), "stacked": training_pass(as_one, x)}


CHAINS = ((FEATURES, HIDDEN, BATCH), (64, 256, 128))
"""Features, those between, and rows: a low-rank kernel, and one that is wider between."""


def chain(rounds: int) -> Figure:
    """Row 3: two linear layers by one map, made in the call, over one after the other."""
    ratios = []
    for features, between, rows in CHAINS:
        first, last = nn.Linear(features, between), nn.Linear(between, features)
        x = torch.randn(rows, features)
        calls = {
            "layers": partial(_inferred, lambda x, f=first, la=last: la(f(x)), x),
            "map": partial(_inferred, partial(_by_one_map, first, last), x),
        }
        took = take_turns(calls, rounds=2 * rounds, number=25)
        ratios.append(took["map"].ratio(took["layers"], "chain"))
    features, between, _ = CHAINS[1]
    return replace(ratios[0], beside=f"{features}-{between}-{features} {ratios[1].value:.2f}x")


def _inferred(module: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    with torch.no_grad():
        return module(x)


def _by_one_map(first: nn.Linear, last: nn.Linear, x: Tensor) -> Tensor:
    bias = torch.addmv(last.bias, last.weight, first.bias)
    return nn.functional.linear(x, last.weight @ first.weight, bias)


def fossil(rounds: int) -> Figure:
    """Row 4: a fossil that does not fold, without a guard, over the same arithmetic by hand."""
    host, kernel = nn.Linear(FEATURES, FEATURES), bottleneck()
    x = torch.randn(BATCH, FEATURES, requires_grad=True)
    layer = grafted(host, kernel, "off")
    certificate = layer.fossilize(0)
    assert not certificate.folded, "a kernel with an activation in it cannot be folded"
    calls = {
        "hand": training_pass(ByHand(sharing(host), kernel), x),
        "fossil": training_pass(layer, x),
    }
    took = take_turns(calls, rounds=4 * rounds, number=25)
    return took["fossil"].ratio(took["hand"], "fossil")
