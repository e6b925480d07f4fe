"""What a policy is told, and what it answers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import NoneType
from typing import Any

from esper.contracts.arguments import check_type, whole_number
from esper.contracts.blueprint import BlueprintIR
from esper.contracts.choices import VERDICTS, Verdict

PolicyState = dict[str, Any]
"""What a policy remembers, as JSON-able values by name."""


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
        last_change_update: When the last package was judged or removed; None where there was none.
        num_packages: Packages that were tried so far, at least 0.
        unhealthy: Names of the layers that somebody has to see to; nothing grows there meanwhile.
    """

    update: int
    horizon: int | None = None
    train_loss: float | None = None
    gate_loss: float | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)
    rates: tuple[float, ...] = ()
    last_change_update: int | None = None
    num_packages: int = 0
    unhealthy: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """A graft that the owner named.

    Attributes:
        site: Name of the layer in the wrapped model.
        blueprint: The blueprint itself, the id of one in the catalog, or the digest of a kernel in
            the Grower's registry, which is fetched before the run begins.
        update: Earliest update at which to germinate it, at least 0.

    Raises:
        TypeError: A field is of the wrong type.
        ValueError: ``update`` is negative.
    """

    site: str
    blueprint: BlueprintIR | str
    update: int = 0

    def __post_init__(self) -> None:
        """Refuse what names no graft."""
        check_type("site", self.site, str, "the name of a layer")
        check_type(
            "blueprint", self.blueprint, (BlueprintIR, str), "a BlueprintIR or the id of one"
        )
        whole_number(f"update of {self.site!r}", self.update, least=0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """Whether to grow now, and why.

    Attributes:
        grow: Whether to grow now.
        verdict: The rule that decided.
        reason: One sentence for the log.
        choice: The graft that the owner named; None where the ranking is to choose.

    Raises:
        TypeError: ``choice`` is no :class:`Choice`.
        ValueError: ``verdict`` is none.
    """

    grow: bool
    verdict: Verdict
    reason: str
    choice: Choice | None = None

    def __post_init__(self) -> None:
        """Refuse what says nothing."""
        if self.verdict not in VERDICTS:
            msg = (
                f"verdict is {', '.join(map(repr, VERDICTS[:-1]))} or {VERDICTS[-1]!r}, got "
                f"{self.verdict!r}; a rule of one's own is 'scheduled' or 'waiting', and says more "
                "in its reason"
            )
            raise ValueError(msg)
        check_type("choice", self.choice, (Choice, NoneType), "an esper.Choice or None")
