"""From recorded steps to kernels that are ready to be tried."""

from __future__ import annotations

import copy
import functools
import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

import torch

from esper.compiler.compile import compile_blueprint
from esper.compiler.lowering import checked_plan
from esper.contracts.blueprint import BlueprintIR
from esper.contracts.errors import (
    BlueprintError,
    GrowthError,
    KasminaException,
    RankFailedError,
    SiteDescriptionError,
)
from esper.contracts.lifecycle import SeedLifecycleState
from esper.contracts.reference import is_digest
from esper.fetching.outbox import KernelParcel
from esper.growth.budget import Cost, count_parameters, forward_flops
from esper.growth.causality import is_causal, is_causal_kernel
from esper.growth.graft import Germination, Graft
from esper.growth.offers import Offer
from esper.growth.ranking import Candidate, RefusedCandidate, finite_score
from esper.growth.ranking_cost import CUT, affordable_ranking
from esper.growth.recording import finite_steps
from esper.growth.sent_kernel import kernel_of_first_rank
from esper.resilience.attempt import Done, Failed, attempt
from esper.seeds.probe import probe
from esper.state.kernel import prepare_kernel
from esper.state.ranges import named_ranges
from esper.state.shortage import is_shortage
from esper.state.site import describe_site

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from torch import nn

    from esper.contracts.artifact import CompiledKernelArtifact
    from esper.contracts.choices import GraftVerdict
    from esper.contracts.site import SiteSpec
    from esper.execution.kasmina_layer import KasminaLayer
    from esper.fetching.kernel_cache import KernelCache
    from esper.growth.ranking import RankedCandidate
    from esper.growth.ranking_cost import AffordableRanking
    from esper.growth.reading import Choice
    from esper.growth.recording import SiteObservation
    from esper.growth.run import GrowthRun
    from esper.state.kernel import PreparedKernel
    from esper.state.layer_call import Example


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Contender:
    """A kernel that is compiled, fetched, verified and probed, and is no part of the model yet.

    Attributes:
        graft: The graft that it is a try of.
        layer: Where it would stand.
        seed_idx: The slot there, which is reserved.
        blueprint: The kernel's blueprint.
        kernel: The kernel.
        example: A call of the layer as it was recorded.
        alpha: The largest alpha at which it changes no output yet: 1, or 0 where its last layer
            is not zeroed.
    """

    graft: Graft
    layer: KasminaLayer
    seed_idx: int
    blueprint: BlueprintIR
    kernel: PreparedKernel
    example: Example
    alpha: float

    @property
    def made_by(self) -> str:
        """What was done until it could be tried, in words."""
        came = "fetched, verified" if self.graft.record.is_of_a_registry else "compiled, fetched"
        return f"{came}, probed"

    def withdraw(self, reason: str, *, update: int, verdict: GraftVerdict) -> None:
        """Free the seed, unless its owner has; the run is as if nothing had been chosen."""
        if self.layer.state_layout.state(self.seed_idx) is SeedLifecycleState.LOADING:
            self.layer.cancel(self.seed_idx)
        self.graft.cull(reason, update=update, verdict=verdict)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Ranked:
    """A ranking of what is on offer.

    Attributes:
        order: Candidates, best first.
        offers: What they are, by site and name.
        refused: What was refused before.
        is_cut: Whether something was left out that the overhead does not buy a score of.
    """

    order: list[RankedCandidate]
    offers: dict[tuple[str, str], Offer]
    refused: list[RefusedCandidate]
    is_cut: bool = False


class Named(NamedTuple):
    """What the owner named.

    Attributes:
        blueprint: The kernel's blueprint.
        cost: What it costs.
        artifact: The kernel itself where it was named by its digest.
    """

    blueprint: BlueprintIR
    cost: Cost
    artifact: CompiledKernelArtifact | None


class Chosen(NamedTuple):
    """A kernel that a ranking chose, as ranks tell it one another.

    Attributes:
        site: Name of its layer.
        blueprint: Name of its blueprint.
        gain: Its predicted gain.
    """

    site: str
    blueprint: str
    gain: float


