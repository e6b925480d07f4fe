"""What a run says of itself: every sentence is true of what happened."""

from dataclasses import replace

import pytest

from esper.contracts.lifecycle import GraftStage
from esper.contracts.report import (
    Evaluation,
    GraftRecord,
    RunReport,
    StageRecord,
    TrialRecord,
)
from esper.contracts.report_text import ONE_RUN_EACH, OPTIMISTIC, flops_text
from esper.contracts.run_report import headline, words_for, work_text

FROM_SCRATCH = "Nothing here was compared with a network of the final size trained from scratch"
NOBODY_MEASURED = "Whether the run needed a graft nobody measured"


def a_trial(package=1, **other):
    """Return a package that was kept on all the evidence that there can be."""
    values = {
        "package": package,
        "grafts": (2 * package - 1, 2 * package),
        "sites": ("0", "3"),
        "blueprints": ("mlp", "conv"),
        "parameters": 80,
        "started_at": 10,
        "trial_updates": 50,
        "decided_at": 60,
        "verdict": "kept",
        "taken": "candidate",
        "reason": "the loss falls by 0.5, z = 5 above 1.65",
        "spread": 1.6,
        "samples": 400,
        "effect": 0.5,
        "stderr": 0.1,
        "z": 5.0,
        "threshold": 1.65,
        "null_effect": 0.1,
        "null_stderr": 0.1,
        "capacity": 0.4,
        "capacity_stderr": 0.1,
        "capacity_shown": True,
        "going_on": 0.1,
        "going_on_stderr": 0.05,
    }
    return TrialRecord(**(values | other))


REFUSED = {"verdict": "refused", "taken": "", "reason": "not beyond luck: z = 0.30"}
UNREAD = {
    "verdict": "in trial",
    "taken": "",
    "decided_at": None,
    "effect": None,
    "z": None,
    "reason": "",
}


def a_graft(**other):
    values = {
        "graft": 1,
        "site": "0",
        "seed_idx": 0,
        "blueprint": "mlp",
        "artifact_id": "a" * 64,
        "stage": GraftStage.FOSSILIZED,
        "verdict": "fossilized",
        "reason": "it held",
        "parameters": 40,
        "germinated_at": 10,
        "admitted_at": 60,
        "decided_at": 90,
    }
    return GraftRecord(**(values | other))


def a_run(*trials, **other):
    values = {
        "settings": {"trial": "twin"},
        "updates": 100,
        "parameters_before": 358,
        "parameters_after": 438,
        "trials": trials,
    }
    return RunReport(**(values | other))


def a_control():
    return a_run(evaluations=(Evaluation(update=100, gate_loss=0.9),))


def said(*trials, **other):
    return headline(a_run(*trials, **other))


def test_a_kept_package_is_told_with_all_that_it_beat():
    """The live run, itself made linear, and going on; with what it was not compared with."""
    text = said(a_trial())
    for words in (
        "The one package that met the live run was kept.",
        "It beat the live run after the same 50 updates (gate loss lower by 0.5 \u00b1 0.1",
        "and itself made linear (by 0.4 \u00b1 0.1): capacity was shown.",
        "It brought more than going on for the same FLOPs would have (0.1 \u00b1 0.05).",
        "esper grow --control trains the same job without growth.",
        FROM_SCRATCH,
    ):
        assert words in text
    assert NOBODY_MEASURED not in text


def test_capacity_that_was_not_shown_is_not_claimed():
    """The gain may be treatment, and the headline says that much."""
    text = said(a_trial(capacity=0.05, capacity_shown=False))
    assert "but was not shown to beat itself made linear" in text
    assert "treatment alone" in text
    assert "capacity was shown" not in text


def test_a_null_that_adds_capacity_makes_a_lower_bound():
    """Where the linear form is none the figure is called the least."""
    assert "(by at least 0.4" in said(a_trial(capacity_is_lower_bound=True))


def test_a_null_that_was_taken_over_is_called_treatment():
    """No capacity is claimed for it, and going on is held against what it brought itself."""
    text = said(a_trial(taken="null", null_effect=0.2, capacity=-0.1, capacity_shown=False))
    assert "was taken over made linear" in text
    assert "gate loss lower by 0.2 \u00b1 0.1" in text
    assert "no capacity was added" in text
    assert "It was not shown to bring more than going on for the same FLOPs" in text


