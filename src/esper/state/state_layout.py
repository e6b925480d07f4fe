"""State of a layer's seeds as a structure of arrays in CPU memory: the one authority.

The lifecycle table is enforced here. Arrays are tensors that share their memory with a
memoryview; Python writes through the view (a write costs 0.1 us; through a tensor 2.9 us).
"""

from __future__ import annotations

import math
import struct
from numbers import Integral
from typing import TYPE_CHECKING, Any, Final

import torch

from esper.contracts.errors import SeedLifecycleError
from esper.contracts.lifecycle import ALLOWED_TRANSITIONS, SeedLifecycleState

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

__all__ = ["FAULTS_IN_A_ROW", "FAULTS_IN_WINDOW", "KasminaStateLayout", "SeedLifecycleState"]

FAULTS_IN_A_ROW: Final = 3
"""So many faults without a clean call between them isolate a seed."""

WINDOW_CALLS: Final = 200
"""Length of the window, in calls, over which a fault rate is taken."""

FAULTS_IN_WINDOW: Final = 10
"""So many faults in the last 200 calls (5 %) isolate a seed."""

_HEALTH_SMOOTHING: Final = 0.1
_DORMANT: Final = int(SeedLifecycleState.DORMANT)
_ACTIVE: Final = int(SeedLifecycleState.ACTIVE)
_ALLOWED: Final = frozenset(
    (int(before), int(after)) for before, row in ALLOWED_TRANSITIONS.items() for after in row
)

# Name, torch dtype, memoryview format, bytes each, value at birth.
_ARRAYS: Final = (
    ("lifecycle_states", torch.uint8, "B", 1, 0),
    ("fallback_active", torch.bool, "?", 1, False),
    ("alpha_blend", torch.float32, "f", 4, 0.0),
    ("health_accumulator", torch.float32, "f", 4, math.nan),
    ("active_kernel_id", torch.int32, "i", 4, 0),
    ("last_update_epoch", torch.int32, "i", 4, -1),
    ("exec_latency_us", torch.int32, "i", 4, 0),
    ("error_count", torch.int32, "i", 4, 0),
)


