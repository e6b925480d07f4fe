"""Rows 10, 13, 14 and 16: state of seeds, the cost of many, and a controller with nothing to do."""

import subprocess
import sys
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from measure import US, Figure, Timing, figure_of, one_by_one, take_turns
from torch import nn

import esper
from esper.state.state_layout import KasminaStateLayout, SeedLifecycleState

NUM_SEEDS, MANY_SEEDS = 8, 1_000_000
LAYERS = (250, 500, 1000)
FIRST_UPDATES = 20
"""Updates in which a controller tries loss, measure and twin, and learns what an update takes."""
WAITS = 10**9
"""Updates until a controller looks at a run: it waits."""
HOOKS = ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks")
"""What torch's optimizers keep the hooks of a step in."""
ACTIVE = 8
_MEASURE_MEMORY = """
from esper.state.state_layout import KasminaStateLayout
def resident_bytes():
    lines = open("/proc/self/status").read().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmRSS"))
KasminaStateLayout(8)
before = resident_bytes()
layout = KasminaStateLayout({num_seeds})
layout.transition_seed_state(3, 1)
print(resident_bytes() - before)
"""


def transition(rounds: int) -> Figure:
    """Row 10: a checked transition of the layout."""
    layout = KasminaStateLayout(NUM_SEEDS)
    loading, dormant = SeedLifecycleState.LOADING, SeedLifecycleState.DORMANT

    def there_and_back() -> None:
        layout.transition_seed_state(3, loading)
        layout.transition_seed_state(3, dormant)

    took = take_turns({"": there_and_back}, rounds=2 * rounds, number=2000)[""]
    return Timing(tuple(seconds / 2 for seconds in took.rounds_s)).took("transition", US)


