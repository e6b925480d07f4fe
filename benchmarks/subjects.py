"""What is measured: the host, its kernels, and the same arithmetic written by hand.

The host is ``Linear(512, 512)``, the kernel a bottleneck 512-32-512, the batch 32, unless a line of
the table names another. Contenders share the host's parameters, so that memory cannot favour one.
"""

import copy
import shutil
from collections.abc import Callable, Mapping
from typing import TypeVar

import torch
from torch import Tensor, nn

from esper.contracts.blueprint import BlueprintEdge, BlueprintIR, BlueprintNode, TensorSpec
from esper.execution.host_class import adopt
from esper.execution.kasmina_layer import KasminaLayer

FEATURES, HIDDEN, BATCH = 512, 32, 32

Module = TypeVar("Module", bound=nn.Module)


class ByHand(nn.Module):
    """The arithmetic of one adding seed, as a person would write it."""

    def __init__(self, host: nn.Module, kernel: nn.Module) -> None:
        super().__init__()
        self.host, self.kernel = host, kernel
        self.register_buffer("alpha", torch.tensor(1.0))

    def forward(self, x: Tensor) -> Tensor:
        """Add the kernel's share to the host."""
        return self.host(x) + self.alpha * self.kernel(x)


def bottleneck(features: int = FEATURES, hidden: int = HIDDEN) -> nn.Module:
    """Return the kernel as a module."""
    return nn.Sequential(nn.Linear(features, hidden), nn.ReLU(), nn.Linear(hidden, features))


def sharing(module: Module) -> Module:
    """Return a copy that has the very parameters of its original."""
    return copy.deepcopy(module, {id(p): p for p in module.parameters()})


def grafted(host: nn.Module, kernel: nn.Module, guard: str) -> KasminaLayer:
    """Return a layer over the host's parameters, with a copy of the kernel at alpha 1.

    A guard puts hooks on the kernel's parameters, so contenders cannot share these.
    """
    layer = adopt(sharing(host), name=f"guard={guard}")
    layer.enable_step_guard()
    example = torch.randn(BATCH, next(host.parameters()).shape[-1])
    layer.graft(0, copy.deepcopy(kernel), alpha=1.0, guard=guard, example=example)
    return layer


def training_pass(layer: Callable[[Tensor], Tensor], x: Tensor) -> Callable[[], None]:
    """Return a call that makes a forward and a backward."""
    return lambda: layer(x).sum().backward()


def compiled_passes(
    layers: Mapping[str, nn.Module], x: Tensor
) -> tuple[dict[str, Callable[[], None]], str]:
    """Return such calls of layers that are compiled already, and how they were."""
    has_compiler = any(shutil.which(name) for name in ("g++", "clang++", "c++"))
    backend = "inductor" if has_compiler else "aot_eager"
    calls = {
        name: training_pass(torch.compile(layer, fullgraph=True, backend=backend), x)
        for name, layer in layers.items()
    }
    for call in calls.values():
        call()
        call()
    return calls, f"backend {backend}" + ("" if has_compiler else ": no C++ compiler for inductor")


def blueprint(
    features: int = FEATURES, hidden: int = HIDDEN, init_seed: int = 0, out: str = "zeros"
) -> BlueprintIR:
    """Return the kernel as a blueprint; with ``out="zeros"`` it is the identity at birth."""
    spec = TensorSpec(("*", features))
    back = {"in_features": hidden, "out_features": features}
    return BlueprintIR(
        id=f"mlp-{features}-{hidden}-{features}",
        nodes=(
            BlueprintNode("hidden", "linear", {"in_features": features, "out_features": hidden}),
            BlueprintNode("act", "activation", {"type": "relu"}),
            BlueprintNode("out", "linear", {**back, "init": "zeros"} if out == "zeros" else back),
        ),
        edges=(
            BlueprintEdge("input", "hidden"),
            BlueprintEdge("hidden", "act"),
            BlueprintEdge("act", "out"),
            BlueprintEdge("out", "output"),
        ),
        input_spec=spec,
        output_spec=spec,
        init_seed=init_seed,
    )
