"""A kernel in a model that is in training: how it enters, how its alpha rises, how it goes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from esper.continuity.following import tell_of_copies
from esper.continuity.optimizer import (
    append_parameters,
    drop_stale_moments,
    order_kernels,
    remove_parameters,
)
from esper.contracts.lifecycle import SeedLifecycleState
from esper.seeds.shadow import remember_call, seen_example
from esper.state.layer_call import LayerCall
from esper.state.layer_record import record_of
from esper.state.roster import where_kernels_stand
from esper.state.shards import spread_state

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor, nn

    from esper.continuity.ensemble import AnyOptimizer
    from esper.continuity.placement import Placement
    from esper.continuity.warmup import UpdateFactor
    from esper.contracts.choices import Guard
    from esper.execution.kasmina_layer import KasminaLayer
    from esper.seeds.folding import FoldCertificate
    from esper.state.kernel import PreparedKernel
    from esper.state.layer_call import Example
    from esper.state.seed_slot import Seed


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

    @property
    def seed(self) -> Seed:
        """What the layer keeps of the kernel: the kernel itself, and a call that it has seen."""
        return record_of(self.layer).seeds[self.seed_idx]

    @property
    def is_active(self) -> bool:
        """Whether the kernel contributes, and is neither isolated nor taken out."""
        state = self.layer.state_layout.state(self.seed_idx)
        return state is SeedLifecycleState.ACTIVE

    def set_alpha(self, updates: int, ramp_updates: int) -> float:
        """Set alpha for the next update from the number of joint updates done; return it."""
        alpha = 1.0 if updates >= ramp_updates else updates / ramp_updates
        if alpha != self.layer.alpha(self.seed_idx):
            self.layer.set_alpha(self.seed_idx, alpha)
        return alpha


def place_kernel(
    layer: KasminaLayer,
    seed_idx: int,
    kernel: PreparedKernel,
    *,
    example: Example,
    alpha: float,
    placement: Placement,
    factor: UpdateFactor,
    peaks: Sequence[float],
    state: Mapping[Tensor, dict[str, Any]] | None = None,
    guard: Guard = "always",
) -> LiveKernel:
    """Put a kernel that was probed, or has run elsewhere, into a model and its optimizer.

    Parameters and moments go by reference, step included, to the groups that train their host.

    Args:
        layer: The layer: the live one, or its counterpart in a twin.
        seed_idx: The slot there.
        kernel: The kernel; this object, not a copy.
        example: A call of the layer.
        alpha: Its share from now on, in [0, 1].
        placement: Of the layer's model and what trains it, as they are before the graft.
        factor: Warm-up of parameters that appear in that model.
        peaks: Highest rate that each of its groups has had.
        state: Optimizer state of the kernel's parameters, by parameter; None starts without.
        guard: Where its faults are stopped.
    """
    if seen_example(layer, kernel) is None:
        remember_call(layer, kernel, LayerCall.of(example))
    before = list(kernel.module.parameters())
    layer.graft(seed_idx, kernel, alpha=alpha, guard=guard)
    if state is not None:  # in a layer in shards the kernel has other parameters now
        pairs = zip(before, kernel.module.parameters(), strict=True)
        state = {now: spread_state(state[p], now) for p, now in pairs if p in state}
    places, _ = placement.places(layer, seed_idx, kernel.module)
    parameters = tuple(place.parameter for place in places)
    tell_of_copies([layer])
    if parameters:
        append_parameters(placement.optimizer, places, state=state)
        order_kernels(placement.model, placement.optimizer)
        placement.hold(places)
        factor.add(parameters, peaks=peaks)
    return LiveKernel(grafted_into=layer, seed_idx=seed_idx, parameters=parameters)


def remove_kernel(live: LiveKernel, optimizer: AnyOptimizer, factor: UpdateFactor) -> None:
    """Undo :func:`place_kernel`: the kernel goes, and its parameters and their state with it."""
    factor.remove(live.parameters)
    live.layer.unload_kernel(live.seed_idx)
    remove_parameters(optimizer, live.parameters)


def make_permanent(
    live: LiveKernel, optimizer: AnyOptimizer, factor: UpdateFactor
) -> FoldCertificate:
    """Fossilize a kernel: one that folds leaves the optimizer, any other is guarded at the step.

    Where the fold gives the host's weights another gradient, their moments begin anew, and so do
    their first steps, whose full size under Adam would be a dip.
    """
    certificate = live.layer.fossilize(live.seed_idx)
    if not certificate.folded:
        live.layer.set_guard(live.seed_idx, "step")
        return certificate
    factor.remove(live.parameters)
    remove_parameters(optimizer, live.parameters)
    rates = [float(group["lr"]) for group in optimizer.param_groups]
    factor.add(drop_stale_moments(live.layer, optimizer), peaks=rates)
    return certificate
