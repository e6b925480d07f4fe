"""The journal: what it publishes is numbered, and what it keeps is what is known now."""

from __future__ import annotations

from dataclasses import replace

import pytest

from esper.contracts.events import (
    Noted,
    PassengerRemoved,
    RolledBack,
    StageChanged,
    StageWoken,
    TakenOver,
    TrialRead,
    TrialStarted,
)
from esper.contracts.lifecycle import GraftStage
from esper.contracts.report import StageRecord, TrialRecord
from esper.growth.budget import Cost
from esper.growth.graft import Germination, Grafts
from esper.growth.journal import Journal
from esper.resilience.clock import ManualClock


class Sink:
    def __init__(self):
        self.events = []

    def publish(self, event):
        self.events.append(event)


@pytest.fixture
def sink():
    return Sink()


@pytest.fixture
def journal(sink):
    return Journal(sink, ManualClock(), lambda: 7)


def a_trial(**other):
    values = {
        "package": 1,
        "grafts": (1, 2),
        "sites": ("0", "3"),
        "blueprints": ("mlp", "conv"),
        "parameters": 80,
        "started_at": 7,
        "trial_updates": 200,
        "memory_bytes": 4096,
    }
    return TrialRecord(**(values | other))


READ = {
    "verdict": "taken over",
    "taken": "candidate",
    "decided_at": 207,
    "reason": "beyond luck",
    "effect": 0.5,
    "stderr": 0.125,
    "seconds": 3.0,
    "memory_peak_bytes": 8192,
}


def a_stage(**other):
    values = {"path": "h", "depth": 2, "blocks": ("h.1",), "started_at": 7, "ramp_updates": 10}
    return StageRecord(**(values | other))


def a_graft(journal):
    return Grafts(journal).germinate(
        Germination(
            site="3",
            seed_idx=0,
            blueprint="conv",
            artifact_id="",
            reason="ranked first",
            update=7,
            package=2,
            cost=Cost(parameters=40),
        )
    )


def test_events_are_numbered_within_a_run_that_has_a_name(journal, sink):
    """0, 1, 2 and so on, whatever happens; and no two runs share a name."""
    journal.note("a word")
    journal.trial_started(a_trial(), arms=["live", "candidate"])
    journal.note("another")
    assert [event.seq for event in sink.events] == [0, 1, 2]
    assert {event.run_id for event in sink.events} == {journal.run_id}
    assert len({event.id for event in sink.events}) == 3
    assert Journal(sink, ManualClock(), lambda: 0).run_id != journal.run_id


def test_a_word_that_is_not_said_again_takes_no_number(journal, sink):
    """A log has no gaps, so that a gap is a loss."""
    journal.note("a word")
    journal.note("a word")
    journal.note("another")
    assert [(type(event), event.seq) for event in sink.events] == [(Noted, 0), (Noted, 1)]


def test_the_course_of_a_package_is_told_and_kept(journal, sink):
    """From its copy to its way back; the report has it once, as it is known now."""
    journal.trial_started(a_trial(), arms=["live", "candidate", "null"])
    journal.trial_read(a_trial(**READ))
    switched = a_trial(**READ, gate_loss_before=0.75, gate_loss_after=0.5)
    journal.taken_over(switched, folded=False)
    back = replace(switched, verdict="rolled back", updates_lost=40)
    journal.package_rolled_back(back, "the gate loss rose")
    started, read, taken, rolled = sink.events
    assert isinstance(started, TrialStarted)
    assert (started.arms, started.memory_bytes) == (("live", "candidate", "null"), 4096)
    assert isinstance(read, TrialRead)
    assert (read.effect, read.stderr, read.reason) == (0.5, 0.125, "beyond luck")
    assert isinstance(taken, TakenOver)
    assert (taken.taken, taken.gate_loss_before, taken.gate_loss_after) == ("candidate", 0.75, 0.5)
    assert rolled == RolledBack(
        update=7,
        time_s=0.0,
        run_id=journal.run_id,
        seq=3,
        graft=0,
        package=1,
        updates_lost=40,
        reason="the gate loss rose",
    )
    assert journal.trials == [back]


def test_what_a_clock_read_is_no_part_of_a_verdicts_event(journal, sink):
    """A replay compares all of an event but its time and its run, so no other time may be in it."""
    journal.trial_read(a_trial(**READ))
    journal.trial_read(a_trial(**READ | {"seconds": 99.0, "memory_peak_bytes": 1}))
    first, again = sink.events
    assert first == replace(again, seq=first.seq)


def test_packages_are_kept_apart(journal):
    """A record replaces that of its own package, in its place."""
    for package in (1, 2, 1):
        journal.trial_changed(a_trial(package=package, samples=package))
    journal.trial_changed(a_trial(package=1, verdict="kept"))
    assert [(t.package, t.verdict) for t in journal.trials] == [(1, "kept"), (2, "in trial")]


def test_a_passenger_is_told_with_what_its_absence_costs(journal, sink):
    """The rise, its bound, what was allowed, and the same in words."""
    journal.passenger_removed(1, a_graft(journal), rise=0.001, upper=0.002, allowed=0.02)
    event = sink.events[-1]
    assert isinstance(event, PassengerRemoved)
    assert (event.graft, event.site, event.package) == (1, "3", 1)
    assert (event.rise, event.upper, event.allowed) == (0.001, 0.002, 0.02)
    assert "rises by 0.001, at most 0.002 where 0.02 is allowed" in event.reason


def test_a_stage_of_depth_is_told_when_it_begins_and_when_it_is_done(journal, sink):
    """And kept once; another stage of the same stack is another one."""
    journal.stage_woken(a_stage())
    journal.stage_woken(a_stage(verdict="awake", ended_at=17, loss_after=0.5))
    journal.stage_woken(a_stage(depth=4, started_at=50))
    assert [e.verdict for e in sink.events if isinstance(e, StageWoken)] == [
        "waking",
        "awake",
        "waking",
    ]
    assert [(s.depth, s.verdict) for s in journal.stages] == [(2, "awake"), (4, "waking")]


def test_a_stage_of_a_graft_names_its_package(journal, sink):
    """A log can be replayed without the trial's own events."""
    record = replace(a_graft(journal).record, package=2, stage=GraftStage.TRIAL)
    journal.stage_changed(record, GraftStage.GERMINATED)
    event = sink.events[-1]
    assert isinstance(event, StageChanged)
    assert (event.package, event.after) == (2, GraftStage.TRIAL)