def free_seed(run: GrowthRun, site: str) -> int | None:
    """Return the first seed of a site that is dormant, or None."""
    dormant = run.layers[site].state_layout.get_dormant_seeds().nonzero().flatten().tolist()
    return next(iter(dormant), None)


def open_sites(run: GrowthRun) -> dict[str, KasminaLayer]:
    """Return the layers in which a graft may germinate now."""
    return {
        name: layer
        for name, layer in run.layers.items()
        if name not in run.closed and free_seed(run, name) is not None
    }


def rank(
    run: GrowthRun, observations: Mapping[str, SiteObservation], *, is_bounded: bool = True
) -> Ranked:
    """Rank every kernel on offer at every recorded site, within the budget. Changes nothing.

    Args:
        run: The run.
        observations: What was recorded, by site.
        is_bounded: Whether samples and candidates are cut to what the overhead leaves to rankings.
    """
    candidates: list[Candidate] = []
    refused: list[RefusedCandidate] = []
    offers: dict[tuple[str, str], Offer] = {}
    for name, seen in observations.items():
        if not seen.inputs:
            reason = f"nothing was recorded: {seen.silence}"
            refused.append(RefusedCandidate(site=name, blueprint="", reason=reason))
            continue
        _tell_of_lost_steps(run, seen)
        try:
            offered = _offered(run, name, seen)
        except SiteDescriptionError as error:
            refused.append(RefusedCandidate(site=name, blueprint="", reason=str(error)))
            continue
        for offer in offered:
            made = _candidate(run, name, offer, seen)
            if isinstance(made, RefusedCandidate):
                refused.append(made)
                continue
            candidate = made
            cost = Cost(parameters=candidate.parameters, flops=candidate.flops)
            over = run.over_budget(cost)
            if over is None:
                candidates.append(candidate)
                offers[name, candidate.blueprint] = offer
            else:
                refused.append(
                    RefusedCandidate(site=name, blueprint=candidate.blueprint, reason=over)
                )
    is_cut = False
    if is_bounded and run.ledger.update_flops > 0:
        cut = affordable_ranking(observations, candidates, run.ledger.ranking_left(run.updates))
        observations, candidates = cut.observations, cut.candidates
        refused += cut.refused
        is_cut = cut.text is not None
        _tell_of_cut(run, cut)
    with run.fits.in_use():
        scored = list(map(finite_score, run.ranking.rank(observations, candidates)))
    order = sorted(scored, key=lambda entry: entry.gain is None)
    return Ranked(order=order, offers=offers, refused=refused, is_cut=is_cut)


def _tell_of_cut(run: GrowthRun, cut: AffordableRanking) -> None:
    """Say what of the first ranking that was cut was left out; others are as the overhead is."""
    if cut.text is not None and not any(n.startswith(CUT) for n in run.journal.notes):
        run.journal.note(cut.text)


def _tell_of_lost_steps(run: GrowthRun, seen: SiteObservation) -> None:
    """Say how much of what was recorded a ranking cannot use."""
    num_recorded = len(seen.inputs)
    num_lost = num_recorded - sum(1 for _ in finite_steps(seen))
    if num_lost:
        run.journal.note(
            f"{num_lost} of {num_recorded} steps recorded at {seen.site} had values that are not "
            "finite, and the ranking is without them"
        )


def make_candidate(
    layer: KasminaLayer,
    site: str,
    blueprint: BlueprintIR,
    seen: SiteObservation,
    artifact: CompiledKernelArtifact | None = None,
) -> Candidate:
    """Build what a ranking scores: a kernel at a site with what it costs.

    Args:
        layer: The layer.
        site: Its name.
        blueprint: The kernel's blueprint.
        seen: What was recorded there, at least one step.
        artifact: The kernel with its weights; None: those that the blueprint begins with.
    """
    kernel = prepare_kernel(layer, artifact or blueprint)
    made = checked_plan(blueprint)
    zeroed = [i for i, step in enumerate(made.steps) if step is made.zeroed_step]
    return Candidate(
        site=site,
        blueprint=blueprint.id,
        kernel=kernel.module,
        zeroed=f"steps.{zeroed[0]}.weight" if zeroed and blueprint.mode == "add" else None,
        position=blueprint.position,
        parameters=count_parameters(kernel.module),
        flops=_flops(kernel.module, seen, kernel),
    )


