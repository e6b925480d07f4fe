"""Grafts that deserve no place, and the ranking held against what really helps.

Everything here starts from one host at one fixed update and never touches the arms.
"""

from __future__ import annotations

import copy
import statistics
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

from esper.compiler import catalog
from esper.continuity.optimizer import sync_optimizer
from esper.continuity.placement import Placement
from esper.contracts.lifecycle import GraftStage
from esper.contracts.report import ControlKind, ControlRow
from esper.growth.audition import Audition
from esper.growth.evaluation import Evaluator, measuring
from esper.growth.gates import read_gate
from esper.growth.germination import make_candidate
from esper.growth.grower import Grower
from esper.growth.policies import ByHand
from esper.growth.ranking import FirstOrderGain
from esper.growth.recording import Recorder
from esper.services.arms import (
    Tell,
    compute_loss,
    inputs_of,
    measure_on,
    optimizer_for,
    train_on,
)
from esper.services.digits import (
    LEARNING_RATE,
    UPDATES_PER_EPOCH,
    Digits,
    batches,
    demo_host,
)
from esper.state.kernel import prepare_kernel
from esper.state.site import describe_site
from esper.wrapping.wrap import layers, wrap

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import torch
    from torch import Tensor, nn

    from esper.contracts.blueprint import BlueprintIR
    from esper.contracts.site import SiteSpec

FORK_UPDATE: Final = 400
SITES: Final = ("3", "7")
RAMP_UPDATES: Final = 100
JOINT_UPDATES: Final = 250
NAIVE_LEVEL: Final = 0.05
RANKING_PASSES: Final = 50
RECORDED_UPDATES: Final = 16

