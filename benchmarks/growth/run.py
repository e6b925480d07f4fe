"""``make bench-growth``: what growing brings, against everything that it has to beat.

Every finished run is kept, so that what is interrupted goes on where it stopped. At the end
``docs/growth.md`` is written from all that is there.
"""

import argparse
import os
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path

import document
import torch
from environment import commit, environment
from store import RESULTS, ROOT, Store
from task import Task
from tasks import TASKS


def run_one(name: str, random_seed: int, arms: list[str], folder: Path, *, quick: bool) -> None:
    """Run what is missing of one task at one random seed."""
    torch.set_num_threads(1)
    task, store = TASKS[name], Store(folder=folder)
    settings = task.quick if quick else task.settings
    where, at = environment(), commit(ROOT)
    for result in task.runs(random_seed, arms, settings):
        store.write(replace(result, environment=where, commit=at))
        told = ", ".join(f"{k} {v:.4g}" for k, v in result.figures.items() if v is not None)
        print(f"{name}, {result.arm}, random seed {random_seed}: {told}", flush=True)


def _missing(task: Task, random_seed: int, store: Store, options: argparse.Namespace) -> list[str]:
    settings = task.quick if options.quick else task.settings
    wanted = [arm for arm in task.arms if not options.arms or arm in options.arms]
    return [arm for arm in wanted if not store.has(task.name, arm, random_seed, settings)]


def main() -> None:
    """Run what is missing, and write the document."""
    options = _options()
    begin = time.perf_counter()
    store = Store(folder=options.out or RESULTS)
    jobs = _jobs(options, store)
    print(f"{len(jobs)} jobs in {options.processes} processes of one thread", flush=True)
    with ProcessPoolExecutor(options.processes, get_context("spawn")) as pool:
        futures = [
            pool.submit(run_one, name, seed, arms, store.folder, quick=options.quick)
            for name, seed, arms in jobs
        ]
        for future in as_completed(futures):
            future.result()
    print(f"Took {time.perf_counter() - begin:.0f} s")
    if options.out is None:
        print(f"Written to docs: {', '.join(document.write())}")


def _jobs(options: argparse.Namespace, store: Store) -> list[tuple[str, int, list[str]]]:
    jobs = []
    for name in options.only or TASKS:
        task = TASKS[name]
        reason = task.missing()
        if reason is not None:
            print(f"{name} is skipped: {reason}")
            continue
        seeds = options.random_seeds or task.random_seeds
        found = [(name, seed, _missing(task, seed, store, options)) for seed in seeds]
        jobs += [job for job in found if job[2]]
    return jobs


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="+", choices=[*TASKS], help="these tasks and no others")
    parser.add_argument("--arms", nargs="+", help="these arms and no others")
    parser.add_argument("--random-seeds", nargs="+", type=int, help="instead of each task's own")
    parser.add_argument("--processes", type=int, default=2, help="each of one thread")
    parser.add_argument("--quick", action="store_true", help="worthless figures; needs --out")
    parser.add_argument("--out", type=Path, help="folder of the results; the document stays")
    options = parser.parse_args()
    if options.quick and options.out is None:
        parser.error("figures of a quick run are not kept: give it a folder with --out")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    return options


if __name__ == "__main__":
    main()
