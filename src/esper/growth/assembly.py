"""Putting a run together from what the owner gave, and from defaults for the rest."""

from __future__ import annotations

import functools
import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from esper.bus.in_process import EventBus
from esper.compiler.catalog import default_catalog
from esper.compiler.tracing import warm_up
from esper.continuity.ensemble import joined, members_of
from esper.continuity.optimizer import sync_optimizer
from esper.continuity.placement import Placement, check_trains, numbered
from esper.continuity.replicas import bare, is_first, ranks_of
from esper.continuity.warmup import UpdateFactor
from esper.contracts.errors import GrowthError
from esper.contracts.events import BatchFitted
from esper.contracts.reference import is_digest
from esper.fetching.enhanced_kernel_cache import EnhancedKernelCache
from esper.fetching.incidents import Incidents
from esper.fetching.outbox import Outbox
from esper.fetching.preloader import DEFAULT_BYTES, Preloader
from esper.growth.budget import Budget, Cost, count_parameters, default_overhead
from esper.growth.claims import check_free, left_behind
from esper.growth.evaluation import Evaluator
from esper.growth.field_reports import FieldReports
from esper.growth.graft import Grafts
from esper.growth.journal import Journal
from esper.growth.ledger import WorkLedger
from esper.growth.offers import Offers
from esper.growth.options import check_options
from esper.growth.policies import DiminishingReturns, choices_of
from esper.growth.ranking import FirstOrderGain
from esper.growth.run import GrowthRun
from esper.growth.sent_kernel import kernel_of_first_rank
from esper.growth.staged import check_stages, grafts_nothing, needs_no_seeds
from esper.growth.twins import builder, twin_update
from esper.growth.updates import UpdateWatcher
from esper.observability.event_log import EventLog, read_events
from esper.observability.run_folder import (
    EVENTS_FILE,
    OUTBOX_FOLDER,
    claim_run_folder,
    earlier_outboxes,
)
from esper.resilience.clock import MonotonicClock
from esper.seeds.fitting import IN_SHARDS, Fits, Planned, key_of
from esper.state.host_parts import check_replicas
from esper.state.layer_record import record_of
from esper.state.shards import is_in_shards
from esper.wrapping.wrap import layers

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import nn
    from torch.optim import Optimizer

    from esper.contracts.artifact import CompiledKernelArtifact
    from esper.contracts.ports import KernelSource, Registry
    from esper.execution.kasmina_layer import KasminaLayer
    from esper.growth.options import GrowerOptions
    from esper.growth.policies import Policy
    from esper.growth.settings import GrowthSettings


