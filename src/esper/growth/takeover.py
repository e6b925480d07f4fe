"""Taking over: the live run goes on where a twin stands, in one transaction between two steps."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, cast

import torch

from esper.continuity.ensemble import members_of
from esper.continuity.optimizer import remove_parameters, sync_optimizer
from esper.continuity.replicas import in_step, spread
from esper.continuity.snapshot import RunSnapshot, parameters_by_name
from esper.growth.live_kernel import LiveKernel, place_kernel, remove_kernel
from esper.state.seed_slot import SeedSlot
from esper.state.shards import spread_like, spread_state

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from torch import Tensor, nn

    from esper.continuity.ensemble import State
    from esper.execution.kasmina_layer import KasminaLayer
    from esper.growth.graft import Graft
    from esper.growth.run import GrowthRun
    from esper.growth.stage import StageState
    from esper.growth.twins import Twin


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Taken:
    """What was taken over, and the way back.

    Attributes:
        kernels: Every kernel in the live model, in the order of the package.
        snapshot: The run as it was before.
        host: The parameters that the model had then.
        factors: How far their first steps were.
    """

    kernels: tuple[LiveKernel, ...]
    snapshot: RunSnapshot
    host: Sequence[nn.Parameter]
    factors: list[dict[str, float] | None]

    @classmethod
    def before(cls, run: GrowthRun) -> Taken:
        """Return the way back to where a run is now, which has none of the kernels yet."""
        host = list(run.model.parameters())
        return cls(
            kernels=(),
            snapshot=RunSnapshot(run.model, run.optimizer, update=run.updates),
            host=host,
            factors=run.factor.state_dict(host),
        )

    def state_dict(self, run: GrowthRun, grafts: Sequence[Graft]) -> StageState:
        """Return kernels and way back by names, as plain values and tensors on the CPU.

        Args:
            run: The run.
            grafts: The grafts of the kernels, in their order.
        """
        named = {id(p): n for n, p in parameters_by_name(run.model, run.optimizer).items()}
        sites = {id(layer): name for name, layer in run.layers.items()}
        return {
            "kernels": [
                {
                    "graft": graft.number,
                    "site": sites[id(kernel.layer)],
                    "parameters": [named[id(p)] for p in kernel.parameters],
                }
                for graft, kernel in zip(grafts, self.kernels, strict=True)
            ],
            "snapshot": self.snapshot.state_dict(run.model, run.optimizer),
            "factors": {
                named[id(p)]: factor
                for p, factor in zip(self.host, self.factors, strict=True)
                if id(p) in named
            },
        }

    @classmethod
    def from_state_dict(cls, state: StageState, run: GrowthRun) -> tuple[list[Graft], Taken]:
        """Return grafts, and the way back that :meth:`state_dict` was taken of.

        Args:
            state: What it returned.
            run: A run whose model, optimizer and grafts are those of then.

        Raises:
            KeyError: The state names what the run does not have.
        """
        named = parameters_by_name(run.model, run.optimizer)
        grafts = [run.grafts.numbered(kernel["graft"]) for kernel in state["kernels"]]
        kernels = [
            LiveKernel(
                grafted_into=run.layers[kernel["site"]],
                seed_idx=graft.seed_idx,
                parameters=tuple(
                    cast("nn.Parameter", named[name]) for name in kernel["parameters"]
                ),
            )
            for graft, kernel in zip(grafts, state["kernels"], strict=True)
        ]
        return grafts, cls(
            kernels=tuple(kernels),
            snapshot=RunSnapshot.from_state_dict(state["snapshot"], run.model, run.optimizer),
            host=[cast("nn.Parameter", named[name]) for name in state["factors"]],
            factors=list(state["factors"].values()),
        )

    def undo(self, run: GrowthRun) -> None:
        """Put the run back to where it was before, exactly: weights, buffers, moments, draws."""
        for kernel in self.kernels:
            remove_kernel(kernel, run.optimizer, run.factor)
        self.snapshot.restore(run.optimizer)
        run.factor.load_state_dict(self.factors, self.host)
        run.losses.clear()


def take_over(run: GrowthRun, twin: Twin, kernels: Mapping[str, LiveKernel]) -> Taken:
    """Let the live run have the state of a twin; whatever fails, on any rank, it is as it was.

    Host parameters, buffers and moments are written in place, so that every object stays the
    owner's. Kernels move over with their moments, which join the groups of their hosts. The
    schedule, the loss scale and the random state are the run's own.

    Args:
        run: The run.
        twin: The twin, which is used up.
        kernels: What stands in it that the live run does not have, by site.
    """
    taken = Taken.before(run)
    host = taken.host
    try:
        moved = in_step(run.given, lambda: _written(run, twin, host, kernels))
    except BaseException:
        for site, kernel in kernels.items():
            _clear(run, run.layers[site], kernel.seed_idx)
        taken.undo(run)
        raise
    return replace(taken, kernels=tuple(moved))


def _written(
    run: GrowthRun,
    twin: Twin,
    host: Sequence[nn.Parameter],
    kernels: Mapping[str, LiveKernel],
) -> list[LiveKernel]:
    """Write the twin's state into the live run; return its kernels where they stand now."""
    copies = [twin.copy_of(p) for p in host]
    going = [*copies, *(p for kernel in kernels.values() for p in kernel.parameters)]
    first_steps = twin.factor.state_dict(going)
    _write_host(run, twin, list(zip(host, copies, strict=True)))
    moved = [_moved(run, twin, run.layers[site], kernel) for site, kernel in kernels.items()]
    staying = [*host, *(p for kernel in moved for p in kernel.parameters)]
    run.factor.load_state_dict(first_steps, staying)
    sync_optimizer(run.given, members_of(run.optimizer), group_for=run.group_for)
    return moved


