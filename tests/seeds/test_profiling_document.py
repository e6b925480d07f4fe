"""What docs/profiling.md says of profiles and telemetry is so."""

import contextlib
import io
import re
from pathlib import Path

from esper.contracts.events import EVENT_TYPES
from esper.resilience.health_monitor import HealthLimits
from esper.seeds.maintenance import MEASURED_EVERY

PAGE = (Path(__file__).parents[2] / "docs" / "profiling.md").read_text(encoding="utf-8")
OF_THE_RUN = {
    "run_started",
    "run_ended",
    "evaluated",
    "detected",
    "ranked",
    "noted",
    "batch_fitted",
    "kernel_prepared",
    "stage_changed",
    "stage_woken",
    "gate_read",
    "alpha_changed",
    "fossilized",
    "rolled_back",
    "trial_started",
    "trial_read",
    "taken_over",
    "passenger_removed",
}
"""Kinds that tell what a run decided."""


def test_its_block_prints_what_it_says():
    """As it stands."""
    (code,) = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)
    (expected,) = re.findall(r"```text\n(.*?)```", PAGE, flags=re.DOTALL)
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(code, {})
    assert printed.getvalue() == expected


def test_it_has_a_row_for_each_kind_of_event_of_seeds_and_sources():
    """And for no other."""
    rows = re.findall(r"^\| `(\w+)` \|", PAGE, flags=re.MULTILINE)
    assert sorted(rows) == sorted(EVENT_TYPES.keys() - OF_THE_RUN)


def test_its_numbers_are_those_of_the_code():
    """The interval of measurements, and the limits of health."""
    limits = HealthLimits()
    assert f"every {MEASURED_EVERY}th update" in PAGE
    assert f"({limits.error_rate:.0%})".replace("%", " %") in PAGE
    assert f"({limits.latency_ms:.0f} ms)" in PAGE
    assert f"({limits.memory_percent:.0f} % of a device's)" in PAGE
