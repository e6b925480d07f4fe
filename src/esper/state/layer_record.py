"""A layer's record: everything of ours in the host object's ``__dict__``, under one name."""

from __future__ import annotations

import copy
from collections import Counter
from typing import TYPE_CHECKING, Any, Final

from esper.state.state_layout import KasminaStateLayout

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch
    from torch import nn

    from esper.contracts.ports import KernelSource
    from esper.state.seed_slot import Seed

RECORD: Final = "_kasmina"
"""The one entry of the host object's ``__dict__``."""

_SHARED: Final = ("source", "cache", "error_recovery")
"""Belong to the process, not to the layer: copies share them, pickles drop them."""


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
        refusals: Why a graft that had waited was refused, by seed index.
        native_count: Calls that ran no kernel, counted where telemetry is on.
        active_count: Calls that ran kernels, counted likewise.
        kernel_execution_count: Kernel calls, counted where telemetry is on.
        num_faults: Faulty kernel calls since birth, as far as they were read.
        has_step_guard: Whether an optimizer's pre-hook reads step flags; not so in copies.
        keep_buffers: Copies the model's buffers for steps that may be dropped; not so in copies.
        num_unloads: How often a seed was given up, by index; a load that was under way sees it.
        in_shadow: Whether a shadow pass runs, of which nothing is counted.
        family_state: What the layer's family keeps for it; copied and pickled with it.
        cache: The kernel cache, made when first asked for.
        error_recovery: What tries failed loads again, made likewise.
        health_monitor: Health of the kernels' calls, made when some were first read.
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
        self.cache: Any = None
        self.error_recovery: Any = None
        self.health_monitor: Any = None
        self.seeds: dict[int, Seed] = {}
        self.shadows: dict[int, Seed] = {}
        self.plan: tuple[Seed, ...] = ()
        self.waiting: dict[int, Any] = {}
        self.refusals: dict[int, str] = {}
        self.native_count = 0
        self.active_count = 0
        self.kernel_execution_count = 0
        self.num_faults = 0
        self.has_step_guard = False
        self.keep_buffers: Callable[[], None] | None = None
        self.num_unloads: Counter[int] = Counter()
        self.in_shadow = False
        self.family_state: Any = None

    @property
    def forward_count(self) -> int:
        """Calls since birth, counted where telemetry is on."""
        return self.native_count + self.active_count

    def __deepcopy__(self, memo: dict[int, Any]) -> LayerRecord:
        copied = LayerRecord.__new__(LayerRecord)
        memo[id(self)] = copied
        for key, value in self.__dict__.items():
            if key not in ("waiting", "keep_buffers"):
                copied.__dict__[key] = value if key in _SHARED else copy.deepcopy(value, memo)
        copied.waiting = self._waiting_hooks()
        copied.shadows = {}
        copied.has_step_guard = copied.in_shadow = False
        copied.keep_buffers = None
        return copied

    def __getstate__(self) -> dict[str, Any]:
        """Return what pickle keeps; where kernels come from is the process's business."""
        own = {"shadows": {}, "waiting": self._waiting_hooks(), "has_step_guard": False}
        own |= {"in_shadow": False, "keep_buffers": None}
        return {**self.__dict__, **dict.fromkeys(_SHARED), **own}

    def _waiting_hooks(self) -> dict[int, int]:
        """Return the ids of the hooks of waiting grafts, which a copied layer takes away."""
        return {i: waiting.handle.id for i, waiting in self.waiting.items()}


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
