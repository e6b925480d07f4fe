"""Policies: when to grow, and, where the owner says so, what and where."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Protocol

from esper.contracts.blueprint import BlueprintIR
from esper.growth.detector import Decision, Detector, out_of_time


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


class Policy(Protocol):
    """Says when to grow. Three questions, no more: the ranking says where, the gates whether.

    Attributes:
        reads_losses: Whether it decides by the losses; then it is asked after an evaluation only,
            otherwise after every update.
    """

    reads_losses: bool

    def observe(self, update: int, train_loss: float | None, gate_loss: float) -> object:
        """Take one evaluation."""
        ...

    def decide(
        self, update: int, horizon: int | None, last_change_update: int | None = None
    ) -> Decision:
        """Say whether to grow now. Asked only while there is room; changes nothing."""
        ...

    def choice(self) -> Choice | None:
        """Return the graft that the owner named, or None where the ranking is to choose."""
        ...

    def germinated(self, update: int) -> None:
        """Learn that a decision to grow was carried out, or refused for good."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Return the policy's memory as JSON-able values."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over the memory of a policy of the same class and settings."""
        ...


class DiminishingReturns:
    """Grows where a run has reached diminishing returns; the default.

    Args:
        detector: Holds the rules; the default one where None.
    """

    reads_losses: bool = True

    def __init__(self, detector: Detector | None = None) -> None:
        self.detector = Detector() if detector is None else detector

    def observe(self, update: int, train_loss: float | None, gate_loss: float) -> bool:
        """Pass an evaluation to the detector; False where it was not finite."""
        return self.detector.observe(update, train_loss, gate_loss)

    def decide(
        self, update: int, horizon: int | None, last_change_update: int | None = None
    ) -> Decision:
        """Return the detector's decision."""
        return self.detector.decide(update, horizon, last_change_update)

    def choice(self) -> None:
        """Leave the choice to the ranking."""

    def germinated(self, update: int) -> None:
        """Remember nothing: the detector looks at the losses only."""

    def state_dict(self) -> dict[str, Any]:
        """Return the detector's observations."""
        return self.detector.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over a detector's observations."""
        self.detector.load_state_dict(state)


class EveryN:
    """Grows every so many updates, whatever the losses, but not in the last 20 % of a run.

    Args:
        updates: Updates between two germinations, at least 1.

    Raises:
        ValueError: ``updates`` is less than 1.
    """

    reads_losses: bool = False

    def __init__(self, updates: int) -> None:
        if updates < 1:
            msg = f"updates is the distance between two grafts, at least 1, got {updates}"
            raise ValueError(msg)
        self.updates = updates
        self._last = 0

    def observe(self, update: int, train_loss: float | None, gate_loss: float) -> None:
        """Look at no loss."""

    def decide(
        self,
        update: int,
        horizon: int | None,
        last_change_update: int | None = None,  # noqa: ARG002 - the protocol's signature
    ) -> Decision:
        """Say yes once ``updates`` have passed since the start or the last germination."""
        late = out_of_time(update, horizon)
        if late:
            return late
        due = self._last + self.updates
        if update < due:
            return Decision(grow=False, verdict="waiting", reason=f"the next graft is due at {due}")
        return Decision(grow=True, verdict="scheduled", reason=f"a graft was due at {due}")

    def choice(self) -> None:
        """Leave the choice to the ranking."""

    def germinated(self, update: int) -> None:
        """Count the next distance from here."""
        self._last = update

    def state_dict(self) -> dict[str, Any]:
        """Return when the last graft germinated."""
        return {"last": self._last}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over when the last graft germinated."""
        self._last = int(state["last"])


class ByHand:
    """Grows what the owner names, in the order named.

    It skips the ranking and the capacity filter; never the probe, the budget or the gates.

    Args:
        choices: Each a :class:`Choice`, ``(site, blueprint)`` or ``(site, blueprint, update)``.

    Raises:
        ValueError: An entry is none of these, or its update is negative.
    """

    reads_losses: bool = False

    def __init__(
        self,
        choices: Iterable[
            Choice | tuple[str, BlueprintIR | str] | tuple[str, BlueprintIR | str, int]
        ],
    ) -> None:
        self.choices = tuple(_as_choice(entry) for entry in choices)
        self._num_done = 0

    def observe(self, update: int, train_loss: float | None, gate_loss: float) -> None:
        """Look at no loss."""

    def decide(
        self,
        update: int,
        horizon: int | None,  # noqa: ARG002 - the protocol's signature
        last_change_update: int | None = None,  # noqa: ARG002 - the protocol's signature
    ) -> Decision:
        """Say yes once the next choice is due."""
        choice = self.choice()
        if choice is None:
            return Decision(grow=False, verdict="waiting", reason="nothing more was named")
        if update < choice.update:
            reason = f"{choice.site!r} is due at update {choice.update}"
            return Decision(grow=False, verdict="waiting", reason=reason)
        return Decision(grow=True, verdict="scheduled", reason=f"{choice.site!r} was named by hand")

    def choice(self) -> Choice | None:
        """Return the next choice, or None where all are done."""
        return self.choices[self._num_done] if self._num_done < len(self.choices) else None

    def germinated(self, update: int) -> None:  # noqa: ARG002 - the protocol's signature
        """Go on to the next choice."""
        self._num_done += 1

    def state_dict(self) -> dict[str, Any]:
        """Return how many choices are done."""
        return {"num_done": self._num_done}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over how many choices are done."""
        self._num_done = int(state["num_done"])


def _as_choice(entry: object) -> Choice:
    if isinstance(entry, tuple) and len(entry) in (2, 3):
        entry = Choice(**dict(zip(("site", "blueprint", "update"), entry, strict=False)))
    if not isinstance(entry, Choice):
        msg = f"a choice by hand is (site, blueprint) or (site, blueprint, update), got {entry!r}"
        raise ValueError(msg)  # noqa: TRY004 - a malformed entry, whatever its type
    if entry.update < 0:
        msg = f"the update of {entry.site!r} is at least 0, got {entry.update}"
        raise ValueError(msg)
    return entry
