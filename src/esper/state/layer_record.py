"""A layer's record: everything of ours in the host object's ``__dict__``, under one name."""

from __future__ import annotations

import copy
import weakref
from collections import defaultdict
from typing import TYPE_CHECKING, Final, TypeVar

from esper.contracts.lifecycle import SeedLifecycleState
from esper.state.load_order import LoadOrder
from esper.state.state_layout import KasminaStateLayout

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch
    from torch import nn

    from esper.contracts.ports import KernelSource
    from esper.state.seed_slot import Seed
    from esper.state.waiting import WaitingGraft

T = TypeVar("T")

RECORD: Final = "_kasmina"
"""The one entry of the host object's ``__dict__``."""


class Companions:
    """What other rooms keep with a layer: one object of a class, and no class is known here."""

    def __init__(self) -> None:
        self._kept: dict[type, object] = {}

    def find(self, kind: type[T]) -> T | None:
        """Return what was kept as a ``kind``, or None."""
        kept = self._kept.get(kind)
        return kept if isinstance(kept, kind) else None

    def keep(self, kind: type[T], companion: T) -> T:
        """Keep an object of a class in the place of the one before it, and return it."""
        self._kept[kind] = companion
        return companion


class LayerRecord:
    """State of one layer.

    Args:
        name: Name of the layer in its model, for people.
        num_seeds: Number of seeds, at least 1.
        device: The host's device.
        telemetry_enabled: Whether calls are counted and kernels are timed.
        source: Where ``load_kernel`` fetches from, or None.
        cache_size_mb: Budget of a cache of the layer's own, in MiB; None for the process's.

    Attributes:
        layout: State of the seeds, the authority.
        seeds: Records of the seeds that hold a kernel or wait for one's probe, by index.
        shadows: Seeds in audition, by index.
        plan: Seeds with alpha > 0, in slot order; made at transitions.
        waiting: Grafts that wait for an example, by seed index.
        hooks_of_original: In a copy, the ids of the hooks of the original's waiting grafts, by seed
            index; the copy takes them away.
        refusals: Why a graft that had waited was refused, by seed index.
        native_count: Calls that ran no kernel, counted where telemetry is on.
        active_count: Calls that ran kernels, counted likewise.
        kernel_execution_count: Kernel calls, counted where telemetry is on.
        num_faults: Faulty kernel calls since birth, as far as they were read.
        has_step_guard: Whether an optimizer's pre-hook reads step flags; not so in copies.
        keep_buffers: Copies the model's buffers for steps that may be dropped; not so in copies.
        loads: Order of a seed's loads, by index; a copy has none under way.
        in_shadow: Whether a shadow pass runs, of which nothing is counted.
        on_change: Told when a seed has come, changed or gone; not so in copies.
        copies: Records of copies of the layer that nobody has accounted for, held weakly.
        own: What is kept with this layer, and copied and pickled with it.
        shared: What is the process's: copies of the layer share it, and pickles drop it.
    """

    def __init__(
        self,
        *,
        name: str,
        num_seeds: int,
        device: torch.device,
        telemetry_enabled: bool,
        source: KernelSource | None,
        cache_size_mb: int | None = None,
    ) -> None:
        self.name = name
        self.layout = KasminaStateLayout(num_seeds, device)
        self.telemetry_enabled = telemetry_enabled
        self.source = source
        self.cache_size_mb = cache_size_mb
        self.own = Companions()
        self.shared = Companions()
        self.seeds: dict[int, Seed] = {}
        self.shadows: dict[int, Seed] = {}
        self.plan: tuple[Seed, ...] = ()
        self.waiting: dict[int, WaitingGraft] = {}
        self.hooks_of_original: dict[int, int] = {}
        self.refusals: dict[int, str] = {}
        self.native_count = 0
        self.active_count = 0
        self.kernel_execution_count = 0
        self.num_faults = 0
        self.has_step_guard = False
        self.keep_buffers: Callable[[], None] | None = None
        self.loads: defaultdict[int, LoadOrder] = defaultdict(LoadOrder)
        self.in_shadow = False
        self.on_change: list[Callable[[], None]] = []
        self.copies: list[weakref.ref[LayerRecord]] = []

    @property
    def forward_count(self) -> int:
        """Calls since birth, counted where telemetry is on."""
        return self.native_count + self.active_count

    def changed(self) -> None:
        """Tell those who want to know that seeds are not as they were."""
        for tell in self.on_change:
            tell()

    def __deepcopy__(self, memo: dict[int, object]) -> LayerRecord:
        copied = LayerRecord.__new__(LayerRecord)
        memo[id(self)] = copied
        cleared = self._cleared_in_copies()
        shared = {"source": self.source, "shared": self.shared}
        own = {k: v for k, v in self.__dict__.items() if k not in cleared and k not in shared}
        copied.__setstate__(copy.deepcopy(own, memo) | shared | cleared)
        self.copies = [ref for ref in self.copies if ref() is not None]
        self.copies.append(weakref.ref(copied))
        return copied

    def __getstate__(self) -> dict[str, object]:
        """Return what pickle keeps; where kernels come from is the process's business."""
        return {
            **self.__dict__,
            **self._cleared_in_copies(),
            "source": None,
            "shared": Companions(),
        }

    def __setstate__(self, state: dict[str, object]) -> None:
        """Take the state of a copy, in which nobody will end what the original has begun."""
        self.__dict__.update(state)
        for i in range(self.layout.num_seeds):
            if self.layout.state(i) == SeedLifecycleState.LOADING:
                self.layout.transition_seed_state(i, SeedLifecycleState.DORMANT)

    def _cleared_in_copies(self) -> dict[str, object]:
        """Return what a copy does not take over: auditions, loads, hooks, promises to the layer."""
        return {
            "shadows": {},
            "waiting": {},
            "hooks_of_original": {i: w.handle.id for i, w in self.waiting.items()},
            "has_step_guard": False,
            "keep_buffers": None,
            "loads": defaultdict(LoadOrder),
            "in_shadow": False,
            "on_change": [],
            "copies": [],
        }


def record_of(layer: nn.Module) -> LayerRecord:
    """Return a wrapped layer's record.

    Raises:
        TypeError: The module is not wrapped.
    """
    record = layer.__dict__.get(RECORD)
    if not isinstance(record, LayerRecord):
        msg = f"{type(layer).__name__} is not wrapped: call esper.wrap on the model first"
        raise TypeError(msg)
    return record
