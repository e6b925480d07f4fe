"""Events have one JSON form, and logs that were written stay readable."""

import json
from pathlib import Path

import pytest

from esper.contracts.choices import SEED_STATES
from esper.contracts.events import (
    EVENT_TYPES,
    AlphaChanged,
    AnomalySeen,
    BatchFitted,
    BreakerMoved,
    Detected,
    Evaluated,
    Fossilized,
    GateRead,
    HealthChanged,
    KernelEmbargoed,
    KernelPrepared,
    KernelQuarantined,
    Noted,
    PassengerRemoved,
    Ranked,
    RegistryUnavailable,
    Retried,
    RolledBack,
    RunEnded,
    RunStarted,
    SeedFaulted,
    SeedMeasured,
    SeedMoved,
    StageChanged,
    StageWoken,
    TakenOver,
    TrialRead,
    TrialStarted,
    UnknownEvent,
    event_from_json,
    event_to_json,
)
from esper.contracts.lifecycle import GraftStage, SeedLifecycleState

FILES = Path(__file__).parent / "files"
WHEN = {"update": 7, "time_s": 0.5}
OF_FORMAT_1 = {
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

ENVELOPE = {**WHEN, "run_id": "ab", "seq": 3}
OF_A_TRIAL = {
    "package": 1,
    "grafts": (1, 2),
    "sites": ("fc", "head"),
}
OF_FORMAT_1_1 = {
    '{"arms": ["live", "candidate", "null"], "attribution": "trial", "blueprints": ["mlp", "mlp"], '
    '"format_version": "1.1", "grafts": [1, 2], "id": "ab-3", "kind": "trial_started", '
    '"level": 0.05, "memory_bytes": 4096, "null_adds": [], "package": 1, "parameters": 80, '
    '"run_id": "ab", "seq": 3, "sites": ["fc", "head"], "time_s": 0.5, "trial_updates": 200, '
    '"update": 7}': TrialStarted(
        **ENVELOPE,
        **OF_A_TRIAL,
        blueprints=("mlp", "mlp"),
        parameters=80,
        trial_updates=200,
        arms=("live", "candidate", "null"),
        memory_bytes=4096,
    ),
    '{"attribution": "trial", "capacity": 0.5, "capacity_is_lower_bound": false, '
    '"capacity_shown": true, "capacity_stderr": 0.25, "effect": 0.75, "flops": null, '
    '"format_version": "1.1", "going_on": null, "going_on_stderr": null, "id": "ab-3", '
    '"kind": "trial_read", "level": 0.05, "null_adds": [], "null_effect": 0.25, '
    '"null_stderr": 0.25, "num_nulls": 0, "package": 1, "reason": "beyond luck", "run_id": "ab", '
    '"samples": 400, "seq": 3, "sites": ["fc", "head"], "spread": 1.6, "stderr": 0.25, '
    '"taken": "candidate", "threshold": 1.65, "time_s": 0.5, "update": 7, "verdict": "taken over", '
    '"z": 3.0}': TrialRead(
        **ENVELOPE,
        package=1,
        sites=("fc", "head"),
        verdict="taken over",
        taken="candidate",
        reason="beyond luck",
        spread=1.6,
        samples=400,
        effect=0.75,
        stderr=0.25,
        z=3.0,
        threshold=1.65,
        null_effect=0.25,
        null_stderr=0.25,
        capacity=0.5,
        capacity_stderr=0.25,
        capacity_shown=True,
    ),
    '{"folded": false, "format_version": "1.1", "gate_loss_after": 0.25, "gate_loss_before": 0.5, '
    '"grafts": [1, 2], "id": "ab-3", "kind": "taken_over", "package": 1, "run_id": "ab", "seq": 3, '
    '"sites": ["fc", "head"], "taken": "candidate", "time_s": 0.5, "update": 7}': TakenOver(
        **ENVELOPE, **OF_A_TRIAL, taken="candidate", gate_loss_before=0.5, gate_loss_after=0.25
    ),
    '{"allowed": 0.5, "format_version": "1.1", "graft": 2, "id": "ab-3", '
    '"kind": "passenger_removed", "package": 1, "reason": "idle", "rise": 0.125, "run_id": "ab", '
    '"seq": 3, "site": "head", "time_s": 0.5, "update": 7, "upper": 0.25}': PassengerRemoved(
        **ENVELOPE,
        package=1,
        graft=2,
        site="head",
        rise=0.125,
        upper=0.25,
        allowed=0.5,
        reason="idle",
    ),
    '{"blocks": ["h.1"], "depth": 2, "ended_at": null, "flops": null, "format_version": "1.1", '
    '"id": "ab-3", "init": "fresh", "kind": "stage_woken", "loss_after": null, '
    '"loss_before": 0.5, "path": "h", "ramp_updates": 20, "reason": "", "run_id": "ab", "seq": 3, '
    '"started_at": 7, "time_s": 0.5, "update": 7, "verdict": "waking"}': StageWoken(
        **ENVELOPE,
        path="h",
        depth=2,
        blocks=("h.1",),
        started_at=7,
        ramp_updates=20,
        loss_before=0.5,
    ),
    '{"device": "cpu", "format_version": "1.1", "id": "ab-3", "kind": "batch_fitted", '
    '"run_id": "ab", "samples": 64, "seq": 3, "shapes": "float32[3] int64[]", "size": 16, '
    '"time_s": 0.5, "update": 7, "why": "memory", "work": "trial"}': BatchFitted(
        **ENVELOPE,
        work="trial",
        device="cpu",
        shapes="float32[3] int64[]",
        samples=64,
        size=16,
        why="memory",
    ),
    '{"artifact_id": "ab", "blueprint": "mlp", "done": true, "format_version": "1.1", '
    '"id": "ab-3", "kind": "kernel_prepared", "run_id": "ab", "seq": 3, "site": "", '
    '"time_s": 0.5, "took_s": 0.25, "update": 7, "what": "fetch"}': KernelPrepared(
        **ENVELOPE, what="fetch", blueprint="mlp", artifact_id="ab", took_s=0.25
    ),
    '{"artifact_id": "ab", "format_version": "1.1", "id": "ab-3", "kind": "registry_unavailable", '
    '"operation": "put", "reason": "down", "run_id": "ab", "seq": 3, "time_s": 0.5, '
    '"update": 7}': RegistryUnavailable(
        **ENVELOPE, operation="put", artifact_id="ab", reason="down"
    ),
    '{"format_version": "1.1", "graft": 0, "id": "ab-3", "kind": "rolled_back", "package": 1, '
    '"reason": "worse", "run_id": "ab", "seq": 3, "time_s": 0.5, "update": 7, '
    '"updates_lost": 3}': RolledBack(
        **ENVELOPE, graft=0, package=1, updates_lost=3, reason="worse"
    ),
    '{"after": "trial", "artifact_id": "ab", "before": "germinated", "blueprint": "mlp", '
    '"format_version": "1.1", "graft": 1, "id": "ab-3", "kind": "stage_changed", "package": 1, '
    '"reason": "copied", "run_id": "ab", "seed_idx": 0, "seq": 3, "site": "fc", "time_s": 0.5, '
    '"update": 7}': StageChanged(
        **ENVELOPE,
        graft=1,
        site="fc",
        seed_idx=0,
        blueprint="mlp",
        artifact_id="ab",
        before=GraftStage.GERMINATED,
        after=GraftStage.TRIAL,
        reason="copied",
        package=1,
    ),
    '{"alpha": 0.5, "calls": 64, "fault_rate": 0.015625, "faults": 1, "format_version": "1.1", '
    '"health": 0.75, "id": "ab-3", "kind": "seed_measured", "latency_us": 125.0, '
    '"run_id": "ab", "seed_idx": 1, "seq": 3, "site": "fc", "size_bytes": 4096, '
    '"state": "active", "time_s": 0.5, "update": 7}': SeedMeasured(
        **ENVELOPE,
        site="fc",
        seed_idx=1,
        state="active",
        alpha=0.5,
        calls=64,
        faults=1,
        fault_rate=0.015625,
        health=0.75,
        latency_us=125.0,
        size_bytes=4096,
    ),
    '{"after": "error_recovery", "before": "active", "format_version": "1.1", "id": "ab-3", '
    '"kind": "seed_moved", "reason": "NaN", "run_id": "ab", "seed_idx": 1, "seq": 3, '
    '"site": "fc", "time_s": 0.5, "update": 7}': SeedMoved(
        **ENVELOPE, site="fc", seed_idx=1, before="active", after="error_recovery", reason="NaN"
    ),
    '{"artifact_id": "ab", "format_version": "1.1", "id": "ab-3", "kind": "retried", '
    '"number": 2, "outcome": "recovered", "reason": "down", "run_id": "ab", "seed_idx": 1, '
    '"seq": 3, "site": "fc", "time_s": 0.5, "update": 7, "what": "load"}': Retried(
        **ENVELOPE,
        what="load",
        outcome="recovered",
        number=2,
        site="fc",
        seed_idx=1,
        artifact_id="ab",
        reason="down",
    ),
    '{"after": "open", "before": "closed", "format_version": "1.1", "id": "ab-3", '
    '"kind": "breaker_moved", "name": "the registry", "run_id": "ab", "seq": 3, "time_s": 0.5, '
    '"update": 7, "wait_s": 1.5}': BreakerMoved(
        **ENVELOPE, name="the registry", before="closed", after="open", wait_s=1.5
    ),
    '{"artifact_id": "ab", "format_version": "1.1", "id": "ab-3", '
    '"kind": "kernel_quarantined", "reason": "NaN", "released": false, "run_id": "ab", "seq": 3, '
    '"time_s": 0.5, "update": 7}': KernelQuarantined(**ENVELOPE, artifact_id="ab", reason="NaN"),
    '{"artifact_id": "ab", "for_s": 30.0, "format_version": "1.1", "id": "ab-3", '
    '"kind": "kernel_embargoed", "reason": "not there", "run_id": "ab", "seq": 3, "time_s": 0.5, '
    '"update": 7}': KernelEmbargoed(**ENVELOPE, artifact_id="ab", for_s=30.0, reason="not there"),
    '{"format_version": "1.1", "id": "ab-3", "kind": "anomaly_seen", "limit": 250.0, '
    '"reason": "slow", "run_id": "ab", "seed_idx": 1, "seq": 3, "site": "fc", "time_s": 0.5, '
    '"update": 7, "usual": 125.0, "value": 500.0, "what": "latency"}': AnomalySeen(
        **ENVELOPE,
        site="fc",
        seed_idx=1,
        what="latency",
        value=500.0,
        usual=125.0,
        limit=250.0,
        reason="slow",
    ),
    '{"format_version": "1.1", "healthy": false, "id": "ab-3", "kind": "health_changed", '
    '"reason": "error rate is 0.5, its limit 0.1", "run_id": "ab", "score": 0.5, '
    '"seed_idx": null, "seq": 3, "site": "fc", "time_s": 0.5, "update": 7}': HealthChanged(
        **ENVELOPE,
        site="fc",
        healthy=False,
        score=0.5,
        reason="error rate is 0.5, its limit 0.1",
    ),
}
"""Lines of a log of format 1.1. Lines are never changed here, only added."""

WRITTEN = OF_FORMAT_1 | OF_FORMAT_1_1
FROM_LATER = (
    '{"format_version": "1.7", "gate_loss": 2.5, "id": "ab-3", "kind": "evaluated", "metrics": {}, '
    '"own": {"b":1,  "a": 1E5}, "run_id": "ab", "seq": 3, "time_s": 0.5, "train_loss": null, '
    '"update": 7}'
)
"""A line of a later minor version, with a field that is not known here."""


def ids(lines):
    return [f"{n}-{event.kind}" for n, event in enumerate(lines.values())]


@pytest.mark.parametrize("line", WRITTEN, ids=ids(WRITTEN))
def test_a_line_that_was_written_stays_readable(line):
    """Reading gives the event, whose own line says the same."""
    assert event_from_json(line) == WRITTEN[line]
    assert event_from_json(event_to_json(WRITTEN[line])) == WRITTEN[line]


@pytest.mark.parametrize("line", OF_FORMAT_1_1, ids=ids(OF_FORMAT_1_1))
def test_an_event_has_one_line(line):
    """Writing gives the very bytes."""
    assert event_to_json(OF_FORMAT_1_1[line]) == line


@pytest.mark.parametrize("line", OF_FORMAT_1, ids=ids(OF_FORMAT_1))
def test_a_line_of_format_1_is_written_in_the_format_of_today(line):
    """Nothing of it is lost; what was added has its default."""
    old, written = json.loads(line), json.loads(event_to_json(event_from_json(line)))
    assert {name: written[name] for name in old} == {**old, "format_version": "1.1"}
    assert (written["run_id"], written["seq"], written["id"]) == ("", 0, "-0")


def test_events_outside_of_a_run_can_be_told_apart():
    """Two that say the same are equal, and each has a name of its own."""
    first, second = (Noted(update=1, time_s=0.5, text="x") for _ in range(2))
    assert first == second
    assert first.id != second.id
    assert event_to_json(first) != event_to_json(second)


def test_a_whole_log_of_format_1_is_read():
    """A run with an audition and twins: every line is an event of a kind that is known."""
    lines = (FILES / "events-1.jsonl").read_text(encoding="utf-8").splitlines()
    events = [event_from_json(line) for line in lines]
    kinds = {type(event) for event in events}
    assert {GateRead, AlphaChanged, Fossilized, StageChanged} < kinds
    assert UnknownEvent not in kinds
    assert any(e.tau is not None for e in events if isinstance(e, GateRead))


def test_every_kind_has_a_line():
    """No kind of event is without an example."""
    assert {event.kind for event in WRITTEN.values()} == set(EVENT_TYPES)


def test_a_field_of_a_later_version_is_written_again_as_it_was():
    """Byte for byte, in its place and under its version; and it is seen to be there."""
    event = event_from_json(FROM_LATER)
    assert isinstance(event, Evaluated)
    assert dict(event.more)["own"] == '{"b":1,  "a": 1E5}'
    assert event_to_json(event) == FROM_LATER


@pytest.mark.parametrize("version", ['"1.7"', '"1.1"', "1"])
def test_a_kind_that_is_not_known_is_kept_as_it_was(version):
    """With its place in the run, so that a log stays whole whoever passes it on."""
    line = (
        f'{{"update": 7, "kind": "pruned",   "format_version": {version}, "run_id": "ab", '
        '"seq": 3, "share": 1E-1, "time_s": 0.5}'
    )
    event = event_from_json(line)
    assert event == UnknownEvent(**ENVELOPE, kind="pruned", body=line)
    assert (event.kind, event.id) == ("pruned", "ab-3")
    assert event_to_json(event) == line


def test_a_word_that_only_a_later_version_knows_is_kept_as_it_was():
    """A stage that is none here makes the whole event one that is passed on."""
    (line,) = (line for line in OF_FORMAT_1_1 if '"trial"' in line and "stage_changed" in line)
    later = line.replace('"1.1"', '"1.2"').replace('"trial"', '"napping"')
    assert event_to_json(event_from_json(later)) == later
    with pytest.raises(ValueError, match="napping"):
        event_from_json(line.replace('"trial"', '"napping"'))


@pytest.mark.parametrize("version", ["2", '"2.0"', '"10.1"'])
def test_a_higher_major_version_is_refused_by_name(version):
    """With what is known here, and what to do."""
    found = version.replace('"', "'")
    with pytest.raises(ValueError, match=f"{found} is not known.*up to 1.1.*a newer Esper"):
        event_from_json(FROM_LATER.replace('"1.7"', version))


@pytest.mark.parametrize("line", ["[]", "{}", '{"format_version": "1.1"}', "not JSON", ""])
def test_what_is_no_event_is_refused(line):
    """Whatever is missing, it is a ValueError."""
    with pytest.raises(ValueError, match=r"expected|format|kind|Expecting"):
        event_from_json(line)


def test_a_field_without_a_default_is_asked_for():
    """Its name and its event are in the message."""
    with pytest.raises(ValueError, match="Evaluated needs the field gate_loss"):
        event_from_json(FROM_LATER.replace('"gate_loss": 2.5, ', ""))


def test_a_number_that_is_not_finite_is_not_written():
    """JSON has no NaN."""
    with pytest.raises(ValueError, match="JSON"):
        event_to_json(AlphaChanged(**WHEN, graft=1, alpha=float("nan")))


def test_stages_are_stages_whoever_wrote_them():
    """A stage that was read, or given as a word, is the member; another word is refused."""
    line = next(line for line in WRITTEN if '"culled"' in line)
    event = event_from_json(line)
    assert event.before is GraftStage.AUDITION
    assert event.after is GraftStage.CULLED
    with pytest.raises(ValueError, match="removed"):
        event_from_json(line.replace('"culled"', '"removed"'))


WRONG_TYPES = {
    "update": ('"ten"', "10.5", "true", "null", "[]"),
    "time_s": ('"soon"', "NaN", "Infinity", "1e999", "1" + "0" * 400, "false", "null"),
    "run_id": ("7", "null", '"\\ud800"'),
    "metrics": ("[]", '{"accuracy": "high"}', '{"accuracy": null}'),
    "train_loss": ('"low"', "{}"),
}
"""Values that are of another type than their field, of an event that is read."""


@pytest.mark.parametrize(
    ("field", "text"), [(field, text) for field, texts in WRONG_TYPES.items() for text in texts]
)
def test_a_value_of_another_type_is_refused_by_its_field(field, text):
    """So that nothing that reads a log fails at it later; the control is the same line without."""
    event = Evaluated(
        update=1, time_s=0.5, gate_loss=1, train_loss=2.0, metrics={"accuracy": 1}, run_id="a"
    )
    line = event_to_json(event)
    assert event_from_json(line) == event
    known = json.dumps(getattr(event, field))
    with pytest.raises(ValueError, match=f"the field '{field}' is "):
        event_from_json(line.replace(f'"{field}": {known}', f'"{field}": {text}'))


def test_what_was_not_measured_is_no_value_of_another_type():
    """Null stands for it where a field may be unknown."""
    event = Evaluated(update=1, time_s=0.5, gate_loss=1.0, train_loss=None, metrics={})
    assert event_from_json(event_to_json(event)) == event


@pytest.mark.parametrize(
    ("kind", "word", "wrong", "field"),
    [
        ("gate_read", '"admission"', '"admissoin"', "gate"),
        ("seed_faulted", '"active"', '"nonsense"', "state"),
        ("seed_faulted", '"active"', "2", "state"),
        ("seed_moved", '"error_recovery"', '"lost"', "after"),
        ("retried", '"recovered"', '"well"', "outcome"),
        ("batch_fitted", '"memory"', '"luck"', "why"),
        ("kernel_prepared", '"fetch"', '"cook"', "what"),
        ("breaker_moved", '"open"', '"ajar"', "after"),
        ("anomaly_seen", '"latency"', '"mood"', "what"),
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
