"""Packages that deserve no place, in real runs: how often the verdict lets one in all the same.

They enter a trial by a door of the benchmark's own (:func:`door`), behind which everything is as
in any run: twins, averaged weights, one verdict. Controls that must fail are read from the same
trials: one look at the last weights, and the plain standard error.
"""

import copy
import functools
import itertools
import math
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Final

import byte_model
import torch
import torch.nn.functional as F
from byte_text import Batches, load_text, sample_losses, windows
from images import Batch, compute_loss, digits_splits, measure, no_digits
from store import Result
from task import Task
from torch import Tensor, nn

import esper
from esper.compiler.catalog import CONTROLS, default_catalog, noise, noop, own_shape_zeroed
from esper.compiler.linear_form import linear_form
from esper.contracts.blueprint import INPUT, OUTPUT, BlueprintEdge, BlueprintIR
from esper.contracts.site import SiteSpec
from esper.growth.gates import EXACT, judge, level_of
from esper.growth.trial import Arm, Trial
from esper.services.digits import LEARNING_RATE, demo_host
from esper.state.site import describe_site

STARTS: Final = (0.1, 0.4, 0.7)
"""Where in its run a trial starts; runs take turns."""
RUNS_IN_BLOCK: Final = 5
"""Runs that one file tells of: their random seeds are its own and those behind it."""
USELESS: Final = ("nothing", "noise", "permuted", "linear")
KINDS: Final = (*USELESS, "own shape", "useful 200", "useful 400")
"""What is tried: four that are useless, a null that is none, and one that is of use."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """A model in training, small enough to be trained hundreds of times.

    Attributes:
        build: Random seed to a model.
        rate: Learning rate of AdamW, constant.
        batch: Random seed and update to a batch.
        compute_loss: Model and batch to the loss.
        evaluate: The owner's measure.
        permuted: Batch and random seed to the batch with targets of other samples.
        site: Where packages are tried.
        updates: Length of a whole run, of which starts are shares.
    """

    build: Callable[[int], nn.Module]
    rate: float
    batch: Callable[[int, int], Any]
    compute_loss: Callable[[nn.Module, Any], Tensor]
    evaluate: Callable[[nn.Module], Any]
    permuted: Callable[[Any, int], Any]
    site: str
    updates: int


def _other_labels(batch: Batch, random_seed: int) -> Batch:
    generator = torch.Generator().manual_seed(random_seed)
    return batch[0], batch[1][torch.randperm(len(batch[1]), generator=generator)]


def digits_subject() -> Subject:
    """Return the demo's digits."""
    splits = digits_splits({})

    def batch(random_seed: int, update: int) -> Batch:
        generator = torch.Generator().manual_seed(random_seed * 1_000_003 + update)
        rows = torch.randint(len(splits.train.y), (32,), generator=generator)
        return splits.train.x[rows], splits.train.y[rows]

    return Subject(
        build=demo_host,
        rate=LEARNING_RATE,
        batch=batch,
        compute_loss=compute_loss,
        evaluate=measure(splits.gate),
        permuted=_other_labels,
        site="3",
        updates=1_200,
    )


def regression_subject() -> Subject:
    """Return a regression of a wider network with noise by a network of 85 parameters."""
    generator = torch.Generator().manual_seed(0)
    hidden, out = (torch.randn(s, generator=generator) for s in ((5, 32), (32, 1)))
    x_ND = torch.randn(1_600, 5, generator=generator)
    noise_N1 = 0.3 * torch.randn(1_600, 1, generator=generator)
    y_N1 = (x_ND @ hidden).tanh() @ out / 4 + noise_N1
    gate = slice(1_000, None)

    def build(random_seed: int) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(random_seed)
            return nn.Sequential(nn.Linear(5, 12), nn.Tanh(), nn.Linear(12, 1))

    def batch(random_seed: int, update: int) -> Batch:
        places = torch.Generator().manual_seed(random_seed * 1_000_003 + update)
        rows = torch.randint(1_000, (32,), generator=places)
        return x_ND[rows], y_N1[rows]

    return Subject(
        build=build,
        rate=1e-2,
        batch=batch,
        compute_loss=lambda model, given: F.mse_loss(model(given[0]), given[1]),
        evaluate=lambda model: (model(x_ND[gate]) - y_N1[gate]).square().squeeze(1),
        permuted=_other_labels,
        site="0",
        updates=1_000,
    )