def test_a_gain_that_going_on_would_have_brought_is_told_as_such():
    """An owner sees whether capacity is missing or only training."""
    text = said(a_trial(going_on=0.45))
    assert "not shown to bring more than going on for the same FLOPs would have (0.45" in text
    assert "training may be what is missing" in text


def test_what_going_on_would_have_brought_may_not_be_known():
    """Then nothing is said to be more or less than it."""
    text = said(a_trial(going_on=None, going_on_stderr=None))
    assert "Whether going on for the same FLOPs would have done as well is not known." in text


def test_without_attribution_nobody_measured_whether_it_was_needed():
    """The headline says so, and how to."""
    trial = a_trial(attribution="none", capacity=None, capacity_shown=None)
    text = said(trial, settings={"trial": "twin", "attribution": "none"})
    assert "whether that is capacity or treatment alone was not measured" in text
    assert f'{NOBODY_MEASURED}: attribution="trial"' in text
    assert "esper grow --control" in text


def test_a_refused_package_beat_nothing():
    """Its reason is told, and nothing is asked for: nothing stayed."""
    text = said(a_trial(**REFUSED))
    assert "The one package that met the live run was refused: not beyond luck: z = 0.30." in text
    assert " beat " not in text
    assert "esper grow" not in text


def test_a_package_that_was_rolled_back_is_told_with_its_cost():
    """It is not among those that beat anything."""
    text = said(a_trial(verdict="rolled back", reason="the gate loss rose by 0.2", updates_lost=40))
    assert (
        "was taken over and rolled back: the gate loss rose by 0.2, which cost 40 updates" in text
    )
    assert "It beat" not in text


def test_what_was_met_is_counted_and_not_what_was_tried():
    """A package that was given up before its verdict met nothing."""
    text = said(a_trial(1), a_trial(2, **REFUSED), a_trial(3, **UNREAD))
    assert "Of the 2 packages that met the live run 1 was kept and 1 was refused." in text
    assert "1 more package had no verdict by the end of the run." in text
    assert "Package 1 beat the live run" in text


def test_why_a_package_had_no_verdict_is_said():
    """A loss that raised in a twin is not told as a run that was too short."""
    broken = "its twin could not be trained: RuntimeError: boom"
    unread = {**UNREAD, "reason": broken}
    text = said(a_trial(1, **unread), a_trial(2, **unread))
    assert text.startswith(f"Growth kept nothing: 2 packages had no verdict: {broken}.")


def test_a_measure_of_which_higher_is_better_keeps_its_sign():
    """The controller's loss is the owner's measure turned; it is told as it was given."""
    values = [Evaluation(update=u, gate_loss=v) for u, v in ((1, -0.35), (90, -0.53))]
    report = RunReport(
        settings={"goal": "max"},
        updates=100,
        evaluations=tuple(values),
        parameters_before=1,
        parameters_after=1,
        test_metrics={"loss": 1.0},
    )
    told = "0.35 at first, 0.53 at update 90, which was looked at last."
    assert f"Gate measure, higher is better: {told}" in str(report)


def test_a_run_that_was_stopped_in_a_trial_claims_nothing():
    """The package is named as one without a verdict."""
    text = said(a_trial(**UNREAD), interrupted=True)
    assert text.startswith(
        "Growth kept nothing: 1 package had no verdict when the run was stopped."
    )


def test_a_package_under_watch_is_not_called_kept():
    """It is in the model, and its watch may still put it back."""
    text = said(a_trial(verdict="taken over"), interrupted=True)
    assert "was taken over, with the watch not over yet." in text
    assert "It beat the live run" in text


def test_several_packages_are_told_in_counts():
    """What each kind of evidence showed, by how many; no figure is a sum of others."""
    text = said(
        a_trial(1),
        a_trial(2, capacity_shown=False, going_on=0.5),
        a_trial(3, taken="null"),
        a_trial(4, capacity_shown=None, going_on=None),
    )
    assert "Of the 4 packages that met the live run 4 were kept." in text
    assert "Each of the 4 in the model beat the live run at equal updates" in text
    assert "for 1 capacity was shown against the package made linear" in text
    assert (
        "1 is the linear form itself, for 1 nobody measured it and for 1 it was not shown" in text
    )
    assert "1 of 4 brought more than going on" in text


def test_passengers_are_counted_among_what_was_taken_over():
    """How many kernels left, of how many."""
    left = a_graft(graft=2, stage=GraftStage.CULLED, verdict="removed as a passenger", package=1)
    text = said(a_trial(), grafts=(a_graft(package=1), left))
    assert "Of 2 kernels that were taken over 1 left as a passenger." in text