def memory() -> Iterator[Figure]:
    """Row 13: bytes of the arrays, and what the process grows by."""
    layout = KasminaStateLayout(NUM_SEEDS)
    arrays = [tensor for tensor in vars(layout).values() if isinstance(tensor, torch.Tensor)]
    size = sum(tensor.numel() * tensor.element_size() for tensor in arrays)
    yield Figure(key="arrays", value=size / NUM_SEEDS)
    if not Path("/proc/self/status").exists():
        yield Figure(key="memory", value=None, note="this system does not say what is resident")
        return
    script = _MEASURE_MEMORY.format(num_seeds=MANY_SEEDS)
    printed = subprocess.run(  # noqa: S603 - this interpreter on our own script
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    yield Figure(key="memory", value=int(printed.stdout) / MANY_SEEDS)


def wrapping(rounds: int) -> Iterator[Figure]:
    """Row 14: time to wrap a model, by its number of layers."""
    took = {n: one_by_one(lambda n=n: _wrapping(n), rounds=max(rounds // 3, 2)) for n in LAYERS}
    least, middle, most = (
        Timing(tuple(seconds / n for seconds in took[n].rounds_s)) for n in LAYERS
    )
    beside = f"at 500: {middle.median_s / least.median_s:.2f}x"
    yield most.ratio(least, "wrap", beside=beside)
    yield most.took("wrap layer", US)


def _wrapping(num_layers: int) -> Callable[[], object]:
    model = _model(num_layers)
    return lambda: esper.wrap(model, num_seeds=NUM_SEEDS)


def _model(num_layers: int) -> nn.Module:
    return nn.Sequential(*(nn.Linear(4, 4) for _ in range(num_layers)))


class Controlled:
    """A wrapped model with a Grower, and some active seeds."""

    def __init__(self, num_layers: int, num_active: int) -> None:
        self.model = esper.wrap(_model(num_layers), num_seeds=NUM_SEEDS)
        self.active = list(esper.layers(self.model).values())[:num_active]
        self._x = torch.randn(2, 4, requires_grad=True)
        for layer in self.active:
            layer.graft(0, nn.Linear(4, 4), alpha=0.1, example=self._x.detach())
        self._trained = self.model[0].weight  # one: the optimizer's own work is not what is timed
        for layer in self.model:
            layer.requires_grad_(requires_grad=False)
        self._trained.requires_grad_()
        for layer in self.active:
            layer.seed_kernel(0).requires_grad_()
        self.optimizer = torch.optim.SGD([self._trained], lr=0.0)
        self.grower = esper.Grower(self.model, self.optimizer)

    def train(self) -> None:
        """Call the active layers forward and backward, as a training step does."""
        self._trained.grad = torch.zeros_like(self._trained)
        for layer in self.active:
            layer(self._x).sum().backward()

    def step(self) -> None:
        """Step the optimizer and the controller."""
        self.optimizer.step()
        self.grower.step()


def controller(rounds: int) -> Iterator[Figure]:
    """Row 14: a controller step, by the number of layers and of active seeds."""
    runs = {
        "few layers": Controlled(10, ACTIVE),
        "many layers": Controlled(LAYERS[-1], ACTIVE),
        "idle": Controlled(LAYERS[-1], 0),
    }
    took: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(4 * rounds):
        for name, run in runs.items():
            took[name] += one_by_one(lambda run=run: _stepping(run), rounds=2).rounds_s
    timed = {name: Timing(tuple(seconds)) for name, seconds in took.items()}
    for run in runs.values():
        run.grower.close()
    yield timed["many layers"].ratio(timed["few layers"], "step size")
    yield timed["idle"].took("step idle", US)
    per_seed = [(a - b) / ACTIVE for a, b in _pairs(timed["many layers"], timed["idle"])]
    best = (timed["many layers"].best_s - timed["idle"].best_s) / ACTIVE * US
    yield figure_of([s * US for s in per_seed], "step seed", best=best)


class Training:
    """A loop that trains a wrapped model of 1,051,648 parameters under a Grower that waits.

    It can leave the controller out of an update, hooks and all: of two models the one may be faster
    by two hundredths for where its memory lies.
    """

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(*(m for _ in range(4) for m in (nn.Linear(512, 512), nn.ReLU())))
        self._batches = [(torch.randn(32, 512), torch.randn(32, 512)) for _ in range(8)]
        esper.wrap(self.model)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4)
        self.grower = esper.Grower(
            self.model,
            self.optimizer,
            compute_loss=_squared,
            evaluate=lambda model: _squared(model, self._batches[0]),
            policy=esper.EveryN(WAITS),
            evaluate_every=WAITS,
        )
        self._with_hooks = {name: vars(self.optimizer)[name] for name in HOOKS}
        self._without_hooks = {name: OrderedDict[int, object]() for name in HOOKS}
        self._updates = 0

    def update(self) -> None:
        """Make one update, as a loop of anybody's does, with the Grower."""
        loss, batch = self._train()
        self.grower.step(loss, batch=batch)

    def plain_update(self) -> None:
        """Make one without it: the optimizer has no hook meanwhile."""
        self.optimizer.__dict__.update(self._without_hooks)
        self._train()
        self.optimizer.__dict__.update(self._with_hooks)

    def _train(self) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
        batch = self._batches[self._updates % len(self._batches)]
        self._updates += 1
        loss = _squared(self.model, batch)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return loss, batch


def _squared(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    loss: torch.Tensor = (model(batch[0]) - batch[1]).square().mean()
    return loss


def waiting_controller(rounds: int) -> Figure:
    """Row 16: updates under a controller whose seeds are all dormant, over those without one."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a run without a horizon that never grows
        run = Training()
        for _ in range(FIRST_UPDATES):
            run.update()
        calls = {"plain": run.plain_update, "grown": run.update}
        took = take_turns(calls, rounds=64 * rounds, number=1)
    run.grower.close()
    added = took["grown"].added(took["plain"], "controller", US).value
    return took["grown"].ratio(took["plain"], "controller", beside=f"+{added:.0f} us an update")


def _stepping(run: Controlled) -> Callable[[], object]:
    run.train()
    return run.step


def _pairs(one: Timing, other: Timing) -> Iterator[tuple[float, float]]:
    return zip(one.rounds_s, other.rounds_s, strict=True)