def begin_run(
    model: nn.Module, optimizer: Optimizer | Sequence[Optimizer], options: GrowerOptions
) -> GrowthRun:
    """Check everything, then hook the optimizer and open the log.

    Args:
        model: A wrapped model, which may be inside DDP or ``torch.compile``.
        optimizer: What trains it: an optimizer, or several.
        options: What the owner gave to the Grower.

    Raises:
        ValueError: A setting is out of its range, the model has no layer with seeds, or none that
            the optimizer trains, or it is another model's.
        TypeError: An option is unknown or of the wrong type, or the optimizer is not supported.
        GrowthError: A site named by hand is none of the model's or cannot grow, a kernel named by
            its digest is not to be had, or another Grower has the model or an optimizer.
        KernelSourceUnavailable: The registry did not give such a kernel.
        OSError: The log cannot be written, or that of ``fit_like`` cannot be read.
    """
    settings = check_options(options)
    like = options.get("fit_like")
    sizes = [] if like is None else _sizes_in(like)
    check_replicas("Grower", model)
    every, inner = joined(optimizer), bare(model)
    _check_shadow_in_shards(model, settings)
    policy = options.get("policy") or DiminishingReturns()
    check_stages(policy, inner, every, settings.horizon)
    group_for = numbered(options.get("group_for"), every)
    found, untrained = _layers_to_grow(Placement(inner, every, group_for), policy)
    check_free([*layers(inner).values(), *members_of(every)])
    left = list(left_behind(layers(inner)))
    if not grafts_nothing(policy):
        warm_up()
    registry = _opened(options.get("registry"))
    cache = _cache_of(registry, policy, model)
    sync_optimizer(model, members_of(every), group_for=group_for)
    log, clock = _log_in(options.get("run_dir")), options.get("clock") or MonotonicClock()
    factor = UpdateFactor(
        every, warmup_updates=settings.warmup_updates, lr_new=settings.lr_new, hooks=False
    )
    watcher = UpdateWatcher(every, factor)
    bus = EventBus([sink for sink in (log, options.get("sink")) if sink is not None])
    journal = Journal(bus, clock, lambda: watcher.updates)
    for name, parameters in untrained.items():
        journal.note(_said_of(name, parameters))
    for told in left:
        journal.note(told)
    compute_loss, evaluate = options.get("compute_loss"), options.get("evaluate")
    functions = tuple(f for f in (compute_loss, options.get("update")) if f is not None)
    budget = options.get("budget") or Budget()
    host_cost = Cost(parameters=count_parameters(inner))
    fits = Fits(
        clock,
        pass_s=settings.pass_s,
        tell=journal.fitted,
        tell_left=journal.left_whole,
        off=IN_SHARDS if is_in_shards(inner) and ranks_of(model) is not None else "",
    )
    fits.follow(sizes, lambda: watcher.updates)
    settings = _with_overhead(settings, budget, host_cost)
    of_overhead = _said_of_overhead(settings, options, budget, host_cost)
    if of_overhead is not None and not grafts_nothing(policy):
        journal.note(of_overhead)
    return GrowthRun(
        model=inner,
        given=model,
        layers=found,
        optimizer=every,
        group_for=group_for,
        settings=settings,
        budget=budget,
        policy=policy,
        ranking=options.get("ranking") or FirstOrderGain(random_seed=settings.random_seed),
        catalog=options.get("catalog") or default_catalog(),
        cache=cache,
        outbox=_outbox(registry, model, options.get("run_dir"), log),
        offers=_offers(registry, cache, model, options.get("preload_bytes")),
        field_reports=FieldReports(),
        incidents=Incidents(_sources(registry, found)),
        origin_id=journal.run_id,
        owned_registry=registry if registry is not options.get("registry") else None,
        clock=clock,
        compute_loss=compute_loss,
        evaluator=None
        if evaluate is None
        else Evaluator(evaluate, goal=settings.goal, functions=functions),
        functions=functions,
        twin_update=twin_update(options.get("update"), compute_loss),
        build_twin=builder(options.get("twin")),
        watcher=watcher,
        factor=factor,
        journal=journal,
        bus=bus,
        log=log,
        ledger=WorkLedger(settings, clock),
        grafts=Grafts(journal),
        host_cost=host_cost,
        fits=fits,
    )


def _sources(registry: Registry | None, found: Mapping[str, KasminaLayer]) -> list[KernelSource]:
    """Return where kernels of a run may come from: its registry, and its layers' own sources."""
    sources = (registry, *(record_of(layer).source for layer in found.values()))
    return list({id(source): source for source in sources if source is not None}.values())


def _with_overhead(settings: GrowthSettings, budget: Budget, host: Cost) -> GrowthSettings:
    """Fill in what growing may take where the owner does not say it."""
    if settings.overhead is not None:
        return settings
    return replace(settings, overhead=default_overhead(host.parameters, budget))


def _said_of_overhead(
    settings: GrowthSettings, options: GrowerOptions, budget: Budget, host: Cost
) -> str | None:
    """Say what growing may take of a small host where the owner does not, or None."""
    if options.get("overhead") is not None or host.parameters >= budget.small_host:
        return None
    return (
        f"overhead={settings.overhead:g}, since the host has {host.parameters:,} parameters, fewer "
        f"than {budget.small_host:,}: growing may take as many FLOPs as training, and a kernel up "
        f"to {budget.small_graft:,} parameters; give overhead= and budget= for other limits"
    )


def _opened(registry: Registry | str | Path | None) -> Registry | None:
    """Return a registry that may have been given by its address.

    Raises:
        ValueError: It is no address, or that of a directory of a newer Esper.
    """
    if registry is None or not isinstance(registry, (str, os.PathLike)):
        return registry
    from esper.registry.open import open_registry  # a database comes with it: where it is needed

    try:
        return open_registry(registry)
    except ValueError as error:
        msg = f"registry={str(registry)!r} cannot be opened: {error}"
        raise ValueError(msg) from error


def _offers(
    registry: Registry | None, cache: EnhancedKernelCache, model: nn.Module, most: int | None
) -> Offers:
    """Return what a registry offers a run; of several ranks the first one asks it."""
    has_registry = registry is not None and most != 0
    preloader = None
    if registry is not None and has_registry and is_first(model):
        preloader = Preloader(registry, cache, budget_bytes=DEFAULT_BYTES if most is None else most)
    return Offers(preloader, model, has_registry=has_registry)


