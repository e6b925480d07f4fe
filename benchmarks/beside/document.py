"""Write ``docs/peers.md`` from the results that are kept in ``benchmarks/results/peers/``.

    python benchmarks/beside/document.py

It holds nothing that is not in those files; ``run.py`` beside it calls this after a full run.
"""

import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "peers"
DOCUMENT = ROOT / "docs" / "peers.md"
FORMAT_VERSION = 1

_HEAD = """\
# Beside its peers

Written by `make bench-peers` from the files in `benchmarks/results/peers/`; change none by hand.

What users of other libraries ask for, or what was seen to fall short, run on the library and on
Esper in one process, each library in an environment of its own. These are outcomes; timings are in
[benchmarks.md](benchmarks.md). The choice of questions is ours: what a peer does that Esper does
not is no part of it. A source names an issue of a peer's own tracker.
"""


def as_markdown(results: Path = RESULTS) -> str:
    """Return the document.

    Args:
        results: Folder of the JSON files.

    Raises:
        ValueError: A file is of a newer format.
    """
    return "\n".join([_HEAD, *(_section(path) for path in sorted(results.glob("*.json")))])


def _section(path: Path) -> str:
    result = json.loads(path.read_text(encoding="utf-8"))
    if result["format_version"] > FORMAT_VERSION:
        msg = f"{path} is of format {result['format_version']}; {FORMAT_VERSION} is known here"
        raise ValueError(msg)
    environment = ", ".join(f"{key} {value}" for key, value in result["environment"].items())
    parts = [f"## {path.stem}\n", f"{environment}\n"]
    return "\n".join([*parts, *(_of_peer(peer) for peer in result["peers"])])


def _of_peer(peer: dict[str, Any]) -> str:
    """Return a peer's table, with what could not be compared below it, or why there is none."""
    title = f"### {peer['peer'].replace('==', ' ')}\n"
    if peer["torch"]:
        title += f"\nWith torch {peer['torch']}.\n"
    if peer["absent"]:
        return f"{title}\nNothing was compared: {peer['absent']}\n"
    rows = [row for row in peer["rows"] if "failed" not in row]
    failed = [f"- not compared: {row['failed']}" for row in peer["rows"] if "failed" in row]
    lines = ["| asked | peer | Esper |", "| --- | --- | --- |"]
    for row in rows:
        source = f" ({row['source']})" if row["source"] else ""
        cells = (f"{row['asked']}{source}", row["peer"], row["esper"])
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join([title, *lines, *(["", *failed] if failed else []), ""])


def write() -> None:
    """Write the document."""
    DOCUMENT.write_text(as_markdown(), encoding="utf-8")


if __name__ == "__main__":
    write()
