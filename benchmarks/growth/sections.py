"""How the results of each kind of task are told: a table with the goals, and a picture."""

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

from depth import RIVALS
from drawing import Bar, Line, bars, losses
from figures import (
    ByArm,
    interval_of,
    paired,
    saving,
    share_interval,
    upper_bound,
    values,
)
from task import Task
from useless import USELESS

from esper.contracts.intervals import mean_interval

Section = tuple[str, str]
"""Text, and a picture; an empty one where there is none."""


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table in Markdown."""
    ruled = [heads, ["---" for _ in heads], *rows]
    return "\n".join("| " + " | ".join(row) + " |" for row in ruled) + "\n"


def spread(found: Sequence[float | None], digits: int) -> str:
    """Return a mean and the standard deviation between random seeds."""
    known = [value for value in found if value is not None]
    if not known:
        return "-"
    mean = f"{statistics.fmean(known):.{digits}f}"
    return mean if len(known) < 2 else f"{mean} ± {statistics.stdev(known):.{digits}f}"


def verdict(is_met: bool | None) -> str:  # noqa: FBT001 - a value, no switch
    """Say whether a goal is met; None is not known."""
    return "-" if is_met is None else "met" if is_met else "missed"


def _bar(name: str, found: Sequence[float]) -> Bar | None:
    interval = mean_interval(found)
    if interval.mean is None or interval.low is None or interval.high is None:
        return None
    return Bar(name=name, mean=interval.mean, low=interval.low, high=interval.high)


def _above(found: Sequence[float], least: float) -> bool | None:
    """Say whether a mean reaches a goal with its interval above 0; None with one run."""
    interval = mean_interval(found)
    if interval.mean is None or interval.low is None:
        return None
    return interval.mean >= least and interval.is_above_zero


def images(task: Task, results: ByArm) -> Section:
    """Tell of a classifier that is grown."""
    least = 3.0 if task.name == "digits" else 4.0
    rows, drawn = _differences(results, "accuracy", "points", ("grown", "defaults"), least)
    for arm in ("grown", "defaults", "random"):
        if arm in results:
            rows += _trials(arm, results, has_defaults=arm == "defaults")
    return table(_HEADS, rows), bars(drawn, "points")


def remedies(task: Task, results: ByArm) -> Section:
    """Tell what each remedy came to beside the defaults and the host, at the same random seeds."""
    rows = []
    for arm in (a for a in task.arms if a in results and a != "host"):
        against = paired(results, arm, "defaults", task.figure)
        won, lost = sum(g > 0 for g in against), sum(g < 0 for g in against)
        passed = values(results, arm, "passed")
        beside = (interval_of(against, 2), f"{won} won, {lost} lost")
        rows.append(
            (
                arm,
                *(("", "") if arm == "defaults" else beside),
                interval_of(paired(results, arm, "host", task.figure), 2),
                f"{sum(map(bool, passed))} of {len(passed)}",
                spread(values(results, arm, "parameters"), 0),
            )
        )
    differences = ("minus defaults, points", "random seeds", "minus host, points")
    return table(("", *differences, "a trial passed", "parameters at the end"), rows), ""


def other_data(task: Task, results: ByArm) -> Section:
    """Tell of a model that is grown with every default."""
    unit, remark = (
        ("points", "") if task.figure == "accuracy" else ("% of the variance", ", less is better")
    )
    rows, drawn = _differences(results, task.figure, unit, ("grown",))
    if task.figure == "accuracy":
        rows += _differences(results, "loss", "nats")[0]
    for arm in ("grown", "random"):
        if arm in results:
            rows += _trials(arm, results, has_defaults=arm == "grown")
            size = spread(values(results, arm, "parameters"), 0)
            rows.append((f"{arm}: parameters at the end", size, "", "", ""))
    return table(_HEADS, rows), bars(drawn, unit + remark)


_HEADS: Final = ("", "figure", "random seeds", "goal", "")


def _differences(
    results: ByArm,
    figure: str,
    unit: str,
    with_goals: Sequence[str] = (),
    least: float | None = None,
) -> tuple[list[tuple[str, ...]], list[Bar]]:
    """Return a row and a bar for each pair of arms; of a loss less is better."""
    rows, drawn = [], []
    better, side = (-1, "below") if figure == "loss" else (1, "above")
    for arm in ("grown", "defaults", "early", "random"):
        for other in ("host", "random", "null", "scratch"):
            found = paired(results, arm, other, figure)
            if arm == other or not found or (arm != "grown" and other != "host"):
                continue
            gains = [better * f for f in found]
            won, lost = sum(g > 0 for g in gains), sum(g < 0 for g in gains)
            is_goal = other == "host" and arm in with_goals
            amount = "" if least is None else f"≥ {least:g}, "
            met = _all(_above(gains, least or 0.0), lost == 0)
            rows.append(
                (
                    f"{arm} minus {other}, {unit}",
                    interval_of(found, 4 if unit == "nats" else 2),
                    f"{won} won, {lost} lost",
                    f"{amount}interval {side} 0, no loss" if is_goal else "",
                    verdict(met) if is_goal else "",
                )
            )
            drawn.append(_bar(f"{arm} minus {other}", found))
    return rows, [bar for bar in drawn if bar]


def _all(*found: bool | None) -> bool | None:
    return None if None in found else all(found)


def _trials(arm: str, results: ByArm, *, has_defaults: bool) -> list[tuple[str, ...]]:
    """Return what trials came to in an arm, and what growing took; defaults may take 2."""
    runs = list(results[arm].values())
    passed, work = values(results, arm, "passed"), values(results, arm, "work")
    trials = [trial for run in runs for trial in run.details["trials"]]
    nulls = sum(trial["taken"] == "null" for trial in trials)
    shown = sum(bool(t["taken"] == "candidate" and t["capacity_shown"]) for t in trials)
    share = statistics.fmean(passed)
    return [
        (
            f"{arm}: runs in which a trial passed",
            f"{100 * share:.0f} %",
            f"{sum(map(bool, passed))} of {len(passed)}",
            "≥ 80 %" if arm != "random" else "",
            verdict(share >= 0.8) if arm != "random" else "",
        ),
        (
            f"{arm}: packages taken over, made linear, with capacity shown",
            f"{sum(bool(t['taken']) for t in trials)}, {nulls}, {shown}",
            f"of {len(trials)} trials",
            "",
            "",
        ),
        (
            f"{arm}: work of the run over its training",
            f"{statistics.fmean(work):.2f}",
            "",
            "≤ 2" if has_defaults else "",
            verdict(statistics.fmean(work) <= 2.0) if has_defaults else "",
        ),
    ]


def depth(task: Task, results: ByArm) -> Section:
    """Tell of a model that is deepened late."""
    scratch = [arm for arm in task.arms if arm.startswith("scratch")]
    rows = []
    for arm in (a for a in task.arms if a in results and not a.startswith("scratch")):
        found = saving(results, arm, scratch)
        if not found.shares:
            continue
        percent = [100 * share for share in found.shares]
        is_goal = arm.startswith("grown")
        beyond = f"{found.num_beyond} of {len(percent)} beyond the curve: bounds"
        mean = statistics.fmean(percent)
        rows.append(
            (
                f"{arm}: compute saved at equal loss, %",
                interval_of(percent, 1, sign=False),
                beyond if found.num_beyond else "",
                "≥ 40" if is_goal else "",
                verdict(mean >= 40 if len(percent) > 1 else None) if is_goal else "",
            )
        )
    for arm in (a for a in task.arms if a.startswith("grown")):
        rival = RIVALS[arm]
        found_differences = paired(results, arm, rival, "loss")
        if found_differences:
            below = mean_interval(found_differences)
            met = None if below.high is None else below.is_below_zero
            rows.append(
                (
                    f"{arm} minus {rival.removesuffix(' 100')} at equal FLOPs, nats",
                    interval_of(found_differences, 4),
                    f"{len(found_differences)} random seeds",
                    "interval below 0, of at least 6",
                    verdict(_all(met, len(found_differences) >= 6)),
                )
            )
    alone, *grown = (
        [100 * share for share in saving(results, arm, scratch).shares]
        for arm in ("small 100", "grown fresh", "grown copy")
    )
    remark = ""
    if alone and all(own and statistics.fmean(alone) > statistics.fmean(own) for own in grown):
        remark = (
            "\nThe small model alone saves more: so short a run does not yet need the larger one, "
            "and whoever can stop here should take the small one.\n"
        )
    text = table(("", "figure", "", "goal", ""), rows) + remark
    return text, losses(_curves(task, results), task.unit)


def _curves(task: Task, results: ByArm) -> list[Line]:
    """Return mean losses by kind of arm; arms that differ in their horizon are one line."""
    kinds: dict[str, list[tuple[float, float]]] = {}
    for arm in (a for a in task.arms if a in results):
        runs = results[arm].values()
        kind = arm.rstrip("0123456789 ")
        flops = statistics.fmean(r.flops for r in runs)
        kinds.setdefault(kind, []).append((flops, statistics.fmean(values(results, arm, "loss"))))
    return [Line(name=kind, points=sorted(points)) for kind, points in kinds.items()]


def extra_budget(task: Task, results: ByArm) -> Section:
    """Tell of a further budget."""
    rows, drawn = [], []
    for arm in (a for a in task.arms if a in results and a not in ("going on", "scratch")):
        for other in ("going on", "scratch"):
            found = paired(results, arm, other, "loss")
            if not found:
                continue
            interval = mean_interval(found)
            met = None if interval.high is None else interval.is_below_zero
            is_goal = arm != "null"
            rows.append(
                (
                    f"{arm} minus {other}, nats",
                    interval_of(found, 4),
                    f"{sum(f < 0 for f in found)} of {len(found)} lower",
                    "interval below 0" if is_goal else "",
                    verdict(met) if is_goal else "",
                )
            )
            if other == "going on":
                drawn.append(_bar(f"{arm} minus {other}", found))
    heads = ("", "figure", "random seeds", "goal", "")
    return table(heads, rows), bars([b for b in drawn if b], "nats")


def useless(task: Task, results: ByArm) -> Section:
    """Tell of packages that deserve no place, and of one that may."""
    rows = []
    for arm in (a for a in task.arms if a in results):
        trials = _rows(results, [arm])
        is_claim = arm in ("linear", "own shape")
        what = "capacity claimed" if is_claim else "taken over"
        counts = (
            sum(_counted(arm, row) for row in trials),
            sum(row["plain"] for row in trials),
            sum(row["single"] for row in trials),
        )
        shares = [_share(count, len(trials)) for count in counts]
        if is_claim:
            shares[1:] = ["", ""]
        rows.append((arm, what, str(len(trials)), *shares))
        if arm.startswith("useful"):
            shown = _share(sum(_is_claimed(row) for row in trials), len(trials))
            rows.append((arm, "taken over, with capacity shown", str(len(trials)), shown, "", ""))
    pooled = _rows(results, USELESS)
    text = table(("kind", "", "runs", "by the verdict", "plain error", "one last look"), rows)
    if pooled:
        text += f"\nUseless kinds of this task pooled: {_pooled(pooled)}.\n"
        by_start = ", ".join(
            f"{100 * start:.0f} % of the run: "
            f"{sum(_counted(r['arm'], r) for r in pooled if r['start'] == start)} of "
            f"{sum(r['start'] == start for r in pooled)}"
            for start in sorted({r["start"] for r in pooled})
        )
        text += f"\nBy the start of the trial: {by_start}.\n"
    return text, ""


def useless_in_all(tasks: Sequence[ByArm]) -> str:
    """Tell of the useless kinds of all tasks together, which is what the goal is of."""
    by_kind = {
        kind: [row for results in tasks for row in _rows(results, [kind])] for kind in USELESS
    }
    rows, lows = [], []
    for kind, trials in by_kind.items():
        kept = sum(_counted(kind, row) for row in trials)
        lows.append(share_interval(kept, len(trials))[0])
        what = "capacity claimed" if kind == "linear" else "taken over"
        rows.append((kind, what, str(len(trials)), _share(kept, len(trials))))
    pooled = [row for trials in by_kind.values() for row in trials]
    kept = sum(_counted(row["arm"], row) for row in pooled)
    met = kept <= 0.05 * len(pooled) and upper_bound(kept, len(pooled)) <= 0.065
    enough = len(tasks) == 3 and all(
        len(_rows(results, [kind])) >= 100 for results in tasks for kind in USELESS
    )
    goal = verdict(met and max(lows) <= 0.05 if enough else None)
    return (
        f"{table(('kind', '', 'runs', 'by the verdict'), rows)}\nPooled: {_pooled(pooled)}. Goal "
        "(100 runs per kind and task): at most 5 %, bound at most 6.5 %, and no kind's lower bound "
        f"above 5 %: {goal}{'' if enough else ' (too few runs)'}.\n"
    )


def _pooled(rows: Sequence[Mapping[str, Any]]) -> str:
    kept = sum(_counted(row["arm"], row) for row in rows)
    bound = 100 * upper_bound(kept, len(rows))
    return f"{kept} of {len(rows)} kept or claimed, upper 95 % bound {bound:.1f} %"


def _rows(results: ByArm, arms: Sequence[str]) -> list[dict[str, Any]]:
    """Return the single runs of some kinds."""
    return [
        {**row, "arm": arm}
        for arm in arms
        for block in results.get(arm, {}).values()
        for row in block.details["rows"]
    ]


def _counted(arm: str, row: Mapping[str, Any]) -> bool:
    """Say whether a run counts: a package taken over, or, of linear ones, capacity claimed."""
    return _is_claimed(row) if arm in ("linear", "own shape") else bool(row["taken"])


def _is_claimed(row: Mapping[str, Any]) -> bool:
    """Say whether a package was taken over as it is, and capacity claimed for it."""
    return bool(row["taken"] == "candidate" and row["capacity_shown"])


def _share(count: int, num: int) -> str:
    low, high = share_interval(count, num)
    return f"{count} ({100 * low:.0f} to {100 * high:.0f} %)"


def ratios(task: Task, results: ByArm) -> Section:  # noqa: ARG001 - the signature of all
    """Tell of growing by a peer's own measures, each beside what the peer published."""
    gains = [
        a / b
        for a, b in zip(
            values(results, "chosen", "gradient"),
            values(results, "random", "gradient"),
            strict=False,
        )
    ]
    logs = paired(results, "chosen", "random", "log_loss")
    rows = [
        (
            "gradient at birth over that of random growth",
            interval_of(gains, 2, sign=False),
            "2.29",
            verdict(statistics.fmean(gains) >= 2.29 if gains else None),
        )
    ]
    if logs:
        rows.append(
            (
                "loss at the end over that of random growth (geometric mean)",
                f"{math.exp(statistics.fmean(logs)):.2f}",
                "0.90",
                verdict(math.exp(statistics.fmean(logs)) <= 0.90),
            )
        )
    return table(("", "here", "GradMax, published", ""), rows), ""


