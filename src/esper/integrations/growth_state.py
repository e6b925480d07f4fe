"""A Grower's state in a framework's checkpoint, and what growth tells a framework's log."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import esper.integrations.pretrained
import esper.observability.notebook  # noqa: F401 - both are there where nobody has said esper.Grower
from esper.continuity.replicas import ranks_of
from esper.contracts.errors import GrowthError
from esper.contracts.events import Evaluated, StageChanged
from esper.contracts.lifecycle import GraftStage
from esper.contracts.owner_warning import warn_owner

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import nn

    from esper.contracts.events import Event
    from esper.contracts.ports import EventSink
    from esper.growth.grower import Grower

_KEPT: Final = (GraftStage.HOLDING, GraftStage.FOSSILIZED)


def state_of(grower: Grower | None) -> dict[str, Any]:
    """Return a Grower's state; empty where there is none, or it cannot be saved now.

    Warns:
        UserWarning: Growth cannot be saved at this moment; the framework's checkpoint is written
            without it.
    """
    save = getattr(grower, "state_dict", None)
    try:
        return {} if save is None else dict(save())
    except GrowthError as error:
        warn_owner(f"this checkpoint has no state of growth: {error}")
        return {}


def resume(grower: Grower, state: Mapping[str, Any] | None, *, at_update: int) -> None:
    """Give a Grower the state that a checkpoint had; model and optimizer are loaded before.

    Args:
        grower: It has made no update yet.
        state: What :func:`state_of` returned; empty or None where the checkpoint has none.
        at_update: Where the framework goes on, in updates; 0 at the start of a run.

    Warns:
        UserWarning: The run goes on without a state of growth, from a checkpoint or from none.
    """
    load = getattr(grower, "load_state_dict", None)
    if state and load is not None:
        load(dict(state))
    elif at_update:
        warn_owner(
            f"the run goes on at update {at_update} and has no state of growth: no checkpoint "
            "gave one; kernels and their moments are those that are there, and the Grower begins "
            "anew (verdicts and its view of the losses are not resumed)"
        )


def check_together(model: nn.Module, num_processes: int) -> None:
    """Refuse processes that train a model in a way that growth knows nothing of.

    Args:
        model: As the framework has prepared it.
        num_processes: How many train it.

    Raises:
        ValueError: There are several, and no ranks are known: each would grow by itself.
    """
    if num_processes > 1 and ranks_of(model) is None:
        msg = (
            f"{num_processes} processes train the model as {type(model).__name__}, and growth "
            "needs DDP, or FSDP2 with whole twins (twin=): each process would grow by itself"
        )
        raise ValueError(msg)


class Hearing:
    """A sink that notes whether there is something to log, and passes every event on.

    Args:
        sink: The owner's; None where there is none.

    Attributes:
        has_heard: Whether an evaluation or a change of stage came since it was last set to False.
    """

    def __init__(self, sink: EventSink | None) -> None:
        self._sink = sink
        self.has_heard = False

    def publish(self, event: Event) -> None:
        """Take one event."""
        self.has_heard |= isinstance(event, (Evaluated, StageChanged))
        if self._sink is not None:
            self._sink.publish(event)


def metrics_of(grower: Grower) -> dict[str, float]:
    """Return what a framework's log shows of growth, by names that start with ``esper/``."""
    row = grower.progress_row()
    kept = {g.package or -g.graft for g in grower.report().grafts if g.stage in _KEPT}
    found = {"esper/parameters": float(row.parameters or 0), "esper/packages": float(len(kept))}
    if row.gate_loss is not None:
        found["esper/gate_loss"] = row.gate_loss
    return found