_BUILDERS: Final[dict[ControlKind, Callable[[SiteSpec], BlueprintIR]]] = {
    "noop": catalog.noop,
    "noise": catalog.noise,
    "capacity_free": catalog.capacity_free,
    "random_features": catalog.random_features,
}
_TRAINED_JOINTLY: Final = frozenset({"capacity_free", "random_features"})
"""With the other two there is nothing that training could change about the kernel."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class HostFork:
    """The host at the fixed update, to be copied.

    Attributes:
        model: The host, not wrapped.
        optimizer: Its optimizer.
        random_seed: What the batches follow from.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    random_seed: int

    def copy(self) -> tuple[nn.Module, torch.optim.Optimizer]:
        """Return a wrapped copy of the host and an optimizer with the same moments."""
        model = wrap(copy.deepcopy(self.model))
        optimizer = optimizer_for(model)
        optimizer.load_state_dict(copy.deepcopy(self.optimizer.state_dict()))
        return model, optimizer

    def batches_after(self, digits: Digits) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the batches that the host would be trained on next, without an end."""
        epoch = FORK_UPDATE // UPDATES_PER_EPOCH
        while True:
            yield from batches(digits.train, self.random_seed, epoch)
            epoch += 1


def fork_host(digits: Digits, random_seed: int) -> HostFork:
    """Train the demo's host up to the fixed update."""
    model = demo_host(random_seed)
    optimizer = optimizer_for(model)
    for epoch in range(FORK_UPDATE // UPDATES_PER_EPOCH):
        for batch in batches(digits.train, random_seed, epoch):
            train_on(model, optimizer, batch)
    return HostFork(model=model, optimizer=optimizer, random_seed=random_seed)


def run_controls(digits: Digits, fork: HostFork, tell: Tell) -> tuple[ControlRow, ...]:
    """Try every control at two sites, by the gates and by a naive on/off gate."""
    rows = []
    for kind, build in _BUILDERS.items():
        admitted = fossilized = naive = 0
        for site in SITES:
            tell()
            spec = describe_site(fork.copy()[0].get_submodule(site))
            blueprint = replace(build(spec), init_seed=fork.random_seed)
            stage, was_admitted = _judged_by_gates(digits, fork, site, blueprint, tell)
            admitted += was_admitted
            fossilized += stage is GraftStage.FOSSILIZED
            naive += _accepted_naively(digits, fork, site, blueprint, kind in _TRAINED_JOINTLY)
        rows.append(
            ControlRow(
                kind=kind,
                tried=len(SITES),
                admitted=admitted,
                fossilized=fossilized,
                naive_accepted=naive,
            )
        )
    return tuple(rows)


def _judged_by_gates(
    digits: Digits,
    fork: HostFork,
    site: str,
    blueprint: BlueprintIR,
    tell: Tell,
) -> tuple[GraftStage, bool]:
    """Graft a control by hand; return its last stage and whether it was admitted."""
    model, optimizer = fork.copy()
    grower = Grower(
        model,
        optimizer,
        compute_loss=compute_loss,
        evaluate=measure_on(digits.gate),
        policy=ByHand([(site, blueprint)]),
        overhead=1000.0,  # a control is tried whatever it takes
        evaluate_every=10**6,
        ramp_updates=RAMP_UPDATES,
        hold_updates=JOINT_UPDATES - RAMP_UPDATES,
        verify="fork",
        random_seed=fork.random_seed,
    )
    with grower:
        for batch in fork.batches_after(digits):
            grower.step(train_on(model, optimizer, batch), batch=batch)
            grafts = grower.report().grafts if not grower.updates % 10 else ()
            if grafts and grafts[0].decided_at is not None:
                break
            tell()
    graft = grower.report().grafts[0]
    return graft.stage, graft.admitted_at is not None


def _accepted_naively(
    digits: Digits,
    fork: HostFork,
    site: str,
    blueprint: BlueprintIR,
    trains: bool,  # noqa: FBT001 - the one thing that differs
) -> bool:
    """Join a kernel at once, train, and switch it off: what an on/off gate would say."""
    model, optimizer = fork.copy()
    layer = layers(model)[site]
    feed = fork.batches_after(digits)
    layer.graft(0, blueprint, alpha=1 / RAMP_UPDATES, example=inputs_of(model, layer, digits))
    sync_optimizer(model, optimizer)
    for update in range(1, JOINT_UPDATES + 1 if trains else 1):
        layer.set_alpha(0, min(1.0, update / RAMP_UPDATES))
        train_on(model, optimizer, next(feed))
    measure, losses = measure_on(digits.gate), []
    for alpha in (0.0, 1.0):
        layer.set_alpha(0, alpha)
        with measuring(model):
            losses.append(measure(model)[0].double().numpy())
    return read_gate(losses[0], losses[1], level=NAIVE_LEVEL).passed


def ranking_pairs(digits: Digits, fork: HostFork, tell: Tell) -> list[tuple[float, float]]:
    """Return, for every candidate, the predicted gain and the one measured after an audition.

    All candidates are auditioned side by side, each for 50 shadow passes, and measured on the
    gate split with the seed on against the seed off.
    """
    model, optimizer = fork.copy()
    feed = fork.batches_after(digits)
    found = layers(model)
    with Recorder(found, random_seed=fork.random_seed) as recorder:
        for _ in range(RECORDED_UPDATES):
            train_on(model, optimizer, next(feed))
    candidates, auditions, placement = [], {}, Placement(model, optimizer)
    for site, seen in recorder.observations.items():
        for blueprint in catalog.default_catalog().blueprints_for(describe_site(found[site])):
            seeded = replace(blueprint, init_seed=fork.random_seed)
            candidates.append(make_candidate(found[site], site, seeded, seen))
            auditions[site, seeded.id] = Audition.begin(
                found[site],
                0,
                prepare_kernel(found[site], seeded),
                placement=placement,
                rates=[LEARNING_RATE],
                random_seed=fork.random_seed,
            )
    for _ in range(RANKING_PASSES):
        tell()
        batch = next(feed)
        train_on(model, optimizer, batch)
        for audition in auditions.values():
            audition.shadow_update(model, batch, compute_loss)
    ranked = FirstOrderGain(random_seed=fork.random_seed).rank(recorder.observations, candidates)
    evaluator = Evaluator(measure_on(digits.gate))
    without = evaluator(model).loss
    pairs = []
    for entry in ranked:
        if entry.gain is not None:
            audition = auditions[entry.site, entry.blueprint]
            pairs.append((entry.gain, without - audition.evaluate(model, evaluator).loss))
    return pairs


def spearman(pairs: list[tuple[float, float]]) -> float | None:
    """Return the rank correlation of two columns; None with fewer than three or without spread.

    Ties get the mean of their ranks.
    """
    if len(pairs) < 3:
        return None
    first, second = (_ranks([pair[i] for pair in pairs]) for i in range(2))
    if len(set(first)) == 1 or len(set(second)) == 1:
        return None
    return statistics.correlation(first, second)


def _ranks(values: list[float]) -> list[float]:
    ordered = sorted(values)
    return [ordered.index(v) + (ordered.count(v) - 1) / 2 for v in values]