def tutorial(task: Task, results: ByArm) -> Section:  # noqa: ARG001 - the signature of all
    """Tell of growing by Esper beside a peer's own example, with every arm under each figure."""
    rows = []
    for figure, when in (("loss", "at the tutorial's end"), ("loss_later", "880 updates later")):
        for other in ("GroMo", "random", "host", "large"):
            found = paired(results, "chosen", other, figure)
            if found:
                won, lost = sum(f < 0 for f in found), sum(f > 0 for f in found)
                told = f"chosen minus {other}, test loss {when}"
                rows.append((told, interval_of(found, 3), f"{won} won, {lost} lost"))
    for arm, of_arm in results.items():
        later, size = values(results, arm, "loss_later"), values(results, arm, "parameters")
        seeds = f"{len(of_arm)} random seeds"
        rows.append((f"{arm}: test loss 880 updates later", spread(later, 3), seeds))
        rows.append((f"{arm}: parameters at the end", spread(size, 0), ""))
    return table(("", "figure", "random seeds"), rows), ""


SECTIONS: Final[Mapping[str, Callable[[Task, ByArm], Section]]] = {
    "images": images,
    "remedies": remedies,
    "other data": other_data,
    "depth": depth,
    "extra budget": extra_budget,
    "useless": useless,
    "ratios": ratios,
    "tutorial": tutorial,
}
