"""``make bench``: what Esper costs beside doing without it, and what its ranking is worth.

Prints the table and writes ``benchmarks/results/<environment>.json`` and ``docs/benchmarks.md``.
"""

import argparse
import json
import os
import platform
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import compile_rows
import document
import fusion_rows
import gpu_rows
import layer_rows
import loading_rows
import server_rows
import state_rows
import torch
from goals import GOALS
from measure import Figure
from peers import quiet
from ranking_quality import PUBLISHED, measure_rankings
from table import FORMAT_VERSION, HEADS, Line, as_text, cells, remarks

import esper


def environment() -> dict[str, str | int | None]:
    """Name what the figures depend on."""
    return {
        "esper": esper.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }


def figures(rounds: int) -> Iterator[Figure]:
    """Measure rows 1 to 17, but for the instructions of row 1; what is compiled comes last."""
    yield from layer_rows.dormant(rounds)
    yield from layer_rows.active(rounds)
    yield from fusion_rows.fused(rounds)
    yield fusion_rows.stacked(rounds)
    yield fusion_rows.chain(rounds)
    yield layer_rows.folded(rounds)
    yield fusion_rows.fossil(rounds)
    yield from loading_rows.live(rounds)
    yield loading_rows.cache_hit(rounds)
    yield state_rows.transition(rounds)
    yield layer_rows.failing(rounds)
    yield loading_rows.stored(rounds)
    yield server_rows.metadata(rounds)
    yield from state_rows.memory()
    yield from state_rows.wrapping(rounds)
    yield from state_rows.controller(rounds)
    yield state_rows.waiting_controller(rounds)
    yield compile_rows.telemetry_compiled()
    yield layer_rows.active_compiled(rounds)
    yield fusion_rows.fused_compiled(rounds)
    yield from compile_rows.compiled_events()
    yield from gpu_rows.gpu(rounds)


def main() -> None:
    """Measure, print and write."""
    options = _options()
    start_s = time.perf_counter()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    named = environment()
    print(", ".join(f"{key} {value}" for key, value in named.items()))
    instructions, rankings = _not_timed(quick=options.quick)
    print("\n" + as_text(HEADS))
    lines = []
    with quiet():
        for figure in (instructions, *figures(rounds=2 if options.quick else 30)):
            lines.append(Line.of(figure).to_document())
            print(as_text(cells(lines[-1])), flush=True)
    print("\n" + "\n".join(remarks(lines)))
    print(f"\nTook {time.perf_counter() - start_s:.0f} s")
    order = [goal.key for goal in GOALS]
    lines.sort(key=lambda line: order.index(line["key"]))
    result = {
        "format_version": FORMAT_VERSION,
        "environment": named,
        "lines": lines,
        "rankings": rankings,
    }
    _write(result, options.out)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--quick", action="store_true", help="a minute; the figures are worthless; needs --out"
    )
    parser.add_argument("--out", type=Path, help="folder of the JSON file; the document stays")
    options = parser.parse_args()
    if options.quick and options.out is None:
        parser.error("figures of a quick run are not kept: give it a folder with --out")
    return options


def _not_timed(*, quick: bool) -> tuple[Figure, dict[str, Any]]:
    """Count instructions and train for the rankings, side by side: neither reads a clock."""
    with ThreadPoolExecutor(1) as beside:
        counting = beside.submit(_instructions, quick=quick)
        rows = measure_rankings(quick=quick)
        print("\n{:16} {:>22} {:>22} {:>18}".format("ranking", *_RANKING_HEADS))
        for row in rows:
            realised = f"{row.realised!s:>22} {row.first_gain:18.4f}"
            print(f"{row.ranking:16} {row.auditioned!s:>22} {realised}", flush=True)
        print(PUBLISHED)
        return counting.result(), {
            "legend": PUBLISHED,
            "rows": [row.to_document() for row in rows],
        }


_RANKING_HEADS = ("auditioned", "after joint training", "gain of its first")


def _instructions(*, quick: bool) -> Figure:
    if quick:
        return Figure(key="instructions", value=None, note="not counted in a quick run")
    return layer_rows.instructions(number=200)


def _write(result: dict[str, Any], folder: Path | None) -> None:
    named = result["environment"]
    name = f"{named['platform']}-{named['cores']}-torch-{named['torch']}.json"
    path = (folder or document.RESULTS) / name.replace(" ", "-").lower()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(f"Written to {path}")
    if folder is None:
        document.write()
        print(f"Written to {document.DOCUMENT}")


if __name__ == "__main__":
    main()
