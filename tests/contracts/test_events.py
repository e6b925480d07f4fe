"""Events have one JSON form, and logs that were written stay readable."""

import pytest

from esper.contracts.choices import SEED_STATES
from esper.contracts.events import (
    EVENT_TYPES,
    AlphaChanged,
    Detected,
    Evaluated,
    Fossilized,
    GateRead,
    Noted,
    Ranked,
    RolledBack,
    RunEnded,
    RunStarted,
    SeedFaulted,
    StageChanged,
    event_from_json,
    event_to_json,
)
from esper.contracts.lifecycle import GraftStage, SeedLifecycleState

WHEN = {"update": 7, "time_s": 0.5}
WRITTEN = {
    '{"format_version": 1, "kind": "run_started", "settings": {"goal": "min"}, "time_s": 0.5, '
    '"update": 7}': RunStarted(**WHEN, settings={"goal": "min"}),
    '{"format_version": 1, "gate_loss": 0.25, "kind": "evaluated", "metrics": {"accuracy": 90.0}, '
    '"time_s": 0.5, "train_loss": null, "update": 7}': Evaluated(
        **WHEN, gate_loss=0.25, train_loss=None, metrics={"accuracy": 90.0}
    ),
    '{"format_version": 1, "grow": true, "kind": "detected", "reason": "slow", "time_s": 0.5, '
    '"update": 7, "verdict": "diminishing"}': Detected(
        **WHEN, grow=True, verdict="diminishing", reason="slow"
    ),
    '{"format_version": 1, "kind": "ranked", "refused": [], "rows": [{"site": "fc"}], '
    '"time_s": 0.5, "update": 7}': Ranked(**WHEN, rows=[{"site": "fc"}]),
    '{"after": "germinated", "artifact_id": "", "before": "", "blueprint": "mlp", '
    '"format_version": 1, "graft": 1, "kind": "stage_changed", "reason": "first", "seed_idx": 0, '
    '"site": "fc", "time_s": 0.5, "update": 7}': StageChanged(
        **WHEN,
        graft=1,
        site="fc",
        seed_idx=0,
        blueprint="mlp",
        artifact_id="",
        before="",
        after=GraftStage.GERMINATED,
        reason="first",
    ),
    '{"after": "culled", "artifact_id": "ab", "before": "audition", "blueprint": "mlp", '
    '"format_version": 1, "graft": 1, "kind": "stage_changed", "reason": "no", "seed_idx": 0, '
    '"site": "fc", "time_s": 0.5, "update": 7}': StageChanged(
        **WHEN,
        graft=1,
        site="fc",
        seed_idx=0,
        blueprint="mlp",
        artifact_id="ab",
        before=GraftStage.AUDITION,
        after=GraftStage.CULLED,
        reason="no",
    ),
    '{"effect": 0.5, "format_version": 1, "gate": "admission", "graft": 1, "kind": "gate_read", '
    '"level": 0.05, "passed": true, "reason": "beyond luck", "samples": 64, "stderr": 0.125, '
    '"tau": 0.0, "time_s": 0.5, "update": 7, "z": 4.0}': GateRead(
        **WHEN,
        graft=1,
        gate="admission",
        passed=True,
        effect=0.5,
        stderr=0.125,
        tau=0.0,
        z=4.0,
        level=0.05,
        samples=64,
        reason="beyond luck",
    ),
    '{"alpha": 0.5, "format_version": 1, "graft": 1, "kind": "alpha_changed", "time_s": 0.5, '
    '"update": 7}': AlphaChanged(**WHEN, graft=1, alpha=0.5),
    '{"folded": true, "format_version": 1, "graft": 1, "kind": "fossilized", "reason": "", '
    '"rel_diff": 0.0, "site": "fc", "time_s": 0.5, "update": 7}': Fossilized(
        **WHEN, graft=1, site="fc", folded=True, rel_diff=0.0, reason=""
    ),
    '{"format_version": 1, "graft": 1, "kind": "rolled_back", "reason": "worse", "time_s": 0.5, '
    '"update": 7, "updates_lost": 3}': RolledBack(**WHEN, graft=1, updates_lost=3, reason="worse"),
    '{"faults": 2, "format_version": 1, "kind": "seed_faulted", "reason": "NaN", "seed_idx": 0, '
    '"site": "fc", "state": "active", "time_s": 0.5, "update": 7}': SeedFaulted(
        **WHEN, site="fc", seed_idx=0, faults=2, state="active", reason="NaN"
    ),
    '{"format_version": 1, "kind": "noted", "text": "a word", "time_s": 0.5, "update": 7}': Noted(
        **WHEN, text="a word"
    ),
    '{"format_version": 1, "grafts_admitted": 2, "grafts_fossilized": 1, "kind": "run_ended", '
    '"reason": "closed", "time_s": 0.5, "update": 7}': RunEnded(
        **WHEN, grafts_admitted=2, grafts_fossilized=1, reason="closed"
    ),
}
"""Lines of a log of format 1, and what they say. Lines are never changed here, only added."""


@pytest.mark.parametrize(
    "line", WRITTEN, ids=[f"{n}-{e.kind}" for n, e in enumerate(WRITTEN.values())]
)
def test_a_line_and_its_event_belong_together(line):
    """Writing gives the line, and reading it gives the event."""
    assert event_to_json(WRITTEN[line]) == line
    assert event_from_json(line) == WRITTEN[line]


def test_every_kind_has_a_line():
    """No kind of event is without an example."""
    assert {event.kind for event in WRITTEN.values()} == set(EVENT_TYPES)


def test_stages_are_stages_whoever_wrote_them():
    """A stage that was read, or given as a word, is the member; another word is refused."""
    line = next(line for line in WRITTEN if '"culled"' in line)
    event = event_from_json(line)
    assert event.before is GraftStage.AUDITION
    assert event.after is GraftStage.CULLED
    with pytest.raises(ValueError, match="removed"):
        event_from_json(line.replace('"culled"', '"removed"'))


@pytest.mark.parametrize(
    ("kind", "word", "wrong", "field"),
    [
        ("gate_read", '"admission"', '"admissoin"', "gate"),
        ("seed_faulted", '"active"', '"nonsense"', "state"),
        ("seed_faulted", '"active"', "2", "state"),
        ("stage_changed", '"audition"', '"tryout"', "before"),
        ("stage_changed", '"culled"', '""', "after"),
    ],
)
def test_a_word_of_no_set_is_refused_by_its_field(kind, word, wrong, field):
    """With what was expected and what was found."""
    line = next(line for line in WRITTEN if f'"kind": "{kind}"' in line and word in line)
    found = wrong.replace('"', "'")
    with pytest.raises(ValueError, match=f"'{field}' of a '{kind}' event is one of.*{found}"):
        event_from_json(line.replace(word, wrong))


def test_a_word_of_an_owners_policy_stays_readable():
    """A log may hold one; what is decided today is decided by a rule that is known."""
    line = next(line for line in WRITTEN if '"diminishing"' in line)
    assert event_from_json(line.replace("diminishing", "my own")).verdict == "my own"


def test_a_state_of_a_seed_has_its_name_in_files():
    """The words are those of the state machine, each at the place of its value."""
    assert [state.name.lower() for state in SeedLifecycleState] == list(SEED_STATES)
    assert [int(state) for state in SeedLifecycleState] == list(range(len(SEED_STATES)))
