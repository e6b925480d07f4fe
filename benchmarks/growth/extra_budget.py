"""A further budget for a run that has slowed down: what it is best spent on.

A small byte model trains at a constant rate. Then every arm gets the same further FLOPs, in which
the rate falls to 0. The arm ``scratch`` is the larger model that has these further FLOPs alone.
"""

import functools
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import depth
from store import Result
from task import Task
from torch import Tensor, nn
from training import Training, warm_then_constant

import esper
from esper.growth.flops import update_flops

ARMS = ("going on", "deepen fresh", "deepen copy", "widen", "null", "scratch")
SHORT: dict[str, Any] = {
    **depth.SHORT,
    "blocks": 4,
    "updates": 1_000,
    "further_updates": 600,
}
LONG = {**depth.LONG, "blocks": 4, "further_updates": 6_000}
QUICK = {**depth.QUICK, "blocks": 4, "further_updates": 10}


def runs(
    task: str, random_seed: int, missing: Collection[str], settings: Mapping[str, Any]
) -> Iterator[Result]:
    """Run the missing arms of a random seed."""
    small = depth.flops_at(settings, settings["blocks_at_first"])
    further = small * settings["further_updates"]
    from_trunk = [arm for arm in ARMS if arm in missing and arm != "scratch"]
    if from_trunk:
        trunk = depth.begin(settings, random_seed, depth=settings["blocks_at_first"])
        trunk.train(settings["updates"], warm_then_constant(settings["warmup"]))
        before = trunk.look()
        for arm in from_trunk:
            run = trunk.fork()
            each = _change(run, arm, further, settings)
            run.train_for(further, each)
            yield depth.result(task, arm, random_seed, run, settings, before=before)
    if "scratch" in missing:
        run = depth.begin(settings, random_seed, depth=settings["blocks"])
        run.train_falling(further, depth.flops_at(settings, settings["blocks"]), settings["warmup"])
        yield depth.result(task, "scratch", random_seed, run, settings)


def _change(run: Training, arm: str, further: float, settings: Mapping[str, Any]) -> float:
    """Change the model; return the FLOPs of an update from then on."""
    model, optimizer = run.model, run.optimizer
    if arm.startswith("deepen"):
        each = depth.flops_at(settings, settings["blocks"])
        esper.deepen(
            model,
            optimizer,
            depth=settings["blocks"],
            init=arm.removeprefix("deepen "),
            ramp_updates=max(1, round(0.2 * further / each)),
        )
        return each
    if arm == "widen":
        esper.widen(model, optimizer, "blocks.*.mlp", intermediate=8 * settings["width"])
    if arm == "null":
        _add_maps(model, optimizer)
    return float(update_flops(model, run.learner.compute_loss, run.batches.of_update(0)))


class _Beside(nn.Module):
    """A module with a zeroed linear map beside it: the treatment of growing, and no capacity."""

    def __init__(self, module: nn.Module, width: int) -> None:
        super().__init__()
        self.module = module
        self.map = nn.Linear(width, width)
        nn.init.zeros_(self.map.weight)
        nn.init.zeros_(self.map.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Return the sum of both."""
        return self.module(x) + self.map(x)


def _add_maps(model: nn.Module, optimizer: Any) -> None:
    """Put a map beside the MLP of every block that is awake."""
    asleep = esper.asleep(model)
    for number, block in enumerate(model.blocks):
        if f"{depth.PATH}.{number}" not in asleep:
            block.mlp = _Beside(block.mlp, block.norm_mlp.normalized_shape[0])
            optimizer.param_groups[0]["params"] += [*block.mlp.map.parameters()]


_TOLD = """\
A model of two blocks has trained at a constant rate. Then every arm gets the FLOPs of as many
further updates of two blocks as `further_updates` says, in which the rate falls to 0: `going on`
as it is, `deepen` wakes two more blocks, `widen` doubles every MLP, `null` puts a zeroed linear map
beside every MLP. `scratch` is the four-block model with the further FLOPs alone. In the table of
arms FLOPs are those of the whole run."""
_TRIED = "nothing; the arms are the first that were run."


def _task(name: str, settings: Mapping[str, Any]) -> Task:
    return Task(
        name=name,
        arms=ARMS,
        random_seeds=tuple(range(100, 106)),
        settings=settings,
        quick=QUICK,
        runs=functools.partial(runs, name),
        title=f"A further budget, after {settings['updates']:,} updates of a byte-level model "
        f"of width {settings['width']}",
        told=_TOLD,
        section="extra budget",
        figure="loss",
        unit="nats a byte, test split",
        digits=4,
        tried=_TRIED,
    )


TASKS = (_task("extra budget, short", SHORT), _task("extra budget", LONG))
