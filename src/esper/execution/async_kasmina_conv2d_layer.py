"""The specification's asynchronous convolutional layer: kernels run beside the host."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from esper.execution.kasmina_conv2d_layer import KasminaConv2dLayer
from esper.forward.fence import run_kernel
from esper.forward.finiteness import in_transform
from esper.streams.device_streams import run_on_side
from esper.streams.gradient_sync import GradientFuture, GradientSynchronizer
from esper.streams.stream_manager import StreamManager

if TYPE_CHECKING:
    from collections.abc import Callable

    from esper.forward.generated_class import OpenRun
    from esper.state.layer_call import LayerCall
    from esper.state.layer_record import LayerRecord
    from esper.state.seed_slot import Seed

    RunKernel = Callable[[Seed, LayerCall, Tensor], Tensor | None]


def _open_run(record: LayerRecord, call: LayerCall) -> RunKernel:
    """Return what runs each kernel of one call, made before the host runs."""
    if torch.compiler.is_compiling() or in_transform() or not isinstance(call.x, Tensor):
        return run_kernel
    state = _state_of(record)
    if state.stream_manager.streams_of(call.x.device).is_inline:
        return run_kernel
    return _Run(state, record, call)


class AsyncKasminaConv2dLayer(KasminaConv2dLayer):
    """A two-dimensional convolution whose seeds' kernels run on side streams.

    It computes what :class:`KasminaConv2dLayer` does. The host's convolution stays on the current
    stream. Each parallel kernel waits for the layer's input only, so that it overlaps with the
    host and with the other kernels; each serial one waits for the host's output. The host thread
    waits for nothing, and backward is ordered by autograd. While no seed contributes, the layer
    is the host.

    Kernels run inline on the CPU, where there is one order of work; under ``torch.compile``, which
    schedules by itself; under the transforms of ``torch.func``; and in shadow passes.

    The arguments are those of :class:`KasminaConv2dLayer`.
    """

    open_run: ClassVar[OpenRun | None] = staticmethod(_open_run)

    @property
    def stream_manager(self) -> StreamManager:
        """The layer's side streams, one a seed; may be set."""
        return _state_of(self._kasmina).stream_manager

    @stream_manager.setter
    def stream_manager(self, manager: StreamManager) -> None:
        _state_of(self._kasmina).stream_manager = manager

    @property
    def gradient_sync(self) -> GradientSynchronizer:
        """What :meth:`synchronize_gradients` waits with."""
        return _state_of(self._kasmina).gradient_sync

    @property
    def pending_grads(self) -> list[GradientFuture]:
        """The seeds' gradients that backwards have produced and nobody has waited for."""
        return [future for future in _state_of(self._kasmina).futures.values() if future.done()]

    def synchronize_gradients(self) -> None:
        """Make the current stream wait for :attr:`pending_grads`; the host goes on.

        Needed only where gradients are read on another stream than the one that called
        ``backward``. Backwards that have not come are not waited for.

        Raises:
            GradientSyncError: The device refused.
        """
        self.gradient_sync.synchronize_pending(self.pending_grads)

    def get_stats(self) -> dict[str, Any]:
        """Return the layer's statistics, with ``"streams"`` and ``"gradient_sync"`` beside them."""
        own = {
            "streams": self.stream_manager.get_stats(),
            "gradient_sync": self.gradient_sync.get_stats(),
        }
        return {**super().get_stats(), **own}


class _AsyncState:
    """What the layer adds to its record; a copy starts afresh, with as many streams."""

    def __init__(self, num_streams: int) -> None:
        self.stream_manager = StreamManager(num_streams)
        self.gradient_sync = GradientSynchronizer()
        self.futures: dict[tuple[int, torch.device], GradientFuture] = {}

    def __reduce__(self) -> tuple[type[_AsyncState], tuple[int]]:
        return _AsyncState, (self.stream_manager.num_streams,)


def _state_of(record: LayerRecord) -> _AsyncState:
    state = record.own.find(_AsyncState)
    if state is None:
        state = record.own.keep(_AsyncState, _AsyncState(record.layout.num_seeds))
    return state


class _Run:
    """The kernels of one call, each on its seed's stream.

    Args:
        state: The layer's.
        record: The layer's; its plan says whether anything reads the host's output.
        call: What the layer was called with; what was launched up to now is waited for.
    """

    __slots__ = ("_call_ready", "_has_serial", "_host_ready", "_state", "_streams")

    def __init__(self, state: _AsyncState, record: LayerRecord, call: LayerCall) -> None:
        device = call.x.device
        self._has_serial = any(seed.is_serial for seed in record.plan)
        self._state = state
        self._streams = state.stream_manager.streams_of(device)
        self._call_ready = self._streams.record(self._streams.current(device))
        self._host_ready: torch.Event | None = None

    def __call__(self, seed: Seed, call: LayerCall, h: Tensor) -> Tensor | None:
        """Return the kernel's output, ordered before the current stream's later work."""
        if self._has_serial and self._host_ready is None:  # before any kernel is joined
            self._host_ready = self._streams.record(self._streams.current(h.device))
        if seed.is_shadow:  # an audition stays where the model's own work is
            return run_kernel(seed, call, h)
        ready, inputs = self._call_ready, call.tensors()
        if seed.is_serial:
            assert self._host_ready is not None
            ready, inputs = self._host_ready, [h]
        side = self._state.stream_manager.get_stream(seed.seed_idx, h.device)
        k = run_kernel(seed, call, h, partial(run_on_side, self._streams, side, ready, inputs))
        if k is not None:
            self._follow(seed.seed_idx, k)
        return k

    def _follow(self, seed_idx: int, k: Tensor) -> None:
        """Let the seed's one future see backwards through ``k``, as through earlier calls'."""
        futures, key = self._state.futures, (seed_idx, k.device)
        if key not in futures:
            futures[key] = GradientFuture(self._streams, k.device)
        futures[key].follow(k)