def language_subject() -> Subject:
    """Return a byte model of two narrow blocks."""
    text, context = load_text(), 32
    shape = byte_model.Shape(num_blocks=2, width=32, hidden=64, context=context)
    gate = windows(text.gate, 900, context)

    def batch(random_seed: int, update: int) -> Tensor:
        return Batches(text.train, random_seed, 16, context).of_update(update)

    def permuted(sequences_BL: Tensor, random_seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(random_seed)
        return sequences_BL[:, torch.randperm(sequences_BL.shape[1], generator=generator)]

    return Subject(
        build=lambda random_seed: byte_model.build(shape, random_seed),
        rate=3e-3,
        batch=batch,
        compute_loss=byte_model.compute_loss,
        evaluate=sample_losses(gate),
        permuted=permuted,
        site="blocks.0.mlp.up",
        updates=600,
    )


SUBJECTS: Final[Mapping[str, Callable[[], Subject]]] = {
    "digits": digits_subject,
    "regression": regression_subject,
    "language": language_subject,
}


def blueprint_of(kind: str, site: SiteSpec, random_seed: int) -> BlueprintIR:
    """Return the kernel that is tried."""
    useful = next(iter(default_catalog().blueprints_for(site)))
    made = useful
    if kind == "nothing":
        made = noop(site)
    elif kind == "noise":
        made = _readout_of_noise(site)
    elif kind in ("linear", "own shape"):
        made = linear_form(useful)
    return replace(made, init_seed=random_seed)


def _readout_of_noise(site: SiteSpec) -> BlueprintIR:
    """Return a zeroed matrix that reads noise in place of the host's output."""
    source = noise(site, std=1.0)
    matrix = CONTROLS["attention"].own_shape(site, "noise-readout")
    nodes = (*source.nodes, *matrix.nodes)
    ids = [INPUT, *(node.id for node in nodes), OUTPUT]
    edges = tuple(BlueprintEdge(a, b) for a, b in itertools.pairwise(ids))
    return replace(matrix, nodes=nodes, edges=edges, draws_random=True)


@dataclass(slots=True, kw_only=True)
class Seen:
    """What a door saw of a trial, beside its record: one look at the last weights."""

    single_z: float | None = None
    loss: float | None = None


@contextmanager
def door(kind: str, subject: Subject, random_seed: int) -> Iterator[Seen]:
    """Let a package of a kind into trials, until the block ends."""
    seen, judged = Seen(), Trial._judge  # noqa: SLF001 - the door
    made_arms, made_nulls = Trial._made_arms, Trial._linear_forms  # noqa: SLF001 - the door

    def arms(trial: Trial) -> list[Arm]:
        found = made_arms(trial)
        if kind == "nothing":
            found[0].twin.perturb(random_seed)
        if kind == "permuted":
            _train_on_others(found[0], subject, random_seed)
        return found

    def nulls(trial: Trial) -> dict[str, BlueprintIR]:
        found = made_nulls(trial)
        layers = {each.graft.site: each.layer for each in trial._package}  # noqa: SLF001 - the door
        return {
            name: _other_null(null, kind, random_seed, layers[name]) for name, null in found.items()
        }

    def judge_it(trial: Trial) -> Any:
        run = trial._run  # noqa: SLF001 - the door
        live = run.measure().verdicts_part
        last = run.measure_copy(trial._arm_named("candidate").twin.model).verdicts_part  # noqa: SLF001 - the door
        found = judge(live, last, level=level_of(1), spread=EXACT)
        seen.single_z, seen.loss = found.z, live.loss
        return judged(trial)

    Trial._made_arms, Trial._linear_forms, Trial._judge = arms, nulls, judge_it  # noqa: SLF001 - the door
    try:
        yield seen
    finally:
        Trial._made_arms, Trial._linear_forms, Trial._judge = made_arms, made_nulls, judged  # noqa: SLF001 - the door


def _other_null(null: BlueprintIR, kind: str, random_seed: int, layer: nn.Module) -> BlueprintIR:
    """Return what the null twin is made of: the kernel from another random seed, or a map."""
    if kind == "own shape":
        return replace(own_shape_zeroed(describe_site(layer)), init_seed=random_seed)
    return replace(null, init_seed=random_seed + 500_000) if kind == "linear" else null


def _train_on_others(arm: Arm, subject: Subject, random_seed: int) -> None:
    """Train the kernels of a twin on targets of other samples, and its host on its own."""
    kernels = [p for kernel in arm.kernels for p in kernel.parameters]
    counter = itertools.count(random_seed * 1_009)

    def update(model: nn.Module, optimizer: Any, batches: list[Any], _step: Any) -> None:
        optimizer.zero_grad()
        subject.compute_loss(model, subject.permuted(batches[0], next(counter))).backward()
        theirs = [None if p.grad is None else p.grad.clone() for p in kernels]
        optimizer.zero_grad()
        subject.compute_loss(model, batches[0]).backward()
        for p, gradient in zip(kernels, theirs, strict=True):
            p.grad = gradient
        optimizer.step()

    arm.twin._update = update  # noqa: SLF001 - the door


def one_trial(
    kind: str, subject: Subject, begun: tuple[nn.Module, Any], random_seed: int, update: int
) -> dict[str, Any]:
    """Try a package in a copy of a run that has come so far; return what its verdict said."""
    model, optimizer = copy.deepcopy(begun)
    esper.wrap(model, select=[subject.site])
    site = describe_site(esper.layers(model)[subject.site])
    attributed = kind in ("linear", "own shape") or kind.startswith("useful")
    with door(kind, subject, random_seed) as seen:
        grower = esper.Grower(
            model,
            optimizer,
            compute_loss=subject.compute_loss,
            evaluate=subject.evaluate,
            policy=esper.ByHand([(subject.site, blueprint_of(kind, site, random_seed))]),
            trial_updates=400 if kind.endswith("400") else 200,
            attribution="trial" if attributed else "none",
            overhead=1e6,
            evaluate_every=10**6,
            hold_updates=0,
            random_seed=random_seed,
        )
        with grower:
            while True:
                batch = subject.batch(random_seed, update)
                loss = subject.compute_loss(model, batch)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                grower.step(loss, batch=batch)
                update += 1
                trials = grower.report().trials if update % 10 == 0 else ()
                if trials and trials[0].decided_at is not None:
                    break
                if grower.updates > 600:
                    msg = f"no verdict on {kind}: {grower.report().notes}"
                    raise RuntimeError(msg)
    trial = trials[0]
    if trial.effect is None or (attributed and trial.capacity == 0.0):
        msg = f"{kind} was read against nothing, or against itself: {trial}"
        raise RuntimeError(msg)
    return _row(trial, seen)


def _row(trial: Any, seen: Seen) -> dict[str, Any]:
    """Return what is kept of a trial: its figures, and what two laxer rules would have said."""
    loss = math.inf if seen.loss is None else abs(seen.loss)
    is_large = (trial.effect or 0.0) > 0.001 * loss
    plain_z = None if trial.z is None else trial.z * trial.spread
    return {
        "taken": trial.taken,
        "z": trial.z,
        "effect": trial.effect,
        "capacity": trial.capacity,
        "capacity_shown": trial.capacity_shown,
        "plain": bool(plain_z is not None and plain_z > trial.threshold and is_large),
        "single": bool(seen.single_z is not None and seen.single_z > trial.threshold),
    }


def runs(
    task: str, random_seed: int, missing: Collection[str], settings: Mapping[str, Any]
) -> Iterator[Result]:
    """Run the missing kinds in a block of runs."""
    subject = SUBJECTS[task.removeprefix("useless, ")]()
    rows: dict[str, list[dict[str, Any]]] = {kind: [] for kind in KINDS if kind in missing}
    seconds = dict.fromkeys(rows, 0.0)
    for run in range(random_seed, random_seed + settings["runs"]):
        start = STARTS[run % len(STARTS)]
        begun, update = _begun(subject, run, round(start * subject.updates))
        for kind, told in rows.items():
            begin = time.perf_counter()
            row = one_trial(kind, subject, begun, run, update)
            told.append({"random_seed": run, "start": start, **row})
            seconds[kind] += time.perf_counter() - begin
    for kind, found in rows.items():
        yield Result(
            task=task,
            arm=kind,
            random_seed=random_seed,
            settings={**settings},
            figures={
                "runs": len(found),
                "taken": sum(bool(row["taken"]) for row in found),
                "capacity": sum(bool(row["capacity_shown"]) for row in found),
                "plain": sum(row["plain"] for row in found),
                "single": sum(row["single"] for row in found),
            },
            flops=0.0,
            seconds=seconds[kind],
            details={"rows": found},
        )


def _begun(subject: Subject, random_seed: int, updates: int) -> tuple[tuple[nn.Module, Any], int]:
    model = subject.build(random_seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=subject.rate)
    for update in range(updates):
        loss = subject.compute_loss(model, subject.batch(random_seed, update))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return (model, optimizer), updates


_TOLD = """\
Real runs, each ended at its verdict, trials of 200 updates that start at 10, 40 or 70 % of a run in
turn. `nothing` is a copy of the run, perturbed; `noise` a zeroed readout of noise; `permuted` a
kernel that learns the targets of other samples; `linear` a package made linear against one like it
from another random seed, for which no capacity may be claimed. `own shape` is a control that must
fail: the same package against a zeroed map of the layer's own shape, as if that were its null.
`useful` is the catalog's first kernel for that layer, tried for 200 and for 400 updates: its rows
are the power of the test, of the verdict and of the claim. Two laxer rules must fail as well: the
plain standard error, not widened, and one look at the last weights in place of averaged ones.
Brackets are exact 95 % intervals."""

TASKS = tuple(
    Task(
        name=f"useless, {name}",
        arms=KINDS,
        random_seeds=tuple(range(1_000, 1_100, RUNS_IN_BLOCK)),
        settings={"runs": RUNS_IN_BLOCK},
        quick={"runs": 1},
        runs=functools.partial(runs, f"useless, {name}"),
        title=f"Useless packages: {name}",
        told=_TOLD,
        section="useless",
        figure="taken",
        unit="taken over in a block",
        digits=1,
        counted="blocks",
        missing=no_digits if name == "digits" else lambda: None,
    )
    for name in SUBJECTS
)
