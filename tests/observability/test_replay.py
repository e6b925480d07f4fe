"""A run put together again from its log; the tests of the Grower hold it to live runs as well."""

from dataclasses import replace
from pathlib import Path

import pytest
from replay_checks import in_a_log

from esper.contracts.events import (
    STOPPED,
    Noted,
    RolledBack,
    RunEnded,
    SeedMeasured,
    StageChanged,
    TakenOver,
    TrialStarted,
    event_from_json,
)
from esper.contracts.report import run_report_from_json
from esper.observability.event_log import read_events
from esper.observability.replay import Course, replay
from esper.observability.report_page import run_page

FILES = Path(__file__).parents[1] / "contracts" / "files"
AN_END = RunEnded(update=9, time_s=0.2, grafts_admitted=0, grafts_fossilized=0, reason="it ended")


def a_note(**other):
    return Noted(**({"update": 3, "time_s": 0.1, "text": "a word"} | other))


def stages_of(graft, *stages, package=None):
    """Return the events of a graft that goes through these stages, an update each."""
    return [
        StageChanged(
            update=place,
            time_s=0.5,
            graft=graft,
            site="0",
            seed_idx=0,
            blueprint="mlp",
            artifact_id=f"{graft:064x}",
            before=("", *stages)[place],
            after=stage,
            reason=f"then {stage}",
            package=package,
        )
        for place, stage in enumerate(stages)
    ]


def a_start():
    return TrialStarted(
        update=1,
        time_s=0.5,
        package=1,
        grafts=(1,),
        sites=("0",),
        blueprints=("mlp",),
        parameters=80,
        trial_updates=50,
    )


def a_switch():
    return TakenOver(update=2, time_s=0.5, package=1, taken="candidate", grafts=(1,), sites=("0",))


def test_a_log_of_format_1_gives_its_runs_report():
    """All but what no event of that format told, its contributions among it."""
    told = in_a_log(replay(read_events(FILES / "events-1.jsonl")).report)
    reported = in_a_log(run_report_from_json((FILES / "run-1.json").read_text(encoding="utf-8")))
    for name in ("settings", "updates", "evaluations", "timeline", "alphas", "notes", "stages"):
        assert told[name] == reported[name]
    named = ("graft", "site", "stage", "verdict", "reason", "decided_at", "folded", "parameters")
    for mine, other in zip(told["grafts"], reported["grafts"], strict=True):
        assert [mine[name] for name in named] == [other[name] for name in named]


@pytest.mark.parametrize(
    ("path", "verdict"),
    [
        (("germinated", "audition"), "in progress"),
        (("germinated", "audition", "culled"), "culled in audition"),
        (("germinated", "audition", "blending", "culled"), "culled after admission"),
        (("germinated", "audition", "blending", "holding", "fossilized"), "fossilized"),
    ],
    ids=lambda value: value if isinstance(value, str) else value[-1],
)
def test_a_grafts_verdict_follows_from_its_stages(path, verdict):
    """A log has no verdict of a graft in words: the stages say it."""
    (graft,) = replay(stages_of(1, *path)).report.grafts
    assert (graft.verdict, graft.stage, graft.reason) == (verdict, path[-1], f"then {path[-1]}")


def test_a_trial_without_a_verdict_was_given_up():
    """As where a run was closed in the middle of one: package and kernel are refused, and why."""
    first, *then = stages_of(1, "germinated", "trial", "culled", package=1)
    report = replay([first, a_start(), *then]).report
    assert (report.trials[0].verdict, report.trials[0].reason) == ("refused", "then culled")
    assert report.grafts[0].verdict == "refused in trial"
    assert (report.trials[0].started_at, report.grafts[0].parameters) == (1, 80)


def test_what_a_package_that_went_back_cost_is_told():
    """Of the package, and of each of its kernels."""
    first, *then = stages_of(1, "germinated", "trial", "holding", "culled", package=1)
    gone = RolledBack(update=4, time_s=1.0, graft=0, package=1, updates_lost=40, reason="worse")
    report = replay([first, a_start(), *then[:2], a_switch(), *then[2:], gone]).report
    assert (report.trials[0].verdict, report.trials[0].updates_lost) == ("rolled back", 40)
    assert (report.grafts[0].verdict, report.grafts[0].updates_lost) == ("rolled back", 40)


@pytest.mark.parametrize(
    ("events", "words"),
    [
        ([a_note()], "the log ends at update 3 without the end of its run"),
        (
            [a_note(seq=0), a_note(seq=3), replace(AN_END, seq=4)],
            "the log lacks 2 of its run's events",
        ),
        ([a_note(seq=5), replace(AN_END, seq=6)], "the log lacks 5 of its run's events"),
        (
            [event_from_json('{"format_version": "1.9", "kind": "pruned"}'), AN_END],
            "1 of the log's events are of a kind that this Esper does not know, 'pruned'",
        ),
    ],
    ids=["killed", "a gap", "begins late", "a kind of later"],
)
def test_what_is_odd_about_a_log_is_said(events, words):
    """A note of the report says what the log cannot tell of its run."""
    assert any(words in note for note in replay(events).report.notes)


@pytest.mark.parametrize(
    ("last", "interrupted"),
    [(AN_END, False), (a_note(), True), (replace(AN_END, reason=STOPPED), True)],
    ids=["to its end", "killed", "interrupted"],
)
def test_a_run_without_its_end_was_interrupted(last, interrupted):
    """So was one whose log says that its owner stopped it."""
    assert replay([a_note(), last]).report.interrupted is interrupted


def test_an_empty_log_is_refused():
    """A run that was killed before its first event has nothing to show."""
    with pytest.raises(ValueError, match="no event"):
        replay([])


def test_a_page_does_not_make_up_what_is_not_known():
    """Neither sizes nor work are zero where no log says them."""
    page = run_page(replay([a_note(), AN_END]).report)
    assert "What growing took is not known." in page
    assert "0 FLOP" not in page


def test_a_log_cut_inside_a_letter_is_read_up_to_its_last_line(tmp_path):
    """A kill may leave half of a letter's bytes."""
    text = (FILES / "events-1.jsonl").read_bytes()
    path = tmp_path / "events.jsonl"
    path.write_bytes(text + '{"text": "\u00fc'.encode()[:-1])
    assert read_events(path) == read_events(FILES / "events-1.jsonl")


def measured(update, site):
    at = {"run_id": "0" * 32, "time_s": 1.0, "seq": update}
    return SeedMeasured(**at, update=update, site=site, seed_idx=0, state="active")


def test_a_seed_that_is_not_told_of_any_more_has_gone():
    """All that contribute are told of at the same updates."""
    told = [measured(100, "a"), measured(100, "b"), measured(200, "b"), measured(200, "c")]
    course = Course()
    for event in told:
        course.take(event)
    assert [seed.site for seed in course.report().seeds] == ["b", "c"]
