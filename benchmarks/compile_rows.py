"""Rows 2 and 5: what torch.compile makes of layers; all of it is counted, nothing is timed."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from measure import Figure
from peers import Lora
from subjects import blueprint
from torch import Tensor, fx, nn
from torch._dynamo.utils import counters

from esper.execution.host_class import adopt
from esper.execution.kasmina_layer import KasminaLayer

FEATURES, BATCH, MORPHS = 16, 4, 20
DEFAULT_LIMIT = 8


@dataclass(slots=True)
class Counting:
    """A back end that runs graphs as they are and counts them, their nodes and their calls."""

    graphs: list[fx.GraphModule] = field(default_factory=list)
    calls: int = 0

    def __call__(self, graph: fx.GraphModule, _: list[Tensor]) -> Callable[..., Any]:
        """Keep a graph and return what runs it."""
        self.graphs.append(graph)

        def run(*args: Any) -> Any:
            self.calls += 1
            return graph.forward(*args)

        return run


class Pair(nn.Module):
    """Two layers, of which the first is grafted into."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(FEATURES, FEATURES), nn.Linear(FEATURES, FEATURES)

    def forward(self, x: Tensor) -> Tensor:
        """Call both."""
        output: Tensor = self.second(torch.relu(self.first(x)))
        return output


class Compiled:
    """A compiled model, its back end, and what a call of it makes."""

    def __init__(self, model: nn.Module) -> None:
        torch.compiler.reset()
        counters.clear()
        self.backend = Counting()
        self.x = torch.randn(BATCH, FEATURES, requires_grad=True)
        self._model = torch.compile(model, backend=self.backend)
        self.num_calls = 0
        self.new_graphs()

    def new_graphs(self, change: Callable[[], object] | None = None) -> int:
        """Make a change, train two steps, and return how many graphs were compiled for it."""
        before = len(self.backend.graphs)
        if change is not None:
            change()
        for _ in range(2):
            self._model(self.x).sum().backward()
            self.num_calls += 1
        return len(self.backend.graphs) - before

    @property
    def graph_breaks(self) -> int:
        """Breaks since this model was compiled."""
        return sum(counters["graph_break"].values())

    @property
    def compiled_share(self) -> float:
        """Share of the calls in which a graph ran."""
        return self.backend.calls / self.num_calls


def compiled_events() -> Iterator[Figure]:
    """Row 5: graphs per event, the worse of both guards, beside PEFT's.

    Wrapped layers raise torch's limit of recompilations as they change; PEFT has torch's default.
    """
    with torch._dynamo.config.patch(recompile_limit=DEFAULT_LIMIT):  # noqa: SLF001 - its door
        peft_events, peft_breaks, peft_share = _peft()
    runs = [_events(guard) for guard in ("always", "step")]
    shares = [run.pop("still compiled") for run in runs]
    beside = {
        "breaks": f"PEFT {peft_breaks}",
        "recompiles idle": f"PEFT 1 -> {peft_events} graphs over disable, add, switch",
        "still compiled": f"PEFT {peft_share:.2f} over 20 adapters",
    }
    for key in runs[0]:
        value = max(run[key] for run in runs)
        yield Figure(key=key, value=value, beside=beside.get(key, ""))
    yield Figure(key="still compiled", value=min(shares), beside=beside["still compiled"])


def _events(guard: str) -> dict[str, float]:
    model = Pair()
    layer = adopt(model.first, name="first")
    adopt(model.second, name="second")
    layer.enable_step_guard()
    compiled = Compiled(model)

    def graft(hidden: int, init_seed: int = 0) -> Callable[[], None]:
        return lambda: _graft(layer, compiled.x, guard, hidden, init_seed)

    found: dict[str, float] = {"recompiles dormant": compiled.new_graphs()}
    first = compiled.new_graphs(graft(3))
    found["recompiles alpha"] = max(
        compiled.new_graphs(lambda alpha=alpha: layer.set_alpha(0, alpha)) for alpha in (0.7, 0.1)
    )
    found["recompiles swap"] = max(compiled.new_graphs(graft(3, seed)) for seed in (1, 2))
    found["recompiles idle"] = sum(
        compiled.new_graphs(change) for change in (lambda: layer.unload_kernel(0), graft(3, 3))
    )
    before, num_before = compiled.backend.calls, compiled.num_calls
    morphs = [compiled.new_graphs(graft(hidden)) for hidden in range(4, 4 + MORPHS)]
    found["recompiles morph"] = max(first, *morphs)
    calls = compiled.backend.calls - before
    found["still compiled"] = calls / (compiled.num_calls - num_before)
    return {"breaks": compiled.graph_breaks, **found}


def _graft(layer: KasminaLayer, x: Tensor, guard: str, hidden: int, init_seed: int) -> None:
    kernel = blueprint(FEATURES, hidden, init_seed, out="random")
    layer.graft(0, kernel, alpha=0.5, guard=guard, example=x.detach())


def _peft() -> tuple[int, int, float]:
    """Return graphs over disable, add and switch; breaks; and the compiled share of 20 adapters."""
    lora = Lora(nn.Linear(FEATURES, FEATURES), rank=3)
    compiled = Compiled(lora.model)
    model = lora.model
    changes = (
        model.base_model.disable_adapter_layers,
        model.base_model.enable_adapter_layers,
        lambda: lora.another(5),
        lambda: model.set_adapter("default"),
        lambda: model.set_adapter("rank5"),
    )
    for change in changes:
        compiled.new_graphs(change)
    graphs, breaks = len(compiled.backend.graphs), compiled.graph_breaks
    lora = Lora(nn.Linear(FEATURES, FEATURES), rank=3)
    compiled = Compiled(lora.model)
    for rank in range(4, 4 + MORPHS):
        compiled.new_graphs(lambda rank=rank: lora.another(rank))
    return graphs, breaks, compiled.compiled_share


def telemetry_compiled() -> Figure:
    """Row 2: nodes of the compiled graphs with telemetry on, minus those with it off."""
    added = [
        abs(_num_nodes(kernel, telemetry=True) - _num_nodes(kernel, telemetry=False))
        for kernel in (None, nn.Linear(FEATURES, FEATURES))
    ]
    return Figure(key="telemetry compiled", value=max(added))


def _num_nodes(kernel: nn.Module | None, *, telemetry: bool) -> int:
    layer = adopt(nn.Linear(FEATURES, FEATURES), name="", telemetry_enabled=telemetry)
    if kernel is not None:
        layer.graft(0, kernel, alpha=1.0, example=torch.randn(BATCH, FEATURES))
    compiled = Compiled(layer)
    return sum(len(graph.graph.nodes) for graph in compiled.backend.graphs)
