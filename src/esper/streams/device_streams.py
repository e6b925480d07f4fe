"""What asynchronous layers ask of a device's streams, and the two answers: accelerator and CPU.

A side stream waits for what it reads, the consumer waits for the side stream, and a tensor that
crosses is kept until the stream that uses it is done. Only the device waits: no operation here
blocks the host, so nothing here can stall.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Final, Protocol, TypeVar

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from torch import Tensor

_Result = TypeVar("_Result")

STREAMLESS: Final = frozenset({"cpu", "meta", "mps"})
"""Device types whose work runs in one order."""


class Streams(Protocol):
    """A device's streams. There is no operation that waits on the host, and that is the point.

    Attributes:
        is_inline: Whether there is one order of work only, so that nothing overlaps.
    """

    is_inline: bool

    def current(self, device: torch.device) -> torch.Stream:
        """Return the stream that work of this thread goes to."""
        ...

    def side(self, device: torch.device) -> torch.Stream:
        """Return a stream beside the current one."""
        ...

    def record(self, stream: torch.Stream) -> torch.Event:
        """Return an event that is over when the work given to the stream so far is done."""
        ...

    def wait(self, stream: torch.Stream, event: torch.Event) -> None:
        """Let later work of the stream begin after the event."""
        ...

    def keep(self, tensor: Tensor, stream: torch.Stream) -> None:
        """Keep the tensor's memory from reuse until the stream's work at its release is done."""
        ...

    def on(self, stream: torch.Stream) -> AbstractContextManager[object]:
        """Return a context in which this thread's work goes to the stream."""
        ...

    def is_capturing(self, device: torch.device) -> bool:
        """Return whether the current stream is captured into a graph instead of being run."""
        ...


class AcceleratorStreams:
    """The streams of CUDA, ROCm, XPU and whatever else ``torch.accelerator`` knows."""

    is_inline = False

    def current(self, device: torch.device) -> torch.Stream:
        """Return the current stream."""
        return torch.accelerator.current_stream(device)

    def side(self, device: torch.device) -> torch.Stream:
        """Return a stream of torch's pool."""
        return torch.Stream(device=device)

    def record(self, stream: torch.Stream) -> torch.Event:
        """Return a recorded event."""
        return stream.record_event()

    def wait(self, stream: torch.Stream, event: torch.Event) -> None:
        """Make the stream wait; the host goes on."""
        stream.wait_event(event)

    def keep(self, tensor: Tensor, stream: torch.Stream) -> None:
        """Tell the caching allocator; in a backward the memory may be released on any thread."""
        tensor.record_stream(stream)

    @contextmanager
    def on(self, stream: torch.Stream) -> Iterator[None]:
        """Make the stream current.

        ``with stream:`` would do, but keeps what to restore in the stream object, which the
        threads that call one layer share.
        """
        with torch.accelerator.device_index(stream.device.index):
            before = torch.accelerator.current_stream(stream.device)
            torch.accelerator.set_stream(stream)
            try:
                yield
            finally:
                torch.accelerator.set_stream(before)

    def is_capturing(self, device: torch.device) -> bool:
        """Return whether a CUDA graph is being captured."""
        return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


class InlineStreams:
    """One order of work: every stream is the same, every event is over at once."""

    is_inline = True

    def current(self, device: torch.device) -> torch.Stream:  # noqa: ARG002 - the port's signature
        """Return the CPU's one stream."""
        return torch.Stream(device="cpu")

    def side(self, device: torch.device) -> torch.Stream:
        """Return the CPU's one stream."""
        return self.current(device)

    def record(self, stream: torch.Stream) -> torch.Event:  # noqa: ARG002 - the port's signature
        """Return an event that is over."""
        return torch.Event(device="cpu")

    def wait(self, stream: torch.Stream, event: torch.Event) -> None:
        """Do nothing: what was called before is done."""

    def keep(self, tensor: Tensor, stream: torch.Stream) -> None:
        """Do nothing: what is released is not in use."""

    def on(self, stream: torch.Stream) -> AbstractContextManager[object]:
        """Return a context that changes nothing."""
        return nullcontext(stream)

    def is_capturing(self, device: torch.device) -> bool:  # noqa: ARG002 - the port's signature
        """Return False."""
        return False


_ACCELERATOR: Final = AcceleratorStreams()
_INLINE: Final = InlineStreams()


def streams_of(device: torch.device) -> Streams:
    """Return the streams of a device: inline ones where it has no others."""
    return _INLINE if device.type in STREAMLESS else _ACCELERATOR


def default_device() -> torch.device:
    """Return the current device of the accelerator, or the CPU where there is none."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is None:
        return torch.device("cpu")
    return torch.device(accelerator.type, torch.accelerator.current_device_index())


def run_on_side(
    streams: Streams,
    side: torch.Stream,
    ready: torch.Event,
    inputs: Iterable[Tensor],
    work: Callable[[], _Result],
) -> _Result:
    """Run ``work`` on a side stream, between two waits, and return what it gives.

    The result is ordered: the current stream's later work begins after it. So does work that
    raises, or that gives nothing: what it had launched may still read weights that the caller
    goes on to change.

    Args:
        streams: The device's streams.
        side: Where the work goes.
        ready: Event after which ``inputs`` may be read.
        inputs: Tensors that the work reads and that may be released before it is done, all on
            one device. At least one.
        work: Launches the work; tensors that it returns are kept for the current stream.
    """
    given = tuple(inputs)
    current = streams.current(given[0].device)
    streams.wait(side, ready)
    for tensor in given:
        streams.keep(tensor, side)
    try:
        with streams.on(side):
            result = work()
    finally:
        streams.wait(current, streams.record(side))
    for value in result if isinstance(result, tuple) else (result,):
        if isinstance(value, torch.Tensor):
            streams.keep(value, current)
    return result
