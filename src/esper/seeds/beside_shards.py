"""Kernels in layers that FSDP2 has sharded: whole on every rank, and to their owner as the host's.

FSDP2 gathers and reduces what it found when it sharded, and waits in both for every rank. A kernel
that came later, and may fail on one rank, stands beside the shards: its parameters are ``DTensor``
that are replicated over the host's ranks, so that clipping and fused optimizers take them together
with the host's, and its forward runs on what this rank has of them.
"""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor, nn

from esper.state.shards import exchange, here, is_spread, mesh_beside

if TYPE_CHECKING:
    from torch.utils.hooks import RemovableHandle

_hooks: Final[weakref.WeakKeyDictionary[nn.Module, tuple[RemovableHandle, ...]]] = (
    weakref.WeakKeyDictionary()
)
"""Of kernels that stand beside shards: the hooks around their forwards."""


def stand_beside(layer: nn.Module, kernel: nn.Module) -> None:
    """Spread a kernel's parameters over the ranks of its layer's shards: each has rank 0's values.

    Nothing changes where the layer is not sharded, or the parameters are spread already. Every rank
    has to call this at the same moment.

    Args:
        layer: The layer that the kernel joins.
        kernel: The kernel; its parameters are other objects afterwards.

    Raises:
        ValueError: The layer is spread over ranks in another way than FSDP2's.
    """
    mesh = mesh_beside(layer)
    if mesh is None or all(map(is_spread, kernel.parameters())):
        return
    from torch.distributed.tensor import Replicate, distribute_tensor

    def made(p: Any) -> Tensor:
        if is_spread(p):
            return p  # type: ignore[no-any-return] # a parameter
        spread = distribute_tensor(p.detach(), mesh, [Replicate()] * mesh.ndim)
        return nn.Parameter(spread, requires_grad=p.requires_grad)

    exchange(kernel.modules(), made)
    _hooks[kernel] = (
        kernel.register_forward_pre_hook(_enter, prepend=True),
        kernel.register_forward_hook(_leave, always_call=True),
    )


def stand_alone(kernel: nn.Module) -> None:
    """Give a kernel that stood beside shards plain parameters again, with the same values."""
    for handle in _hooks.pop(kernel, ()):
        handle.remove()
        exchange(kernel.modules(), _plain)


def _plain(p: Any) -> Tensor:
    return nn.Parameter(here(p.detach()), requires_grad=p.requires_grad) if is_spread(p) else p


def _enter(kernel: nn.Module, args: tuple[object, ...]) -> None:
    """Let a forward run on what this rank has; a gradient goes through to what is at rest.

    An attribute of the object hides a parameter, and ``torch.compile`` follows it.
    """
    x = next((t for t in args if isinstance(t, Tensor) and t.is_floating_point()), None)
    for part in kernel.modules():
        held = {name: p for name, p in part._parameters.items() if p is not None}  # noqa: SLF001 - past the attributes
        part.__dict__.update({name: _like_input(p, x) for name, p in held.items()})
        _gather_again(part)


def _leave(kernel: nn.Module, *_: object) -> None:
    for part in kernel.modules():
        for name in part._parameters:  # noqa: SLF001 - as above
            if name in part.__dict__:
                del part.__dict__[name]
        _gather_again(part)


def _gather_again(part: nn.Module) -> None:
    """Let a recurrent module find its weights, which it keeps in a list of its own."""
    if isinstance(part, nn.RNNBase):
        names = part._flat_weights_names  # noqa: SLF001 - torch has no other way
        part.__dict__["_flat_weights"] = [getattr(part, name) for name in names]


def _like_input(p: Any, x: Tensor | None) -> Tensor:
    """Return what this rank has of a weight, in the input's dtype.

    FSDP2's mixed precision narrows a layer's weights and inputs alike.
    """
    if type(p) is not nn.Parameter:  # torch.compile cannot tell what else is spread
        p = p.to_local()
    if x is None or not p.is_floating_point() or torch.is_autocast_enabled(x.device.type):
        return p  # type: ignore[no-any-return] # a tensor
    return p if p.dtype == x.dtype else p.to(x.dtype)  # type: ignore[no-any-return] # as above
