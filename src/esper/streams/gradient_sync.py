"""Gradients of side streams: whether a backward has come, and how to read behind it.

Autograd orders a backward by itself: each operation runs on the stream of its forward, and the
stream that called the backward waits for all of them. There is one case left: gradients that are
read on another stream than that. This is what the futures here are for.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import torch

from esper.contracts.errors import GradientSyncError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from torch import Tensor

    from esper.streams.device_streams import Streams


class GradientFuture:
    """Tells whether a backward has come through a tensor, and waits behind the latest one.

    Args:
        streams: The streams of the tensor's device.
        device: The device.
    """

    def __init__(self, streams: Streams, device: torch.device) -> None:
        self._streams = streams
        self._device = device
        self._event: torch.Event | None = None

    def follow(self, output: Tensor) -> None:
        """Record each backward through ``output``; where there can be none, do nothing."""
        if output.requires_grad and not self._streams.is_capturing(self._device):
            output.register_hook(self._expect)  # type: ignore[no-untyped-call] # torch has none

    def _expect(self, gradient: Tensor) -> None:  # noqa: ARG002 - a hook's signature
        """Ask autograd to say when this backward is over; one that fails never says it."""
        engine = torch.autograd.Variable._execution_engine  # noqa: SLF001 - as DDP and FSDP do
        engine.queue_callback(self._record)

    def _record(self) -> None:
        """Record the event: autograd has made the caller's stream wait for all gradients."""
        if not self._streams.is_capturing(self._device):
            self._event = self._streams.record(self._streams.current(self._device))

    def done(self) -> bool:
        """Return whether a backward has come since the last :meth:`result`.

        Its operations are launched; the device may still be at them.
        """
        return self._event is not None

    def result(self) -> None:
        """Make the current stream wait for the gradients; the host goes on.

        Raises:
            GradientSyncError: No backward has come, and none may ever come; or the device refused.
        """
        if self._event is None:
            msg = (
                f"no backward has come through this output on {self._device}: call result() after "
                "backward(), or ask done() first"
            )
            raise GradientSyncError(msg)
        try:
            self._streams.wait(self._streams.current(self._device), self._event)
        except RuntimeError as error:
            msg = f"the gradients on {self._device} cannot be waited for: {error}"
            raise GradientSyncError(msg) from error
        self._event = None


class GradientSynchronizer:
    """Makes the current stream wait for gradients that were produced, and for no others.

    Needed where gradients are read on another stream than the one that called ``backward``.

    Args:
        clock: Gives seconds, monotonic.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self.sync_count = 0
        self.sync_time_total_s = 0.0
        self.num_not_produced = 0

    def synchronize_pending(self, grad_futures: Iterable[GradientFuture]) -> None:
        """Wait, on the device, for the futures that are done; count the others and go on.

        Raises:
            GradientSyncError: The device refused.
        """
        futures = list(grad_futures)
        produced = [future for future in futures if future.done()]
        self.num_not_produced += len(futures) - len(produced)
        if not produced:
            return
        start_s = self._clock()
        for future in produced:
            future.result()
        self.sync_time_total_s += self._clock() - start_s
        self.sync_count += 1

    def get_stats(self) -> dict[str, float]:
        """Return the specification's three figures, and ``num_not_produced``.

        The times are the host's, to tell the device to wait; the host itself waits for nothing.
        ``num_not_produced`` counts futures that no backward had come to.
        """
        total_ms = self.sync_time_total_s * 1000.0
        return {
            "sync_count": self.sync_count,
            "total_sync_time_ms": total_ms,
            "avg_sync_time_ms": total_ms / max(self.sync_count, 1),
            "num_not_produced": self.num_not_produced,
        }