def test_nothing_tried_beat_nothing():
    """And nothing is asked for that nobody could want."""
    assert said() == "Growth tried nothing here, so there is nothing that it beat."


@pytest.mark.parametrize(
    ("grown", "control", "answer"),
    [
        (7.029, 6.776, "No"),
        (6.776, 7.029, "Yes"),
        (7.0, 7.001, "Not shown"),
        (7.0, 7.0, "Not shown"),
    ],
)
def test_whether_it_helped_is_answered_before_anything_else(grown, control, answer):
    """By the test loss of one run each, and that it is one run each follows."""
    beside = replace(a_run(), test_metrics={"loss": control})
    settings = {"min_effect": 0.001}
    run = replace(a_run(a_trial()), settings=settings, test_metrics={"loss": grown}, control=beside)
    opening = f"Did it help? {answer}: the test loss was {grown:.4g} at the end with growth and"
    assert str(run).startswith(opening)
    assert ONE_RUN_EACH in str(run).splitlines()[0]


def test_a_gate_loss_that_fell_shows_no_help():
    """Growing was decided on it; that it rose is an answer."""
    seen, worse = ((Evaluation(update=100, gate_loss=v),) for v in (0.4, 0.9))
    run, beside = (replace(a_run(), evaluations=e) for e in (seen, worse))
    assert str(replace(run, control=beside)).startswith("Did it help? Not shown: the gate loss")
    assert str(replace(beside, control=run)).startswith("Did it help? No: the gate loss")


@pytest.mark.parametrize(
    ("tested", "words"),
    [
        (
            None,
            "Not shown: the gate measure was 0.9 at the end with growth and 0.4 without: 0.5 more",
        ),
        (0.8, "Yes: the test measure was 0.8 at the end with growth and 0.4 without: 0.4 more"),
        (0.1, "No: the test measure was 0.1 at the end with growth and 0.4 without: 0.3 less"),
    ],
    ids=["no test split", "better", "worse"],
)
def test_a_control_by_a_measure_of_which_higher_is_better(tested, words):
    """It is told in the owner's unit, and more of it is a yes."""
    settings = {"trial": "twin", "goal": "max"}
    seen, beside = (
        replace(a_run(), settings=settings, evaluations=(Evaluation(update=100, gate_loss=v),))
        for v in (-0.9, -0.4)
    )
    if tested is not None:
        seen = replace(seen, test_metrics={"loss": tested})
        beside = replace(beside, test_metrics={"loss": 0.4})
    told = str(replace(seen, control=beside))
    assert told.startswith(f"Did it help? {words}, where higher is better")


def test_a_control_is_what_the_whole_run_is_held_against():
    """Then nobody has to be told how to measure it."""
    seen = (Evaluation(update=100, gate_loss=0.4),)
    text = said(a_trial(), evaluations=seen, control=a_control())
    assert "the gate loss was 0.4 at the end with growth and" in text
    assert "0.9 without: 0.5 less" in text
    assert ONE_RUN_EACH in text
    assert "nobody measured" not in text
    assert FROM_SCRATCH in text


@pytest.mark.parametrize(("shown", "words"), [(True, "it beat"), (False, "was not shown to beat")])
def test_a_null_that_trained_to_the_end_is_told_at_the_end(shown, words):
    """``attribution="run"``: what is claimed at the end was measured at the end."""
    text = said(
        a_trial(attribution="run"),
        end_capacity=0.3,
        end_capacity_stderr=0.1,
        end_capacity_shown=shown,
    )
    assert f"At the end of the run it {words.removeprefix('it ')} the package made linear" in text
    assert "0.3 \u00b1 0.1" in text
    assert "esper grow --control" not in text


def test_of_several_packages_the_last_is_held_against_its_null_at_the_end():
    """The null of an earlier one ends where another is taken over."""
    values = {"end_capacity": 0.3, "end_capacity_stderr": 0.1, "end_capacity_shown": True}
    text = said(a_trial(attribution="run"), a_trial(2, attribution="run"), **values)
    assert "it beat the last package made linear by 0.3" in text


@pytest.mark.parametrize("test_metrics", [{}, {"loss": 0.5}])
def test_gate_figures_are_called_optimistic_where_there_is_no_test_split(test_metrics):
    """In the headline as everywhere else."""
    run = a_run(a_trial(), test_metrics=test_metrics)
    assert (OPTIMISTIC in headline(run)) is not test_metrics
    assert (OPTIMISTIC in str(run)) is (not test_metrics)


