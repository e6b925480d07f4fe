"""From recorded steps to kernels that are ready for their auditions."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from esper.compiler.catalog import own_shape_zeroed
from esper.compiler.compile import compile_blueprint
from esper.compiler.lowering import checked_plan
from esper.continuity.warmup import rate_for_new
from esper.contracts.blueprint import BlueprintIR
from esper.contracts.errors import (
    BlueprintError,
    GrowthError,
    KasminaException,
    SiteDescriptionError,
)
from esper.growth.audition import Audition
from esper.growth.budget import Cost, count_parameters, forward_flops
from esper.growth.causality import is_causal
from esper.growth.graft import Germination, Graft
from esper.growth.ranking import Candidate, RefusedCandidate, finite_score
from esper.growth.ranking_cost import CUT, affordable_ranking
from esper.growth.recording import finite_steps
from esper.resilience.attempt import Failed, attempt
from esper.seeds.probe import probe
from esper.state.kernel import prepare_kernel
from esper.state.site import describe_site

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import nn

    from esper.contracts.site import SiteSpec
    from esper.execution.kasmina_layer import KasminaLayer
    from esper.growth.ranking import RankedCandidate
    from esper.growth.ranking_cost import AffordableRanking
    from esper.growth.reading import Choice
    from esper.growth.recording import SiteObservation
    from esper.growth.run import GrowthRun
    from esper.state.kernel import PreparedKernel


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Contender:
    """A candidate in its audition.

    Attributes:
        graft: The graft that it is a try of.
        blueprint: The kernel's blueprint.
        audition: Its audition.
        null: The audition of the same-treatment null beside it; None under
            ``verify="snapshot"``.
    """

    graft: Graft
    blueprint: BlueprintIR
    audition: Audition
    null: Audition | None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Ranked:
    """A ranking of what is on offer.

    Attributes:
        order: Candidates, best first.
        blueprints: Their blueprints by site and name.
        refused: What was refused before.
    """

    order: list[RankedCandidate]
    blueprints: dict[tuple[str, str], BlueprintIR]
    refused: list[RefusedCandidate]


def free_seed(run: GrowthRun, site: str) -> int | None:
    """Return the first seed of a site that is dormant and under no embargo, or None."""
    dormant = run.layers[site].state_layout.get_dormant_seeds().nonzero().flatten().tolist()
    return next((i for i in dormant if not run.embargoes.covers(site, i)), None)


def open_sites(run: GrowthRun) -> dict[str, KasminaLayer]:
    """Return the layers in which a graft may germinate now."""
    return {name: layer for name, layer in run.layers.items() if free_seed(run, name) is not None}


def rank(
    run: GrowthRun, observations: Mapping[str, SiteObservation], *, is_bounded: bool = True
) -> Ranked:
    """Rank every catalog kernel at every recorded site, within the budget. Changes nothing.

    Args:
        run: The run.
        observations: What was recorded, by site.
        is_bounded: Whether samples and candidates are cut to what the overhead leaves to rankings.
    """
    candidates: list[Candidate] = []
    refused: list[RefusedCandidate] = []
    blueprints: dict[tuple[str, str], BlueprintIR] = {}
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
        for blueprint in offered:
            candidate = make_candidate(run.layers[name], name, blueprint, seen)
            cost = Cost(parameters=candidate.parameters, flops=candidate.flops)
            over = run.over_budget(cost)
            if over is None:
                candidates.append(candidate)
                blueprints[name, blueprint.id] = blueprint
            else:
                refused.append(RefusedCandidate(site=name, blueprint=blueprint.id, reason=over))
    if is_bounded and run.ledger.update_flops > 0:
        cut = affordable_ranking(observations, candidates, run.ledger.ranking_left(run.updates))
        observations, candidates = cut.observations, cut.candidates
        refused += cut.refused
        _tell_of_cut(run, cut)
    scored = map(finite_score, run.ranking.rank(observations, candidates))
    order = sorted(scored, key=lambda entry: entry.gain is None)
    return Ranked(order=order, blueprints=blueprints, refused=refused)


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
    layer: KasminaLayer, site: str, blueprint: BlueprintIR, seen: SiteObservation
) -> Candidate:
    """Build what a ranking scores: a kernel at a site with what it costs.

    Args:
        layer: The layer.
        site: Its name.
        blueprint: The kernel's blueprint.
        seen: What was recorded there, at least one step.
    """
    kernel = prepare_kernel(layer, blueprint)
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


def germinate_best(
    run: GrowthRun, ranked: Ranked, observations: Mapping[str, SiteObservation], limit: int
) -> list[Contender]:
    """Germinate the best candidates from distinct sites that pass the probe."""
    contenders: list[Contender] = []
    for entry in ranked.order:
        taken = {contender.graft.site for contender in contenders}
        if len(contenders) == limit or entry.gain is None:
            break
        if entry.site in taken or entry.gain <= 0:
            continue
        reason = f"ranked first at its site, predicted gain {entry.gain:.3g}"
        seen = observations[entry.site]
        blueprint = ranked.blueprints[entry.site, entry.blueprint]
        contender = germinate(run, entry.site, blueprint, seen, reason)
        if contender is not None:
            contenders.append(contender)
    return contenders


def germinate_choice(
    run: GrowthRun, choice: Choice, observations: Mapping[str, SiteObservation]
) -> Contender | None:
    """Germinate what the owner named: without the ranking, with the budget and the probe.

    Raises:
        GrowthError: The site or the blueprint is not known, or the site has no dormant seed.
    """
    layer = run.layers.get(choice.site)
    if layer is None:
        msg = f"{choice.site!r} is no site of this model; its sites: {', '.join(run.layers)}"
        raise GrowthError(msg)
    if free_seed(run, choice.site) is None:
        msg = f"{choice.site!r} has no seed that is free; wrap with a larger num_seeds"
        raise GrowthError(msg)
    if not observations[choice.site].inputs:
        silence = observations[choice.site].silence
        run.journal.note(
            f"nothing germinated at {choice.site}, where nothing was recorded: {silence}"
        )
        return None
    seen = observations[choice.site]
    try:
        blueprint = _named(run, layer, choice, seen)
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
    return germinate(run, choice.site, blueprint, seen, "named by hand")


def germinate(
    run: GrowthRun, site: str, blueprint: BlueprintIR, seen: SiteObservation, reason: str
) -> Contender | None:
    """Compile, store, fetch, verify, build and probe a kernel, and reserve its seed.

    Returns:
        None where something refused it; the reason is in the log, and nothing was changed.
    """
    layer = run.layers[site]
    seed_idx = free_seed(run, site)
    assert seed_idx is not None, f"{site} was offered without a dormant seed"
    try:
        kernel = _fetched(run, layer, blueprint, seen)
    except (KasminaException, BlueprintError) as error:
        run.journal.note(f"{blueprint.id} at {site} was refused: {error}")
        return None
    layer.reserve(seed_idx)
    graft = run.grafts.germinate(
        Germination(
            site=site,
            seed_idx=seed_idx,
            blueprint=blueprint.id,
            artifact_id=kernel.artifact_id or "",
            reason=reason,
            update=run.updates,
            cost=Cost(
                parameters=count_parameters(kernel.module),
                flops=_flops(kernel.module, seen, kernel),
            ),
        )
    )
    return Contender(
        graft=graft,
        blueprint=blueprint,
        audition=_audition(run, layer, seed_idx, kernel, seen),
        null=_null_audition(run, layer, seed_idx, seen),
    )


def _fetched(
    run: GrowthRun, layer: KasminaLayer, blueprint: BlueprintIR, seen: SiteObservation
) -> PreparedKernel:
    artifact = compile_blueprint(blueprint, clock=run.clock)
    record = None if artifact.record is None else artifact.record.to_document()
    digest = run.registry.put(artifact.kernel_binary, digest=artifact.artifact_id, record=record)
    loaded = run.cache.load_kernel_sync(digest)
    assert loaded is not None, "the registry has just acknowledged this artifact"
    kernel = prepare_kernel(layer, loaded)
    with run.ledger.measured("ranking"):
        probe(layer, kernel, seen.example, is_pristine=True)
    return kernel


def _audition(
    run: GrowthRun,
    layer: KasminaLayer,
    seed_idx: int,
    kernel: PreparedKernel,
    seen: SiteObservation,
) -> Audition:
    rates = [
        rate_for_new(group, lr_new=run.settings.lr_new, peak=peak)
        for group, peak in zip(run.optimizer.param_groups, run.watcher.peaks, strict=True)
    ]
    random_seed = run.settings.generator_seed * 1_000_003 + run.updates
    return Audition.begin(
        layer,
        seed_idx,
        kernel,
        placement=run.placement(),
        rates=rates,
        random_seed=random_seed,
        example=seen.example,
    )


def _null_audition(
    run: GrowthRun, layer: KasminaLayer, seed_idx: int, seen: SiteObservation
) -> Audition | None:
    """Set up the same-treatment null: a zeroed affine layer of the site's own shape."""
    if run.settings.verify != "fork":
        return None
    null = prepare_kernel(layer, own_shape_zeroed(_described(run, layer, seen)))
    return _audition(run, layer, seed_idx, null, seen)


def _offered(run: GrowthRun, site: str, seen: SiteObservation) -> list[BlueprintIR]:
    offered = run.catalog.blueprints_for(_described(run, run.layers[site], seen))
    return [_seeded(run, b) for b in offered if not run.embargoes.covers(site, b.id)]


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
