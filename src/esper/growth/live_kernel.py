"""A kernel in a model that is in training: how it enters, how its alpha rises, how it goes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

from esper.continuity.optimizer import append_parameters, remove_parameters
from esper.growth.audition import trainable
from esper.state.host_parts import host_parameters
from esper.state.roster import where_kernels_stand

if TYPE_CHECKING:
    from torch import nn
    from torch.optim import Optimizer

    from esper.continuity.warmup import UpdateFactor
    from esper.execution.kasmina_layer import KasminaLayer
    from esper.growth.audition import Audition


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LiveKernel:
    """A kernel that is part of a model: the live one or a twin.

    Attributes:
        grafted_into: The layer of this model.
        seed_idx: The slot.
        parameters: What was appended to the optimizer; empty where nothing is trainable.
    """

    grafted_into: KasminaLayer
    seed_idx: int
    parameters: tuple[nn.Parameter, ...]

    @property
    def layer(self) -> KasminaLayer:
        """Where the kernel stands: the layer, or what has taken its place since."""
        return cast("KasminaLayer", where_kernels_stand(self.grafted_into))

    def set_alpha(self, updates: int, ramp_updates: int) -> float:
        """Set alpha for the next update from the number of joint updates done; return it."""
        alpha = 1.0 if updates >= ramp_updates else updates / ramp_updates
        if alpha != self.layer.alpha(self.seed_idx):
            self.layer.set_alpha(self.seed_idx, alpha)
        return alpha


def graft_kernel(
    audition: Audition,
    layer: KasminaLayer,
    optimizer: Optimizer,
    factor: UpdateFactor,
    *,
    peak: float,
) -> LiveKernel:
    """Graft an auditioned kernel at alpha 0 and hand its parameters to ``optimizer``.

    Parameters and moments go by reference, step included, to the group of their host layer.

    Args:
        audition: The audition that ends here.
        layer: The layer to graft into: the live one, or its counterpart in a twin.
        optimizer: The optimizer of the model that ``layer`` belongs to.
        factor: Its warm-up of parameters that appear.
        peak: Highest rate that the host layer's group has had.
    """
    layer.graft(audition.seed_idx, audition.kernel, alpha=0.0)
    parameters = trainable(audition.kernel.module)
    if parameters:
        state = None if audition.optimizer is None else audition.optimizer.state
        append_parameters(optimizer, host_parameters(layer), parameters, state=state)
        factor.add(parameters, peak=peak)
    return LiveKernel(grafted_into=layer, seed_idx=audition.seed_idx, parameters=tuple(parameters))


def remove_kernel(live: LiveKernel, optimizer: Optimizer, factor: UpdateFactor) -> None:
    """Undo :func:`graft_kernel`: the kernel goes, and its parameters and their state with it."""
    factor.remove(live.parameters)
    live.layer.unload_kernel(live.seed_idx)
    remove_parameters(optimizer, live.parameters)
