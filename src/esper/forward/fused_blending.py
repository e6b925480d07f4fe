"""The graft where seeds are run as one: ``y = h + sum alpha_i k_i``, their shares summed first."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import _StopRecomputationError

from esper.forward.blending import blend
from esper.forward.fence import left_out, run_kernel
from esper.forward.finiteness import host_mark, in_transform, seen_finite
from esper.forward.seed_groups import grouping_of
from esper.forward.value_gates import CLEAN, share_adder
from esper.state.observation import CLEAN_MARKS, Call

if TYPE_CHECKING:
    from collections.abc import Sequence

    from esper.forward.blending import RunKernel
    from esper.state.layer_call import LayerCall
    from esper.state.layer_record import LayerRecord
    from esper.state.seed_group import SeedGroup

    Share = tuple[SeedGroup, Tensor, Sequence[Tensor], Tensor | None]
    """A group, the sum of its shares, their marks, and ``h`` with the sum where that was made."""

_OF_ALL_MODULES: Final = tuple(
    vars(nn.modules.module)[f"_global_{name}_hooks"]
    for name in ("forward", "forward_pre", "backward", "backward_pre")
)


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
    for group, total, marks, joined in shares:
        y = y + total if joined is None or y is not host else joined
        _remember(group, h.detach(), marks)
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


def _shares(groups: Sequence[SeedGroup], call: LayerCall, h: Tensor) -> list[Share] | None:
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


def _share(group: SeedGroup, call: LayerCall, h: Tensor) -> Share | None:
    """Return a group with the sum of its shares, or None where that is not the shorter way."""
    first = group.seeds[0]
    given = h if first.is_serial else call.x
    alphas = torch.stack([seed.slot._buffers["alpha"] for seed in group.seeds])  # type: ignore[misc] # noqa: SLF001 - getattr costs a microsecond
    if not group.stands or type(given) is not Tensor or alphas.requires_grad:
        msg = "the kernels are not as they were when the plan was made"
        raise ValueError(msg)
    if not group.run.pays(given):
        return None
    is_watched, host = first.guard == "step", h.detach()
    alphas = alphas.to(h.dtype)
    if is_watched and seen_finite(host):  # of a masked one nothing could be seen, call for call
        total, _ = group.run(given, alphas, host, is_watched=False)
        joined = h + total
        if seen_finite(joined):
            return group, total, (), joined
    return group, *group.run(given, alphas, host, is_watched=is_watched), None


def _remember(group: SeedGroup, h: Tensor, marks: Sequence[Tensor]) -> None:
    """Remember the call with each seed, as it would be by itself."""
    if group.seeds[0].guard == "off":
        for seed in group.seeds:
            seed.seen.calls.append(CLEAN)
        return
    if not marks:  # all that was added was seen to be finite, and so was the host
        for seed in group.seeds:
            seed.seen.calls.append(Call(h.shape, CLEAN_MARKS))
        return
    host = host_mark(h)
    for seed, mark in zip(group.seeds, marks, strict=True):
        seed.seen.calls.append(Call(h.shape, (host, mark)))
