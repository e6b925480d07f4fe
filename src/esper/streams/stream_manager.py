"""The side streams of a layer, and which seed's kernel runs on which."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypedDict

from esper.streams.device_streams import default_device, streams_of

if TYPE_CHECKING:
    import torch

    from esper.streams.device_streams import Streams


class StreamStats(TypedDict):
    """What :meth:`StreamManager.get_stats` returns.

    Attributes:
        num_streams: Streams on each device.
        stream_usage: Requests for each stream, over all devices.
        total_usage: Requests in all.
        is_inline: Whether no stream handed out (or, before the first, the default device) runs
            beside another.
    """

    num_streams: int
    stream_usage: list[int]
    total_usage: int
    is_inline: bool


class StreamManager:
    """Gives each seed a side stream of its device.

    A seed's first request on a device takes the stream that the fewest seeds have, the lowest of
    these; seeds that ask in turn get the streams in turn. After that the seed keeps its stream,
    so that what one call leaves behind for the next (a weight that autocast has cast, a gradient
    to add to) is ordered without a wait.

    Streams are made when they are first asked for. Copies and pickles start without any.

    Args:
        num_streams: Streams on each device, at least 1.
        streams: The streams to use on every device; None for the device's own.

    Raises:
        ValueError: ``num_streams`` is less than 1.
    """

    def __init__(self, num_streams: int = 4, streams: Streams | None = None) -> None:
        if num_streams < 1:
            msg = f"num_streams: expected at least 1, found {num_streams}"
            raise ValueError(msg)
        self.num_streams = num_streams
        self._streams = streams
        self._forget()

    def _forget(self) -> None:
        self.stream_usage = [0] * self.num_streams
        self._made: dict[tuple[torch.device, int], torch.Stream] = {}
        self._assigned: dict[tuple[torch.device, int], int] = {}

    def streams_of(self, device: torch.device) -> Streams:
        """Return the operations on the streams of a device."""
        return self._streams or streams_of(device)

    def get_stream(self, seed_idx: int, device: torch.device | None = None) -> torch.Stream:
        """Return the seed's stream; on the CPU its one stream, which runs inline.

        Args:
            seed_idx: The seed, at least 0.
            device: The device, with its index; None for the accelerator's current one.

        Raises:
            ValueError: ``seed_idx`` is negative.
        """
        if seed_idx < 0:
            msg = f"seed_idx: expected at least 0, found {seed_idx}"
            raise ValueError(msg)
        device = device or default_device()
        index = self._assigned.get((device, seed_idx))
        if index is None:
            index = self._assigned[device, seed_idx] = self._least_loaded(device)
        if (device, index) not in self._made:
            self._made[device, index] = self.streams_of(device).side(device)
        self.stream_usage[index] += 1
        return self._made[device, index]

    def _least_loaded(self, device: torch.device) -> int:
        taken = [index for (where, _), index in self._assigned.items() if where == device]
        return min(range(self.num_streams), key=taken.count)

    def synchronize_all(self) -> None:
        """Make the current stream of each device wait for all side streams; the host goes on."""
        for (device, _), side in self._made.items():
            streams = self.streams_of(device)
            streams.wait(streams.current(device), streams.record(side))

    def get_stats(self) -> StreamStats:
        """Return how the streams were used since the manager was made."""
        devices = {device for device, _ in self._made} or {default_device()}
        return {
            "num_streams": self.num_streams,
            "stream_usage": list(self.stream_usage),
            "total_usage": sum(self.stream_usage),
            "is_inline": all(self.streams_of(device).is_inline for device in devices),
        }

    def __getstate__(self) -> dict[str, int]:
        """Return what copies keep: streams belong to the process, and counts to the original."""
        return {"num_streams": self.num_streams}

    def __setstate__(self, state: dict[str, int]) -> None:
        """Start without streams."""
        self.__init__(**state)  # type: ignore[misc] # a copy begins as a constructed one does