def _clear(run: GrowthRun, layer: KasminaLayer, seed_idx: int) -> None:
    """Take out what stands in a seed, however far it came."""
    kernel = layer.seed_kernel(seed_idx)
    parameters = [] if kernel is None else list(kernel.parameters())
    run.factor.remove(parameters)
    layer.unload_kernel(seed_idx)
    remove_parameters(run.optimizer, parameters)


def _write_host(run: GrowthRun, twin: Twin, pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
    live = run.optimizer.state
    with torch.no_grad():
        for p, copied in pairs:
            p.copy_(spread_like(copied, p))
        for ours, theirs in zip(_buffers(run.model), _buffers(twin.model), strict=True):
            ours.copy_(theirs)
        for p, copied in pairs:
            state = twin.optimizer.state.get(copied)
            _write_state(live, p, None if state is None else spread_state(state, p))


def _write_state(live: State, p: Tensor, state: dict[str, object] | None) -> None:
    """Write a parameter's moments where they are; what there is not yet is taken over."""
    held = live.get(p)
    if state is None:
        live.pop(p, None)
        return
    if held is None:
        live[p] = dict(state)
        return
    for name, value in state.items():
        ours = held.get(name)
        if isinstance(value, torch.Tensor) and isinstance(ours, torch.Tensor):
            ours.copy_(value)
        else:
            held[name] = value


def _buffers(model: nn.Module) -> Iterator[Tensor]:
    """Yield the buffers of a model in order; a seed's own are no state of the run."""
    for module in model.modules():
        if not isinstance(module, SeedSlot):
            yield from (b for b in module._buffers.values() if b is not None)  # noqa: SLF001 - past properties


def _moved(run: GrowthRun, twin: Twin, layer: KasminaLayer, kernel: LiveKernel) -> LiveKernel:
    """Take a kernel out of the twin and put it, at the same alpha, into the live layer."""
    seed, alpha = kernel.seed, kernel.layer.alpha(kernel.seed_idx)
    assert seed.example is not None, "a kernel is put into a twin with an example"
    kernel.layer.unload_kernel(kernel.seed_idx)
    return place_kernel(
        layer,
        kernel.seed_idx,
        seed.kernel,
        example=seed.example,
        alpha=alpha,
        placement=run.placement(),
        factor=run.factor,
        peaks=run.watcher.peaks,
        state=twin.optimizer.state,
        guard="always" if spread(run.given) is None else "step",
    )
