"""GroMo's tutorial, with GroMo beside: a network of 37 parameters that grows four times.

The data, the host, its optimizer and the number of updates are the tutorial's. GroMo computes the
weights of the units that it adds, after each round of updates; Esper adds a kernel before each,
chosen by its ranking among kernels of as many parameters, with a readout of zeros that is trained.
"""

import importlib.util
import time
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from store import Result
from task import Task
from torch import Tensor, nn

import esper
from esper.growth.ranking import Candidate, FirstOrderGain
from esper.growth.recording import Recorder

NAME = "GroMo tutorial"
ARMS = ("chosen", "random", "host", "large", "GroMo")
SITES = {"0": (10, 2), "2": (2, 2), "4": (2, 3)}
"""The linear layers of the host, and what each reads and gives."""

SETTINGS: dict[str, Any] = {
    "growths": 4,
    "epochs": 3,
    "batches": 10,
    "batch": 1_000,
    "rate": 0.01,
    "further_updates": 880,
    "parameters": 32,
    "candidates": 16,
}
QUICK = {**SETTINGS, "epochs": 1, "batches": 2, "further_updates": 2, "candidates": 2}

Batches = list[tuple[Tensor, Tensor]]


def _data(settings: Mapping[str, Any], random_seed: int) -> Batches:
    """Return batches of normal inputs and, of each output, the sum of ``sin(i x_i + d)``."""
    generator = torch.Generator().manual_seed(random_seed)
    number, out = torch.arange(1, 11), torch.arange(3)
    x = torch.randn(settings["batches"], settings["batch"], 10, generator=generator)
    y = torch.sin((number * x)[..., None] + out).sum(dim=2)
    return list(zip(x, y, strict=True))


def _net(hidden: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(10, hidden), nn.SELU(), nn.Linear(hidden, hidden), nn.SELU(), nn.Linear(hidden, 3)
    )


def _kernel(site: str, parameters: int) -> nn.Sequential:
    """Return a kernel of at most so many parameters, with a readout of zeros."""
    features_in, features_out = SITES[site]
    width = (parameters - features_out) // (features_in + 1 + features_out)
    kernel = nn.Sequential(nn.Linear(features_in, width), nn.SELU(), nn.Linear(width, features_out))
    nn.init.zeros_(kernel[2].weight)
    nn.init.zeros_(kernel[2].bias)
    return kernel


def runs(
    random_seed: int, missing: Collection[str], settings: Mapping[str, Any]
) -> Iterator[Result]:
    """Run the missing arms of a random seed; GroMo where it is installed."""
    for arm in (a for a in ARMS if a in missing):
        if arm == "GroMo" and importlib.util.find_spec("gromo") is None:
            print("GroMo is not installed (the extra bench has it): its arm is left out")
            continue
        with torch.random.fork_rng(devices=[]):
            yield _run(arm, random_seed, settings)