class KasminaStateLayout:
    """Lifecycle, kernel, alpha, health and faults of the seeds of one layer.

    The tensors may be read by anyone and are written only through the methods; they stay in CPU
    memory whatever the layer's device (``device`` is kept as a fact about the layer).

    Args:
        num_seeds: Number of seeds, at least 1.
        device: Device of the layer that the seeds belong to.

    Attributes:
        lifecycle_states: ``[num_seeds]`` uint8, values of :class:`SeedLifecycleState`.
        active_kernel_id: ``[num_seeds]`` int32, 0 for none, else a number that is unique among
            the kernels this layout has seen; the artifact's id is :meth:`kernel_id`.
        alpha_blend: ``[num_seeds]`` float32 in [0, 1].
        health_accumulator: ``[num_seeds]`` float32 in [0, 1]; NaN means no sample yet.
        last_update_epoch: ``[num_seeds]`` int32; -1 means never.
        exec_latency_us: ``[num_seeds]`` int32, last sampled execution time in microseconds.
        error_count: ``[num_seeds]`` int32, faults since the last clean call.
        fallback_active: ``[num_seeds]`` bool, whether the host alone answers for this seed.
        epoch: The owner's epoch, written to ``last_update_epoch`` at each transition.
        num_transitions: Transitions made since birth.

    Raises:
        ValueError: ``num_seeds`` is less than 1.
    """

    lifecycle_states: torch.Tensor
    active_kernel_id: torch.Tensor
    alpha_blend: torch.Tensor
    health_accumulator: torch.Tensor
    last_update_epoch: torch.Tensor
    exec_latency_us: torch.Tensor
    error_count: torch.Tensor
    fallback_active: torch.Tensor
    _lifecycle_states: memoryview[int]
    _active_kernel_id: memoryview[int]
    _alpha_blend: memoryview[float]
    _health_accumulator: memoryview[float]
    _last_update_epoch: memoryview[int]
    _exec_latency_us: memoryview[int]
    _error_count: memoryview[int]
    _fallback_active: memoryview[int]

    def __init__(self, num_seeds: int, device: torch.device | str = "cpu") -> None:
        _check_whole("num_seeds", num_seeds)
        if num_seeds < 1:
            msg = f"a layer has at least one seed, got num_seeds={num_seeds}"
            raise ValueError(msg)
        self.num_seeds = num_seeds
        self.device = torch.device(device)
        self.epoch = 0
        self.num_transitions = 0
        self._kernel_ids: dict[int, str] = {}
        self._next_kernel = 1
        self._recent: dict[int, list[int]] = {}  # call numbers of the faults still in the window
        self._calls: dict[int, int] = {}
        self._allocate()

    def _allocate(self) -> None:
        for name, dtype, code, _, birth in _ARRAYS:
            memory = bytearray(struct.pack(code, birth)) * self.num_seeds
            view: memoryview[int] = memoryview(memory).cast(code)  # type: ignore[call-overload] # no literal
            setattr(self, name, torch.frombuffer(memory, dtype=dtype))
            setattr(self, "_" + name, view)

    def get_active_seeds(self) -> torch.Tensor:
        """Return a ``[num_seeds]`` bool mask of the seeds in ACTIVE."""
        return self.lifecycle_states == _ACTIVE

    def get_dormant_seeds(self) -> torch.Tensor:
        """Return a ``[num_seeds]`` bool mask of the seeds in DORMANT."""
        return self.lifecycle_states == _DORMANT

    def get_contributing_seeds(self) -> torch.Tensor:
        """Return a ``[num_seeds]`` bool mask: ACTIVE, and FOSSILIZED that hold a kernel.

        A fossil that was folded into the host's weights holds none and is not among them.
        """
        mask = self.get_active_seeds()
        for i in self._kernel_ids:
            mask[i] = self.contributes(i)
        return mask

    def has_active_seeds(self) -> bool:
        """Return whether a seed contributes: ACTIVE, or FOSSILIZED without a fold."""
        return bool(self.get_contributing_seeds().any())

    def contributes(self, seed_idx: int) -> bool:
        """Return whether a seed is ACTIVE, or FOSSILIZED and holds a kernel."""
        state = self._lifecycle_states[seed_idx]
        return state == _ACTIVE or (
            state == SeedLifecycleState.FOSSILIZED and seed_idx in self._kernel_ids
        )

    def state(self, seed_idx: int) -> SeedLifecycleState:
        """Return the state of one seed.

        Raises:
            ValueError: ``seed_idx`` is not in [0, num_seeds).
        """
        self.check_index(seed_idx)
        return SeedLifecycleState(self._lifecycle_states[seed_idx])

    def kernel_id(self, seed_idx: int) -> str | None:
        """Return the id of the kernel that a seed holds, or None."""
        return self._kernel_ids.get(seed_idx)

    def alpha(self, seed_idx: int) -> float:
        """Return the alpha of one seed, in [0, 1]."""
        self.check_index(seed_idx)
        return float(self._alpha_blend[seed_idx])

    def set_alpha(self, seed_idx: int, alpha: float) -> float:
        """Write an alpha and return it as stored, rounded to float32.

        Raises:
            ValueError: ``seed_idx`` or ``alpha`` is out of range, or ``alpha`` is NaN.
        """
        self.check_index(seed_idx)
        if not 0.0 <= alpha <= 1.0:
            msg = f"alpha of seed {seed_idx} must be in [0, 1], got {alpha}"
            raise ValueError(msg)
        self._alpha_blend[seed_idx] = alpha
        return float(self._alpha_blend[seed_idx])

    def check_index(self, seed_idx: int) -> None:
        """Refuse an index that names no seed; negative ones do not count from the end.

        Raises:
            TypeError: ``seed_idx`` is no whole number.
            ValueError: ``seed_idx`` is not in [0, num_seeds).
        """
        _check_whole("a seed index", seed_idx)
        if not 0 <= seed_idx < self.num_seeds:
            msg = f"seed index {seed_idx} is not in [0, {self.num_seeds})"
            raise ValueError(msg)

    def transition_seed_state(
        self, seed_idx: int, new_state: SeedLifecycleState, kernel_id: str | None = None
    ) -> None:
        """Move a seed along the lifecycle table.

        Entering ACTIVE ends a run of faults; entering DORMANT forgets kernel, alpha and faults; a
        new kernel starts without the faults and the health of the one before.

        Args:
            seed_idx: Index of the seed, in [0, num_seeds).
            new_state: State to enter.
            kernel_id: Id of the kernel that the seed holds from now on; None keeps what it has.

        Raises:
            SeedLifecycleError: The table has no such transition; nothing has changed.
            ValueError: ``seed_idx`` is not in [0, num_seeds); nothing has changed.
        """
        states = self._lifecycle_states
        if not 0 <= seed_idx < self.num_seeds:
            self.check_index(seed_idx)
        if (states[seed_idx], new_state) not in _ALLOWED:
            self._refuse(seed_idx, new_state)
        states[seed_idx] = new_state
        self._enter(seed_idx, new_state, kernel_id)

    def _enter(self, seed_idx: int, new_state: int, kernel_id: str | None) -> None:
        self.num_transitions += 1
        self._last_update_epoch[seed_idx] = self.epoch
        if new_state == _ACTIVE:
            self._error_count[seed_idx] = 0
            self._fallback_active[seed_idx] = False
        elif new_state == _DORMANT:
            self._forget(seed_idx)
        if kernel_id is not None:
            self._hold(seed_idx, kernel_id)

    def _refuse(self, seed_idx: int, new_state: SeedLifecycleState) -> None:
        before = self.state(seed_idx)
        allowed = ", ".join(sorted(s.name for s in ALLOWED_TRANSITIONS[before])) or "nothing"
        msg = (
            f"seed {seed_idx} cannot go from {before.name} to "
            f"{SeedLifecycleState(new_state).name}; {before.name} may be followed by {allowed}"
        )
        raise SeedLifecycleError(msg)

    def _hold(self, seed_idx: int, kernel_id: str) -> None:
        self._forget_calls(seed_idx)
        self._kernel_ids[seed_idx] = kernel_id
        self._active_kernel_id[seed_idx] = self._next_kernel
        self._next_kernel += 1

    def release_kernel(self, seed_idx: int) -> None:
        """Forget which kernel a seed holds, as after a fold; the state stays."""
        self._kernel_ids.pop(seed_idx, None)
        self._active_kernel_id[seed_idx] = 0

    def _forget(self, seed_idx: int) -> None:
        self.release_kernel(seed_idx)
        self._alpha_blend[seed_idx] = 0.0
        self._error_count[seed_idx] = 0
        self._fallback_active[seed_idx] = False
        self._forget_calls(seed_idx)

    def _forget_calls(self, seed_idx: int) -> None:
        """Drop what calls have shown; another kernel answers for its own only."""
        self._health_accumulator[seed_idx] = math.nan
        self._recent.pop(seed_idx, None)
        self._calls.pop(seed_idx, None)

    def transition_seeds(
        self, seed_idxs: Iterable[int], new_state: SeedLifecycleState, kernel_id: str | None = None
    ) -> None:
        """Move several seeds; either all of them move or none does.

        Raises:
            SeedLifecycleError: The table forbids it for one of them; nothing has changed.
            ValueError: An index is out of range; nothing has changed.
        """
        seeds = list(seed_idxs)
        for seed_idx in seeds:
            if (int(self.state(seed_idx)), new_state) not in _ALLOWED:
                self._refuse(seed_idx, new_state)
        for seed_idx in seeds:
            self.transition_seed_state(seed_idx, new_state, kernel_id)

    def restore_seed(
        self, seed_idx: int, state: SeedLifecycleState, *, alpha: float, kernel_id: str | None
    ) -> None:
        """Put a seed into the state that a snapshot or checkpoint recorded, past the table.

        Raises:
            ValueError: ``seed_idx`` or ``alpha`` is out of range.
        """
        self.check_index(seed_idx)
        self._forget(seed_idx)
        self._lifecycle_states[seed_idx] = state
        self._enter(seed_idx, state, kernel_id)
        self.set_alpha(seed_idx, alpha)

    def increment_error_count(self, seed_idx: int) -> int:
        """Count a fault and return how many there are since the last clean call.

        With the third in a row, or the tenth within 200 calls, ``fallback_active`` is set and an
        ACTIVE seed enters ERROR_RECOVERY. A fossil is never isolated.

        Raises:
            ValueError: ``seed_idx`` is not in [0, num_seeds).
        """
        return self.record_calls(seed_idx, [True])

    def record_success(self, seed_idx: int) -> None:
        """Count a clean call, which ends a run of faults."""
        self.record_calls(seed_idx, [False])

    def record_calls(self, seed_idx: int, faulty: Iterable[bool]) -> int:
        """Count calls in the order in which they happened; see :meth:`increment_error_count`.

        Args:
            seed_idx: Index of the seed, in [0, num_seeds).
            faulty: One truth value a call: whether the kernel was at fault in it.

        Returns:
            The longest run of faults that these calls have reached.

        Raises:
            ValueError: ``seed_idx`` is not in [0, num_seeds).
        """
        self.check_index(seed_idx)
        counts = self._error_count
        calls, recent = self._calls.get(seed_idx, 0), self._recent.get(seed_idx, [])
        longest = most = 0
        for bad in faulty:
            calls += 1
            counts[seed_idx] = counts[seed_idx] + 1 if bad else 0
            if bad:
                recent = [call for call in recent if call > calls - WINDOW_CALLS] + [calls]
                longest, most = max(longest, counts[seed_idx]), max(most, len(recent))
        self._calls[seed_idx], self._recent[seed_idx] = calls, recent
        if longest >= FAULTS_IN_A_ROW or most >= FAULTS_IN_WINDOW:
            self.isolate(seed_idx)
        return longest

    def fault_rate(self, seed_idx: int) -> float:
        """Return the share of faults in the last recorded calls (at most 200), in [0, 1]."""
        calls = self._calls.get(seed_idx, 0)
        recent = [c for c in self._recent.get(seed_idx, []) if c > calls - WINDOW_CALLS]
        return len(recent) / min(calls, WINDOW_CALLS) if calls else 0.0

    def shown(self, seed_idx: int) -> dict[str, Any]:
        """Return what the calls of a seed's kernel have shown, as JSON can hold it."""
        return {
            "calls": self._calls.get(seed_idx, 0),
            "faults": [*self._recent.get(seed_idx, [])],
            "in_a_row": int(self._error_count[seed_idx]),
            "health": self.health(seed_idx),
            "latency_us": int(self._exec_latency_us[seed_idx]),
        }

    def have_shown(self, seed_idx: int, shown: Mapping[str, Any]) -> None:
        """Take what :meth:`shown` returned of the same kernel; the seed's state stays."""
        health = shown["health"]
        self._calls[seed_idx], self._recent[seed_idx] = shown["calls"], [*shown["faults"]]
        self._error_count[seed_idx] = shown["in_a_row"]
        self._health_accumulator[seed_idx] = math.nan if health is None else health
        self._exec_latency_us[seed_idx] = shown["latency_us"]

    def isolate(self, seed_idx: int) -> None:
        """Let the host alone answer for a seed; an ACTIVE one enters ERROR_RECOVERY."""
        self._fallback_active[seed_idx] = True
        if self._lifecycle_states[seed_idx] == _ACTIVE:
            self.transition_seed_state(seed_idx, SeedLifecycleState.ERROR_RECOVERY)

    def update_telemetry(self, seed_idx: int, latency_us: int, health_score: float) -> None:
        """Record an execution time and fold a health score into its moving average.

        Args:
            seed_idx: Index of the seed, in [0, num_seeds).
            latency_us: Execution time in microseconds, at least 0; above 2**31 - 1 it is clamped.
            health_score: In [0, 1].

        Raises:
            ValueError: An argument is out of its range.
        """
        self.check_index(seed_idx)
        if latency_us < 0 or not 0.0 <= health_score <= 1.0:
            msg = (
                f"telemetry of seed {seed_idx}: latency_us must be at least 0 and health_score "
                f"in [0, 1], got {latency_us} and {health_score}"
            )
            raise ValueError(msg)
        self._exec_latency_us[seed_idx] = min(latency_us, 2**31 - 1)
        before = self._health_accumulator[seed_idx]
        change = 0.0 if math.isnan(before) else _HEALTH_SMOOTHING * (health_score - before)
        after = health_score if math.isnan(before) else before + change
        self._health_accumulator[seed_idx] = after

    def health(self, seed_idx: int) -> float | None:
        """Return the smoothed health of a seed in [0, 1], or None before the first sample."""
        self.check_index(seed_idx)
        value = float(self._health_accumulator[seed_idx])
        return None if math.isnan(value) else value

    @property
    def bytes_per_seed(self) -> int:
        """Bytes of array memory that one seed takes."""
        return sum(size for _, _, _, size, _ in _ARRAYS)

    def __getstate__(self) -> dict[str, object]:
        """Return what pickle and deepcopy keep: values instead of views, which do not copy."""
        views = {"_" + name for name, *_ in _ARRAYS} | {name for name, *_ in _ARRAYS}
        state = {key: value for key, value in self.__dict__.items() if key not in views}
        state["arrays"] = {name: bytes(getattr(self, "_" + name)) for name, *_ in _ARRAYS}
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take the values of :meth:`__getstate__` into memory of this object's own."""
        arrays = state.pop("arrays")
        self.__dict__.update(state)
        self._allocate()
        for name, *_ in _ARRAYS:
            getattr(self, "_" + name).cast("B")[:] = arrays[name]


def _check_whole(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, Integral):
        msg = f"{name} is a whole number, got {value!r} (a {type(value).__name__})"
        raise TypeError(msg)
