"""What is known of each seed between steps: its calls and faults, times, size, and its history."""

from __future__ import annotations

import statistics
from typing import TYPE_CHECKING, Any, Final

from esper.contracts.choices import SEED_STATES
from esper.contracts.events import AnomalySeen, Event, HealthChanged, SeedMeasured
from esper.resilience.attempt import Done, attempt
from esper.resilience.health_monitor import HealthMonitor
from esper.resilience.own_history import UsualRate, UsualTime
from esper.running.module_cache import size_bytes
from esper.seeds.layer_health import monitor_of
from esper.state.layer_call import LayerCall
from esper.state.layer_record import record_of
from esper.state.plain_values import as_plain, from_plain

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from torch import nn

    from esper.contracts.choices import AnomalousFigure
    from esper.resilience.health_monitor import HealthLimits
    from esper.resilience.own_history import Departure
    from esper.state.layer_record import LayerRecord
    from esper.state.seed_slot import Seed

MOST_EXAMPLE_BYTES: Final = 1 << 20
"""Bytes of a layer's call up to which it is saved, to probe a kernel again in a resumed run."""
_RELIEF = 0.8
"""A limit that was passed counts as passed until the figure is below this share of it."""


class _Figures:
    """Of one kernel in a seed.

    Attributes:
        number: The seed's; with another kernel it is another one, which begins anew.
        calls: Calls that were read.
        faults: Those of them that were faulty.
        num_timed: Times that were taken and looked at.
        over: Which of its own limits it has passed; empty where none.
    """

    def __init__(self, number: int) -> None:
        self.number = number
        self.calls = self.faults = self.num_timed = 0
        self.rate, self.time = UsualRate(), UsualTime()
        self.over = ""

    def state_dict(self) -> dict[str, Any]:
        """Return them, as JSON can hold them."""
        return {
            "calls": self.calls,
            "faults": self.faults,
            "over": self.over,
            "rate": self.rate.state_dict(),
            "time": self.time.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on with what :meth:`state_dict` returned."""
        self.calls, self.faults, self.over = state["calls"], state["faults"], state["over"]
        self.rate.load_state_dict(state["rate"])
        self.time.load_state_dict(state["time"])


class SeedFigures:
    """The figures of a layer's seeds, kept with the layer."""

    def __init__(self) -> None:
        self._by_seed: dict[int, _Figures] = {}

    def take(self, record: LayerRecord, seed: Seed, outcomes: Sequence[bool]) -> list[Event]:
        """Take what the calls of a seed since the last look have shown; return what is news."""
        figures = self._of(seed)
        figures.calls += len(outcomes)
        figures.faults += sum(outcomes)
        news: list[Event] = []
        for has_failed in outcomes:
            departure = figures.rate.take(has_failed=has_failed)
            if departure is not None:
                news.append(_anomaly(record, seed, "error rate", departure))
        num_news = min(seed.num_timed - figures.num_timed, len(seed.timed_us))
        figures.num_timed = seed.num_timed
        for took_us in list(seed.timed_us)[len(seed.timed_us) - num_news :]:
            departure = figures.time.take(took_us)
            if departure is not None:
                news.append(_anomaly(record, seed, "latency", departure))
        return news

    def measured(self, record: LayerRecord, seed: Seed) -> Iterator[Event]:
        """Yield how a seed is doing, and whether it has passed a limit of its own, or come back."""
        figures, layout, i = self._of(seed), record.layout, seed.seed_idx
        latency_us = statistics.median(seed.timed_us) if seed.timed_us else None
        size = size_bytes(seed.slot.kernel)
        yield SeedMeasured(
            update=0,
            time_s=0.0,
            site=record.name,
            seed_idx=i,
            state=SEED_STATES[layout.state(i)],
            alpha=layout.alpha(i),
            calls=figures.calls,
            faults=figures.faults,
            fault_rate=layout.fault_rate(i),
            health=layout.health(i),
            latency_us=latency_us,
            size_bytes=size,
        )
        limits = monitor_of(record).limits
        over = _over(limits, latency_us, size, share=_RELIEF if figures.over else 1.0)
        if bool(over) != bool(figures.over):
            yield HealthChanged(
                update=0,
                time_s=0.0,
                site=record.name,
                seed_idx=i,
                healthy=not over,
                reason=over or "it is within its limits again",
            )
        figures.over = over

    def state_of(self, record: LayerRecord, seed: Seed) -> dict[str, Any]:
        """Return what is known of a seed, as JSON can hold it."""
        return {
            **self._of(seed).state_dict(),
            "shown": record.layout.shown(seed.seed_idx),
            "times_us": [*seed.timed_us],
            "example": _plain_example(seed),
        }

    def load_state_of(self, record: LayerRecord, seed: Seed, state: Mapping[str, Any]) -> None:
        """Go on with what :meth:`state_of` returned of a seed with the same kernel."""
        made = self._by_seed[seed.seed_idx] = _Figures(seed.number)
        made.load_state_dict(state)
        seed.timed_us.clear()
        seed.timed_us.extend(state["times_us"])
        made.num_timed = seed.num_timed
        example = state.get("example")
        if seed.example is None and example is not None:
            seed.example = LayerCall(*from_plain(example, record.layout.device))
        record.layout.have_shown(seed.seed_idx, state["shown"])

    def _of(self, seed: Seed) -> _Figures:
        found = self._by_seed.get(seed.seed_idx)
        if found is None or found.number != seed.number:
            found = self._by_seed[seed.seed_idx] = _Figures(seed.number)
        return found


def figures_of(record: LayerRecord) -> SeedFigures:
    """Return a layer's figures, made when first asked for."""
    found = record.own.find(SeedFigures)
    return record.own.keep(SeedFigures, SeedFigures()) if found is None else found


def health_state(layers: Mapping[str, nn.Module]) -> dict[str, Any]:
    """Return how layers and their seeds are doing and did before, as plain values.

    Args:
        layers: The layers by name; those without a kernel, of which nothing is known, are left out.
    """
    found = {}
    for name, layer in layers.items():
        record = record_of(layer)
        monitor = record.own.find(HealthMonitor)
        if not (record.seeds or monitor):
            continue
        figures = figures_of(record)
        found[name] = {
            "monitor": None if monitor is None else monitor.state_dict(),
            "seeds": {str(i): figures.state_of(record, seed) for i, seed in record.seeds.items()},
        }
    return found


def load_health_state(layers: Mapping[str, nn.Module], state: Mapping[str, Any]) -> None:
    """Let layers with the same kernels go on with what is known of them.

    Args:
        layers: The layers by name.
        state: What :func:`health_state` returned.
    """
    for name, known in state.items():
        record = record_of(layers[name])
        if known["monitor"] is not None:
            monitor_of(record).load_state_dict(known["monitor"])
        for i, seed in record.seeds.items():
            if str(i) in known["seeds"]:
                figures_of(record).load_state_of(record, seed, known["seeds"][str(i)])


def _plain_example(seed: Seed) -> Any:
    """Return what a seed is probed again with, as plain values; None where that is too much."""
    call = seed.example
    if call is None or sum(t.nbytes for t in call.tensors()) > MOST_EXAMPLE_BYTES:
        return None
    plain = attempt(lambda: as_plain((call.args, dict(call.kwargs))))
    return plain.value if isinstance(plain, Done) else None


def _over(limits: HealthLimits, latency_us: float | None, size: int, *, share: float) -> str:
    """Say which limit of a seed's own is passed; empty where none is."""
    if latency_us is not None and latency_us / 1e3 > share * limits.latency_ms:
        return f"its latency is {latency_us / 1e3:.3g} ms, its limit {limits.latency_ms:.3g} ms"
    most = limits.seed_memory_mb
    if most is not None and size / 2**20 > most:
        return f"its kernel takes {size / 2**20:.3g} MiB, its limit {most:.3g} MiB"
    return ""


def _anomaly(
    record: LayerRecord, seed: Seed, what: AnomalousFigure, found: Departure
) -> AnomalySeen:
    unit = " us" if what == "latency" else ""
    return AnomalySeen(
        update=0,
        time_s=0.0,
        site=record.name,
        seed_idx=seed.seed_idx,
        what=what,
        value=found.value,
        usual=found.usual,
        limit=found.limit,
        reason=f"its {what} is {found.value:.3g}{unit}, and was {found.usual:.3g}{unit} before",
    )
