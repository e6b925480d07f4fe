"""A layer's record: everything of ours in the host object's ``__dict__``, under one name."""

from __future__ import annotations

import copy
import weakref
from collections import defaultdict
from typing import TYPE_CHECKING, Final, TypeVar

from torch import nn

from esper.contracts.lifecycle import SeedLifecycleState
from esper.state.load_order import LoadOrder
from esper.state.seed_group import Grouping
from esper.state.state_layout import KasminaStateLayout

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

    from esper.contracts.ports import KernelSource
    from esper.state.range_sums import RangeSums
    from esper.state.seed_slot import Seed, SeedSlot
    from esper.state.waiting import Note, WaitingGraft

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
        grouping: Which of the plan's seeds are run as one; None in a copy, which finds its own.
        watched: Slots of the seeds that would be in the plan if their alpha were not 0.
        waiting: Grafts that wait for a call of the layer, by seed index.
        note: What the forward notes for them; None while none waits.
        refusals: Why a graft that had waited was refused, by seed index.
        stale_moments: Names of host parameters whose gradient a fold has changed, until their
            optimizer learns of it.
        native_count: Calls that ran no kernel, counted where telemetry is on.
        active_count: Calls that ran kernels, counted likewise.
        kernel_execution_count: Kernel calls, counted where telemetry is on.
        last_timed_us: What the kernel that was timed last took, in microseconds; None before.
        num_faults: Faulty kernel calls since birth, as far as they were read.
        num_skipped: Kernel calls that were left out for no fault of the kernel, likewise.
        has_step_guard: Whether an optimizer's pre-hook reads step flags; not so in copies.
        keep_buffers: Copies the model's buffers for steps that may be dropped; not so in copies.
        loads: Order of a seed's loads, by index; a copy has none under way.
        is_loading: Whether a ``state_dict`` is being loaded, which may exchange parameters.
        writes_input: Whether the host writes to its input, in evaluation and in training; None
            where that was not seen yet.
        in_shadow: Whether a shadow pass runs, of which nothing is counted.
        profiles: Where the times of seeds are summed while somebody profiles; not so in copies.
        num_naming: How many of them want calls of kernels named; not so in copies.
        surroundings: An empty tensor with device and dtype of the model around a host without
            tensors of its own, which follows them; None where nothing is known.
        model: The model that was wrapped, weakly; a pickle does not keep it.
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
        self.grouping: Grouping | None = Grouping()
        self.watched: tuple[SeedSlot, ...] = ()
        self.waiting: dict[int, WaitingGraft] = {}
        self.note: Note | None = None
        self.refusals: dict[int, str] = {}
        self.stale_moments: set[str] = set()
        self.native_count = 0
        self.active_count = 0
        self.kernel_execution_count = 0
        self.last_timed_us: int | None = None
        self.num_faults = 0
        self.num_skipped = 0
        self.has_step_guard = False
        self.keep_buffers: Callable[[], None] | None = None
        self.loads: defaultdict[int, LoadOrder] = defaultdict(LoadOrder)
        self.is_loading = False
        self.writes_input: list[bool | None] = [None, None]
        self.in_shadow = False
        self.profiles: tuple[RangeSums, ...] = ()
        self.num_naming = 0
        self.surroundings: torch.Tensor | None = None
        self.model: weakref.ref[nn.Module] | None = None
        self.on_change: list[Callable[[], None]] = []
        self.copies: list[weakref.ref[LayerRecord]] = []

    def find_model(self) -> nn.Module | None:
        """Return the model that was wrapped, where it is known and still there."""
        return None if self.model is None else self.model()

    @property
    def forward_count(self) -> int:
        """Calls since birth, counted where telemetry is on."""
        return self.native_count + self.active_count

    def changed(self) -> None:
        """Tell those who want to know that seeds are not as they were."""
        for tell in self.on_change:
            tell()

    def __copy__(self) -> LayerRecord:
        """Return the record of a layer that shares its tensors with this one; it has no seeds."""
        copied = LayerRecord.__new__(LayerRecord)
        own = {
            "layout": copy.deepcopy(self.layout),
            "own": Companions(),
            "refusals": dict(self.refusals),
            "stale_moments": set(self.stale_moments),
        }
        none: dict[str, object] = {"seeds": {}, "plan": (), "watched": ()}
        copied.__setstate__(self.__dict__ | self._cleared_in_copies() | own | none)
        return copied

    def __deepcopy__(self, memo: dict[int, object]) -> LayerRecord:
        copied = LayerRecord.__new__(LayerRecord)
        memo[id(self)] = copied
        cleared = self._cleared_in_copies()
        shared = {"source": self.source, "shared": self.shared}
        own = {k: v for k, v in self.__dict__.items() if k not in cleared and k not in shared}
        copied.__setstate__(copy.deepcopy(own, memo) | shared | cleared)
        model = memo.get(id(self.find_model()))  # there, if it is all copied
        copied.model = weakref.ref(model) if isinstance(model, nn.Module) else None
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
            "grouping": None,
            "waiting": {},
            "note": None,
            "has_step_guard": False,
            "keep_buffers": None,
            "loads": defaultdict(LoadOrder),
            "is_loading": False,
            "in_shadow": False,
            "profiles": (),
            "num_naming": 0,
            "model": None,
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
