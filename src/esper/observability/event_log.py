"""The event log: a line of JSON per event, and the structure that such a log describes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from os import SEEK_END
from typing import TYPE_CHECKING, Any, ClassVar, Self, final

from esper.contracts.events import (
    AlphaChanged,
    Event,
    Fossilized,
    PassengerRemoved,
    RolledBack,
    StageChanged,
    TakenOver,
    event_from_json,
    event_to_json,
)
from esper.contracts.lifecycle import GraftStage

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from pathlib import Path
    from types import TracebackType

IN_THE_MODEL = frozenset({GraftStage.BLENDING, GraftStage.HOLDING, GraftStage.FOSSILIZED})
"""Stages in which a kernel is part of the model; trials and auditions leave no trace in it."""


class EventLog:
    """An event sink that appends to a file, one line per event, flushed at once.

    A sink may not raise: an event that cannot be written is counted in ``dropped``, and ``error``
    keeps the latest reason.

    Args:
        path: File to write. Its folder is made; what the file held is replaced.

    Raises:
        OSError: The file cannot be opened.

    Attributes:
        path: The file.
        dropped: Events that could not be written.
        error: Why the latest of them could not; None while none was dropped.
    """

    never_waits: ClassVar[bool] = True

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self._file = path.open("w", encoding="utf-8", newline="\n")
        self.dropped = 0
        self.error: str | None = None

    def publish(self, event: Event) -> None:
        """Write one event; count it where that fails."""
        try:
            self._file.write(event_to_json(event) + "\n")
            self._file.flush()
        except (OSError, ValueError, TypeError) as error:
            self.dropped += 1
            self.error = f"{event.kind} at update {event.update}: {error}"

    def close(self) -> None:
        """Close the file; events that come later are counted as dropped.

        What a full disk did not take is written once more, and given up where it fails again.
        """
        try:
            self._file.close()
        except OSError as error:
            self.error = f"{self.path}: {error}"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


def read_events(path: Path) -> list[Event]:
    """Return the events of a log, in order.

    A last line without a line end was cut off while it was written, and is left out.

    Raises:
        OSError: The file cannot be read.
        ValueError: A line is no event, or is of a newer format; the message has its number.
    """
    events = []
    lines = path.read_bytes().split(b"\n")
    for number, line in enumerate(lines[:-1], start=1):
        try:
            events.append(event_from_json(line.decode("utf-8")))
        except ValueError as error:
            msg = f"{path}, line {number}: {error}"
            raise ValueError(msg) from error
    return events


@final
class LogTail:
    """What a log has had since the last look; it need not be there yet.

    Args:
        path: The log. One that is shorter than what was read of it was begun anew, and is read
            from its start.

    Attributes:
        num_begun: How often a log began at this path, from 1: after a rise of it what was taken
            before is of another run.
    """

    def __init__(self, path: Path) -> None:
        self._path, self.num_begun = path, 1
        self._begin()

    def _begin(self) -> None:
        self._read, self._number, self._rest = 0, 0, b""
        self._wrong: ValueError | None = None

    def take(self) -> list[Event] | None:
        """Return the events that were written since the last call; None where nothing was.

        Half a line is kept until its other half is there.

        Raises:
            OSError: The file cannot be read.
            ValueError: A line is no event, or is of a newer format; the message has its number.
        """
        if self._wrong is not None:
            raise self._wrong
        data = _read_from(self._path, self._read)
        if data is None:
            self.num_begun += 1
            self._begin()
            data = _read_from(self._path, 0)
        if not data:
            return None
        self._read += len(data)
        *lines, self._rest = (self._rest + data).split(b"\n")
        return self._events(lines)

    def _events(self, lines: list[bytes]) -> list[Event]:
        """Return the events of lines up to the first that is none, which the next look tells."""
        events = []
        for line in lines:
            self._number += 1
            try:
                events.append(event_from_json(line.decode("utf-8")))
            except ValueError as error:
                self._wrong = ValueError(f"{self._path}, line {self._number}: {error}")
                break
        return events


def follow_log(
    path: Path, *, goes_on: Callable[[], bool], pause: Callable[[], object]
) -> Iterator[Event]:
    """Yield the events of a log while it is written, from the first on.

    Args:
        path: The log, as :class:`LogTail` takes it.
        goes_on: Asked where there is nothing new; False ends it.
        pause: Called before it is looked at again.

    Raises:
        OSError: The file cannot be read.
        ValueError: A line is no event, or is of a newer format; the message has its number.
    """
    tail = LogTail(path)
    while True:
        events = tail.take()
        if events is not None:
            yield from events
        elif goes_on():
            pause()
        else:
            return


def _read_from(path: Path, start: int) -> bytes | None:
    """Return what a file has behind a place; None where it ends before it."""
    try:
        with path.open("rb") as file:
            if file.seek(0, SEEK_END) < start:
                return None
            file.seek(start)
            return file.read()
    except FileNotFoundError:
        return None if start else b""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplayedSeed:
    """A seed that is part of the model, as the log describes it.

    Attributes:
        seed_idx: Slot in its layer.
        graft: Number of the graft that filled it.
        blueprint: Human name of the kernel's blueprint.
        artifact_id: The sha256 of the kernel's bytes.
        stage: Stage of the graft.
        alpha: Its alpha, in [0, 1]; None if the log has none, as for a kernel of a package, which
            stands at 1.
        folded: Whether its weights are in the host's own.
    """

    seed_idx: int
    graft: int
    blueprint: str
    artifact_id: str
    stage: GraftStage
    alpha: float | None = None
    folded: bool = False


def replay_structure(events: Iterable[Event]) -> dict[str, list[ReplayedSeed]]:
    """Return the structure that a log leads to: the seeds in the model, by site, by slot.

    What was only tried or has been removed is not in it, nor is a site without seeds.
    """
    replay = _Replay()
    for event in events:
        replay.take(event)
    return replay.structure()


class _Replay:
    """Follows the grafts of a log."""

    def __init__(self) -> None:
        self._sites: dict[int, str] = {}
        self._seeds: dict[int, ReplayedSeed] = {}
        self._alphas: dict[int, float] = {}
        self._packages: dict[int | None, list[int]] = {}

    def take(self, event: Event) -> None:
        """Follow one event; those that change no structure are passed over."""
        match event:
            case StageChanged():
                self._change_stage(event)
            case AlphaChanged():
                self._alphas[event.graft] = event.alpha
            case Fossilized():
                self._change([event.graft], folded=event.folded)
            case TakenOver():
                self._change(event.grafts, folded=event.folded)
            case PassengerRemoved():
                self._change([event.graft], stage=GraftStage.CULLED)
            case RolledBack():
                grafts = self._packages.get(event.package, [])
                self._change([event.graft, *grafts], stage=GraftStage.CULLED)

    def structure(self) -> dict[str, list[ReplayedSeed]]:
        """Return the seeds that are in the model now."""
        found: dict[str, list[ReplayedSeed]] = {}
        for graft, seed in sorted(self._seeds.items(), key=lambda at: (at[1].seed_idx, at[0])):
            if seed.stage in IN_THE_MODEL:
                row = replace(seed, alpha=self._alphas.get(graft))
                found.setdefault(self._sites[graft], []).append(row)
        return found

    def _change_stage(self, event: StageChanged) -> None:
        before = self._seeds.get(event.graft)
        self._sites[event.graft] = event.site
        if event.package is not None and before is None:
            self._packages.setdefault(event.package, []).append(event.graft)
        self._seeds[event.graft] = ReplayedSeed(
            seed_idx=event.seed_idx,
            graft=event.graft,
            blueprint=event.blueprint,
            artifact_id=event.artifact_id,
            stage=event.after,
            folded=before.folded if before else False,
        )

    def _change(self, grafts: Iterable[int], **changes: Any) -> None:
        for graft in grafts:
            if graft in self._seeds:
                self._seeds[graft] = replace(self._seeds[graft], **changes)
