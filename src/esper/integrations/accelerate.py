"""Growth in a loop of one's own under Accelerate."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Unpack

from esper.bus.in_process import EventBus
from esper.growth.grower import Grower
from esper.growth.options import check_options
from esper.integrations.growth_state import check_together, resume, state_of
from esper.integrations.missing import missing_framework
from esper.integrations.trackers import AcceleratorSink
from esper.wrapping.wrap import layers, wrap

try:
    from accelerate import Accelerator
except ImportError as error:
    raise missing_framework("accelerate", "hf") from error

if TYPE_CHECKING:
    from torch import nn
    from torch.optim import Optimizer

    from esper.growth.options import GrowerOptions
    from esper.wrapping.select import Select


def esper_prepare(
    accelerator: Accelerator,
    model: nn.Module,
    optimizer: Optimizer | Sequence[Optimizer],
    *others: Any,
    select: Select | None = None,
    **options: Unpack[GrowerOptions],
) -> tuple[Any, ...]:
    """Wrap a model, prepare everything, and make the Grower: in this order.

    Call ``grower.step(loss, batch=batch)`` behind each ``optimizer.step()``, inside
    ``accelerator.accumulate`` too: a step that only gathered gradients is no update. Call
    ``grower.close()`` at the end. ``accelerator.save_state`` saves kernels with the model, their
    moments with the optimizer, and growth beside them; ``load_state`` brings them back. The
    trackers that ``log_with`` names have the growth beside what is logged there, until the Grower
    is closed: ``accelerator.end_training()``, which finishes them, closes it first where its owner
    has not.

    Args:
        accelerator: What prepares and trains.
        model: The model; wrapped already, or not.
        optimizer: What trains it, or a sequence of all that do.
        others: Loaders and schedulers, as in ``accelerator.prepare``.
        select: Which layers may grow, as in :func:`esper.wrap`.
        options: Those of :class:`esper.Grower`; ``compute_loss`` and ``evaluate`` among them.

    Returns:
        The model, the optimizer (a list where a sequence was given), the others as prepared, and
        the Grower.

    Raises:
        TypeError, ValueError: An option is none of the Grower's or out of its range, several
            processes train the model in a way that growth does not know, or what
            :func:`esper.wrap` and :class:`esper.Grower` raise.
    """
    check_options(options)
    if not layers(model):
        wrap(model, select=select)
    several = list(optimizer) if isinstance(optimizer, Sequence) else [optimizer]
    made: Sequence[Any] = accelerator.prepare(model, *several, *others)
    check_together(made[0], accelerator.num_processes)
    prepared, optimizers, rest = made[0], made[1 : 1 + len(several)], made[1 + len(several) :]
    given = list(optimizers) if isinstance(optimizer, Sequence) else optimizers[0]
    if accelerator.log_with:
        own = options.get("sink")
        theirs = AcceleratorSink(accelerator)
        options["sink"] = theirs if own is None else EventBus([own, theirs])
    grower = Grower(prepared, given, **options)
    if accelerator.log_with:
        _close_before_trackers(accelerator, grower)
    accelerator.register_for_checkpointing(_Growth(grower))
    return prepared, given, *rest, grower


def _close_before_trackers(accelerator: Accelerator, grower: Grower) -> None:
    """Let the end of the training close a Grower before it finishes its trackers.

    They take no event that comes behind it: the last verdicts and the end of the run were lost.
    """
    end_training = accelerator.end_training

    def close_and_end_training() -> None:
        grower.close()
        end_training()

    accelerator.end_training = close_and_end_training


class _Growth:
    """What ``save_state`` and ``load_state`` keep of a Grower.

    Args:
        grower: The Grower.
    """

    def __init__(self, grower: Grower) -> None:
        self._grower = grower

    def state_dict(self) -> dict[str, Any]:
        """Return where growth is."""
        return {"updates": self._grower.updates, "grower": state_of(self._grower)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there; model and optimizer are loaded."""
        resume(self._grower, state["grower"], at_update=state["updates"])