def choose_package(
    run: GrowthRun, ranked: Ranked, *, limit: int, flops: float = math.inf
) -> list[RankedCandidate]:
    """Choose a package: at every open site the best kernel that the budget allows.

    It takes at most half of what the budget has left in all, best predicted gain first.

    Args:
        run: The run.
        ranked: What is on offer, best first.
        limit: How many kernels a package may have, at least 1.
        flops: What they may take together in a forward of one sample, for their trial to be paid.
    """
    chosen: dict[str, RankedCandidate] = {}
    room = run.budget.room(host=run.host_cost, admitted=run.grafts.added_cost)
    room = replace(room, flops=min(room.flops, flops))
    for entry in ranked.order:
        if len(chosen) == limit or entry.gain is None:
            break
        cost = Cost(parameters=entry.parameters, flops=entry.flops)
        if entry.site not in chosen and entry.gain > 0 and room.takes(cost):
            chosen[entry.site] = entry
            room = room.without(cost)
    return list(chosen.values())


def germinate_package(
    run: GrowthRun,
    chosen: Iterable[Chosen],
    ranked: Ranked,
    observations: Mapping[str, SiteObservation],
) -> list[Contender]:
    """Germinate what was chosen; a kernel that its probe refuses is left out, and the log says so.

    Args:
        run: The run.
        chosen: At most one kernel of each site, each of those that were offered there.
        ranked: What it was chosen from.
        observations: What was recorded, by site.
    """
    made = (
        germinate(
            run,
            entry.site,
            ranked.offers[entry.site, entry.blueprint].blueprint,
            observations[entry.site],
            f"the best at its site, score {entry.gain:.3g}",
            ranked.offers[entry.site, entry.blueprint].artifact,
        )
        for entry in chosen
        if (entry.site, entry.blueprint) in ranked.offers  # of another rank's it may not be
    )
    return [contender for contender in made if contender is not None]


def named_kernel(
    run: GrowthRun, choice: Choice, observations: Mapping[str, SiteObservation]
) -> Named | None:
    """Return what the owner named and what it costs: without the ranking, with the budget.

    Returns:
        None where something refused it; the reason is in the log.

    Raises:
        GrowthError: The site or the blueprint is not known, or the site has no dormant seed.
    """
    layer = run.layers.get(choice.site)
    if layer is None:
        msg = f"{choice.site!r} is no site of this model; its sites: {', '.join(run.layers)}"
        raise GrowthError(msg)
    if choice.site in run.closed:
        run.journal.note(
            f"nothing germinated at {choice.site}, which is not healthy: {run.closed[choice.site]}"
        )
        return None
    if free_seed(run, choice.site) is None:
        msg = f"{choice.site!r} has no seed that is free; wrap with a larger num_seeds"
        raise GrowthError(msg)
    if not observations[choice.site].inputs:
        silence = observations[choice.site].silence
        run.journal.note(
            f"nothing germinated at {choice.site}, where nothing was recorded: {silence}"
        )
        return None
    seen, artifact = observations[choice.site], fetched_for(run.cache, choice)
    try:
        blueprint = artifact.blueprint if artifact else _named(run, layer, choice, seen)
    except SiteDescriptionError as error:
        run.journal.note(f"{choice.blueprint} at {choice.site} was refused: {error}")
        return None
    made = attempt(functools.partial(make_candidate, layer, choice.site, blueprint, seen))
    if isinstance(made, Failed):  # a blueprint of the owner's own, which may not fit the site
        run.journal.note(f"{blueprint.id} at {choice.site}, named by hand, was refused: {made}")
        return None
    cost = Cost(parameters=made.value.parameters, flops=made.value.flops)
    reason = run.over_budget(cost)
    if reason is not None:
        run.journal.note(f"{blueprint.id} at {choice.site}, named by hand, was refused: {reason}")
        return None
    return Named(blueprint, cost, artifact)


def fetched_for(cache: KernelCache, choice: Choice) -> CompiledKernelArtifact | None:
    """Return the kernel that a choice names by its digest; None where it names a blueprint."""
    named = choice.blueprint
    return cache.load_kernel_sync(named) if isinstance(named, str) and is_digest(named) else None


