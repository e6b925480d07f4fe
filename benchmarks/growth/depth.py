"""Depth and width by stages: the final model from scratch, a smaller one alone, and it grown.

All arms of a random seed that begin at one width have the same initial weights, and all see the
same batch at each update. The
rate warms up, stays, and falls over the last part of a run, so that runs of several horizons have
one beginning, which is trained once.
"""

import functools
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from gpt import PATH as GPT_BLOCKS
from gpt import no_gpu
from images import no_fashion
from learners import MLP_RATIO, learner_of
from store import Result
from task import Task
from training import Training, falling, warm_then_constant

import esper
from esper.growth.flops import update_flops

SHORT: dict[str, Any] = {
    "blocks": 6,
    "blocks_at_first": 2,
    "width": 64,
    "context": 64,
    "batch": 16,
    "rate": 4e-3,
    "weight_decay": 0.1,
    "warmup": 100,
    "updates": 1_000,
    "decay_share": 0.2,
    "horizons": [0.6, 0.8, 1.0, 1.25],
    "look_every": 250,
    "test_windows": 1_024,
}
LONG = {**SHORT, "width": 32, "updates": 6_000, "look_every": 1_000, "test_windows": 4_096}
QUICK = {**SHORT, "width": 16, "updates": 20, "warmup": 2, "look_every": 10, "test_windows": 64}
PATH = "blocks"


def percent(share: float) -> str:
    """Name a horizon."""
    return f"{100 * share:.0f}"


SCRATCH = tuple(f"scratch {percent(h)}" for h in SHORT["horizons"])


