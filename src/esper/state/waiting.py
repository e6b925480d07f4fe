"""What a caller asks of a graft, and a graft that waits for an input of its layer."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypedDict

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import nn
    from torch.utils.hooks import RemovableHandle

    from esper.contracts.choices import Guard, Mode, Position
    from esper.state.kernel import PreparedKernel
    from esper.state.layer_call import Example, LayerCall


class GraftOptions(TypedDict, total=False):
    """The options of ``KasminaLayer.graft``, by name; each may be left out.

    Attributes:
        alpha: In [0, 1]; None where the graft is to change nothing at birth.
        mode: ``"add"`` or ``"replace"``; None for what the kernel carries.
        position: ``"parallel"`` or ``"serial"``; None for what the kernel carries.
        guard: ``"always"``, ``"step"`` or ``"off"``.
        example: An input of the layer to probe the kernel with; None to wait for one.
    """

    alpha: float | None
    mode: Mode | None
    position: Position | None
    guard: Guard
    example: Example | None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class GraftRequest:
    """A graft that is to be made.

    Attributes:
        kernel: What is to be grafted.
        alpha: In [0, 1]; None where the probe decides.
        guard: Where the kernel's faults are stopped.
        is_pristine: Whether an earlier probe of the same artifact may answer.
    """

    kernel: PreparedKernel
    alpha: float | None
    guard: Guard
    is_pristine: bool


@dataclass(slots=True, kw_only=True, eq=False)
class WaitingGraft:
    """A graft that waits for a call of its layer.

    Attributes:
        request: What is to be made then.
        num_readings: How often somebody looked between two steps, and there had been no call.
    """

    request: GraftRequest
    num_readings: int = 0


@dataclass(slots=True, kw_only=True, eq=False)
class Note:
    """What the forward of a layer has noted for the grafts that wait there, and how it is awaited.

    Attributes:
        call: The first call since; None before.
        is_autocast: Whether that was under autocast, which has chosen the dtypes.
        num_to_recompute: Calls inside a checkpoint whose backward has not come; it runs them again.
        handles: Hooks on the modules that the layer is part of.
        set_aside: Modules that were compiled in place, with their compiled forward, which is put
            back.
    """

    call: LayerCall | None = None
    is_autocast: bool = False
    num_to_recompute: int = 0
    handles: list[RemovableHandle] = field(default_factory=list)
    set_aside: list[tuple[nn.Module, Callable[..., Any]]] = field(default_factory=list)
