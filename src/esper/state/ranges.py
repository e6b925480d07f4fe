"""Named ranges of seeds: what a profile has asked for, and nothing where there is none."""

from __future__ import annotations

import time
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

import torch

from esper.state.layer_record import RECORD

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from torch import nn

    from esper.state.layer_record import LayerRecord
    from esper.state.range_sums import RangeKey, Work


def range_name(layer: str, seed_idx: int, work: Work) -> str:
    """Return what a range is called in traces: ``esper/<layer>/<seed>/<work>``."""
    return f"esper/{layer or '(root)'}/{seed_idx}/{work}"


class OpenRange:
    """A range that is under way: in torch's traces, and in the sums of who profiles the layer.

    Args:
        record: The layer's.
        seed_idx: The seed.
        work: What is done.
        is_call: Whether it counts as a call; else it is a further part of one.
    """

    __slots__ = ("_calls", "_key", "_named", "_start_s", "_sums")

    def __init__(
        self, record: LayerRecord, seed_idx: int, work: Work, *, is_call: bool = True
    ) -> None:
        self._sums, self._calls = record.profiles, int(is_call)
        self._key: RangeKey = (record.name, seed_idx, work)
        self._named = torch.profiler.record_function(range_name(*self._key))
        self._named.__enter__()  # type: ignore[no-untyped-call] # torch has none
        self._start_s = time.perf_counter()

    def end(self) -> None:
        """End it."""
        took_s = time.perf_counter() - self._start_s
        self._named.__exit__(None, None, None)
        for sums in self._sums:
            sums.add(self._key, took_s, calls=self._calls)


@contextmanager
def named_range(record: LayerRecord, seed_idx: int, work: Work) -> Iterator[None]:
    """Name what runs inside, where the layer is profiled."""
    if not record.profiles:
        yield
        return
    opened = OpenRange(record, seed_idx, work)
    try:
        yield
    finally:
        opened.end()


@contextmanager
def named_ranges(seeds: Iterable[tuple[nn.Module, int]], work: Work) -> Iterator[None]:
    """Name what runs inside for several seeds of layers at once: each has all of the time."""
    with ExitStack() as ranges:
        for layer, seed_idx in seeds:
            record = layer.__dict__.get(RECORD)
            if record is not None and record.profiles:
                ranges.enter_context(named_range(record, seed_idx, work))
        yield