def germinate(
    run: GrowthRun,
    site: str,
    blueprint: BlueprintIR,
    seen: SiteObservation,
    reason: str,
    artifact: CompiledKernelArtifact | None = None,
) -> Contender | None:
    """Compile a kernel, verify, build and probe it, and reserve its seed; nothing here waits.

    Args:
        run: The run.
        site: Name of the layer, which has a seed that is free.
        blueprint: The kernel's blueprint.
        seen: What was recorded at the layer.
        reason: Why this kernel, for the log.
        artifact: The kernel itself where it came from a registry; None: it is compiled.

    Returns:
        None where something refused it; the reason is in the log, and nothing was changed.
    """
    layer = run.layers[site]
    seed_idx = free_seed(run, site)
    assert seed_idx is not None, f"{site} was offered without a dormant seed"
    try:
        kernel, is_identity = _probed(
            run, site, seed_idx, artifact or _compiled(run, site, blueprint), seen
        )
    except (KasminaException, BlueprintError, RankFailedError) as error:
        run.journal.note(f"{blueprint.id} at {site} was refused: {error}")
        return None
    except (RuntimeError, MemoryError) as error:
        if not is_shortage(error):
            raise
        run.journal.note(f"{blueprint.id} at {site} was refused, for lack of memory: {error}")
        return None
    if artifact is not None:
        run.journal.note(f"{blueprint.id} at {site} is a registry's: {run.offers.told(artifact)}")
    layer.reserve(seed_idx)
    graft = run.grafts.germinate(
        Germination(
            site=site,
            seed_idx=seed_idx,
            blueprint=blueprint.id,
            artifact_id=kernel.artifact_id or "",
            reason=reason,
            update=run.updates,
            package=run.num_packages + 1 if run.settings.trial == "twin" else None,
            cost=Cost(
                parameters=count_parameters(kernel.module),
                flops=_flops(kernel.module, seen, kernel),
            ),
        )
    )
    of_artifact = blueprint if artifact is None else artifact.blueprint
    run.field_reports.germinated(graft.number, of_artifact, layer, seen)
    return Contender(
        graft=graft,
        layer=layer,
        seed_idx=seed_idx,
        blueprint=blueprint,
        kernel=kernel,
        example=seen.example,
        alpha=1.0 if is_identity else 0.0,
    )


def _compiled(run: GrowthRun, site: str, blueprint: BlueprintIR) -> CompiledKernelArtifact:
    """Compile a kernel, decode what was made of it as if it had been fetched, and publish it.

    Of several ranks the first one compiles it.
    """
    compiling = functools.partial(compile_blueprint, blueprint, clock=run.clock)
    with run.journal.preparing("compile", site, blueprint.id):
        artifact = kernel_of_first_rank(run.given, compiling)
    run.cache.admit(artifact)
    if run.outbox is not None:
        record = None if artifact.record is None else artifact.record.to_document()
        run.outbox.send(
            KernelParcel(digest=artifact.artifact_id, data=artifact.kernel_binary, record=record)
        )
    return artifact


def _probed(
    run: GrowthRun,
    site: str,
    seed_idx: int,
    artifact: CompiledKernelArtifact,
    seen: SiteObservation,
) -> tuple[PreparedKernel, bool]:
    """Return a kernel that passed its probe, and whether it is the identity at alpha 1."""
    layer, of_kernel = run.layers[site], (site, artifact.blueprint.id, artifact.artifact_id)
    with run.journal.preparing("load", *of_kernel):
        kernel = prepare_kernel(layer, artifact)
    ranges = named_ranges([(layer, seed_idx)], "probe")
    told = run.journal.preparing("probe", *of_kernel)
    with told, run.ledger.measured("ranking"), ranges, run.fits.in_use():
        found = probe(layer, kernel, seen.example, is_pristine=True)
    return kernel, found.is_identity


