"""The event log and its replay."""

from pathlib import Path

import pytest

from esper.contracts.events import (
    AlphaChanged,
    Fossilized,
    Noted,
    PassengerRemoved,
    RolledBack,
    RunEnded,
    RunStarted,
    StageChanged,
    TakenOver,
    event_from_json,
)
from esper.contracts.lifecycle import GraftStage
from esper.observability.event_log import EventLog, ReplayedSeed, read_events, replay_structure


def a_stage(graft, after, *, site="0", seed_idx=0, update=1, package=None):
    return StageChanged(
        update=update,
        time_s=0.5,
        graft=graft,
        site=site,
        seed_idx=seed_idx,
        blueprint=f"mlp-{graft}",
        artifact_id=f"{graft:064x}",
        before="",
        after=after,
        reason="",
        package=package,
    )


def a_package(*stages):
    """Return what a log says of a package of two kernels that goes through these stages."""
    return [
        a_stage(graft, stage, site=site, package=1)
        for stage in stages
        for graft, site in ((1, "0"), (2, "head"))
    ]


def a_switch(*, folded=False):
    return TakenOver(
        update=4,
        time_s=0.5,
        package=1,
        taken="null" if folded else "candidate",
        grafts=(1, 2),
        sites=("0", "head"),
        folded=folded,
    )


def an_alpha(graft, alpha):
    return AlphaChanged(update=2, time_s=0.5, graft=graft, alpha=alpha)


def a_seed(graft, stage, **other):
    return ReplayedSeed(
        **{
            "seed_idx": 0,
            "graft": graft,
            "blueprint": f"mlp-{graft}",
            "artifact_id": f"{graft:064x}",
            "stage": stage,
        }
        | other
    )


def test_what_is_published_is_read_back(tmp_path):
    """A log returns the very events, in order, whatever characters they hold."""
    events = [
        RunStarted(update=0, time_s=0.0, settings={"goal": "min"}),
        Noted(update=3, time_s=0.1, text="Zeile\nzwei ü\u2028drei"),
        RunEnded(update=9, time_s=0.2, grafts_admitted=0, grafts_fossilized=0, reason="end"),
    ]
    path = tmp_path / "folder" / "events.jsonl"
    with EventLog(path) as log:
        for event in events:
            log.publish(event)
    assert read_events(path) == events


def test_every_event_is_on_disk_at_once(tmp_path):
    """A reader sees an event while the log is still open."""
    path = tmp_path / "events.jsonl"
    with EventLog(path) as log:
        log.publish(an_alpha(1, 0.5))
        assert read_events(path) == [an_alpha(1, 0.5)]


def test_a_line_that_was_cut_off_is_left_out(tmp_path):
    """After a kill in the middle of a write, all that was finished can be read."""
    path = tmp_path / "events.jsonl"
    with EventLog(path) as log:
        log.publish(an_alpha(1, 0.5))
        log.publish(an_alpha(1, 1.0))
    path.write_bytes(path.read_bytes()[:-5])
    assert read_events(path) == [an_alpha(1, 0.5)]


