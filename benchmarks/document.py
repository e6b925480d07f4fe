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
    return "\n".join([_HEAD, *sections])


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
