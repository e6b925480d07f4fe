"""A kernel in a model that is in training: how it enters, how its alpha rises, how it goes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

from esper.continuity.following import tell_of_copies
from esper.continuity.optimizer import append_parameters, remove_parameters
from esper.seeds.shadow import seen_example
from esper.state.roster import where_kernels_stand

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import nn

    from esper.continuity.ensemble import AnyOptimizer
    from esper.continuity.placement import Placement
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
    factor: UpdateFactor,
    *,
    placement: Placement,
    peaks: Sequence[float],
) -> LiveKernel:
    """Graft an auditioned kernel at alpha 0 and hand its parameters to an optimizer.

    Parameters and moments go by reference, step included, to the groups that train their host.

    Args:
        audition: The audition that ends here.
        layer: The layer to graft into: the live one, or its counterpart in a twin.
        factor: Warm-up of parameters that appear in the model that ``layer`` belongs to.
        placement: Of that model and what trains it, as they are before the graft.
        peaks: Highest rate that each of its groups has had.
    """
    seen = seen_example(layer, audition.kernel)  # none where the owner's own loss runs compiled
    example = audition.example if seen is None else None
    layer.graft(audition.seed_idx, audition.kernel, alpha=0.0, example=example)
    places, _ = placement.places(layer, audition.seed_idx, audition.kernel.module)
    parameters = tuple(place.parameter for place in places)
    tell_of_copies([layer])
    if parameters:
        state = None if audition.optimizer is None else audition.optimizer.state
        append_parameters(placement.optimizer, places, state=state)
        factor.add(parameters, peaks=peaks)
    return LiveKernel(grafted_into=layer, seed_idx=audition.seed_idx, parameters=parameters)


def remove_kernel(live: LiveKernel, optimizer: AnyOptimizer, factor: UpdateFactor) -> None:
    """Undo :func:`graft_kernel`: the kernel goes, and its parameters and their state with it."""
    factor.remove(live.parameters)
    live.layer.unload_kernel(live.seed_idx)
    remove_parameters(optimizer, live.parameters)
