"""What a seed that holds a kernel adds to its layer: one child module a seed, and a record."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from esper.state.layer_call import Takes
from esper.state.observation import Observations

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch.utils.hooks import RemovableHandle

    from esper.contracts.choices import Guard
    from esper.state.kernel import PreparedKernel
    from esper.state.layer_call import LayerCall


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
        self._alpha, self._structure = 0.0, bytearray()
        self.register_buffer("alpha", None)
        self.register_buffer("structure", torch.zeros(0, dtype=torch.uint8, device=device))
        self._fill_alpha(device)

    def set_alpha(self, alpha: float) -> None:
        """Replace the alpha that forwards multiply with."""
        self._alpha = alpha
        self._fill_alpha(self.alpha.device)

    def set_structure(self, structure: bytes) -> None:
        """Replace the description that travels with ``state_dict``: canonical JSON."""
        self._structure = bytearray(structure)
        self._fill_structure(self.alpha.device)

    def _fill_alpha(self, device: torch.device) -> None:
        with torch.inference_mode(mode=False):  # autograd may save it
            self._buffers["alpha"] = torch.tensor(self._alpha, dtype=torch.float32, device=device)

    def _fill_structure(self, device: torch.device) -> None:
        with torch.inference_mode(mode=False):
            data = torch.frombuffer(self._structure or bytearray(1), dtype=torch.uint8)
            self._buffers["structure"] = data[: len(self._structure)].to(device)

    def forward(self, x: Tensor) -> Tensor:
        """Return the kernel's output, unblended; layers do not call this."""
        output: Tensor = self.kernel(x)
        return output

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SeedSlot:  # noqa: FBT001, FBT002 - torch's signature
        """Follow the host to another device or dtype; alpha stays float32, whatever ``fn`` does."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call] # torch has none
        self._fill_alpha(self.alpha.device)
        self._fill_structure(self.alpha.device)
        return self

    def _load_from_state_dict(
        self, state_dict: dict[str, Tensor], prefix: str, *args: object
    ) -> None:
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

    def forward(self, x: object) -> object:
        """Return ``x``."""
        return x


def no_hook(*_: object) -> None:
    """Do nothing."""


class Seed:
    """What is known about a seed that is not dormant; part of the layer's record, no module.

    Args:
        seed_idx: Index of the seed in its layer.
        kernel: The kernel and how it joins.
        slot: The kernel's slot.
        guard: ``"always"``, ``"step"`` or ``"off"``.
        is_shadow: Whether it is auditioned: not fenced, not guarded, no part of the model.
        example: A call of the layer, to probe the kernel again with.

    Attributes:
        takes: What the kernel takes of the layer's call; None for its first tensor.
        seen: What was observed of its calls and not read.
        num_retries: Probes since the graft that an isolated seed was given.
        readings_to_wait: Readings until the next such probe.
        last_error: What the last fault was, for people.
        handles: Handles of the hooks on the kernel's parameters.
        gated: Tables of the kernel's modules when its parameters were gated, and their lengths.
        gated_values: What stood there: a table, a name, the parameter or module.
        frozen: Parameters that needed no gate then.
        works_on_batches: Whether a call of several samples was seen to be clean.
        told: Reasons of skipped calls that were logged.
    """

    def __init__(
        self,
        seed_idx: int,
        kernel: PreparedKernel,
        slot: SeedSlot,
        *,
        guard: Guard,
        is_shadow: bool = False,
        example: LayerCall | None = None,
    ) -> None:
        self.seed_idx = seed_idx
        self.kernel = kernel
        self.slot = slot
        self.guard = guard
        self.is_shadow = is_shadow
        self.example = example
        self.is_serial = kernel.position == "serial"
        self.replaces = kernel.mode == "replace"
        self.takes = None if self.is_serial else Takes.by(slot.kernel)
        self.last_error = ""
        self.num_retries = 0
        self.readings_to_wait = 0
        self.works_on_batches = False
        self.told: frozenset[str] = frozenset()
        self.handles: list[RemovableHandle] = []
        self.gated: list[tuple[Mapping[str, object], int]] = []
        self.gated_values: list[tuple[Mapping[str, object], str, object]] = []
        self.frozen: list[nn.Parameter] = []
        self.forget_calls()

    def forget_calls(self) -> None:
        """Drop what was observed and not read."""
        self.seen = Observations(self.slot.alpha.device)

    def follow_device(self) -> None:
        """Drop what was observed where the model was moved since."""
        if self.seen.ring.device != self.slot.alpha.device:
            self.forget_calls()

    def __getstate__(self) -> dict[str, object]:
        """Return what copies keep: hooks and what hangs on a graph belong to the original."""
        gates: dict[str, object] = {
            name: [] for name in ("handles", "gated", "gated_values", "frozen")
        }
        return {**self.__dict__, **gates, "seen": None}

    def __setstate__(self, state: dict[str, object]) -> None:
        """Take the state of a copy, which has seen nothing."""
        self.__dict__.update(state)
        self.forget_calls()
