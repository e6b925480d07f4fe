"""What FSDP2 does with the gradients of a model that it has sharded, where kernels depend on it."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from esper.state.shards import is_spread

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator

    from torch import nn

_logger = logging.getLogger(__name__)


def is_shard(p: Any) -> bool:
    """Say whether a rank has a part of a parameter only, which FSDP2 gathers and reduces."""
    return is_spread(p) and any(placement.is_shard() for placement in p.placements)


def synchronizes(model: nn.Module) -> bool:
    """Say whether the next backward reduces gradients (``set_requires_gradient_sync``)."""
    return all(group.reduce_grads for _, group in _groups(model))


def expect_idle_ranks(model: nn.Module, params: Collection[int]) -> None:
    """Let FSDP2 go on where a rank has no gradient of some of its parameters.

    Otherwise it reduces what each rank has, one after the other, and ranks that have isolated a
    kernel wait for ever or mix their gradients up. In groups that hold none of these parameters
    nothing changes.

    Args:
        model: The model.
        params: Ids of the parameters, kernels' that were there when the model was sharded.
    """
    for module, group in _groups(model):
        held = (own.sharded_param for own in group.fsdp_params)
        if not any(id(p) in params for p in held):
            continue
        expect: Any = getattr(module, "set_reduce_scatter_unused_params", None)
        if expect is not None:
            expect(reduce_scatter_unused_params=True, recurse=False)
        else:
            _logger.warning(
                "kernels that were grafted before fully_shard: before torch 2.13 a rank that "
                "isolates one of them alone hangs the others; graft after fully_shard, or let "
                "guard='step' isolate it on all ranks"
            )


def _groups(model: nn.Module) -> Iterator[tuple[nn.Module, Any]]:
    """Yield the groups of parameters that FSDP2 gathers together, each with its module."""
    for module in model.modules():
        get_state: Any = getattr(module, "_get_fsdp_state", None)
        if get_state is None:
            continue
        state = get_state()
        several = getattr(state, "_fsdp_param_groups", None)
        single = state._fsdp_param_group if several is None else None  # noqa: SLF001 - before torch 2.12
        groups = several or filter(None, [single])
        yield from ((module, group) for group in groups)