def _run(arm: str, random_seed: int, settings: Mapping[str, Any]) -> Result:
    train, test = (_data(settings, 2 * random_seed + i) for i in range(2))
    torch.manual_seed(random_seed)
    begin = time.perf_counter()
    model = _peer() if arm == "GroMo" else _net(7 if arm == "large" else 2)
    first = _count(model)
    if arm in ("chosen", "random"):
        esper.wrap(model, num_seeds=settings["growths"])
    for growth in range(settings["growths"]):
        if arm in ("chosen", "random"):
            _grow(arm, model, train, settings, random_seed * 100 + growth)
        for _ in range(settings["epochs"]):
            _train(model, train, settings)
        if arm == "GroMo":
            _grow_peer(model, train, growth)
    loss = _loss(model, test)
    for _ in range(settings["further_updates"] // settings["batches"]):
        _train(model, train, settings)
    return Result(
        task=NAME,
        arm=arm,
        random_seed=random_seed,
        settings={**settings},
        figures={
            "loss": loss,
            "loss_later": _loss(model, test),
            "parameters_before": first,
            "parameters": _count(model),
        },
        flops=0.0,
        seconds=time.perf_counter() - begin,
    )


def _count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def _train(model: nn.Module, batches: Batches, settings: Mapping[str, Any]) -> None:
    """Train for an epoch; plain SGD keeps nothing, so that each epoch may have one of its own."""
    optimizer = torch.optim.SGD(model.parameters(), lr=settings["rate"])
    for x, y in batches:
        optimizer.zero_grad()
        F.mse_loss(model(x), y).backward()
        optimizer.step()


@torch.no_grad()
def _loss(model: nn.Module, batches: Batches) -> float:
    """Return the mean squared error of the first batch, as the tutorial's one test batch."""
    x, y = batches[0]
    return float(F.mse_loss(model(x), y))


def _grow(
    arm: str, model: nn.Module, train: Batches, settings: Mapping[str, Any], number: int
) -> None:
    """Graft a kernel: the best by the ranking, or one at random."""
    candidates = []
    for i in range(settings["candidates"] * len(SITES)):
        site = list(SITES)[i % len(SITES)]
        torch.manual_seed(number * 1_000 + i)
        kernel = _kernel(site, settings["parameters"])
        candidates.append(
            Candidate(
                site=site,
                blueprint=f"kernel-{i}",
                kernel=kernel,
                zeroed="2.weight",
                position="parallel",
                parameters=_count(kernel),
            )
        )
    taken = candidates[number % len(SITES)]
    if arm == "chosen":
        taken = _best(model, train, candidates, number)
    layer = esper.layers(model)[taken.site]
    free = next(i for i in range(settings["growths"]) if layer.seed_kernel(i) is None)
    layer.graft(free, taken.kernel, alpha=1.0)


def _best(model: nn.Module, train: Batches, candidates: list[Candidate], number: int) -> Candidate:
    with Recorder(esper.layers(model), random_seed=number) as recorder:
        for x, y in train:
            model.zero_grad()
            F.mse_loss(model(x.clone().requires_grad_()), y).backward()
            recorder.end_update(num_batches=1)
    ranked = FirstOrderGain(random_seed=number).rank(recorder.observations, candidates)
    return ranked[0].candidate


def _peer() -> nn.Module:
    from gromo.containers.growing_mlp import GrowingMLP

    return GrowingMLP(in_features=10, out_features=3, hidden_size=2, number_hidden_layers=2)


def _grow_peer(model: Any, train: Batches, growth: int) -> None:
    """Let GroMo add units to a hidden layer, scaled by the best of four factors."""
    model.eval()
    model.set_growing_layers(index=growth % 2)
    model.init_computation()
    for x, y in train:
        model.zero_grad()
        F.mse_loss(model(x), y, reduction="sum").backward()
        model.update_computation()
    model.compute_optimal_updates()
    model.reset_computation()
    model.dummy_select_update()
    losses = {}
    for factor in (0.0, 0.1, 0.5, 1.0):
        model.set_scaling_factor(factor)
        with torch.no_grad():
            errors = [float(F.mse_loss(model.extended_forward(x), y)) for x, y in train]
        losses[factor] = sum(errors)
    model.set_scaling_factor(min(losses, key=losses.__getitem__))
    model.apply_change()
    model.train()


TASK = Task(
    name=NAME,
    arms=ARMS,
    random_seeds=tuple(range(100, 110)),
    settings=SETTINGS,
    quick=QUICK,
    runs=runs,
    title="GroMo's tutorial",
    told="""\
A network of two hidden layers of two units learns sums of sines by SGD, 120 updates in four rounds.
`GroMo` is the tutorial as published, run beside: after each round units are added to a hidden layer
with weights computed for them. `chosen` and `random` add a kernel of as many parameters before each
round, by Esper's ranking and at random, each with a readout of zeros; `host` never grows, `large`
has two hidden layers of seven from the start. Then all train on alike for 880 updates.""",
    section="tutorial",
    figure="loss",
    unit="test loss at the tutorial's end",
    digits=3,
    tried="nothing.",
)
