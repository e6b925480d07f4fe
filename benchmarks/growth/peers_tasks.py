"""The student and teacher of GradMax, with Esper's ranking choosing among kernels of one size.

A student of half the teacher's hidden units gets the others one by one. A kernel is one hidden unit
beside the whole student, with a zeroed readout; of many that differ in their initial weights the
ranking takes one. What is compared is the size of the gradient that the readout gets at birth, and
the loss at the end, each over that of a kernel taken at random.
"""

import math
import time
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from store import Result
from task import Task
from torch import Tensor, nn

import esper
from esper.growth.ranking import Candidate, FirstOrderGain
from esper.growth.recording import Recorder

NAME = "student and teacher"
ARMS = ("chosen", "random", "small", "large")
SETTINGS: dict[str, Any] = {
    "features": 10,
    "hidden": 10,
    "samples": 1_000,
    "rate": 0.1,
    "growth_every": 200,
    "last_updates": 500,
    "candidates": 64,
}
QUICK = {**SETTINGS, "growth_every": 3, "last_updates": 3, "candidates": 8}


@dataclass(frozen=True, slots=True, kw_only=True)
class _Data:
    x: Tensor
    y: Tensor


def _net(settings: Mapping[str, Any], hidden: int) -> nn.Sequential:
    features = settings["features"]
    return nn.Sequential(
        nn.Linear(features, hidden, bias=False), nn.ReLU(), nn.Linear(hidden, features, bias=False)
    )


def _data(settings: Mapping[str, Any], random_seed: int) -> _Data:
    """Return samples of a teacher with uniform weights; the same for every arm."""
    torch.manual_seed(random_seed)
    teacher = _net(settings, settings["hidden"])
    with torch.no_grad():
        for p in teacher.parameters():
            p.uniform_(-1.0, 1.0)
        x = torch.randn(settings["samples"], settings["features"])
        return _Data(x=x, y=teacher(x))


def _candidate(settings: Mapping[str, Any], number: int) -> Candidate:
    torch.manual_seed(number)
    kernel = _net(settings, 1)
    nn.init.zeros_(kernel[2].weight)
    return Candidate(
        site="0",
        blueprint=f"unit-{number}",
        kernel=kernel,
        zeroed="2.weight",
        position="parallel",
        parameters=sum(p.numel() for p in kernel.parameters()),
    )


def runs(
    random_seed: int, missing: Collection[str], settings: Mapping[str, Any]
) -> Iterator[Result]:
    """Run the missing arms of a random seed."""
    for arm in (a for a in ARMS if a in missing):
        with torch.random.fork_rng(devices=[]):
            yield _run(arm, random_seed, settings)


def _run(arm: str, random_seed: int, settings: Mapping[str, Any]) -> Result:
    data = _data(settings, random_seed)
    hidden = settings["hidden"] if arm == "large" else settings["hidden"] // 2
    torch.manual_seed(random_seed + 1)
    model = nn.Sequential(_net(settings, hidden))
    num_growths = settings["hidden"] - settings["hidden"] // 2
    esper.wrap(model, select=["0"], num_seeds=num_growths)
    optimizer = torch.optim.SGD(model.parameters(), lr=settings["rate"])
    gradients, begin = [], time.perf_counter()
    for growth in range(num_growths):
        _train(model, optimizer, data, settings["growth_every"])
        if arm in ("chosen", "random"):
            kernel = _kernel(arm, model, data, settings, random_seed * 1_000 + growth)
            gradients.append(_grow(model, optimizer, data, growth, kernel))
    _train(model, optimizer, data, settings["last_updates"])
    with torch.no_grad():
        loss = float(F.mse_loss(model(data.x), data.y))
    return Result(
        task=NAME,
        arm=arm,
        random_seed=random_seed,
        settings={**settings},
        figures={
            "log_loss": math.log(loss),
            "loss": loss,
            "gradient": sum(gradients) / len(gradients) if gradients else None,
        },
        flops=0.0,
        seconds=time.perf_counter() - begin,
    )


def _train(model: nn.Module, optimizer: Any, data: _Data, updates: int) -> None:
    for _ in range(updates):
        optimizer.zero_grad()
        F.mse_loss(model(data.x), data.y).backward()
        optimizer.step()


def _kernel(
    arm: str, model: nn.Module, data: _Data, settings: Mapping[str, Any], number: int
) -> nn.Module:
    """Return the kernel that the ranking takes of many, or the first."""
    candidates = [
        _candidate(settings, number * settings["candidates"] + i)
        for i in range(settings["candidates"])
    ]
    if arm == "random":
        return candidates[0].kernel
    with Recorder(esper.layers(model), random_seed=number) as recorder:
        x = data.x.clone().requires_grad_()
        F.mse_loss(model(x), data.y).backward()
        recorder.end_update(num_batches=1)
    ranked = FirstOrderGain(random_seed=number).rank(recorder.observations, candidates)
    return ranked[0].candidate.kernel


def _grow(model: nn.Module, optimizer: Any, data: _Data, growth: int, kernel: nn.Module) -> float:
    """Graft a kernel; return the norm of the first gradient of what it brings."""
    layer = esper.layers(model)["0"]
    layer.graft(growth, kernel, alpha=1.0, example=data.x)
    esper.sync_optimizer(model, optimizer)
    optimizer.zero_grad()
    F.mse_loss(model(data.x), data.y).backward()
    norms = [p.grad.norm() for p in layer.seed_kernel(growth).parameters() if p.grad is not None]
    return float(torch.stack(norms).norm())


TASK = Task(
    name=NAME,
    arms=ARMS,
    random_seeds=tuple(range(100, 110)),
    settings=SETTINGS,
    quick=QUICK,
    runs=runs,
    title="GradMax's student and teacher",
    told="""\
A student of five hidden units learns a teacher of ten, on all samples at once by SGD, and gets the
other five one by one: `chosen` takes each from 64 of one size by the ranking, `random` takes the
first of the same; `small` never grows, `large` has all ten from the start. GradMax sets the weights
of a unit so that its gradient is largest; Esper chooses among random ones, so that the figure is
that of the ranking.""",
    section="ratios",
    figure="loss",
    unit="loss at the end",
    digits=4,
    tried="nothing.",
)
