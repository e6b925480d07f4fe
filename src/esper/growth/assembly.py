"""Putting a run together from what the owner gave, and from defaults for the rest."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from esper.bus.in_process import EventBus
from esper.compiler.catalog import default_catalog
from esper.continuity.optimizer import check_supported, sync_optimizer
from esper.continuity.warmup import UpdateFactor
from esper.contracts.errors import GrowthError
from esper.fetching.enhanced_kernel_cache import EnhancedKernelCache
from esper.growth.budget import Budget, Cost, count_parameters
from esper.growth.embargoes import Embargoes
from esper.growth.evaluation import Evaluator
from esper.growth.graft import Grafts
from esper.growth.journal import Journal
from esper.growth.ledger import WorkLedger
from esper.growth.options import check_options
from esper.growth.policies import DiminishingReturns, choices_of
from esper.growth.ranking import FirstOrderGain
from esper.growth.run import GrowthRun
from esper.growth.twins import twin_update
from esper.growth.updates import UpdateWatcher
from esper.observability.event_log import EventLog
from esper.observability.run_folder import EVENTS_FILE, claim_run_folder
from esper.registry.open import open as open_registry
from esper.resilience.clock import MonotonicClock
from esper.wrapping.wrap import layers

if TYPE_CHECKING:
    from torch import nn
    from torch.optim import Optimizer

    from esper.contracts.ports import EventSink
    from esper.execution.kasmina_layer import KasminaLayer
    from esper.growth.options import GrowerOptions
    from esper.growth.policies import Policy


def begin_run(model: nn.Module, optimizer: Optimizer, options: GrowerOptions) -> GrowthRun:
    """Check everything, then hook the optimizer and open the log.

    Args:
        model: A wrapped model, which may be inside DDP or ``torch.compile``.
        optimizer: Its optimizer.
        options: What the owner gave to the Grower.

    Raises:
        ValueError: A setting is out of its range, or the model has no layer with seeds.
        TypeError: An option is unknown or of the wrong type, or the optimizer is not supported.
        GrowthError: A site named by hand is none of the model's.
        OSError: The log cannot be written.
    """
    settings = check_options(options)
    check_supported(optimizer)
    bare = _unwrapped(model)
    policy = options.get("policy") or DiminishingReturns()
    found = _layers_to_grow(bare, policy)
    sync_optimizer(bare, optimizer)
    registry = options.get("registry")
    registry = open_registry("memory:") if registry is None else registry
    log, clock = _log_in(options.get("run_dir")), options.get("clock") or MonotonicClock()
    watcher = UpdateWatcher(optimizer)
    journal = Journal(_bus(log, options.get("sink")), clock, lambda: watcher.updates)
    compute_loss, evaluate = options.get("compute_loss"), options.get("evaluate")
    return GrowthRun(
        model=bare,
        layers=found,
        optimizer=optimizer,
        settings=settings,
        budget=options.get("budget") or Budget(),
        policy=policy,
        ranking=options.get("ranking") or FirstOrderGain(random_seed=settings.random_seed),
        catalog=options.get("catalog") or default_catalog(),
        registry=registry,
        cache=EnhancedKernelCache(source=registry),
        clock=clock,
        compute_loss=compute_loss,
        evaluator=None if evaluate is None else Evaluator(evaluate, goal=settings.goal),
        twin_update=twin_update(options.get("update"), compute_loss),
        watcher=watcher,
        factor=UpdateFactor(
            optimizer, warmup_updates=settings.warmup_updates, lr_new=settings.lr_new
        ),
        journal=journal,
        log=log,
        ledger=WorkLedger(settings),
        embargoes=Embargoes(settings.embargo),
        grafts=Grafts(journal),
        host_cost=Cost(parameters=count_parameters(bare)),
    )


def _bus(*sinks: EventSink | None) -> EventBus:
    return EventBus([sink for sink in sinks if sink is not None])


def _log_in(run_dir: str | Path | None) -> EventLog | None:
    return None if run_dir is None else EventLog(claim_run_folder(Path(run_dir)) / EVENTS_FILE)


def _layers_to_grow(model: nn.Module, policy: Policy) -> dict[str, KasminaLayer]:
    """Return the layers with seeds; refuse a site named by hand that there is not."""
    found = layers(model)
    if not found:
        msg = "the model has no layer with seeds: call esper.wrap(model) before the Grower"
        raise ValueError(msg)
    for choice in choices_of(policy):
        if choice.site not in found:
            msg = f"{choice.site!r} is no site of this model; its sites: {', '.join(found)}"
            raise GrowthError(msg)
    return found


def _unwrapped(model: nn.Module) -> nn.Module:
    """Return the module inside DDP and ``torch.compile``."""
    while True:
        inner = getattr(model, "_orig_mod", None)
        if inner is None and isinstance(model, torch.nn.parallel.DistributedDataParallel):
            inner = model.module
        if inner is None:
            return model
        model = inner
