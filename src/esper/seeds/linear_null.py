"""Whether a kernel that is linear leaves no trace at a layer, or adds what the layer cannot be."""

from __future__ import annotations

import copy
import math
from functools import partial
from typing import TYPE_CHECKING, Final

import torch
from torch import nn

from esper.resilience.attempt import Done, attempt
from esper.seeds.affine import NotFoldable
from esper.seeds.fold_target import Joining
from esper.seeds.folding import FLOAT32_TOLERANCE, composed, measured, target_beside
from esper.state.layer_record import record_of
from esper.state.made_call import made_calls

if TYPE_CHECKING:
    from esper.seeds.fold_target import Folded, FoldTarget
    from esper.state.kernel import PreparedKernel

_SHARE: Final = 0.5
"""Share of a kernel in the trial; any but 0 and 1 shows both sides of the sum."""


def why_null_adds(layer: nn.Module, kernel: PreparedKernel) -> str | None:
    """Return why a linear kernel adds capacity at a layer; None where it adds none.

    It adds none where it folds exactly into the layer, whatever it learns, and the layer's own
    tensors can learn the same. That is tried with a copy in which all that is trainable has random
    values, in float64: at birth the zeroed layer hides what comes before it. Nothing is changed,
    and no random state is touched.

    Args:
        layer: A wrapped layer; the seeds that hold kernels in it count.
        kernel: What would be grafted beside them, as ``prepare_kernel`` returns it for the
            blueprint's ``linear_form``.
    """
    try:
        target = target_beside(layer, record_of(layer).seeds.values())
        _check_learns(target)
        joining = _joining(layer, kernel)
        made = composed(target, joining)
        _check_bias_learns(target, made)
        rel_diff = measured(target, joining, *made)
    except NotFoldable as refused:
        return str(refused)
    if not rel_diff <= FLOAT32_TOLERANCE:
        return f"relative difference {rel_diff:.3g} exceeds {FLOAT32_TOLERANCE:.3g}"
    return None


def _check_learns(target: FoldTarget) -> None:
    if not target.weight.requires_grad:
        msg = "the host's weight is frozen, so that the kernel learns what the host cannot"
        raise NotFoldable(msg)


def _check_bias_learns(target: FoldTarget, made: Folded) -> None:
    bias, changed = target.bias, made[1]
    if bias is None or changed is None or bias.requires_grad:
        return
    if not torch.equal(changed, bias.detach().double()):
        msg = "the host's bias is frozen, and the kernel has one that learns"
        raise NotFoldable(msg)


def _joining(layer: nn.Module, kernel: PreparedKernel) -> Joining:
    trained = attempt(partial(_as_if_trained, kernel.module))
    if not isinstance(trained, Done):
        msg = f"the kernel cannot be copied: {trained.error}"
        raise NotFoldable(msg)
    return Joining(
        kernel=trained.value,
        alpha=_SHARE,
        is_serial=kernel.position == "serial",
        replaces=kernel.mode == "replace",
        example=next(iter(made_calls(layer)), None),
    )


def _as_if_trained(kernel: nn.Module) -> nn.Module:
    """Return a copy of a kernel in which no trainable tensor is special any more."""
    copied = copy.deepcopy(kernel)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in copied.parameters():
            if parameter.requires_grad:
                drawn = torch.randn(parameter.shape, generator=generator)
                parameter.copy_(drawn / math.sqrt(math.prod(parameter.shape[1:])))
    return copied
