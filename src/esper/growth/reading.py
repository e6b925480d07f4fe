"""What a policy is told, and what it answers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from esper.contracts.blueprint import BlueprintIR

PolicyState = dict[str, Any]
"""What a policy remembers, as JSON-able values by name."""

Verdict = Literal[
    "diminishing",
    "deadline",
    "overfitting",
    "too_early",
    "too_late",
    "improving",
    "scheduled",
    "waiting",
]
"""The rule that decided; ``"scheduled"`` and ``"waiting"`` are of policies without such rules."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """Where a run is. Losses and metrics are those of the last evaluation.

    Attributes:
        update: Optimizer updates done.
        horizon: Length of the run in updates; None where unknown.
        train_loss: Mean of the recent training losses; None where unknown.
        gate_loss: Loss on the gate split, lower is better; the training loss where the owner
            measures nothing, None before the first evaluation. It may not be finite.
        metrics: What ``evaluate`` returned beside the losses, by name, as returned.
        rates: Learning rate of each param group at the last update; empty before the first.
        last_change_update: When the last graft ended, by a verdict or a removal; None where there
            was none.
    """

    update: int
    horizon: int | None = None
    train_loss: float | None = None
    gate_loss: float | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)
    rates: tuple[float, ...] = ()
    last_change_update: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """A graft that the owner named.

    Attributes:
        site: Name of the layer in the wrapped model.
        blueprint: The blueprint itself, or the id of one in the catalog.
        update: Earliest update at which to germinate it, at least 0.
    """

    site: str
    blueprint: BlueprintIR | str
    update: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """Whether to grow now, and why.

    Attributes:
        grow: Whether to grow now.
        verdict: The rule that decided.
        reason: One sentence for the log.
        choice: The graft that the owner named; None where the ranking is to choose.
    """

    grow: bool
    verdict: Verdict
    reason: str
    choice: Choice | None = None