def _offered(run: GrowthRun, site: str, seen: SiteObservation) -> list[Offer]:
    """Return what the catalog offers at a site, and what was taken from the registry for it."""
    spec = _described(run, run.layers[site], seen)
    local = [_seeded(run, blueprint) for blueprint in run.catalog.blueprints_for(spec)]
    theirs = run.offers.at(spec, local)
    if spec.is_sequence and spec.is_causal:
        theirs = [offer for offer in theirs if not _looks_ahead(run, site, offer, seen)]
    return [*(Offer(blueprint=blueprint) for blueprint in local), *theirs]


def _looks_ahead(run: GrowthRun, site: str, offer: Offer, seen: SiteObservation) -> bool:
    """Say whether a registry's kernel looks at later inputs; one that cannot be run is refused."""

    def looks() -> bool:
        kernel = prepare_kernel(run.layers[site], offer.artifact or offer.blueprint)
        x = seen.inputs[0] if kernel.position == "parallel" else seen.outputs[0]
        return not is_causal_kernel(kernel.module, x[:1])

    found = attempt(looks)
    if isinstance(found, Done) and not found.value:
        return False
    why = "it looks at later inputs" if isinstance(found, Done) else str(found)
    run.journal.note(f"{offer.blueprint.id} of the registry is not offered at {site}: {why}")
    return True


def _candidate(
    run: GrowthRun, site: str, offer: Offer, seen: SiteObservation
) -> Candidate | RefusedCandidate:
    """Build a candidate. A registry's kernel, which may not fit, is tried on a recorded sample."""
    layer, artifact = run.layers[site], offer.artifact
    if artifact is None:
        return make_candidate(layer, site, offer.blueprint, seen)

    def made() -> Candidate:
        candidate = make_candidate(layer, site, offer.blueprint, seen, artifact)
        _check_shape(candidate, seen)
        return candidate

    found = attempt(made)
    if isinstance(found, Done):
        return found.value
    reason = f"it does not fit: {found}"
    run.journal.note(f"{offer.blueprint.id} of the registry is not offered at {site}: {reason}")
    return RefusedCandidate(site=site, blueprint=offer.blueprint.id, reason=reason)


def _check_shape(candidate: Candidate, seen: SiteObservation) -> None:
    """Refuse a kernel that gives something of another shape than its site.

    Raises:
        GrowthError: As said.
    """
    x = seen.inputs[0] if candidate.position == "parallel" else seen.outputs[0]
    with torch.no_grad(), torch.random.fork_rng():
        given = copy.deepcopy(candidate.kernel)(x[:1])
    expected = seen.outputs[0][:1].shape
    if given.shape != expected:
        msg = f"it gives {tuple(given.shape)} where the site gives {tuple(expected)}"
        raise GrowthError(msg)


def _described(run: GrowthRun, layer: KasminaLayer, seen: SiteObservation) -> SiteSpec:
    """Describe a site; one that cannot be run again to see what it looks at counts as causal."""
    spec = describe_site(layer, seen.inputs[0], seen.outputs[0])
    if not spec.is_sequence:
        return spec
    causal = attempt(functools.partial(is_causal, layer, seen.example))
    if isinstance(causal, Failed):
        run.journal.note(
            f"{seen.site} could not be run again to see whether it looks at later inputs, so only "
            f"kernels that do not are offered there: {causal}"
        )
        return spec
    return spec if causal.value else replace(spec, is_causal=False)


def _named(
    run: GrowthRun, layer: KasminaLayer, choice: Choice, seen: SiteObservation
) -> BlueprintIR:
    if isinstance(choice.blueprint, BlueprintIR):
        return choice.blueprint
    site = _described(run, layer, seen)
    try:
        return _seeded(run, run.catalog.named(choice.blueprint, site, where=repr(choice.site)))
    except ValueError as error:
        raise GrowthError(str(error)) from error


def _seeded(run: GrowthRun, blueprint: BlueprintIR) -> BlueprintIR:
    """Let the initial weights follow the run's random seed."""
    return replace(blueprint, init_seed=run.settings.generator_seed)


def _flops(module: nn.Module, seen: SiteObservation, kernel: PreparedKernel) -> float:
    example = seen.inputs[0] if kernel.position == "parallel" else seen.outputs[0]
    return float(forward_flops(module, example[:1]))
