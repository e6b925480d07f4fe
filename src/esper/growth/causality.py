"""Whether a layer looks at later inputs: a kernel that does where its host does not, cheats."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import torch

from esper.forward.host_output import blendable
from esper.forward.host_view import completed, host_forward
from esper.seeds.shadow import shadow_pass
from esper.state.layer_call import LayerCall

if TYPE_CHECKING:
    from torch import Tensor, nn

    from esper.state.layer_call import Example


def is_causal(layer: nn.Module, example: Example) -> bool:
    """Return whether no output of a layer was seen to depend on a later input.

    The last position of a recorded input is changed: where outputs at earlier positions change
    too, the layer looks ahead, and its kernels may. A layer that works position by position is
    causal. What the layer raises when it is run again is passed on.

    Args:
        layer: A wrapped layer that gives ``[batch, length, features]``.
        example: A call of it, as it was recorded.
    """
    call = completed(layer, LayerCall.of(example)).detached()
    before, after = (_run(layer, call, value) for value in (call.x, _changed_at_its_end(call.x)))
    return torch.equal(before[:, :-1], after[:, :-1])


def is_causal_kernel(kernel: nn.Module, x: Tensor) -> bool:
    """Return whether no output of a kernel was seen to depend on a later input.

    It is tried on a copy in which no tensor is zero, since a layer of zeros hides what it reads.

    Args:
        kernel: Reads and gives ``[batch, length, features]``.
        x: An input of it.
    """
    copied = copy.deepcopy(kernel).eval()
    with torch.no_grad():
        for p in copied.parameters():
            if not p.any():
                p.fill_(1.0)
        before, after = copied(x), copied(_changed_at_its_end(x))
    return torch.equal(before[:, :-1], after[:, :-1])


def _changed_at_its_end(x: Tensor) -> Tensor:
    changed = x.clone()
    changed[:, -1] += torch.where(x[:, -1] > 0, -1.0, 1.0)
    return changed


def _run(layer: nn.Module, call: LayerCall, x: Tensor) -> Tensor:
    """Run the host with another first input; every tensor that is the first one follows."""
    given = call.detached()
    first = call.x
    args = tuple(x if a is first else b for a, b in zip(call.args, given.args, strict=True))
    kwargs = {k: x if call.kwargs[k] is first else v for k, v in given.kwargs.items()}
    with shadow_pass(layer), torch.no_grad():
        torch.manual_seed(0)  # the same dropout in both runs
        return blendable(host_forward(layer, *args, **kwargs)).clone()
