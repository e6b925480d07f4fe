"""What a report says in words: how packages, grafts and stages of depth are told.

Only what was met is counted: a package whose verdict was read, a kernel that came to a gate. And
only what was measured is claimed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from esper.contracts.lifecycle import GraftStage

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from esper.contracts.run_records import GraftRecord, StageRecord, TrialRecord

OPTIMISTIC: Final = "used for growing: optimistic"
ONE_RUN_EACH: Final = (
    "That is as far as one run of each can tell: another random seed may tell otherwise."
)

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

_DEPTH_ALONE: Final = (
    "A stage is planned and no gate decides about it: what the final depth from the start, or the "
    "smaller model for the same FLOPs, would have come to was not compared."
)
_AFTER_A_GATE: Final = frozenset({"culled at admission", "culled after admission", "fossilized"})


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


def in_brackets(hint: str) -> str:
    """Return a hint in brackets, after a space; nothing for none."""
    return f" ({hint})" if hint else ""


def counted(count: int, word: str) -> str:
    """Return ``"1 package"`` or ``"2 packages"``."""
    return f"{count} {word}{'' if count == 1 else 's'}"


def _listing(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


def _ends_text(counts: Mapping[str, int]) -> str:
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


def of_packages(
    trials: Sequence[TrialRecord],
    grafts: Sequence[GraftRecord],
    *,
    optimistic: bool,
    interrupted: bool,
) -> Iterator[str]:
    """Yield sentences on what became of packages, and what those in the model did and did not beat.

    Args:
        trials: All packages of a run.
        grafts: All grafts of the run.
        optimistic: Whether figures of the gate split are all that there is.
        interrupted: Whether the run was stopped before its end.
    """
    if not trials:
        return
    hint = OPTIMISTIC if optimistic else ""
    met = [trial for trial in trials if trial.was_read]
    end = "when the run was stopped" if interrupted else "by the end of the run"
    yield from _verdicts(met, [trial for trial in trials if not trial.was_read], end)
    inside = [trial for trial in met if trial.verdict in ("kept", "taken over")]
    if len(inside) == 1:
        who = f"Package {inside[0].package}" if len(trials) > 1 else "It"
        yield _what_one_beat(inside[0], who, hint)
        yield _going_on(inside[0])
    elif inside:
        yield from _what_several_beat(inside, hint)
    left = [graft for graft in grafts if graft.verdict == "removed as a passenger"]
    if left:
        kernels = sum(len(trial.grafts) for trial in trials if trial.taken)
        role = "a passenger" if len(left) == 1 else "passengers"
        yield f"Of {counted(kernels, 'kernel')} that were taken over {len(left)} left as {role}."


def _verdicts(
    met: Sequence[TrialRecord], others: Sequence[TrialRecord], when: str
) -> Iterator[str]:
    """Say how many packages met the live run, what became of them, and why others did not."""
    if not met:
        yield f"Growth kept nothing: {_unread(others, 'package', when)}."
        return
    if len(met) == 1:
        (only,) = met
        why = "" if only.verdict in ("kept", "taken over") else f": {_reason(only)}"
        end = _ENDS.get(only.verdict, only.verdict)
        yield f"The one package that met the live run was {end}{why}."
    else:
        counts = {end: sum(t.verdict == name for t in met) for name, end in _ENDS.items()}
        yield f"Of the {len(met)} packages that met the live run {_ends_text(counts)}."
    if others:
        yield f"{_unread(others, 'more package', when)}."


def _unread(trials: Sequence[TrialRecord], what: str, when: str) -> str:
    """Say of packages whose verdict could not be read, or was not come to, why that is."""
    whys = list(dict.fromkeys(trial.reason for trial in trials if trial.reason))
    why = f": {'; '.join(whys)}" if whys else f" {when}"
    return f"{counted(len(trials), what)} had no verdict{why}"


def _reason(trial: TrialRecord) -> str:
    cost = f", which cost {counted(trial.updates_lost, 'update')}" if trial.updates_lost else ""
    return f"{trial.reason or 'it was not shown to beat it'}{cost}"


def _what_one_beat(trial: TrialRecord, who: str, hint: str) -> str:
    """Say what the one package in the model beat, and what not."""
    after = f"the live run after the same {trial.trial_updates:,} updates"
    fall = f"gate loss lower by {with_error(*trial.brought)}{f'; {hint}' if hint else ''}"
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


def _what_several_beat(inside: Sequence[TrialRecord], hint: str) -> Iterator[str]:
    """Say in counts what the packages in the model beat, and what not."""
    total = len(inside)
    yield f"Each of the {total} in the model beat the live run at equal updates{in_brackets(hint)}."
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
    hedge = "" if more == total else ": of the others training may be what is missing"
    yield f"{more} of {total} brought more than going on for the same FLOPs would have{hedge}."


def of_untried(trials: Sequence[TrialRecord], grafts: Sequence[GraftRecord]) -> Iterator[str]:
    """Yield a sentence on kernels that were made for a package of which no trial began."""
    tried = {trial.package for trial in trials}
    untried = [g for g in grafts if g.package is not None and g.package not in tried]
    if untried:
        kernels, last = counted(len(untried), "kernel"), untried[-1].reason
        yield f"For want of a trial {kernels} met nothing: {last}."


def of_single_grafts(grafts: Sequence[GraftRecord], *, had_twins: bool) -> Iterator[str]:
    """Yield sentences on what became of kernels that were auditioned one by one.

    Args:
        grafts: All grafts of a run.
        had_twins: Whether each that was admitted had twins of its own, as in files of format 1.
    """
    alone = [graft for graft in grafts if graft.package is None]
    if not alone:
        return
    if had_twins:
        yield _against_twins(alone)
        return
    met = [g for g in alone if g.verdict in _AFTER_A_GATE or g.admitted_at is not None]
    if not met:
        yield f"Growth kept nothing: {counted(len(alone), 'kernel')} came to no gate."
        return
    yield f"{_gates_of(met)}."
    if len(alone) > len(met):
        yield f"{counted(len(alone) - len(met), 'more kernel')} came to no gate."
    yield "An audition beside a frozen host does not say what a kernel brings to a run."


def _gates_of(met: Sequence[GraftRecord]) -> str:
    """Say what became of kernels that came to a gate; of one that was dropped, why."""
    kept = sum(graft.stage is GraftStage.FOSSILIZED for graft in met)
    inside = sum(graft.stage in (GraftStage.BLENDING, GraftStage.HOLDING) for graft in met)
    dropped = len(met) - kept - inside
    counts = {"kept": kept, "in the model without a verdict": inside, "dropped": dropped}
    if len(met) > 1:
        return f"Of the {len(met)} kernels that came to a gate {_ends_text(counts)}"
    (only,) = met
    cost = f", which cost {counted(only.updates_lost, 'update')}" if only.updates_lost else ""
    why = f": {only.reason}{cost}" if dropped else ""
    return f"The one kernel that came to a gate {_ends_text(counts).removeprefix('1 ')}{why}"


def _against_twins(grafts: Sequence[GraftRecord]) -> str:
    met = [graft for graft in grafts if graft.contribution is not None]
    if not met:
        return f"Growth kept nothing: {counted(len(grafts), 'graft')} met no twin."
    wins = sum(g.stage is GraftStage.FOSSILIZED and (g.contribution or 0.0) > 0.0 for g in met)
    lost = len(met) - wins
    good = f"Growth beat a twin without the graft in {wins} of {len(met)} that met one"
    return f"{good}, and was not shown to in {lost}." if lost else f"{good}."


def of_stages(stages: Sequence[StageRecord]) -> Iterator[str]:
    """Yield sentences on planned stages of depth, and what they were not compared with."""
    for stage in stages:
        yield f"In {stage.path}, {stage_text(stage)}."
    if stages:
        yield _DEPTH_ALONE


def stage_text(stage: StageRecord) -> str:
    """Say what a stage of depth did, in a clause."""
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


def trial_lines(trial: TrialRecord, hint: str) -> Iterator[str]:
    """Yield what is known of a package, in plain lines.

    Args:
        trial: The package.
        hint: Said of its figures, in brackets; empty for none.
    """
    kernels = _listing(
        [f"{b} at {s}" for b, s in zip(trial.blueprints, trial.sites, strict=True)] or ["nothing"]
    )
    why = f" ({trial.reason})" if trial.reason else ""
    yield f"  {trial.package}. {trial.parameters:,} parameters: {trial.verdict}{why}"
    yield f"     {kernels}"
    if trial.was_read:
        needed = "" if trial.z is None or trial.threshold is None else _needed(trial)
        found = with_error(trial.effect, trial.stderr, "+.3g")
        yield f"     candidate against live run, loss saved{in_brackets(hint)}: {found}{needed}"
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


def registry_lines(grafts: Sequence[GraftRecord]) -> Iterator[str]:
    """Yield which kernels of a run came from a registry; nothing where none did.

    Args:
        grafts: All grafts of the run.
    """
    theirs = [graft for graft in grafts if graft.is_of_a_registry]
    if theirs:
        yield f"Kernels from a registry: {len({graft.artifact_id for graft in theirs})}"
    for graft in theirs:
        yield f"  graft {graft.graft}, {graft.blueprint}: digest {graft.artifact_id}"


def graft_lines(graft: GraftRecord) -> Iterator[str]:
    """Yield what is known of a graft, in plain lines."""
    package = "" if graft.package is None else f", package {graft.package}"
    size = "" if graft.parameters is None else f", {graft.parameters:,} parameters"
    yield (
        f"  {graft.graft}. {graft.blueprint} at {graft.site}{size}"
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
