"""What the commands print at their end."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from rich.table import Table
from rich.text import Text

from esper.cli.console import printable
from esper.contracts.report import ARMS, OPPONENTS
from esper.contracts.report_text import WORDS, flops_text, with_error
from esper.observability.replay import ABSENT
from esper.observability.wording import (
    ARM_NAMES,
    CONTROL_NAMES,
    control_counts,
    difference_of,
    dip_text,
    interval_text,
    not_beaten,
    number_text,
    stage_rows,
    wins_text,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from rich.console import Console

    from esper.cli.doctor import Check
    from esper.contracts.report import DemoReport
    from esper.observability.replay import Replayed

    Rows = tuple[Sequence[str], list[Sequence[str]]]

SHOWN_OF_DIGEST: Final = 12
"""Letters of a digest that a table has room for."""


def print_demo(console: Console, report: DemoReport) -> None:
    """Print the arms, the differences, packages, controls, stages, grafts and their lives."""
    console.print(not_beaten(report))
    print_table(console, "Arms", *_arm_rows(report))
    for name in OPPONENTS:
        interval = interval_text(difference_of(report, name), sign=True)
        wins = wins_text(report.wins[name])
        console.print(f"grown minus {ARM_NAMES[name]}: {interval} points; {wins}")
    console.print(f"worst dip after a switch, points: {dip_text(report)}")
    trials = _trial_rows(report)
    if trials[1]:
        print_table(console, "Packages of the grown arm (loss saved on the gate split)", *trials)
        for word in ("package", "null", "capacity", "treatment", "going on"):
            console.print(f"{word}: {WORDS[word]}")
    print_table(
        console, "Controls, for none of which capacity may be claimed", *_control_rows(report)
    )
    if report.stages:
        heads = ("arm", ">loss, nats", ">FLOPs", ">saved at equal loss, % (95 %)", "from")
        print_table(console, "A language model by stages", heads, stage_rows(report))
    print_table(console, "Grafts of the grown arm", *_graft_rows(report))
    print_table(console, "Timeline of the grown arm", *_timeline_rows(report))
    for note in report.notes:
        console.print(f"Note: {note}")


def print_replayed(console: Console, found: Replayed) -> None:
    """Print what a log says of its run: the report, the seeds in the model, and what is absent."""
    console.print(str(found.report), soft_wrap=True)
    heads = ("site", ">seed", ">graft", "kernel", "stage", ">alpha", "folded", "artifact")
    rows = [
        (
            site,
            str(seed.seed_idx),
            str(seed.graft),
            seed.blueprint,
            str(seed.stage),
            number_text(seed.alpha, ".3g"),
            "yes" if seed.folded else "no",
            seed.artifact_id[:SHOWN_OF_DIGEST],
        )
        for site, seeds in found.structure.items()
        for seed in seeds
    ]
    print_table(console, "Kernels in the model where the log ends", heads, rows)
    console.print()
    console.print(ABSENT, soft_wrap=True)


def print_checks(console: Console, checks: Sequence[Check]) -> None:
    """Print what a doctor found, and under each problem its cure."""
    width = max((len(check.name) for check in checks), default=0)
    for check in checks:
        mark = "problem" if check.cure else "ok"
        console.print(f"{mark:8}{check.name:{width}}  {check.found}", soft_wrap=True)
        if check.cure:
            console.print(f"{'':8}{'':{width}}  cure: {check.cure}", soft_wrap=True)


def print_table(
    console: Console, title: str, heads: Sequence[str], rows: Iterable[Sequence[str]]
) -> None:
    """Print a table; a head that begins with ``>`` is of a column of numbers."""
    table = Table(title=title, title_justify="left", box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for head in heads:
        number = head.startswith(">")
        table.add_column(head.removeprefix(">"), justify="right" if number else "left")
    for row in rows:
        table.add_row(*(Text(printable(cell)) for cell in row))
    console.print()
    if table.row_count:
        console.print(table)
    else:
        console.print(f"{title}: none")


def _arm_rows(report: DemoReport) -> Rows:
    heads = (
        "arm",
        ">test accuracy, % (95 %)",
        ">parameters",
        ">FLOPs",
        ">over training",
        ">us",
        ">dip, points",
    )
    rows: list[Sequence[str]] = []
    for name in ARMS:
        arm = report.arms[name]
        cells = (
            ARM_NAMES[name],
            interval_text(arm.accuracy_interval),
            number_text(arm.parameters, ",.0f"),
            flops_text(arm.train_flops),
            number_text(arm.work, ".2f"),
            number_text(arm.latency_us, ",.0f"),
            number_text(arm.worst_dip_points, ".2f"),
        )
        rows.append(cells)
    return heads, rows


def _trial_rows(report: DemoReport) -> Rows:
    heads = ("seed", "package", ">candidate", ">treatment", ">capacity", ">going on", "verdict")
    rows: list[Sequence[str]] = [
        (
            str(run.random_seed),
            str(trial.package),
            with_error(trial.effect, trial.stderr, "+.3g"),
            with_error(trial.null_effect, trial.null_stderr, "+.3g"),
            with_error(trial.capacity, trial.capacity_stderr, "+.3g"),
            with_error(trial.going_on, trial.going_on_stderr, "+.3g"),
            trial.verdict,
        )
        for run in report.runs_of("grown")
        for trial in (run.report.trials if run.report else ())
    ]
    return heads, rows


def _graft_rows(report: DemoReport) -> Rows:
    heads = ("seed", "graft", "package", "kernel", "site", ">depend.", "verdict", "reason")
    rows: list[Sequence[str]] = [
        (
            str(random_seed),
            str(graft.graft),
            number_text(graft.package, "d"),
            graft.blueprint,
            graft.site,
            number_text(graft.dependence, "+.4f"),
            graft.verdict,
            graft.reason,
        )
        for random_seed, graft in report.grafts("grown")
    ]
    return heads, rows


def _timeline_rows(report: DemoReport) -> Rows:
    """Return one row per graft: every stage that it reached, with the update."""
    rows: list[Sequence[str]] = []
    for run in report.runs_of("grown"):
        for graft in run.report.grafts if run.report else ():
            entries = run.report.timeline if run.report else ()
            own = [e for e in entries if e.graft == graft.graft]
            life = ", ".join(f"{entry.after} {entry.update:,}" for entry in own)
            rows.append((str(run.random_seed), str(graft.graft), life))
    return ("seed", "graft", "stage and update"), rows


def _control_rows(report: DemoReport) -> Rows:
    heads = ("control", ">tried", ">taken over", ">kept", ">capacity claimed", ">naive gate keeps")
    rows: list[Sequence[str]] = [
        (CONTROL_NAMES.get(row.kind, row.kind), *(str(n) for n in control_counts(row)))
        for row in report.controls.rows
    ]
    return heads, rows
