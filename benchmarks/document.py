"""Write ``docs/benchmarks.md`` from the results that are kept in ``benchmarks/results/``.

    python benchmarks/document.py

It holds nothing that is not in those files; ``benchmarks/run.py`` calls this after a full run.
"""

import json
from pathlib import Path
from typing import Any

from table import FORMAT_VERSION, HEADS, cells, remarks

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
DOCUMENT = ROOT / "docs" / "benchmarks.md"

_HEAD = """\
# What Esper costs

Written by `make bench` from the files in `benchmarks/results/`; change neither by hand.

Contenders share the host's parameters and take turns, round by round, on one thread of one process.
A figure is the median of its rounds, and the verdict is read on it; ratios are taken round by
round. The quartiles are those of the rounds, and tell how far to trust it; beside them stands the
figure of each contender's fastest round. Ratios travel between machines, times do not.
"""


def as_markdown(results: Path = RESULTS) -> str:
    """Return the document.

    Args:
        results: Folder of the JSON files.

    Raises:
        ValueError: A file is of another format.
    """
    sections = [_section(path) for path in sorted(results.glob("*.json"))]
    runs = [_whole_run(path) for path in sorted((results / "whole-run").glob("*.json"))]
    return "\n".join([_HEAD, *sections, *([_RUNS_HEAD] if runs else []), *runs])


def _section(path: Path) -> str:
    result = json.loads(path.read_text(encoding="utf-8"))
    if result["format_version"] != FORMAT_VERSION:
        found = result["format_version"]
        msg = f"{path} is of format {found}, and {FORMAT_VERSION} is known here: measure again"
        raise ValueError(msg)
    environment = ", ".join(f"{key} {value}" for key, value in result["environment"].items())
    lines = result["lines"]
    parts = [f"## {path.stem}\n", f"{environment}\n", _table(HEADS, [cells(li) for li in lines])]
    said = remarks(lines)
    if said:
        parts += ["", "\n".join(f"- {text}" for text in said)]
    return "\n".join([*parts, "", _rankings(result["rankings"])])


_RUNS_HEAD = """\
## A whole run

Written by `make bench-run`: updates of a decoder beside the same run without Esper, by turns, each
the median of its rounds; the most memory that a process of its own had. A trial trains a candidate
and its null beside the run, until its verdict. Fossils are kernels of an eighth of the width, not
folded, and their Grower waits; *by hand* is the same arithmetic without Esper. Shares of a run's
time are of a look at its stack every two milliseconds: what the model, its backward and the
optimizer compute is theirs, all else that of the room whose code it runs behind.
"""


def _whole_run(path: Path) -> str:
    result = json.loads(path.read_text(encoding="utf-8"))
    environment = ", ".join(f"{key} {value}" for key, value in result["environment"].items())
    return "\n".join([f"### {path.stem}\n", f"{environment}\n", *map(_of_size, result["sizes"])])


def _of_size(size: dict[str, Any]) -> str:
    heads = ("state", "an update", "over without Esper", "over by hand", "memory", "added")
    rows = [
        (
            row["state"],
            f"{row['update_ms']:.2f} ms",
            f"{row['over']:.3f}x",
            "" if row["over_by_hand"] is None else f"{row['over_by_hand']:.3f}x",
            f"{row['memory_mb']:.0f} MB",
            f"{row['memory_added_mb']:+.0f} MB",
        )
        for row in size["rows"]
    ]
    states = list(size["rooms"])
    rooms = sorted(
        {room for state in states for room in size["rooms"][state]},
        key=lambda room: -sum(size["rooms"][state].get(room, 0.0) for state in states),
    )
    shares = [
        (room, *(f"{size['rooms'][state].get(room, 0.0):.1%}" for state in states))
        for room in rooms
    ]
    first = (
        f"{size['parameters']:,} parameters: wrapped in {size['wrap_ms']:.2f} ms, unwrapped in "
        f"{size['unwrap_ms']:.2f} ms.\n"
    )
    return "\n".join([first, _table(heads, rows), "", _table(("room", *states), shares), ""])


def _rankings(rankings: dict[str, Any]) -> str:
    heads = ("ranking", "auditioned", "after joint training", "gain of its first")
    rows = [
        (
            row["ranking"],
            _interval(row["auditioned"]),
            _interval(row["realised"]),
            f"{row['first_gain']:.4f}",
        )
        for row in rankings["rows"]
    ]
    return f"### Rankings\n\n{rankings['legend']}\n\n{_table(heads, rows)}\n"


def _interval(interval: dict[str, float | None]) -> str:
    numbers = (interval["mean"], interval["low"], interval["high"])
    return "{} [{}, {}]".format(*("-" if n is None else f"{n:+.2f}" for n in numbers))


def _table(heads: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    ruled = [heads, tuple("---" for _ in heads), *rows]
    return "\n".join("| " + " | ".join(row) + " |" for row in ruled)


def write() -> None:
    """Write the document."""
    DOCUMENT.write_text(as_markdown(), encoding="utf-8")


if __name__ == "__main__":
    write()
