"""What a long command says while it works."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, NamedTuple

from esper.contracts.lifecycle import GraftStage

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence


class GraftStatus(NamedTuple):
    """Where a graft is.

    Attributes:
        site: Dotted name of the layer.
        seed_idx: Slot in that layer.
        stage: Stage of the graft.
        package: Number of its package, from 1; None where it is tried by itself.
    """

    site: str
    seed_idx: int
    stage: GraftStage
    package: int | None = None

    def __str__(self) -> str:
        return f"{self.site}.{self.seed_idx} {self.stage}"


def statuses_text(statuses: Sequence[GraftStatus]) -> str:
    """Say where grafts are, a package in one piece: ``"package 2 of 5 kernels in trial"``.

    Returns:
        The pieces with commas between them; empty where there are none.
    """
    packages = Counter((each.package, each.stage) for each in statuses if each.package is not None)
    alone = [str(each) for each in statuses if each.package is None]
    together = [
        f"package {package} of {num} kernel{'s' * (num > 1)} {_DOING.get(stage, str(stage))}"
        for (package, stage), num in packages.items()
    ]
    return ", ".join([*together, *alone])


_DOING: Final = {
    GraftStage.GERMINATED: "being made",
    GraftStage.TRIAL: "in trial in a twin",
    GraftStage.HOLDING: "under watch",
}
"""What a package does at a stage."""


_SHARES: Final = frozenset({"accuracy"})
"""Metrics that are shares in [0, 1], and shown in percent."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ProgressRow:
    """Where one run is: what a terminal, a page and a callback of the owner's are all given.

    Attributes:
        name: What runs, for example ``"random seed 3, grown"``.
        update: Optimizer updates done.
        gate_loss: Loss on the gate split, as last read; None before the first reading.
        train_loss: Mean of recent training losses, as last read; None where it is not known.
        metrics: Whatever else was measured on the gate split, by name, as last read.
        parameters: Parameters of the model now; None before they are known.
        grafts: The grafts that are under way.
    """

    name: str
    update: int
    gate_loss: float | None = None
    train_loss: float | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)
    parameters: int | None = None
    grafts: tuple[GraftStatus, ...] = ()

    def measured(self) -> dict[str, str]:
        """Return everything that was measured so far, as text by name.

        The losses come first, then the owner's metrics in their order; what was not read yet is
        left out.
        """
        losses = {"gate loss": self.gate_loss, "training loss": self.train_loss}
        known = {name: f"{loss:.4g}" for name, loss in losses.items() if loss is not None}
        return known | {name: metric_text(name, value) for name, value in self.metrics.items()}

    def __str__(self) -> str:
        parts = [f"{self.name} at update {self.update:,}"]
        parts += [f"{name} {text}" for name, text in self.measured().items()]
        if self.parameters is not None:
            parts.append(f"{self.parameters:,} parameters")
        return ", ".join([*parts, statuses_text(self.grafts) or "dormant"])


def metric_text(name: str, value: float) -> str:
    """Return a metric with its unit: ``"93.2 %"`` for a share, else four digits."""
    return f"{100 * value:.1f} %" if name in _SHARES else f"{value:.4g}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """How far a command is.

    Attributes:
        done: Work done, in any unit; at least 0.
        total: Work in all, in the same unit; at least ``done``.
        doing: What is being done, in a few words.
        rows: One per run that is under way.
    """

    done: float
    total: float
    doing: str
    rows: tuple[ProgressRow, ...] = ()
