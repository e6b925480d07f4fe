"""``make bench``: what Esper costs beside doing without it, and what its ranking is worth.

Prints a table and writes ``benchmarks/results/<environment>.json``. One thread; what is compared is
timed in turn, round by round, and each figure is the fastest of its rounds.
"""

import argparse
import json
import os
import platform
from dataclasses import asdict
from pathlib import Path

import torch
from costs import all_costs
from ranking_quality import PUBLISHED, measure_rankings

import esper

RESULTS = Path(__file__).parent / "results"


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


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a few seconds, figures are worthless")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the JSON file")
    options = parser.parse_args()
    torch.set_num_threads(1)
    named = environment()
    print(", ".join(f"{key} {value}" for key, value in named.items()))
    costs = []
    for cost in all_costs(rounds=2 if options.quick else 30):
        costs.append(cost)
        goal = "" if cost.goal is None else f"  goal {cost.goal:g}"
        print(f"{cost.name:58} {cost.value:8.3f} {cost.unit:3}{goal}", flush=True)
    rankings = measure_rankings(quick=options.quick)
    heads = ("ranking", "auditioned", "after joint training", "gain of its first")
    print("\n{:16} {:>22} {:>22} {:>18}".format(*heads))
    for row in rankings:
        print(
            f"{row.ranking:16} {row.auditioned!s:>22} {row.realised!s:>22} {row.first_gain:18.4f}"
        )
    print(PUBLISHED)
    result = {
        "format_version": 1,
        "environment": named,
        "costs": [asdict(cost) for cost in costs],
        "rankings": [row.to_document() for row in rankings],
    }
    path = options.out / f"{named['platform']}-{named['cores']}-torch-{torch.__version__}.json"
    path = path.with_name(path.name.replace(" ", "-").lower())
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(f"\nWritten to {path}")


if __name__ == "__main__":
    main()
