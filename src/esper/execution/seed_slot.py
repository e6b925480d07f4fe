"""What a seed that holds a kernel adds to its layer: one child module a seed, and a record."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor, nn

from esper.contracts.canonical_json import encode

if TYPE_CHECKING:
    from collections.abc import Callable

    from esper.execution.kernel import PreparedKernel

SEEDS: Final = "_seeds"
"""Name of the child of a layer that holds its slots; absent while there is none."""

GUARDS: Final = ("always", "step", "off")

OBSERVED_CALLS: Final = 256
"""So many calls of a seed are remembered between two readings; older ones are not counted."""


class SeedSlot(nn.Module):
    """A kernel in a seed: a child module, so that the host's owner sees its parameters.

    Attributes:
        kernel: The kernel itself.
        alpha: 0-dim float32 buffer in [0, 1] on the kernel's device, a copy of the layout's;
            replaced when it changes and never written in place.
        structure: uint8 buffer, canonical JSON of what is needed to build the kernel again.
    """

    alpha: Tensor
    structure: Tensor

    def __init__(self, kernel: nn.Module, device: torch.device) -> None:
        super().__init__()
        self.kernel = kernel
        self.register_buffer("alpha", torch.zeros((), dtype=torch.float32, device=device))
        self.register_buffer("structure", torch.zeros(0, dtype=torch.uint8, device=device))

    def set_alpha(self, alpha: float) -> None:
        """Replace the alpha that forwards multiply with."""
        self._buffers["alpha"] = torch.tensor(alpha, dtype=torch.float32, device=self.alpha.device)

    def set_structure(self, structure: dict[str, Any]) -> None:
        """Replace the description that travels with ``state_dict``."""
        data = torch.frombuffer(bytearray(encode(structure)), dtype=torch.uint8)
        self._buffers["structure"] = data.to(self.alpha.device)

    def forward(self, x: Tensor) -> Tensor:
        """Return the kernel's output, unblended; layers do not call this."""
        output: Tensor = self.kernel(x)
        return output

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SeedSlot:  # noqa: FBT001, FBT002 - torch's signature
        """Follow the host to another device or dtype; alpha stays float32."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call] # torch has none
        self._buffers["alpha"] = self.alpha.to(torch.float32)
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Take the buffers as fresh tensors, which loading may then write."""
        for name, buffer in self._buffers.items():
            given = state_dict.get(prefix + name)
            if given is not None and buffer is not None:
                self._buffers[name] = torch.empty_like(given, device=buffer.device)
        super()._load_from_state_dict(state_dict, prefix, *args)


class SeedContainer(nn.Module):
    """The slots of a layer, by seed index. A host that calls all of its children passes through.

    It carries an empty forward hook: fused paths that would bypass the layer look for one.
    """

    def __init__(self) -> None:
        super().__init__()
        self.register_forward_hook(no_hook)

    def forward(self, x: Any) -> Any:
        """Return ``x``."""
        return x


def no_hook(*_: Any) -> None:
    """Do nothing."""


class Seed:
    """What is known about a seed that is not dormant; part of the layer's record, no module.

    Args:
        seed_idx: Index of the seed in its layer.
        kernel: The kernel and how it joins.
        slot: The kernel's slot.
        guard: ``"always"``, ``"step"`` or ``"off"``.
        is_shadow: Whether it is auditioned: not fenced, not guarded, no part of the model.
        example: An input of the layer, to probe the kernel again with.

    Attributes:
        rows: For each recent call the sums of the host's output and of that with the seed's
            share, 0-dim, on the device.
        ring: ``[OBSERVED_CALLS, 2]``, the same for compiled calls: 0 for finite, else NaN; rows
            of NaN say nothing.
        errors: Recent calls that the fence saw, where no row stands for them: True at fault.
        gradients: Recent (``incoming``, sum of a gradient that left) of the gates.
        incoming: In the latest backward, the sum of the gradient that reached the kernel's
            output, and the sums of its forward; all are finite where what came in was.
        num_retries: Probes since the graft that an isolated seed was given.
        readings_to_wait: Readings until the next such probe.
        last_error: What the last fault was, for people.
        handles: Handles of the hooks on the kernel's parameters.
    """

    def __init__(
        self,
        seed_idx: int,
        kernel: PreparedKernel,
        slot: SeedSlot,
        *,
        guard: str,
        is_shadow: bool = False,
        example: Tensor | None = None,
    ) -> None:
        self.seed_idx = seed_idx
        self.kernel = kernel
        self.slot = slot
        self.guard = guard
        self.is_shadow = is_shadow
        self.example = example
        self.is_serial = kernel.position == "serial"
        self.replaces = kernel.mode == "replace"
        self.last_error = ""
        self.num_retries = 0
        self.readings_to_wait = 0
        self.handles: list[Any] = []
        self.forget_calls()

    def forget_calls(self) -> None:
        """Drop what was observed and not read."""
        self.rows: deque[tuple[Tensor, Tensor]] = deque(maxlen=OBSERVED_CALLS)
        self.errors: deque[bool] = deque(maxlen=OBSERVED_CALLS)
        self.gradients: deque[tuple[tuple[Tensor, ...] | None, Tensor]] = deque(
            maxlen=OBSERVED_CALLS
        )
        self.incoming: tuple[Tensor, ...] | None = None
        self.ring = torch.full((OBSERVED_CALLS, 2), torch.nan, device=self.slot.alpha.device)

    def __getstate__(self) -> dict[str, Any]:
        """Return what copies keep: hooks and what hangs on a graph belong to the original."""
        state = self.__dict__.copy()
        state["handles"] = []
        for name in ("rows", "gradients", "errors"):
            state[name] = deque(maxlen=OBSERVED_CALLS)
        state["incoming"] = None
        return state
