"""What a seed that holds a kernel adds to its layer: one child module a seed, and a record."""

from __future__ import annotations

import itertools
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np
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


KEPT_TIMES: Final = 128
"""Times that are kept of a seed's kernel."""


_numbers: Final = itertools.count()


class SeedSlot(nn.Module):
    """A kernel in a seed: a child module, so that the host's owner sees its parameters.

    Attributes:
        kernel: The kernel itself.
        alpha: 0-dim float32 buffer in [0, 1] on the kernel's device, a copy of the layout's;
            replaced when it changes and never written in place by us. Others write to it
            (averaged models, loads in place), and :meth:`read_alpha` and :attr:`differs` see it.
        structure: uint8 buffer, canonical JSON of what is needed to build the kernel again.
    """

    alpha: Tensor
    structure: Tensor
    _noted: _Noted

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

    def read_alpha(self) -> float:
        """Return what the buffer holds, whoever wrote it; it is NaN or out of range if they did.

        The device is asked only where the buffer was exchanged or its version has risen. On the
        CPU its memory is looked at, where a write through ``.data`` leaves no version.
        """
        buffer = self._buffers["alpha"]
        noted = self._noted
        is_new = buffer is not noted.buffer or noted.is_moved or noted.is_written(self._alpha)
        if is_new and buffer is not None and not buffer.is_meta:
            self._alpha = float(buffer)
            if buffer.dtype != torch.float32:
                self._fill_alpha(buffer.device)
            self._noted = _Noted.of(self._buffers["alpha"])
        return self._alpha

    @property
    def differs(self) -> bool:
        """Whether the buffer was written and is not 0; no device is asked.

        For forwards, which pass by a kernel whose alpha is 0. A buffer that stands in for ours
        during one call (``torch.func``) is not looked at.
        """
        return self._alpha != 0.0 or self._noted.is_written(0.0)

    def set_structure(self, structure: bytes) -> None:
        """Replace the description that travels with ``state_dict``: canonical JSON."""
        self._structure = bytearray(structure)
        self._fill_structure(self.alpha.device)

    def _fill_alpha(self, device: torch.device) -> None:
        with torch.inference_mode(mode=False):  # autograd may save it
            made = torch.tensor(self._alpha, dtype=torch.float32, device=device)
        self._buffers["alpha"], self._noted = made, _Noted.of(made)

    def _fill_structure(self, device: torch.device) -> None:
        with torch.inference_mode(mode=False):
            data = torch.frombuffer(self._structure or bytearray(1), dtype=torch.uint8)
            self._buffers["structure"] = data[: len(self._structure)].to(device, copy=True)

    def forward(self, x: Tensor) -> Tensor:
        """Return the kernel's output, unblended; layers do not call this."""
        output: Tensor = self.kernel(x)
        return output

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SeedSlot:  # noqa: FBT001, FBT002 - torch's signature
        """Follow the host to another device or dtype; alpha stays float32, whatever ``fn`` does."""
        self.read_alpha()
        before = dict(self._buffers)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call] # torch has none
        if self._buffers["alpha"] is not before["alpha"]:
            self._fill_alpha(self.alpha.device)
        if self._buffers["structure"] is not before["structure"]:
            self._fill_structure(self.alpha.device)
        return self

    def __getstate__(self) -> dict[str, object]:
        """Return what copies keep: what is known of the buffer is known of the original's."""
        self.read_alpha()
        return {key: value for key, value in self.__dict__.items() if key != "_noted"}

    def __setstate__(self, state: dict[str, object]) -> None:
        """Take the state of a copy, whose buffer is as the original's was."""
        super().__setstate__(state)  # type: ignore[no-untyped-call] # torch has none
        self._noted = _Noted.of(self._buffers["alpha"])

    def _load_from_state_dict(
        self, state_dict: dict[str, Tensor], prefix: str, *args: object
    ) -> None:
        """Take the buffers as fresh tensors, which loading may then write."""
        for name, buffer in self._buffers.items():
            given = state_dict.get(prefix + name)
            if given is not None and buffer is not None:
                self._buffers[name] = torch.empty_like(given, device=buffer.device)
        super()._load_from_state_dict(state_dict, prefix, *args)
        self.read_alpha()
        self._fill_structure(self.alpha.device)

    def _save_to_state_dict(self, destination: object, prefix: str, keep_vars: bool) -> None:  # noqa: FBT001 - torch's signature
        """Save the description as it is, also where averaging has written to its bytes."""
        if not self.structure.is_meta and bytes(self.structure.tolist()) != self._structure:
            self._fill_structure(self.alpha.device)
        super()._save_to_state_dict(destination, prefix, keep_vars)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Noted:
    """An alpha buffer as it was when it was last read or made.

    Attributes:
        buffer: The buffer.
        version: Its version then.
        memory: The memory of a buffer in CPU memory; None for any other.
        address: Where its memory began then, in bytes.
    """

    buffer: Tensor | None
    version: int
    memory: np.ndarray[tuple[()], np.dtype[np.float32]] | None
    address: int = 0

    @classmethod
    def of(cls, buffer: Tensor | None) -> _Noted:
        """Return a note of a buffer as it is now."""
        if buffer is None or buffer.is_inference():
            return cls(buffer=buffer, version=0, memory=None)
        is_near = type(buffer) is Tensor and buffer.device.type == "cpu"
        return cls(
            buffer=buffer,
            version=buffer._version,  # noqa: SLF001 - torch has no other name for it
            memory=buffer.detach().numpy() if is_near else None,
            address=buffer.data_ptr() if is_near else 0,
        )

    @property
    def is_moved(self) -> bool:
        """Whether the buffer was given other memory since, as by ``buffer.data = other``."""
        buffer = self.buffer
        return buffer is not None and self.memory is not None and buffer.data_ptr() != self.address

    def is_written(self, alpha: float) -> bool:
        """Return whether the buffer was written since; where that can be seen, to another alpha."""
        if self.memory is not None:
            return bool(self.memory[()] != alpha)
        if self.buffer is None or self.buffer.is_inference():
            return False
        return self.buffer._version != self.version  # noqa: SLF001 - torch has no other name for it


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
        runs_compiled: Whether it was seen to be called in compiled code.
        works_on_batches: Whether a call of several samples was seen to be clean.
        told: Reasons of skipped calls that were logged.
        timed_us: The latest times that its kernel took, in microseconds, where telemetry is on.
        num_timed: How often it was timed.
        number: Tells it from other seeds of this process, but for its copies.
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
        self.runs_compiled = False
        self.works_on_batches = False
        self.told: frozenset[str] = frozenset()
        self.timed_us: deque[int] = deque(maxlen=KEPT_TIMES)
        self.num_timed = 0
        self.number = next(_numbers)
        self.handles: list[RemovableHandle] = []
        self.gated: list[tuple[Mapping[str, object], int]] = []
        self.gated_values: list[tuple[Mapping[str, object], str, object]] = []
        self.frozen: list[nn.Parameter] = []
        self.seen = Observations(slot.alpha.device)

    def forget_calls(self) -> None:
        """Drop what was observed and not read."""
        self.seen = self.seen.anew()

    def follow_device(self) -> None:
        """Drop what was observed where the model was moved since."""
        if self.seen.ring.device != self.slot.alpha.device:
            self.seen = Observations(self.slot.alpha.device)

    def __getstate__(self) -> dict[str, object]:
        """Return what copies keep: hooks and what hangs on a graph belong to the original."""
        gates: dict[str, object] = {
            name: [] for name in ("handles", "gated", "gated_values", "frozen")
        }
        return {**self.__dict__, **gates, "seen": None}

    def __setstate__(self, state: dict[str, object]) -> None:
        """Take the state of a copy, which has seen nothing."""
        self.__dict__.update(state)
        self.seen = Observations(self.slot.alpha.device)