def a_shadow_run(*verdicts, **other):
    grafts = tuple(
        a_graft(
            graft=number,
            verdict=verdict,
            stage=GraftStage.FOSSILIZED if verdict == "fossilized" else GraftStage.CULLED,
            admitted_at=60 if verdict in ("fossilized", "culled after admission") else None,
        )
        for number, verdict in enumerate(verdicts, start=1)
    )
    return a_run(settings={"trial": "shadow"}, grafts=grafts, **other)


def test_auditions_are_counted_where_they_came_to_a_gate():
    """One that faulted in its audition met none; and no audition says that growth was needed."""
    text = headline(a_shadow_run("fossilized", "culled at admission", "culled in audition"))
    assert "Of the 2 kernels that came to a gate 1 was kept and 1 was dropped." in text
    assert "does not say what a kernel brings to a run" in text
    assert NOBODY_MEASURED in text
    assert "the live run" not in text


def test_one_audition_is_told_as_one():
    """Kept, or none at all."""
    assert "The one kernel that came to a gate was kept." in headline(a_shadow_run("fossilized"))
    text = headline(a_shadow_run("culled in audition"))
    assert "Growth kept nothing: 1 kernel came to no gate." in text
    assert NOBODY_MEASURED not in text


@pytest.mark.parametrize("verdict", ["culled at admission", "culled after admission"])
def test_a_kernel_that_was_dropped_is_told_with_the_reason(verdict):
    """And with nothing that one which stayed would need."""
    (graft,) = a_shadow_run(verdict).grafts
    graft = replace(graft, reason="not beyond luck: z = 0.30", updates_lost=7)
    text = said(settings={"trial": "shadow"}, grafts=(graft,))
    assert "came to a gate was dropped: not beyond luck: z = 0.30, which cost 7 updates." in text
    assert NOBODY_MEASURED not in text


def test_kernels_that_came_to_no_gate_are_told_beside_those_that_did():
    """As packages without a verdict are."""
    text = headline(a_shadow_run("fossilized", "culled in audition"))
    assert "The one kernel that came to a gate was kept. 1 more kernel came to no gate." in text


@pytest.mark.parametrize(
    ("settings", "cure"),
    [
        ({"trial": "shadow", "attribution": "trial"}, 'trial="twin" holds a package against'),
        ({"trial": "twin", "attribution": "none"}, 'attribution="trial" tells capacity from'),
        ({"trial": "twin", "attribution": "trial"}, "esper grow --control trains the same job"),
    ],
    ids=["shadow", "none", "no linear form"],
)
def test_what_nobody_measured_comes_with_what_would_have(settings, cure):
    """No setting is advised that the run had, or that does nothing in its mode."""
    kernel = {"grafts": (a_graft(),)} if settings["trial"] == "shadow" else {}
    trials = () if kernel else (a_trial(attribution="none", capacity=None, capacity_shown=None),)
    assert f"{NOBODY_MEASURED}: {cure}" in said(*trials, settings=settings, **kernel)


def test_kernels_of_a_package_without_a_trial_are_told():
    """They were made, so that it is not true that nothing was tried."""
    stage = {"stage": GraftStage.CULLED, "admitted_at": None, "package": 1}
    graft = a_graft(**stage, verdict="refused in trial", reason="two twins need 9 GB, 1 GB is free")
    text = said(grafts=(graft,))
    assert text.startswith(
        "For want of a trial 1 kernel met nothing: two twins need 9 GB, 1 GB is free."
    )
    assert "tried nothing" not in text


@pytest.mark.parametrize(
    ("contribution", "words"),
    [
        (0.5, "Growth beat a twin without the graft in 1 of 1 that met one."),
        (-0.5, "in 0 of 1 that met one, and was not shown to in 1."),
        (None, "Growth kept nothing: 1 graft met no twin."),
    ],
)
def test_a_run_of_format_1_is_held_against_its_twins(contribution, words):
    """Only grafts that met one are counted."""
    grafts = (a_graft(contribution=contribution),)
    assert words in said(settings={"verify": "fork"}, grafts=grafts)


