"""What Esper costs beside doing the same by hand.

The host is ``Linear(512, 512)``, the kernel an MLP 512-32-512, the batch 32, unless a row names
another.
"""

import copy
import tempfile
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

import esper
from esper.contracts.blueprint import BlueprintEdge, BlueprintIR, BlueprintNode, TensorSpec
from esper.contracts.ports import Registry
from esper.execution.host_class import adopt
from esper.execution.kasmina_layer import KasminaLayer
from esper.execution.kernel_cache import KernelCache
from esper.execution.state_layout import KasminaStateLayout, SeedLifecycleState
from esper.registry.open import open as open_registry

FEATURES, HIDDEN, BATCH = 512, 32, 32


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """One row: a figure, its unit (``x`` is a ratio), and what it is meant to stay below."""

    name: str
    value: float
    unit: str
    goal: float | None = None


class ByHand(nn.Module):
    """The arithmetic of one adding seed, as a person would write it."""

    def __init__(self, host: nn.Module, kernel: nn.Module) -> None:
        super().__init__()
        self.host, self.kernel = host, kernel
        self.register_buffer("alpha", torch.tensor(1.0))

    def forward(self, x: Tensor) -> Tensor:
        """Add the kernel's share to the host."""
        return self.host(x) + self.alpha * self.kernel(x)


def fastest(
    calls: dict[str, Callable[[], object]], *, rounds: int, number: int
) -> dict[str, float]:
    """Return seconds per call: the fastest of the rounds, in which all take turns."""
    best = dict.fromkeys(calls, float("inf"))
    for _ in range(rounds):
        for name, call in calls.items():
            start = time.perf_counter()
            for _ in range(number):
                call()
            best[name] = min(best[name], (time.perf_counter() - start) / number)
    return best


def all_costs(*, rounds: int) -> Iterator[Cost]:
    """Measure every row."""
    torch.manual_seed(0)
    host = nn.Linear(FEATURES, FEATURES)
    kernel = nn.Sequential(nn.Linear(FEATURES, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, FEATURES))
    yield from dormant(host, rounds)
    yield from active(host, kernel, rounds)
    yield transition(rounds)
    yield from artifacts(host, rounds)


def dormant(host: nn.Module, rounds: int) -> Iterator[Cost]:
    """Time a forward of a wrapped layer without a kernel."""
    x = torch.randn(BATCH, FEATURES)
    layers = {
        "bare": copy.deepcopy(host),
        "dormant": adopt(copy.deepcopy(host), name="dormant"),
        "telemetry": adopt(copy.deepcopy(host), name="telemetry", telemetry_enabled=True),
    }
    calls = {name: (lambda layer=layer: layer(x)) for name, layer in layers.items()}
    took = fastest(calls, rounds=4 * rounds, number=100)
    ratio = took["dormant"] / took["bare"]
    yield Cost(name="dormant layer over the bare module", value=ratio, unit="x", goal=1.02)
    added = 1e6 * (took["telemetry"] - took["bare"])
    yield Cost(name="dormant layer with telemetry, added", value=added, unit="us", goal=1.0)


def active(host: nn.Module, kernel: nn.Module, rounds: int) -> Iterator[Cost]:
    """Time forward and backward of a layer with a kernel, under both guards."""
    x = torch.randn(BATCH, FEATURES, requires_grad=True)
    layers = {"hand": ByHand(copy.deepcopy(host), copy.deepcopy(kernel))}
    for guard in ("step", "always"):
        layer = adopt(copy.deepcopy(host), name=guard)
        layer.enable_step_guard()
        layer.graft(0, copy.deepcopy(kernel), alpha=1.0, guard=guard, example=x.detach())
        layers[guard] = layer
    passes = {
        name: (lambda layer=layer: layer(x).sum().backward()) for name, layer in layers.items()
    }
    took = fastest(passes, rounds=4 * rounds, number=25)
    for guard, goal in (("step", 1.05), ("always", 1.10)):
        name = f"active seed, guard={guard}, over the same by hand"
        yield Cost(name=name, value=took[guard] / took["hand"], unit="x", goal=goal)


