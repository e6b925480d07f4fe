"""Kernels that appear in a replicated model: the same on every rank, and averaged like the rest.

DistributedDataParallel averages the parameters that it found when it was made, and no later ones:
each rank would train a kernel of its own, silently.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel


def bare(model: nn.Module) -> nn.Module:
    """Return the module inside DistributedDataParallel and ``torch.compile``."""
    while True:
        inner = getattr(model, "_orig_mod", None)
        if inner is None and isinstance(model, DistributedDataParallel):
            inner = model.module
        if inner is None:
            return model
        model = inner


def replicas(model: nn.Module) -> DistributedDataParallel | None:
    """Return the model, or what ``torch.compile`` holds of it, if that is replicated over ranks."""
    inner: object = getattr(model, "_orig_mod", model)
    if not isinstance(inner, DistributedDataParallel):
        return None
    return inner if dist.get_world_size(inner.process_group) > 1 else None


def share_late_parameters(model: DistributedDataParallel, params: Iterable[nn.Parameter]) -> None:
    """Give parameters that came later rank 0's values, and average their gradients from now on.

    Every rank has to call this with the same parameters, in the same order. A gradient is averaged
    as soon as a backward has added to it, so that accumulating micro-batches stays right.

    Args:
        model: The replicated model.
        params: Parameters of kernels; those that the model knew when it was made are left to it,
            and so are those that have been shared before.
    """
    known = {id(p) for p in model._module_parameters}  # noqa: SLF001 - the list is told to nobody
    for parameter in params:
        hooks = (parameter._post_accumulate_grad_hooks or {}).values()  # noqa: SLF001 - no public look
        if id(parameter) in known or any(isinstance(hook, _Average) for hook in hooks):
            continue
        with torch.no_grad():
            dist.broadcast(parameter, group=model.process_group, group_src=0)
        parameter.register_post_accumulate_grad_hook(  # type: ignore[no-untyped-call] # torch has none
            _Average(model.process_group)
        )


class _Average:
    """The hook of a shared parameter. A copy of the parameter has none."""

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        self._group = group

    def __call__(self, parameter: Tensor) -> None:
        """Replace the gradient by its mean over the ranks."""
        assert parameter.grad is not None
        dist.all_reduce(parameter.grad, group=self._group)
        parameter.grad.div_(dist.get_world_size(self._group))


def worst_of_ranks(model: nn.Module | None) -> Callable[[Tensor], Tensor] | None:
    """Return what takes the elementwise maximum of flags over the ranks; None without ranks."""
    replicated = None if model is None else replicas(model)
    if replicated is None:
        return None

    def worst(flags: Tensor) -> Tensor:
        counts = flags.to(torch.int32)
        dist.all_reduce(counts, dist.ReduceOp.MAX, group=replicated.process_group)
        return counts.to(torch.bool)

    return worst
