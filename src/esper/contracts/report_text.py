"""What a run says in words: its headline, which terminal and page share, and its plain text."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from esper.contracts.lifecycle import GraftStage
from esper.contracts.report import ONE_RUN_EACH, OPTIMISTIC

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from esper.contracts.report import GraftRecord, RunReport, StageRecord, TrialRecord

WORDS: Final[Mapping[str, str]] = {
    "live run": "the run itself, which trains on untouched while a package is tried",
    "package": "kernels for several sites, tried together and judged as one",
    "twin": "a copy of the run that trains beside it on the same batches",
    "candidate": "the twin that has the package",
    "null": "the twin that has the same package made linear: treated alike, without its capacity",
    "capacity": "candidate against null: what a package adds beyond its treatment",
    "treatment": "null against live run: what fresh parameters at a warm rate bring by themselves",
    "going on": (
        "what the trial's FLOPs would have brought as plain training, by the run's own curve: it "
        "tells missing training from missing capacity"
    ),
    "spread": "how far equal runs come out apart; standard errors are widened by it",
    "watch": "the updates after a switch in which a rise of the gate loss puts everything back",
    "passenger": "a kernel that its package does as well without",
    "dependence": (
        "what switching a kernel off costs: how much the model leans on it, not what it brought"
    ),
}
"""Words of a trial, each in a few others."""

_UNNEEDED: Final = (
    'Whether the run needed a graft nobody measured: attribution="trial" tells capacity from '
    "treatment, and esper grow --control trains the same job without growth."
)
_UNMEASURED_END: Final = (
    "What growth brought by the end of the run nobody measured: esper grow --control trains the "
    "same job without growth."
)
_NEVER_COMPARED: Final = (
    "Nothing here was compared with a network of the final size trained from scratch, nor with a "
    "random choice of site and kernel."
)
_DEPTH_ALONE: Final = (
    "A stage is planned and no gate decides about it: what the final depth from the start, or the "
    "smaller model for the same FLOPs, would have come to was not compared."
)
_AFTER_A_GATE: Final = frozenset({"culled at admission", "culled after admission", "fossilized"})


def headline(report: RunReport) -> str:
    """Return what was kept, what it was held against, and what it did and did not beat.

    It is what terminal, page and ``str(report)`` say, word for word. Only what was met is counted:
    a package whose verdict was read, a kernel that came to a gate.
    """
    return " ".join(headline_sentences(report))


def headline_sentences(report: RunReport) -> list[str]:
    """Return the sentences of the headline, for a page that sets the first one larger."""
    told = [*_of_packages(report), *_of_single_grafts(report), *_of_stages(report)]
    if not told:
        told = ["Growth tried nothing here, so there is nothing that it beat."]
    return [*told, *_of_the_end(report)]


def run_lines(report: RunReport) -> Iterator[str]:
    """Yield a run as plain text, a line at a time; the headline is the first of a whole run."""
    if report.interrupted:
        yield f"Stopped after {report.updates:,} updates, before the end of the run."
    yield headline(report)
    yield (
        f"{report.updates:,} updates, {report.parameters_before:,} parameters before and "
        f"{report.parameters_after:,} after; {work_text(report)}."
    )
    yield from _loss_lines(report)
    if report.comparison is not None:
        found = str(report.comparison)
        yield f"Did it help? {found[0].upper()}{found[1:]}{_hint(report)}. {ONE_RUN_EACH}"
    yield from _parts_lines(report)
    yield from (f"Note: {note}" for note in report.notes)


def words_for(report: RunReport) -> dict[str, str]:
    """Return the words that a report uses and that need others to be understood."""
    single = any(graft.dependence is not None for graft in report.grafts)
    shown = set(WORDS) if report.trials else ({"dependence"} if single else set())
    return {word: text for word, text in WORDS.items() if word in shown}


def work_text(report: RunReport) -> str:
    """Say what growing took of a run, in FLOPs and in time, without an end mark."""
    if report.updates and not report.work.get("training"):
        return "what share of the work was growing is not known, since no batch= was given"
    if report.work_unit == "passes":
        return f"{report.overhead_share:.1%} of the work was growing"
    limit = report.overhead_limit
    most = "" if limit is None else f" of at most {flops_text(limit)}"
    took = (
        f"growing took {flops_text(report.overhead)}{most}, {report.overhead_share:.1%} of what "
        "training did"
    )
    training = report.seconds.get("training")
    if training is None:
        return took
    return f"{took}, and {sum(report.seconds.values()) - training:,.1f} s beside {training:,.1f} s"


def flops_text(value: float | None) -> str:
    """Return FLOPs with a decimal prefix: ``"1.24 GFLOP"``; what is not known is a dash."""
    if value is None:
        return "\u2013"
    for prefix, size in (("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(value) >= size:
            return f"{value / size:.3g} {prefix}FLOP"
    return f"{value:.0f} FLOP"


def with_error(value: float | None, stderr: float | None, form: str = ".3g") -> str:
    """Return a number with its standard error: ``"0.0412 +- 0.0101"``; unknown is a dash."""
    if value is None:
        return "\u2013"
    return f"{value:{form}}" + ("" if stderr is None else f" \u00b1 {stderr:.2g}")


def _hint(report: RunReport) -> str:
    return f" ({OPTIMISTIC})" if report.optimistic else ""


def _plural(count: int, word: str) -> str:
    return f"{count} {word}{'' if count == 1 else 's'}"


def _listing(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


def _counted(counts: Mapping[str, int]) -> str:
    """Say how many came to which end: ``"1 was kept and 2 were refused"``."""
    ends = [
        f"{count} {'was' if count == 1 else 'were'} {end}" for end, count in counts.items() if count
    ]
    return _listing(ends)


_ENDS: Final = {
    "kept": "kept",
    "taken over": "taken over, with the watch not over yet",
    "rolled back": "taken over and rolled back",
    "refused": "refused",
}


def _of_packages(report: RunReport) -> Iterator[str]:
    if not report.trials:
        return
    met = [trial for trial in report.trials if trial.was_read]
    yield from _verdicts(report, met)
    inside = [trial for trial in met if trial.verdict in ("kept", "taken over")]
    if len(inside) == 1:
        yield _what_one_beat(inside[0], report)
        yield _going_on(inside[0])
    elif inside:
        yield from _what_several_beat(inside, report)
    left = [graft for graft in report.grafts if graft.verdict == "removed as a passenger"]
    if left:
        kernels = sum(len(trial.grafts) for trial in report.trials if trial.taken)
        role = "a passenger" if len(left) == 1 else "passengers"
        yield f"Of {_plural(kernels, 'kernel')} that were taken over {len(left)} left as {role}."


def _verdicts(report: RunReport, met: Sequence[TrialRecord]) -> Iterator[str]:
    """Say how many packages met the live run, and what became of them."""
    others = len(report.trials) - len(met)
    when = "when the run was stopped" if report.interrupted else "by the end of the run"
    if not met:
        yield f"Growth kept nothing: {_plural(others, 'package')} had no verdict {when}."
        return
    if len(met) == 1:
        (only,) = met
        why = "" if only.verdict in ("kept", "taken over") else f": {_reason(only)}"
        end = _ENDS.get(only.verdict, only.verdict)
        yield f"The one package that met the live run was {end}{why}."
    else:
        counts = {end: sum(t.verdict == name for t in met) for name, end in _ENDS.items()}
        yield f"Of the {len(met)} packages that met the live run {_counted(counts)}."
    if others:
        yield f"{_plural(others, 'more package')} had no verdict {when}."


def _reason(trial: TrialRecord) -> str:
    cost = f", which cost {_plural(trial.updates_lost, 'update')}" if trial.updates_lost else ""
    return f"{trial.reason or 'it was not shown to beat it'}{cost}"


def _what_one_beat(trial: TrialRecord, report: RunReport) -> str:
    """Say what the one package in the model beat, and what not."""
    after = f"the live run after the same {trial.trial_updates:,} updates"
    hint = f"; {OPTIMISTIC}" if report.optimistic else ""
    fall = f"gate loss lower by {with_error(*trial.brought)}{hint}"
    who = f"Package {trial.package}" if len(report.trials) > 1 else "It"
    if trial.taken == "null":
        return (
            f"{who} was taken over made linear, as which it beat {after} ({fall}): the gain is "
            "treatment, and no capacity was added."
        )
    return f"{who} beat {after} ({fall}){_capacity(trial)}."


def _capacity(trial: TrialRecord) -> str:
    found = with_error(trial.capacity, trial.capacity_stderr)
    if trial.capacity_shown is None:
        return "; whether that is capacity or treatment alone was not measured"
    if trial.capacity_shown:
        least = "at least " if trial.capacity_is_lower_bound else ""
        return f" and itself made linear (by {least}{found}): capacity was shown"
    return (
        f", but was not shown to beat itself made linear ({found}): the gain may be treatment alone"
    )


def _going_on(trial: TrialRecord) -> str:
    found = with_error(trial.going_on, trial.going_on_stderr)
    if trial.beat_going_on is None:
        known = "" if trial.going_on is None else f" (about {found})"
        return f"Whether going on for the same FLOPs would have done as well is not known{known}."
    if trial.beat_going_on:
        return f"It brought more than going on for the same FLOPs would have ({found})."
    return (
        f"It was not shown to bring more than going on for the same FLOPs would have ({found}): "
        "training may be what is missing, and not capacity."
    )


def _what_several_beat(inside: Sequence[TrialRecord], report: RunReport) -> Iterator[str]:
    """Say in counts what the packages in the model beat, and what not."""
    total = len(inside)
    yield f"Each of the {total} in the model beat the live run at equal updates{_hint(report)}."
    linear = sum(trial.taken == "null" for trial in inside)
    shown = sum(trial.taken != "null" and trial.capacity_shown is True for trial in inside)
    unread = sum(trial.taken != "null" and trial.capacity_shown is None for trial in inside)
    words = [f"for {shown} capacity was shown against the package made linear"]
    if linear:
        words.append(f"{linear} {'is' if linear == 1 else 'are'} the linear form itself")
    if unread:
        words.append(f"for {unread} nobody measured it")
    if total - shown - linear - unread:
        words.append(f"for {total - shown - linear - unread} it was not shown")
    yield f"Of them, {_listing(words)}."
    more = sum(trial.beat_going_on is True for trial in inside)
    yield f"{more} of {total} brought more than going on for the same FLOPs would have."


def _of_single_grafts(report: RunReport) -> Iterator[str]:
    """Say what became of kernels that were auditioned one by one."""
    alone = [graft for graft in report.grafts if graft.package is None]
    if not alone:
        return
    if report.settings.get("verify") == "fork":
        yield _against_twins(alone)
        return
    met = [g for g in alone if g.verdict in _AFTER_A_GATE or g.admitted_at is not None]
    kept = sum(graft.stage is GraftStage.FOSSILIZED for graft in met)
    inside = sum(graft.stage in (GraftStage.BLENDING, GraftStage.HOLDING) for graft in met)
    if not met:
        yield f"Growth kept nothing: {_plural(len(alone), 'kernel')} came to no gate."
        return
    counts = {
        "kept": kept,
        "in the model without a verdict": inside,
        "dropped": len(met) - kept - inside,
    }
    who = f"Of the {len(met)} kernels that came to a gate {_counted(counts)}"
    if len(met) == 1:
        who = f"The one kernel that came to a gate {_counted(counts).removeprefix('1 ')}"
    yield f"{who}."
    yield "An audition beside a frozen host does not say what a kernel brings to a run."


def _against_twins(grafts: Sequence[GraftRecord]) -> str:
    met = [graft for graft in grafts if graft.contribution is not None]
    if not met:
        return f"Growth kept nothing: {_plural(len(grafts), 'graft')} met no twin."
    wins = sum(g.stage is GraftStage.FOSSILIZED and (g.contribution or 0.0) > 0.0 for g in met)
    lost = len(met) - wins
    good = f"Growth beat a twin without the graft in {wins} of {len(met)} that met one"
    return f"{good}, and was not shown to in {lost}." if lost else f"{good}."


def _of_stages(report: RunReport) -> Iterator[str]:
    for stage in report.stages:
        yield f"In {stage.path}, {_stage_text(stage)}."
    if report.stages:
        yield _DEPTH_ALONE


def _stage_text(stage: StageRecord) -> str:
    before = stage.depth - len(stage.blocks)
    went = {
        "awake": f"awake blocks went from {before} to {stage.depth}",
        "waking": f"awake blocks are on their way from {before} to {stage.depth}",
        "put to sleep": f"awake blocks were put back from {stage.depth} to {before}",
    }
    why = f", since {stage.reason}" if stage.verdict == "put to sleep" and stage.reason else ""
    losses = {"before": stage.loss_before, "after": stage.loss_after}
    known = [f"{loss:.4g} {when}" for when, loss in losses.items() if loss is not None]
    seen = f" (loss {_listing(known)})" if known else ""
    return f"{went[stage.verdict]}{why}{seen}"


def _of_the_end(report: RunReport) -> Iterator[str]:
    """Say what the whole run was compared with, and what nobody measured."""
    inside = [t for t in report.trials if t.verdict in ("kept", "taken over")]
    alone = [g for g in report.grafts if g.package is None and g.admitted_at is not None]
    if report.end_capacity is not None:
        yield _end_capacity(report)
    if report.comparison is not None:
        found = f"{report.comparison}{_hint(report)}"
        yield f"Against the same job without growth, {found}, in one run each."
    elif (inside or alone) and report.end_capacity is None:
        met_a_null = any(trial.capacity_shown is not None for trial in inside)
        met_a_twin = any(graft.contribution is not None for graft in alone)
        yield _UNMEASURED_END if met_a_null or met_a_twin else _UNNEEDED
    if report.trials or report.grafts:
        yield _NEVER_COMPARED


def _end_capacity(report: RunReport) -> str:
    found = with_error(report.end_capacity, report.end_capacity_stderr)
    if report.end_capacity_shown:
        return f"At the end of the run it beat the package made linear by {found}{_hint(report)}."
    return (
        "At the end of the run it was not shown to beat the package made linear "
        f"({found}{_hint(report)})."
    )


def _loss_lines(report: RunReport) -> Iterator[str]:
    hint, lost = _hint(report), report.is_lost("gate loss")
    if report.evaluations:
        first, last = report.evaluations[0], report.evaluations[-1]
        if lost is None:
            end = f"{last.gate_loss:.4g} at the end"
        else:
            seen = f"{last.gate_loss:.4g} at update {last.update:,}"
            end = f"{lost.value} at the end (since update {lost.since:,}; the last finite: {seen})"
        yield f"Gate loss{hint}: {first.gate_loss:.4g} at first, {end}."
        for name in [name for name in first.metrics if name in last.metrics]:
            values = f"{first.metrics[name]:.4g} at first, {last.metrics[name]:.4g} at the end"
            yield f"Gate {name}{hint}: {values}."
    elif lost is not None:
        yield f"Gate loss{hint}: {lost.value} at first, {lost.value} at the end."
    for other in report.not_finite:
        if other.what != "gate loss" and other.until is None:
            name = other.what[0].upper() + other.what[1:]
            yield f"{name}: {other.value} at the end, since update {other.since:,}."
    for name, value in report.test_metrics.items():
        yield f"Test {name}: {value:.4g}"


def _parts_lines(report: RunReport) -> Iterator[str]:
    """Yield trials, grafts and stages, and then the words that they use."""
    if report.trials:
        yield f"Trials: {_plural(len(report.trials), 'package')}"
        for trial in report.trials:
            yield from _trial_lines(trial, report)
    if report.grafts or not report.stages:
        yield f"Grafts: {len(report.grafts) or 'none'}"
        for graft in report.grafts:
            yield from _graft_lines(graft)
    if report.stages:
        yield f"Stages of depth: {len(report.stages)}"
        for stage in report.stages:
            work = "" if stage.flops is None else f", {flops_text(stage.flops)} at that depth"
            yield f"  update {stage.started_at:,}, {stage.path}: {_stage_text(stage)}{work}"
    words = words_for(report)
    if words:
        yield "Words:"
        yield from (f"  {word}: {text}" for word, text in words.items())


def _trial_lines(trial: TrialRecord, report: RunReport) -> Iterator[str]:
    kernels = _listing(
        [f"{b} at {s}" for b, s in zip(trial.blueprints, trial.sites, strict=True)] or ["nothing"]
    )
    why = f" ({trial.reason})" if trial.reason else ""
    yield f"  {trial.package}. {trial.parameters:,} parameters: {trial.verdict}{why}"
    yield f"     {kernels}"
    if trial.was_read:
        needed = "" if trial.z is None or trial.threshold is None else _needed(trial)
        found = with_error(trial.effect, trial.stderr, "+.3g")
        yield f"     candidate against live run, loss saved{_hint(report)}: {found}{needed}"
    known = {
        "null against live run": (trial.null_effect, trial.null_stderr),
        "capacity": (trial.capacity, trial.capacity_stderr),
        "going on": (trial.going_on, trial.going_on_stderr),
    }
    shown = [f"{name} {with_error(*v, '+.3g')}" for name, v in known.items() if v[0] is not None]
    if shown:
        yield f"     {', '.join(shown)}"
    yield from _switch_lines(trial)


def _needed(trial: TrialRecord) -> str:
    return (
        f", z = {trial.z:.2f} ({trial.threshold:.2f} needed, spread {trial.spread:.2g}, "
        f"{trial.samples:,} samples)"
    )


def _switch_lines(trial: TrialRecord) -> Iterator[str]:
    if trial.taken:
        losses = (trial.gate_loss_before, trial.gate_loss_after)
        before, after = (with_error(loss, None, ".4g") for loss in losses)
        yield f"     switched to the {trial.taken}: gate loss {before} before and {after} after"
    if trial.updates_lost:
        yield f"     going back cost {trial.updates_lost:,} updates"


def _graft_lines(graft: GraftRecord) -> Iterator[str]:
    package = "" if graft.package is None else f", package {graft.package}"
    yield (
        f"  {graft.graft}. {graft.blueprint} at {graft.site}, {graft.parameters:,} parameters"
        f"{package}: {graft.verdict} ({graft.reason})"
    )
    measured = {
        "contribution": graft.contribution,
        "against the host alone": graft.host_only_contribution,
        "dependence": graft.dependence,
    }
    known = [f"{name} {value:+.4g}" for name, value in measured.items() if value is not None]
    if known:
        yield f"     loss saved: {', '.join(known)}"
    if graft.updates_lost:
        yield f"     its removal cost {graft.updates_lost:,} updates"
