"""The graft where seeds are run as one: ``y = h + sum alpha_i k_i``, their shares summed first."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import _StopRecomputationError

from esper.forward.blending import blend
from esper.forward.fence import left_out, run_kernel
from esper.forward.finiteness import host_mark, in_transform, seen_finite
from esper.forward.fused_gates import GroupGates
from esper.forward.seed_groups import grouping_of
from esper.forward.value_gates import CLEAN, share_adder
from esper.state.observation import CLEAN_MARKS, Call

if TYPE_CHECKING:
    from collections.abc import Sequence

    from esper.forward.blending import RunKernel
    from esper.state.layer_call import LayerCall
    from esper.state.layer_record import LayerRecord
    from esper.state.seed_group import SeedGroup

_OF_ALL_MODULES: Final = tuple(
    vars(nn.modules.module)[f"_global_{name}_hooks"]
    for name in ("forward", "forward_pre", "backward", "backward_pre")
)


@dataclass(frozen=True, slots=True)
class _Share:
    """What a group adds in a call.

    Attributes:
        group: The group.
        total: The sum of its shares.
        marks: Those of each share; empty where all was seen to be finite, or is not guarded.
        with_host: The host's output with the sum, where that was made.
        gates: Those of ``guard="always"``.
    """

    group: SeedGroup
    total: Tensor
    marks: Sequence[Tensor] = ()
    with_host: Tensor | None = None
    gates: GroupGates | None = None


def blend_fused(
    record: LayerRecord, call: LayerCall, h: Tensor, run: RunKernel = run_kernel
) -> Tensor:
    """Return what ``blend`` returns, but for rounding.

    What cannot be run as one in this call runs as ``blend`` runs it: in compiled code, in
    transformations, under autocast, in shadow passes, where somebody has hooked or exchanged a part
    of a kernel, and wherever a group raises.

    Args:
        record: The layer's record; its grouping is that of its plan.
        call: What the layer was given.
        h: The host's output, of floating dtype.
        run: Runs the kernel of a seed that is in no group.
    """
    if not _can_fuse(record, h):
        return blend(record, call, h, run)
    grouping = record.grouping
    if grouping is None:  # a copy's, which has the plan of its original
        grouping = record.grouping = grouping_of(record.plan)
    shares = _shares(grouping.groups, call, h)
    if shares is None:
        return blend(record, call, h, run)
    adders, host = [], h
    for seed in grouping.others:
        k = run(seed, call, h)
        if k is None:
            h = left_out(h, seed)
            continue
        alpha = seed.slot._buffers["alpha"]  # noqa: SLF001 - getattr costs a microsecond
        assert alpha is not None
        adders.append(share_adder(seed, h, k, alpha)[0])
    y = h
    for share in shares:
        y = y + share.total if share.with_host is None or y is not host else share.with_host
        _remember(share, h)
    for add in adders:
        y = add(y)
    return y


def _can_fuse(record: LayerRecord, h: Tensor) -> bool:
    """Say whether a call may be run as one, for what goes on around it."""
    if torch.compiler.is_compiling() or record.in_shadow:
        return False
    if in_transform() or torch.is_autocast_enabled(h.device.type) or any(_OF_ALL_MODULES):
        return False
    return type(h) is Tensor and torch._C._get_tracing_state() is None  # noqa: SLF001 - there is no public one


def _shares(groups: Sequence[SeedGroup], call: LayerCall, h: Tensor) -> list[_Share] | None:
    """Return each group with the sum of its shares, or None where one cannot be run as one.

    Whatever it raises, each kernel runs by itself then, behind its own fence.
    """
    found = []
    try:
        for group in groups:
            share = _share(group, call, h)
            if share is None:
                return None
            found.append(share)
    except _StopRecomputationError:  # a checkpoint has what it wants; no fault of a kernel's
        raise
    except Exception:  # noqa: BLE001 - the fence, of all of them
        return None
    return found


def _share(group: SeedGroup, call: LayerCall, h: Tensor) -> _Share | None:
    """Return a group with the sum of its shares, or None where that is not the shorter way."""
    first = group.seeds[0]
    given = h if first.is_serial else call.x
    alphas = torch.stack([seed.slot._buffers["alpha"] for seed in group.seeds])  # type: ignore[misc] # noqa: SLF001 - getattr costs a microsecond
    if not group.stands or type(given) is not Tensor or alphas.requires_grad:
        msg = "the kernels are not as they were when the plan was made"
        raise ValueError(msg)
    if not group.run.pays(given):
        return None
    host, alphas = h.detach(), alphas.to(h.dtype)
    if first.guard == "off":
        return _Share(group, *group.run(given, alphas, host, is_watched=False))
    is_finite = seen_finite(host)  # of a masked one nothing could be seen, call for call
    if is_finite:
        gates = GroupGates(group, given, alphas) if first.guard == "always" else None
        read = given if gates is None else gates.gated()
        total, _ = group.run(read, alphas, host, is_watched=False)
        joined = h + total
        if seen_finite(joined):
            return _Share(group, total, with_host=joined, gates=gates)
    if first.guard == "always":
        return None
    return _Share(group, *group.run(given, alphas, host, is_watched=True))


def _remember(share: _Share, h: Tensor) -> None:
    """Remember the call with each seed, as it would be by itself."""
    seeds = share.group.seeds
    if seeds[0].guard == "off":
        for seed in seeds:
            seed.seen.calls.append(CLEAN)
    elif share.gates is not None:
        share.gates.remember(share.total, h.shape)
    elif not share.marks:  # all that was added was seen to be finite, and so was the host
        call = Call(h.shape, CLEAN_MARKS)  # no gradient is remembered of it, so one is as good
        for seed in seeds:
            seed.seen.calls.append(call)
    else:
        host = host_mark(h.detach())
        for seed, mark in zip(seeds, share.marks, strict=True):
            seed.seen.calls.append(Call(h.shape, (host, mark)))