def test_a_damaged_line_is_named(tmp_path):
    """A line in the middle that is no event raises with the file and the number of the line."""
    path = tmp_path / "events.jsonl"
    with EventLog(path) as log:
        log.publish(an_alpha(1, 0.5))
    path.write_text(path.read_text(encoding="utf-8") + "{}\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"events\.jsonl, line 2"):
        read_events(path)


def test_what_cannot_be_written_is_counted(tmp_path):
    """A sink does not raise: the event is counted, the reason kept, and the next one written."""
    path = tmp_path / "events.jsonl"
    with EventLog(path) as log:
        log.publish(an_alpha(1, float("nan")))
        log.publish(an_alpha(1, 1.0))
    assert log.dropped == 1
    assert "alpha_changed at update 2" in log.error
    assert read_events(path) == [an_alpha(1, 1.0)]


def test_a_closed_log_counts(tmp_path):
    """An event that comes after the end is counted and does not raise."""
    log = EventLog(tmp_path / "events.jsonl")
    log.close()
    log.publish(an_alpha(1, 1.0))
    assert log.dropped == 1


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a disk that is always full")
def test_full_disk_is_counted_and_closing_does_not_raise(tmp_path):
    """A disk without room costs the events, not the run: they are counted, the file is named."""
    path = tmp_path / "events.jsonl"
    path.symlink_to("/dev/full")
    with EventLog(path) as log:
        log.publish(an_alpha(1, 0.5))
    assert log.dropped == 1
    assert "events.jsonl" in log.error


def test_replay_gives_the_seeds_in_the_model():
    """A fossil and a kernel that blends are in the structure, by site and slot, with alpha."""
    events = [
        a_stage(1, "audition"),
        a_stage(1, "blending"),
        an_alpha(1, 1.0),
        a_stage(1, "holding"),
        a_stage(1, "fossilized"),
        Fossilized(
            update=5, time_s=1.0, graft=1, site="0", folded=True, rel_diff=1e-8, reason="affine"
        ),
        a_stage(3, "blending", site="head", seed_idx=1),
        a_stage(2, "blending", site="head", seed_idx=0),
        an_alpha(2, 0.0),
    ]
    assert replay_structure(events) == {
        "0": [a_seed(1, GraftStage.FOSSILIZED, alpha=1.0, folded=True)],
        "head": [
            a_seed(2, GraftStage.BLENDING, alpha=0.0),
            a_seed(3, GraftStage.BLENDING, seed_idx=1),
        ],
    }


@pytest.mark.parametrize(
    "last",
    [
        [a_stage(1, "culled")],
        [RolledBack(update=9, time_s=1.0, graft=1, updates_lost=4, reason="worse")],
    ],
    ids=["culled", "rolled back"],
)
def test_replay_forgets_what_was_removed(last):
    """A culled or rolled back graft is not in the structure; before that it was."""
    events = [a_stage(1, "audition"), a_stage(1, "holding")]
    assert replay_structure(events) != {}
    assert replay_structure(events + last) == {}


def test_an_audition_is_no_structure():
    """A graft that only germinated or is in audition is no part of the model."""
    assert replay_structure([a_stage(1, "germinated"), a_stage(2, "audition")]) == {}


def test_a_fold_may_be_told_before_the_stage():
    """The order of the two events of one fossilization does not matter."""
    fold = Fossilized(
        update=5, time_s=1.0, graft=1, site="0", folded=True, rel_diff=0.0, reason="affine"
    )
    structure = replay_structure([a_stage(1, "holding"), fold, a_stage(1, "fossilized")])
    assert structure == {"0": [a_seed(1, GraftStage.FOSSILIZED, folded=True)]}


def test_a_trial_is_no_structure():
    """While its package trains in a twin a kernel is no part of the model; then it may be."""
    assert replay_structure(a_package("germinated", "trial")) == {}
    assert replay_structure(
        [*a_package("germinated", "trial"), a_switch(), *a_package("holding")]
    ) == {
        "0": [a_seed(1, GraftStage.HOLDING)],
        "head": [a_seed(2, GraftStage.HOLDING)],
    }


def test_a_passenger_is_no_structure():
    """It leaves, and the rest of its package stays."""
    left = PassengerRemoved(
        update=9,
        time_s=1.0,
        package=1,
        graft=2,
        site="head",
        rise=0.0,
        upper=0.1,
        allowed=0.2,
        reason="idle",
    )
    assert set(replay_structure([*a_package("trial", "holding"), left])) == {"0"}


def test_a_package_that_is_rolled_back_leaves_as_one():
    """One event takes all of its kernels out, and nobody else's."""
    gone = RolledBack(update=9, time_s=1.0, graft=0, package=1, updates_lost=4, reason="worse")
    events = [a_stage(3, "fossilized", site="fc", package=2), *a_package("trial", "holding")]
    assert set(replay_structure(events)) == {"0", "fc", "head"}
    assert set(replay_structure([*events, gone])) == {"fc"}


def test_a_package_that_folds_at_its_switch_is_folded():
    """As a null may be: its kernels are in the host's weights at once."""
    structure = replay_structure(
        [*a_package("trial"), a_switch(folded=True), *a_package("holding")]
    )
    assert all(seed.folded for seeds in structure.values() for seed in seeds)


def test_events_that_are_not_known_are_passed_over(tmp_path):
    """A log of a later version is written again as it was, and its structure can be replayed."""
    line = '{"format_version": "1.9", "kind": "pruned",  "update": 3}'
    path = tmp_path / "events.jsonl"
    with EventLog(path) as log:
        log.publish(event_from_json(line))
        log.publish(a_stage(1, "holding"))
    assert path.read_text(encoding="utf-8").splitlines()[0] == line
    assert replay_structure(read_events(path)) == {"0": [a_seed(1, GraftStage.HOLDING)]}


def test_a_log_of_format_1_replays_to_the_structure_that_its_run_had():
    """The kernel that its report calls fossilized, and no other."""
    files = Path(__file__).parents[1] / "contracts" / "files"
    structure = replay_structure(read_events(files / "events-1.jsonl"))
    ((site, (seed,)),) = structure.items()
    assert (site, seed.graft, seed.stage) == ("0", 1, GraftStage.FOSSILIZED)