def a_stage(**other):
    values = {
        "path": "h",
        "depth": 12,
        "blocks": tuple(f"h.{i}" for i in range(4, 12)),
        "started_at": 80,
        "ramp_updates": 4,
        "ended_at": 84,
        "loss_before": 1.5,
        "loss_after": 1.25,
        "flops": 2e9,
        "verdict": "awake",
    }
    return StageRecord(**(values | other))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, "In h, awake blocks went from 4 to 12 (loss 1.5 before and 1.25 after)."),
        (
            {"verdict": "waking", "loss_after": None},
            "In h, awake blocks are on their way from 4 to 12 (loss 1.5 before).",
        ),
        (
            {"verdict": "put to sleep", "reason": "the loss spiked", "loss_after": None},
            "In h, awake blocks were put back from 12 to 4, since the loss spiked",
        ),
    ],
    ids=["awake", "waking", "put to sleep"],
)
def test_a_stage_of_depth_is_planned_and_said_to_be(changes, words):
    """No gate decided about it, and what it was not compared with is named."""
    text = said(stages=(a_stage(**changes),))
    assert words in text
    assert "no gate decides about it" in text
    assert "the smaller model for the same FLOPs" in text
    assert "beat" not in text


def test_the_headline_comes_first_and_the_rest_has_every_figure():
    """Trials, grafts, stages, work, notes, and the words that they use."""
    run = a_run(
        a_trial(gate_loss_before=0.75, gate_loss_after=0.5),
        grafts=(a_graft(package=1, dependence=0.2),),
        stages=(a_stage(),),
        work={"training": 4e9, "trial": 1e9},
        seconds={"training": 10.0, "trial": 2.5},
        overhead_limit=2e9,
        notes=("AdamW is not fused",),
    )
    lines = str(run).splitlines()
    assert lines[0] == headline(run)
    text = "\n".join(lines)
    for words in (
        "growing took 1 GFLOP of at most 2 GFLOP, 25.0% of what training did",
        "2.5 s beside 10.0 s",
        "1. 80 parameters: kept (the loss falls by 0.5",
        "mlp at 0 and conv at 3",
        "+0.5 \u00b1 0.1, z = 5.00 (1.65 needed, spread 1.6, 400 samples)",
        "null against live run +0.1 \u00b1 0.1, capacity +0.4 \u00b1 0.1, going on +0.1",
        "switched to the candidate: gate loss 0.75 before and 0.5 after",
        "mlp at 0, 40 parameters, package 1: fossilized (it held)",
        "loss saved: dependence +0.2",
        "update 80, h: awake blocks went from 4 to 12",
        "2 GFLOP at that depth",
        "  null: the twin that has the same package made linear",
        "Note: AdamW is not fused",
    ):
        assert words in text


def test_a_run_that_was_stopped_says_so_first():
    """Then comes what it has to say."""
    run = a_run(grafts=(a_graft(updates_lost=40),), interrupted=True)
    lines = str(run).splitlines()
    assert lines[0] == "Stopped after 100 updates, before the end of the run."
    assert lines[1] == headline(run)
    assert "     its removal cost 40 updates" in lines


def test_words_are_explained_where_they_are_used():
    """All of a trial's with a trial, that of a graft's figure with it, none for a run without."""
    assert {"twin", "null", "capacity", "treatment", "passenger"} <= words_for(
        a_run(a_trial())
    ).keys()
    assert words_for(a_run(grafts=(a_graft(dependence=0.1),))).keys() == {"dependence"}
    assert words_for(a_run()) == {}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"work": {}}, "what growing took is not known"),
        ({"work": {"training": 0.0}}, "not known, since no batch= was given"),
        (
            {"work": {"training": 75.0, "shadow": 25.0}, "work_unit": "passes"},
            "25.0% of the work was growing",
        ),
        ({"work": {"training": 4e9, "trial": 1e9}}, "growing took 1 GFLOP, 25.0% of what training"),
        (
            {"work": {"training": 4e9, "evaluation": 1e6}, "overhead_limit": 0.0},
            "of what training did (whatever the limit, the first pass, update of a twin and",
        ),
    ],
    ids=["of a log", "not counted", "passes", "flops", "beyond the limit"],
)
def test_work_is_told_in_its_unit(changes, words):
    """FLOPs over training's, or passes over all as in files of format 1."""
    assert words in work_text(replace(a_run(), **changes))


@pytest.mark.parametrize(
    ("flops", "expected"),
    [(None, "\u2013"), (12.0, "12 FLOP"), (1234.0, "1.23 kFLOP"), (6.3e9, "6.3 GFLOP")],
)
def test_flops_have_a_prefix(flops, expected):
    """FLOPs are written with three digits and a decimal prefix."""
    assert flops_text(flops) == expected
