"""Write ``docs/growth.md`` and its pictures from what is kept in ``benchmarks/results/growth/``.

    python benchmarks/growth/document.py

It holds nothing that is not in those files; ``benchmarks/growth/run.py`` calls it at its end.
"""

import json
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import sections
from figures import ByArm, by_arm, saving
from store import ROOT, Store
from task import Task
from tasks import TASKS

from esper.contracts.intervals import mean_interval

DOCUMENT = ROOT / "docs" / "growth.md"

_HEAD = """\
# What growing brings

Written by `make bench-growth` from the files in `benchmarks/results/growth/`; change neither by
hand. Each arm is held against the others at the same random seeds, none of which is the demo's.
Brackets are 95 % t intervals of means over random seeds, of paired differences where there is a
difference. FLOPs are those of what was executed, growing included, a multiply-add as two. Seconds
are of one thread of a machine that had other work: compare them loosely. What was tried before an
arm was settled is said below each table; it was tried at other random seeds.
"""


def pages(store: Store) -> Iterator[tuple[str, str]]:
    """Yield every file of the document: its name beside the document, and its text."""
    parts, absent, useless = [_HEAD], [], []
    for task in TASKS.values():
        results = by_arm(task, store)
        if not results:
            absent.append(task)
            continue
        parts.append(f"## {task.title}\n\n{task.told}\n")
        told, picture = sections.SECTIONS[task.section](task, results)
        if picture:
            name = f"growth-{task.name.replace(',', '').replace(' ', '-').lower()}.svg"
            parts.append(f"![{task.title}]({name})\n")
            yield name, picture
        parts += [told, _arms(task, results), _settings(task), *_measured_on(results)]
        if task.section == "useless":
            useless.append(results)
    if useless:
        parts.append(f"## Useless packages: all tasks\n\n{sections.useless_in_all(useless)}")
    if absent:
        rows = "\n".join(f"- {task.title}" for task in absent)
        parts.append(f"## Not run yet\n\nThere are no results of:\n\n{rows}\n")
    yield DOCUMENT.name, "\n".join(parts)


def _arms(task: Task, results: ByArm) -> str:
    """Return the table of all arms: what came out, and what it took."""
    rows = []
    for arm in (a for a in task.arms if a in results):
        found = [r for _, r in sorted(results[arm].items())]
        figure = [r.figures[task.figure] for r in found]
        rows.append(
            (
                arm,
                str(len(found)),
                sections.spread(figure, task.digits),
                f"{statistics.fmean(r.flops for r in found):.3g}" if found[0].flops else "-",
                f"{statistics.fmean(r.seconds for r in found):.0f}",
            )
        )
    heads = ("arm", task.counted, task.unit, "FLOPs", "seconds")
    return sections.table(heads, rows) + "\n"


def _settings(task: Task) -> str:
    told = ", ".join(f"{key} {value}" for key, value in task.settings.items())
    tried = f"\n\nTried before: {task.tried}" if task.tried else ""
    return f"Settings: {told}.{tried}\n"


def _measured_on(results: ByArm) -> Iterator[str]:
    """Yield a line on what results were measured on, each environment once, where it is known."""
    found = [result for own in results.values() for result in own.values()]
    known = [result.environment for result in found if result.environment is not None]
    if not known:
        return
    told = sorted({_environment(environment) for environment in known})
    rest = len(found) - len(known)
    others = f"; of {rest} of the {len(found)} results it was not recorded" if rest else ""
    commits = sorted({result.commit for result in found if result.commit is not None})
    at = f" At {', '.join(commits)}." if commits else ""
    yield f"Measured on {'; '.join(told)}{others}.{at}\n"


def _environment(known: Mapping[str, Any]) -> str:
    threads = f"{known['threads']} thread{'' if known['threads'] == 1 else 's'}"
    return f"Python {known['python']}, torch {known['torch']}, {known['processor']}, {threads}"


def as_markdown(store: Store | None = None) -> str:
    """Return the document itself."""
    return dict(pages(store or Store()))[DOCUMENT.name]


def recorded(store: Store) -> list[dict[str, Any]]:
    """Return the arms of the deepest runs of depth that there are, for the demo to show."""
    told: list[dict[str, Any]] = []
    for name in ("depth", "depth, short"):
        results = by_arm(TASKS[name], store) if name in TASKS else {}
        scratch = [arm for arm in TASKS[name].arms if arm.startswith("scratch")] if results else []
        for arm, found in results.items():
            saved = saving(results, arm, scratch) if arm not in scratch else None
            shares = [] if saved is None or saved.num_beyond else [100 * s for s in saved.shares]
            told.append(
                {
                    "name": f"{TASKS[name].title}: {arm}",
                    "loss": statistics.fmean(r.figures["loss"] for r in found.values()),
                    "flops": statistics.fmean(r.flops for r in found.values()),
                    "saved": asdict(mean_interval(shares)),
                }
            )
        if told:
            break
    return told


def write() -> Sequence[str]:
    """Write the document, its pictures and what the demo shows of them; return their names."""
    text = json.dumps(recorded(Store()), indent=1) + "\n"
    (ROOT / "src" / "esper" / "services" / "recorded_stages.json").write_text(text)
    names = []
    for name, text in pages(Store()):
        (DOCUMENT.parent / name).write_text(text, encoding="utf-8")
        names.append(name)
    return names


if __name__ == "__main__":
    write()