def transition(rounds: int) -> Cost:
    """Time a checked transition of the layout."""
    layout = KasminaStateLayout(8)
    loading, dormant_state = SeedLifecycleState.LOADING, SeedLifecycleState.DORMANT

    def there_and_back() -> None:
        layout.transition_seed_state(3, loading)
        layout.transition_seed_state(3, dormant_state)

    took = fastest({"": there_and_back}, rounds=rounds, number=2000)[""] / 2
    return Cost(name="transition of a seed, checked", value=1e6 * took, unit="us", goal=0.5)


def artifacts(host: nn.Module, rounds: int) -> Iterator[Cost]:
    """Time what happens to a kernel between its blueprint and its seed."""
    blueprint = _bottleneck()
    with tempfile.TemporaryDirectory() as folder:
        registry = open_registry(folder)
        yield _stored(registry, blueprint, rounds)
        artifact = esper.compile_blueprint(blueprint)
        registry.put(artifact.kernel_binary, digest=artifact.artifact_id)
        cache = KernelCache(source=registry)
        cache.load_kernel_sync(artifact.artifact_id)
        yield _hit(cache, artifact.artifact_id, rounds)
        layer = adopt(copy.deepcopy(host), name="site", source=registry)
        yield from _live(layer, artifact.artifact_id, rounds)


def _bottleneck() -> BlueprintIR:
    """Return the kernel as a blueprint."""
    sizes = {"in_features": FEATURES, "out_features": HIDDEN}
    back = {"in_features": HIDDEN, "out_features": FEATURES, "init": "zeros"}
    spec = TensorSpec(("*", FEATURES))
    return BlueprintIR(
        id="mlp-512-32-512",
        nodes=(
            BlueprintNode("hidden", "linear", sizes),
            BlueprintNode("act", "activation", {"type": "relu"}),
            BlueprintNode("out", "linear", back),
        ),
        edges=(
            BlueprintEdge("input", "hidden"),
            BlueprintEdge("hidden", "act"),
            BlueprintEdge("act", "out"),
            BlueprintEdge("out", "output"),
        ),
        input_spec=spec,
        output_spec=spec,
    )


def _stored(registry: Registry, blueprint: BlueprintIR, rounds: int) -> Cost:
    """Compile and put kernels of one graph and ever other weights, as a Grower does."""
    seeds = iter(range(10**6))

    def store() -> None:
        artifact = esper.compile_blueprint(replace(blueprint, init_seed=next(seeds)))
        registry.put(artifact.kernel_binary, digest=artifact.artifact_id)

    store()
    took = fastest({"": store}, rounds=rounds, number=3)[""]
    name = f"blueprint {blueprint.id} to a stored artifact, warm"
    return Cost(name=name, value=1e3 * took, unit="ms", goal=10.0)


def _hit(cache: KernelCache, artifact_id: str, rounds: int) -> Cost:
    plain = OrderedDict.fromkeys([artifact_id, "another"], object())

    def get() -> object:
        plain.move_to_end(artifact_id)
        return plain[artifact_id]

    calls = {"cache": lambda: cache.load_kernel_sync(artifact_id), "plain": get}
    took = fastest(calls, rounds=rounds, number=2000)
    ratio = took["cache"] / took["plain"]
    return Cost(name="cache hit over an OrderedDict as LRU, no lock", value=ratio, unit="x")


def _live(layer: KasminaLayer, artifact_id: str, rounds: int) -> Iterator[Cost]:
    """Load a kernel that the cache holds: the first time at a site, probe included, and again."""
    example = torch.randn(BATCH, FEATURES)
    layer.kernel_cache.prewarm([artifact_id])

    def load(site: KasminaLayer) -> float:
        start = time.perf_counter()
        site.load_kernel_sync(0, artifact_id, example=example)
        took = time.perf_counter() - start
        site.unload_kernel(0)
        return took

    first = min(load(copy.deepcopy(layer)) for _ in range(rounds))
    again = min(load(layer) for _ in range(rounds + 1))
    yield Cost(name="kernel in the cache to live, new site", value=1e3 * first, unit="ms", goal=3.0)
    yield Cost(name="kernel in the cache to live, again", value=1e3 * again, unit="ms", goal=0.5)