@dataclass(frozen=True, slots=True, kw_only=True)
class Start:
    """A smaller model than the one of the end, and what is made of it.

    Attributes:
        alone: Arms in which it stays as it is, the last with the FLOPs of a grown one.
        grown: Arms in which it grows.
        is_shallow: Whether most of its blocks sleep.
        is_narrow: Whether its MLPs have a quarter of their units.
        depth: How many blocks are awake where most of them sleep; None: as the settings say.
    """

    alone: tuple[str, ...]
    grown: tuple[str, ...]
    is_shallow: bool = True
    is_narrow: bool = False
    depth: int | None = None

    def settings(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """Return the settings of the smaller model."""
        return {**settings, "mlp_ratio": 1} if self.is_narrow else {**settings}

    def blocks(self, settings: Mapping[str, Any]) -> int:
        """Return how many of its blocks are awake."""
        if not self.is_shallow:
            return int(settings["blocks"])
        return int(settings["blocks_at_first"] if self.depth is None else self.depth)


SHALLOW = Start(
    alone=tuple(f"small {percent(h)}" for h in (0.8, 1.0)), grown=("grown fresh", "grown copy")
)
NARROW = Start(alone=("narrow 100",), grown=("grown wide",), is_shallow=False, is_narrow=True)
LEAST = Start(alone=("small and narrow 100",), grown=("grown both",), is_narrow=True)
OF_GPT = tuple(
    Start(alone=(f"{name} 100",), grown=(f"grown of {name}",), depth=depth)
    for name, depth in (("one", 1), ("two", 2), ("four", 4))
)
STARTS = (SHALLOW, NARROW, LEAST, *OF_GPT)
RIVALS = {arm: start.alone[-1] for start in STARTS for arm in start.grown}
"""Grown arm -> the smaller model alone with as many FLOPs."""


def begin(settings: Mapping[str, Any], random_seed: int, *, depth: int) -> Training:
    """Begin a run of the final model with ``depth`` blocks awake."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(random_seed)
        model = learner_of(settings).build(settings, settings["blocks"])
    if depth < settings["blocks"]:
        esper.shallow(model, settings.get("path", PATH), depth=depth)
    return Training.of(model, random_seed, settings)


def flops_at(settings: Mapping[str, Any], depth: int) -> float:
    """Return the FLOPs of an update of a model of so many blocks."""
    learner = learner_of(settings)
    with torch.random.fork_rng(devices=[]):
        model = learner.build(settings, depth)
    return float(update_flops(model, learner.compute_loss, learner.feed(settings, 0).of_update(0)))


def result(
    task: str,
    arm: str,
    random_seed: int,
    run: Training,
    settings: Mapping[str, Any],
    **figures: float,
) -> Result:
    """Read the test split, and put a run down."""
    learner = learner_of(settings)
    loss = learner.test(settings)(run.model)
    return Result(
        task=task,
        arm=arm,
        random_seed=random_seed,
        settings={**settings},
        figures={"loss": loss, "updates": run.updates, **figures},
        flops=run.flops,
        seconds=run.seconds,
        curve=tuple(run.curve),
        details={"text": learner.digest()},
    )


def runs(
    task: str, random_seed: int, missing: Collection[str], settings: Mapping[str, Any]
) -> Iterator[Result]:
    """Run the missing arms of a random seed."""
    if any(arm in missing for arm in SCRATCH):
        trunk = begin(settings, random_seed, depth=settings["blocks"])
        ends = {arm: _updates(arm, settings["updates"]) for arm in SCRATCH}
        yield from _horizons(task, trunk, ends, random_seed, missing, settings)
    for start in STARTS:
        small = [arm for arm in (*start.alone, *start.grown) if arm in missing]
        if small:
            yield from _from_small(task, random_seed, start, small, settings)


def _updates(arm: str, updates: int) -> int:
    """Return the updates of a horizon in an arm's name; all of them where there is none."""
    last = arm.rsplit(" ", 1)[-1]
    return round(updates * (int(last) / 100 if last.isdigit() else 1.0))


def _horizons(
    task: str,
    trunk: Training,
    ends: Mapping[str, int],
    random_seed: int,
    missing: Collection[str],
    settings: Mapping[str, Any],
) -> Iterator[Result]:
    rate = warm_then_constant(settings["warmup"])
    for arm in sorted((a for a in ends if a in missing), key=ends.__getitem__):
        start = round((1 - settings["decay_share"]) * ends[arm])
        trunk.train(start, rate)
        run = trunk.fork().train(ends[arm], falling(start, ends[arm], rate))
        yield result(task, arm, random_seed, run, settings)


def _from_small(
    task: str,
    random_seed: int,
    start: Start,
    missing: Collection[str],
    settings: Mapping[str, Any],
) -> Iterator[Result]:
    """Run the smaller model alone, and grow it where its own rate begins to fall."""
    of_start, blocks = start.settings(settings), start.blocks(settings)
    small, whole = flops_at(of_start, blocks), flops_at(settings, settings["blocks"])
    late = settings["decay_share"]
    equal = round(settings["updates"] * ((1 - late) * small + late * whole) / small)
    ends = {arm: _updates(arm, equal) for arm in start.alone}
    moments = {arm: round((1 - late) * ends[arm]) for arm in start.alone if arm in missing}
    for arm in start.grown:
        if arm in missing:
            moments[arm] = round((1 - late) * _updates(arm, settings["updates"]))
    trunk = begin(of_start, random_seed, depth=blocks)
    rate = warm_then_constant(settings["warmup"])
    for arm in sorted(moments, key=moments.__getitem__):
        trunk.train(moments[arm], rate)
        if arm in start.alone:
            yield from _horizons(task, trunk, {arm: ends[arm]}, random_seed, missing, settings)
        else:
            yield _grown(task, trunk.fork(), arm, random_seed, start, settings)


def _grown(
    task: str,
    run: Training,
    arm: str,
    random_seed: int,
    start: Start,
    settings: Mapping[str, Any],
) -> Result:
    rate = warm_then_constant(settings["warmup"])
    end, begun = _updates(arm, settings["updates"]), run.updates
    before = run.look()
    if start.is_narrow:
        hidden = MLP_RATIO * settings["width"]
        esper.widen(run.model, run.optimizer, f"{PATH}.*.mlp", intermediate=hidden)
    if start.is_shallow:
        esper.deepen(
            run.model,
            run.optimizer,
            depth=settings["blocks"],
            path=settings.get("path"),
            init="fresh" if "fresh" in arm else "copy",
            ramp_updates=max(1, round(0.2 * (end - begun))),
        )
    run.train(end, falling(begun, end, rate))
    return result(task, arm, random_seed, run, settings, before=before)


_ARMS_TOLD = """\
`scratch` trains all blocks from the start, at several horizons (percent in the name); `small` is
the same model with most of them asleep to its end, `small 100` for as many FLOPs as `grown`;
`grown` wakes them at 80 % of the run by `esper.deepen`, where the rate begins to fall, with their
own weights or as copies. Compute saved is that of the run from scratch that ends at the same loss,
interpolated between horizons."""
_WIDTH_TOLD = """\
`narrow 100` has all blocks and a quarter of the units in each MLP, `grown wide` gets the others at
80 % by `esper.widen`; `small and narrow 100` has fewer of both, and `grown both` gets all of them
at 80 %, blocks as copies. Each is held against the smaller model that it began as, for as many
FLOPs."""
_TRIED = """\
three rates (2e-3, 4e-3, 8e-3) for two and six blocks at random seed 90, and widths 32, 48 and 64
for their speed, all at 1,000 updates: 5 variants. Kinds of growing tried: those shown."""
TRANSFORMER: dict[str, Any] = {
    **SHORT,
    "model": "vision transformer",
    "data": "Fashion-MNIST",
    "images": [12_000, 1_500, 4_000],
    "size": 28,
    "patch": 4,
    "width": 32,
    "batch": 64,
    "rate": 2e-3,
    "updates": 1_200,
    "look_every": 300,
}
RESIDUAL = {**TRANSFORMER, "model": "residual network", "width": 16}
GPT: dict[str, Any] = {
    **SHORT,
    "model": "GPT-2",
    "path": GPT_BLOCKS,
    "blocks": 12,
    "width": 768,
    "context": 256,
    "batch": 32,
    "rate": 6e-4,
    "warmup": 200,
    "updates": 3_000,
    "look_every": 500,
}
del GPT["blocks_at_first"]
QUICK_GPT = {**GPT, "width": 64, "context": 16, "batch": 2, "updates": 10, "warmup": 2}
QUICK_IMAGES = {"data": "digits", "size": 8, "patch": 2, "updates": 10, "warmup": 2, "width": 8}


def _task(
    name: str,
    settings: Mapping[str, Any],
    title: str,
    told: str,
    *,
    starts: tuple[Start, ...] = (SHALLOW,),
    tried: str = "nothing.",
    missing: Callable[[], str | None] = lambda: None,
) -> Task:
    is_bytes = "model" not in settings
    return Task(
        name=name,
        arms=(*SCRATCH, *(arm for start in starts for arm in (*start.alone, *start.grown))),
        random_seeds=tuple(range(100, 106)),
        settings=settings,
        quick=QUICK if is_bytes else {**settings, **QUICK_IMAGES},
        runs=functools.partial(runs, name),
        title=title,
        told="\n".join((told, _ARMS_TOLD, *([_WIDTH_TOLD] if NARROW in starts else []))),
        section="depth",
        figure="loss",
        unit="nats a byte, test split" if is_bytes else "cross entropy, test split",
        digits=4,
        tried=tried,
        missing=missing,
    )


def _bytes_task(name: str, settings: Mapping[str, Any], starts: tuple[Start, ...]) -> Task:
    size = f"{settings['updates']:,} updates at width {settings['width']}"
    title = f"Depth by stages: a byte-level model, {size}"
    told = "A transformer of six blocks reads Python's standard library, byte by byte."
    return _task(name, settings, title, told, starts=starts, tried=_TRIED)


TASKS = (
    _bytes_task("depth, short", SHORT, (SHALLOW,)),
    _bytes_task("depth", LONG, STARTS),
    _task(
        "vision transformer",
        TRANSFORMER,
        "Depth by stages: a vision transformer on Fashion-MNIST",
        "A transformer of six blocks over patches of 4 by 4.",
        missing=no_fashion,
    ),
    _task(
        "residual network",
        RESIDUAL,
        "Depth by stages: a residual network on Fashion-MNIST",
        "Six residual blocks of 16 channels behind one convolution.",
        missing=no_fashion,
    ),
    Task(
        name="GPT-2",
        arms=(*SCRATCH, *(arm for start in OF_GPT for arm in (*start.alone, *start.grown))),
        random_seeds=(110,),
        settings=GPT,
        quick={**QUICK_GPT, "look_every": 5, "test_windows": 8},
        runs=functools.partial(runs, "GPT-2"),
        title="Depth by stages: a GPT-2 of 12 blocks, on a GPU",
        told="""\
GPT-2 of 85 million parameters reads Python's standard library, byte by byte, in bfloat16.
`scratch` trains all blocks from the start, at several horizons (percent in the name); `one`, `two`
and `four` are the same model with so many blocks awake to its end, for as many FLOPs as it takes
to wake all as copies at 80 % of the run, which are `grown of one`, `of two` and `of four`.""",
        section="depth",
        figure="loss",
        unit="nats a byte, test split",
        digits=4,
        tried="nothing.",
        missing=no_gpu,
    ),
)