def _cache_of(registry: Registry | None, policy: Policy, model: nn.Module) -> EnhancedKernelCache:
    """Return the cache of a run, with the kernels in it that the policy names by their digest.

    Of several ranks the first one fetches them.
    """
    cache = EnhancedKernelCache(source=registry)
    for choice in choices_of(policy):
        if isinstance(choice.blueprint, str) and is_digest(choice.blueprint):
            fetch = functools.partial(_fetched, cache, choice.blueprint, choice.site)
            cache.admit(kernel_of_first_rank(model, fetch))
    return cache


def _fetched(cache: EnhancedKernelCache, named: str, site: str) -> CompiledKernelArtifact:
    found = None if cache.source is None else cache.load_kernel_sync(named)
    if found is None:
        is_without = cache.source is None
        where = "there is no registry=" if is_without else "the registry does not have it"
        msg = f"kernel {named} is to grow at {site!r}, and {where}"
        raise GrowthError(msg)
    return found


def _outbox(
    registry: Registry | None,
    model: nn.Module,
    run_dir: str | Path | None,
    log: EventLog | None,
) -> Outbox | None:
    """Return what sends kernels and reports; ranks all have the same, so that the first one does.

    What earlier runs of that folder had for the same registry, and could not send, goes first.
    """
    if registry is None or not is_first(model):
        return None
    address = getattr(registry, "address", None) or getattr(registry, "root", None)
    to = None if address is None else str(address)
    if log is None or run_dir is None:
        return Outbox(registry)
    box = Outbox(registry, folder=log.path.parent / OUTBOX_FOLDER, address=to)
    for folder in earlier_outboxes(Path(run_dir)):
        box.adopt(folder)
    return box


def _log_in(run_dir: str | Path | None) -> EventLog | None:
    return None if run_dir is None else EventLog(claim_run_folder(Path(run_dir)) / EVENTS_FILE)


def _check_shadow_in_shards(model: nn.Module, settings: GrowthSettings) -> None:
    """Refuse auditions, which each rank holds by itself, where ranks wait for each other.

    Raises:
        GrowthError: As said.
    """
    if settings.trial == "shadow" and is_in_shards(bare(model)) and ranks_of(model) is not None:
        msg = (
            "trial='shadow' trains and admits a kernel on each rank by itself, and the ranks of a "
            "model that FSDP2 has sharded have to go on alike: leave trial= out, and give twin=, a "
            "function that builds the module anew"
        )
        raise GrowthError(msg)


def _layers_to_grow(
    placement: Placement, policy: Policy
) -> tuple[dict[str, KasminaLayer], dict[str, list[str]]]:
    """Return the layers with seeds that the optimizer trains, and of the others what it does not.

    Refuses a site named by hand that there is not, and a model of which nothing is left.
    """
    model = placement.model
    found = layers(model)
    if not found and needs_no_seeds(policy):
        check_trains(placement, ())
        return {}, {}
    if not found:
        msg = "the model has no layer with seeds: call esper.wrap(model) before the Grower"
        raise ValueError(msg)
    check_trains(placement, map(id, model.parameters()))
    untrained = {name: placement.untrained(layer) for name, layer in found.items()}
    untrained = {name: parameters for name, parameters in untrained.items() if parameters}
    for choice in choices_of(policy):
        if choice.site not in found:
            msg = f"{choice.site!r} is no site of this model; its sites: {', '.join(found)}"
            raise GrowthError(msg)
        if choice.site in untrained:
            raise GrowthError(_said_of(choice.site, untrained[choice.site]))
    trained = {name: layer for name, layer in found.items() if name not in untrained}
    for layer in trained.values():
        placement.try_choice(layer)
    if not trained:
        raise ValueError(_said_of(*next(iter(untrained.items()))))
    return trained, untrained


def _sizes_in(log: str | Path) -> list[Planned]:
    """Return the sizes that were chosen in a run, from its folder or its log.

    Raises:
        OSError: It cannot be read.
        ValueError: It is no log.
    """
    path = Path(log)
    events = read_events(path / EVENTS_FILE if path.is_dir() else path)
    return [
        Planned(e.update, key_of(e.work, e.device, e.shapes), e.size)
        for e in events
        if isinstance(e, BatchFitted)
    ]


def _said_of(layer: str, parameters: list[str]) -> str:
    return (
        f"nothing grows at {layer!r}: {', '.join(parameters)} can be trained, and is in no param "
        "group of the optimizer; give the Grower the optimizer that trains it, or a sequence of "
        "all that train the model, or freeze the layer"
    )
