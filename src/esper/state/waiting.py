"""What a caller asks of a graft, and a graft that waits for an input of its layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, TypedDict

if TYPE_CHECKING:
    from torch.utils.hooks import RemovableHandle

    from esper.contracts.choices import Guard, Mode, Position
    from esper.state.kernel import PreparedKernel
    from esper.state.layer_call import Example


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


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class WaitingGraft:
    """A graft that waits for the next forward of its layer.

    Attributes:
        request: What is to be made then.
        handle: The one-shot hook that will see the input.
    """

    request: GraftRequest
    handle: RemovableHandle
