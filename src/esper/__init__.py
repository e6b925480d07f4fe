"""Grow a PyTorch model in place while it trains, on evidence, and get a plain module back.

Importing this package imports no torch: each public name is looked up when it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from esper.bus.in_process import EventBus
    from esper.compiler.catalog import Catalog, CatalogEntry, default_catalog
    from esper.compiler.compile import compile_blueprint
    from esper.continuity.checkpoint import load_checkpoint, save_checkpoint
    from esper.continuity.deepening import deepen
    from esper.continuity.distributed_checkpoint import build_as_saved
    from esper.continuity.ensemble import register_optimizer
    from esper.continuity.following import follow
    from esper.continuity.optimizer import sync_optimizer
    from esper.continuity.widening import widen
    from esper.contracts.artifact import CompiledKernelArtifact
    from esper.contracts.blueprint import BlueprintEdge, BlueprintIR, BlueprintNode, TensorSpec
    from esper.contracts.errors import (
        AsyncExecutionError,
        BlueprintError,
        CacheError,
        EsperError,
        GradientSyncError,
        GrowthError,
        KasminaException,
        KernelCompilationError,
        KernelCorruptError,
        KernelExecutionError,
        KernelLoadError,
        KernelNotFoundError,
        KernelRefusedError,
        KernelSourceUnavailable,
        RankFailedError,
        SeedLifecycleError,
        SiteDescriptionError,
        TagMovedError,
    )
    from esper.contracts.events import Evaluated
    from esper.contracts.lifecycle import GraftStage, SeedLifecycleState
    from esper.contracts.progress import GraftStatus, ProgressRow
    from esper.contracts.report import RunReport
    from esper.contracts.site import SiteSpec
    from esper.execution.kasmina_layer import KasminaLayer
    from esper.growth.budget import Budget
    from esper.growth.evaluate_on import evaluate_on
    from esper.growth.gates import GateVerdict
    from esper.growth.grower import Grower
    from esper.growth.job import GrowthJob
    from esper.growth.measurement import Measurement
    from esper.growth.policies import (
        AllOf,
        AnyOf,
        ByHand,
        DiminishingReturns,
        EveryN,
        Never,
        Policy,
    )
    from esper.growth.ranking import (
        Candidate,
        FirstOrderGain,
        RandomChoice,
        RankedCandidate,
        Ranking,
        in_order,
    )
    from esper.growth.reading import Choice, Decision, Reading
    from esper.growth.settings import GrowthSettings
    from esper.growth.staged import Staged
    from esper.growth.suggestion import Suggestion
    from esper.registry.open import open_registry
    from esper.seeds.maintenance import MaintenanceReport, maintain
    from esper.seeds.profiling import Profile, ProfiledRange, profile
    from esper.seeds.shadow import in_shadow_pass
    from esper.seeds.shallow import asleep, shallow
    from esper.state.waiting import GraftOptions
    from esper.wrapping.export import export
    from esper.wrapping.restore import RestoreResult, restore
    from esper.wrapping.select import SkippedModule
    from esper.wrapping.unwrap import unwrap
    from esper.wrapping.wrap import layers, skipped, wrap

__version__ = "0.1.0"
"""Version of the distribution, ``esper-morph``."""

_HOME: Final = {
    "AllOf": "esper.growth.policies",
    "AnyOf": "esper.growth.policies",
    "AsyncExecutionError": "esper.contracts.errors",
    "BlueprintEdge": "esper.contracts.blueprint",
    "BlueprintError": "esper.contracts.errors",
    "BlueprintIR": "esper.contracts.blueprint",
    "BlueprintNode": "esper.contracts.blueprint",
    "Budget": "esper.growth.budget",
    "ByHand": "esper.growth.policies",
    "CacheError": "esper.contracts.errors",
    "Candidate": "esper.growth.ranking",
    "Catalog": "esper.compiler.catalog",
    "CatalogEntry": "esper.compiler.catalog",
    "Choice": "esper.growth.reading",
    "CompiledKernelArtifact": "esper.contracts.artifact",
    "Decision": "esper.growth.reading",
    "DiminishingReturns": "esper.growth.policies",
    "EsperError": "esper.contracts.errors",
    "Evaluated": "esper.contracts.events",
    "EventBus": "esper.bus.in_process",
    "EveryN": "esper.growth.policies",
    "FirstOrderGain": "esper.growth.ranking",
    "GateVerdict": "esper.growth.gates",
    "GradientSyncError": "esper.contracts.errors",
    "GraftOptions": "esper.state.waiting",
    "GraftStage": "esper.contracts.lifecycle",
    "GraftStatus": "esper.contracts.progress",
    "Grower": "esper.growth.grower",
    "GrowthError": "esper.contracts.errors",
    "GrowthJob": "esper.growth.job",
    "GrowthSettings": "esper.growth.settings",
    "KasminaException": "esper.contracts.errors",
    "KasminaLayer": "esper.execution.kasmina_layer",
    "KernelCompilationError": "esper.contracts.errors",
    "KernelCorruptError": "esper.contracts.errors",
    "KernelExecutionError": "esper.contracts.errors",
    "KernelLoadError": "esper.contracts.errors",
    "KernelNotFoundError": "esper.contracts.errors",
    "KernelRefusedError": "esper.contracts.errors",
    "KernelSourceUnavailable": "esper.contracts.errors",
    "MaintenanceReport": "esper.seeds.maintenance",
    "Measurement": "esper.growth.measurement",
    "Never": "esper.growth.policies",
    "Policy": "esper.growth.policies",
    "ProgressRow": "esper.contracts.progress",
    "RandomChoice": "esper.growth.ranking",
    "RankFailedError": "esper.contracts.errors",
    "RankedCandidate": "esper.growth.ranking",
    "Ranking": "esper.growth.ranking",
    "Reading": "esper.growth.reading",
    "RestoreResult": "esper.wrapping.restore",
    "RunReport": "esper.contracts.report",
    "SeedLifecycleError": "esper.contracts.errors",
    "SeedLifecycleState": "esper.contracts.lifecycle",
    "SiteDescriptionError": "esper.contracts.errors",
    "SiteSpec": "esper.contracts.site",
    "SkippedModule": "esper.wrapping.select",
    "Staged": "esper.growth.staged",
    "Suggestion": "esper.growth.suggestion",
    "TagMovedError": "esper.contracts.errors",
    "TensorSpec": "esper.contracts.blueprint",
    "asleep": "esper.seeds.shallow",
    "compile_blueprint": "esper.compiler.compile",
    "deepen": "esper.continuity.deepening",
    "default_catalog": "esper.compiler.catalog",
    "evaluate_on": "esper.growth.evaluate_on",
    "export": "esper.wrapping.export",
    "build_as_saved": "esper.continuity.distributed_checkpoint",
    "follow": "esper.continuity.following",
    "in_order": "esper.growth.ranking",
    "in_shadow_pass": "esper.seeds.shadow",
    "layers": "esper.wrapping.wrap",
    "load_checkpoint": "esper.continuity.checkpoint",
    "maintain": "esper.seeds.maintenance",
    "open_registry": "esper.registry.open",
    "Profile": "esper.seeds.profiling",
    "ProfiledRange": "esper.seeds.profiling",
    "profile": "esper.seeds.profiling",
    "register_optimizer": "esper.continuity.ensemble",
    "restore": "esper.wrapping.restore",
    "save_checkpoint": "esper.continuity.checkpoint",
    "shallow": "esper.seeds.shallow",
    "skipped": "esper.wrapping.wrap",
    "sync_optimizer": "esper.continuity.optimizer",
    "unwrap": "esper.wrapping.unwrap",
    "widen": "esper.continuity.widening",
    "wrap": "esper.wrapping.wrap",
}
"""Each public name and the module that it lives in."""

__all__ = [
    "AllOf",
    "AnyOf",
    "AsyncExecutionError",
    "BlueprintEdge",
    "BlueprintError",
    "BlueprintIR",
    "BlueprintNode",
    "Budget",
    "ByHand",
    "CacheError",
    "Candidate",
    "Catalog",
    "CatalogEntry",
    "Choice",
    "CompiledKernelArtifact",
    "Decision",
    "DiminishingReturns",
    "EsperError",
    "Evaluated",
    "EventBus",
    "EveryN",
    "FirstOrderGain",
    "GateVerdict",
    "GradientSyncError",
    "GraftOptions",
    "GraftStage",
    "GraftStatus",
    "Grower",
    "GrowthError",
    "GrowthJob",
    "GrowthSettings",
    "KasminaException",
    "KasminaLayer",
    "KernelCompilationError",
    "KernelCorruptError",
    "KernelExecutionError",
    "KernelLoadError",
    "KernelNotFoundError",
    "KernelRefusedError",
    "KernelSourceUnavailable",
    "MaintenanceReport",
    "Measurement",
    "Never",
    "Policy",
    "Profile",
    "ProfiledRange",
    "ProgressRow",
    "RandomChoice",
    "RankFailedError",
    "RankedCandidate",
    "Ranking",
    "Reading",
    "RestoreResult",
    "RunReport",
    "SeedLifecycleError",
    "SeedLifecycleState",
    "SiteDescriptionError",
    "SiteSpec",
    "SkippedModule",
    "Staged",
    "Suggestion",
    "TagMovedError",
    "TensorSpec",
    "__version__",
    "asleep",
    "build_as_saved",
    "compile_blueprint",
    "deepen",
    "default_catalog",
    "evaluate_on",
    "export",
    "follow",
    "in_order",
    "in_shadow_pass",
    "layers",
    "load_checkpoint",
    "maintain",
    "open_registry",
    "profile",
    "register_optimizer",
    "restore",
    "save_checkpoint",
    "shallow",
    "skipped",
    "sync_optimizer",
    "unwrap",
    "widen",
    "wrap",
]


_WITH: Final = {
    "Grower": ("esper.observability.notebook",),
    "GrowthJob": ("esper.observability.notebook",),
    "RunReport": ("esper.observability.notebook",),
    "wrap": ("esper.continuity.optimizer", "esper.integrations.pretrained"),
}
"""What has to be there as well: reports are drawn in notebooks, a wrapped model that loads kernels
tells its optimizers, and one of transformers says in its config that it has grown."""


def __getattr__(name: str) -> Any:
    """Import the module that a public name lives in, and remember the name."""
    if name not in _HOME:
        raise AttributeError(f"module 'esper' has no attribute {name!r}")
    if name in _WITH:
        for module in _WITH[name]:
            importlib.import_module(module)
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
