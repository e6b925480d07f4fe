"""``make bench-preloading``: how many kernels are at hand when a run asks for them.

Runs are simulated on a clock of their own, on which a registry takes a second for each answer; the
detector, the order of the search, and what decides about fetching are Esper's own. A registry has
50 kernels that fit a site, of which field reports say, with the noise of runs, what each brings.
Some runs come to a plateau, some improve on and on, and some improve again, by a lower rate, where
they seemed to have come to one. Meanwhile other runs report.

A load is a kernel that a decision to grow asks for: one of the best four that the registry has at
that moment. It is found where it is in the cache by then. The control fetches as many bytes of
kernels that are drawn at random. Writes ``benchmarks/results/preloading/simulated.json``.
"""

import argparse
import json
import math
import random
import sys
from dataclasses import dataclass
from pathlib import Path

from esper.contracts import artifact_format
from esper.contracts.artifact import CompiledKernelArtifact, KernelMetadata
from esper.contracts.blueprint import TensorSpec
from esper.contracts.kernel_reports import FieldReport
from esper.fetching.kernel_cache import KernelCache
from esper.fetching.preloader import PER_SITE, Preloader, Question
from esper.growth.detector import Detector
from esper.growth.offers import LIKELY
from esper.growth.reading import Reading
from esper.registry.memory import MemoryRegistry

CANDIDATES, LATENCY_S, UPDATE_S, EVERY = 50, 1.0, 0.05, 50
SPREAD, BETWEEN, ERROR = 0.05, 0.03, 0.02
"""Of kernels' true effects, of one between runs, and a report's standard error; relative losses."""
REPORTS = 0.5
"""Reports of other runs between two evaluations, on average."""
QUESTION = Question(
    kind="linear",
    in_features=16,
    out_features=16,
    dtype="float32",
    num_axes=None,
    capacity_only=True,
    max_parameters=None,
)


@dataclass(slots=True)
class Counts:
    """What happened in all runs."""

    loads: int = 0
    found: int = 0
    bytes_fetched: int = 0
    bytes_used: int = 0
    grew: int = 0
    runs: int = 0
    drawn_found: int = 0


class Market:
    """A registry with kernels, what they truly bring, and runs elsewhere that report it."""

    def __init__(self, draw: random.Random) -> None:
        self.draw, self.registry, self.num_reports = draw, MemoryRegistry(), 0
        self.effects = {self._publish(i): draw.gauss(0.0, SPREAD) for i in range(CANDIDATES)}
        for _ in range(4 * CANDIDATES):
            self.report()

    def report(self) -> None:
        """Report one graft, of a kernel that is among the better known half as often as not."""
        draw, known = self.draw, self.registry.search(order="proven", limit=CANDIDATES)
        entry = draw.choice(known[: CANDIDATES // 2] if draw.random() < 0.5 else known)
        self.num_reports += 1
        self.registry.report_outcome(
            FieldReport(
                artifact_id=entry.digest,
                blueprint_digest=entry.metadata.blueprint_digest,
                run_id=f"run-{self.num_reports}",
                graft_id="1",
                site_kind="linear",
                in_features=16,
                out_features=16,
                metric="gate loss",
                unit="relative",
                contribution=draw.gauss(self.effects[entry.digest], math.hypot(BETWEEN, ERROR)),
                standard_error=ERROR,
                num_looks=300,
                verdict="fossilized",
            )
        )

    def _publish(self, number: int) -> str:
        spec, size = TensorSpec(("*", 16)), self.draw.randrange(500, 4_000)
        metadata = KernelMetadata(
            blueprint_id=f"kernel-{number}",
            blueprint_digest=f"{number:064x}",
            input_spec=spec,
            output_spec=spec,
            mode="add",
            position="parallel",
            parameter_count=size,
            draws_random=False,
            adds_capacity=True,
            zeroed=None,
        )
        weights = artifact_format.TensorBytes(dtype="F32", shape=(size,), data=bytes(4 * size))
        header = {"metadata": metadata.to_document()}
        return self.registry.put(artifact_format.encode(header, {"weight": weights}))


@dataclass(slots=True)
class Undecoded:
    """Stands for an artifact, whose weights nobody looks at here."""

    kernel_binary: bytes
    artifact_id: str


def undecoded(data: bytes, *, artifact_id: str) -> CompiledKernelArtifact:
    """Return an artifact's bytes as they are."""
    return Undecoded(data, artifact_id)  # type: ignore[return-value] # all that a cache asks of one


class Simulated(Preloader):
    """A preloader whose thread is the simulation: it does one thing a second."""

    busy_until_s = 0.0
    task: Question | str | None = None

    def _start(self) -> None:
        """Wait for the clock."""

    def run_until(self, now_s: float) -> None:
        """Do what is done by then: each task is begun when the one before it has ended."""
        while True:
            if self.task is None:
                self.task = self._next()
                if self.task is None:
                    self.busy_until_s = now_s
                    return
                self.busy_until_s = max(self.busy_until_s, now_s - EVERY * UPDATE_S) + LATENCY_S
            if self.busy_until_s > now_s:
                return
            task, self.task = self.task, None
            if isinstance(task, Question):
                self._answer(task)
            else:
                self._fetch(task)


def loss_at(update: int, kind: str, ends: int) -> float:
    """Return the loss of a kind of run; one that improves again does so at ``ends``."""
    if kind == "improving":
        return 2.0 * (1 + update / 300) ** -0.7
    plateau = 0.5 + 1.5 * math.exp(-update / 400)
    if kind == "again" and update > ends:
        return plateau - 0.45 * (1 - math.exp(-(update - ends) / 1500))
    return plateau


def one_run(market: Market, counts: Counts, *, horizon: int | None) -> None:
    """Simulate a run to its first decision to grow, or to its end."""
    draw = market.draw
    kind = draw.choice(["plateau", "plateau", "improving", "again"])
    length, ends = draw.randrange(600, 3_000), draw.randrange(500, 1_000)
    detector = Detector()
    cache = KernelCache(source=market.registry, decode=undecoded)
    preloader = Simulated(market.registry, cache)
    was_likely, asked, found = False, False, None
    for update in range(EVERY, length + 1, EVERY):
        preloader.run_until(update * UPDATE_S)
        loss = loss_at(update, kind, ends) + draw.gauss(0.0, 0.003)
        reading = Reading(update=update, horizon=horizon, train_loss=loss, gate_loss=loss)
        detector.observe(reading)
        if draw.random() < REPORTS:
            market.report()
        is_likely = detector.outlook(reading) >= LIKELY
        preloader.expect(is_likely=is_likely)
        if not asked or (is_likely and not was_likely):
            preloader.ask([QUESTION])
        was_likely, asked = is_likely, True
        if detector.decide(reading).grow:
            best = market.registry.search(order="proven", limit=PER_SITE, **QUESTION.criteria())
            found = {e.artifact.artifact_id for e in preloader.at_hand()}
            count(counts, market, found, best, preloader.num_bytes)
            break
    counts.runs += 1
    counts.bytes_fetched += preloader.num_bytes


def count(counts: Counts, market: Market, found: set[str], best: list, num_bytes: int) -> None:
    """Count the loads of a decision, and what kernels drawn at random would have found."""
    counts.grew += 1
    counts.loads += len(best)
    counts.found += sum(entry.digest in found for entry in best)
    counts.bytes_used += sum(entry.size_bytes for entry in best)
    entries = market.registry.search()
    market.draw.shuffle(entries)
    drawn, left = set(), num_bytes
    for entry in entries:
        if entry.size_bytes <= left:
            drawn.add(entry.digest)
            left -= entry.size_bytes
    counts.drawn_found += sum(entry.digest in drawn for entry in best)


def measured(num_runs: int, random_seed: int) -> dict[str, float]:
    """Return the figures of so many runs."""
    draw = random.Random(random_seed)  # noqa: S311 - draws of a simulation
    market, counts = Market(draw), Counts()
    for number in range(num_runs):
        one_run(market, counts, horizon=3_000 if number % 4 == 0 else None)
    return {
        "candidates": CANDIDATES,
        "latency_s": LATENCY_S,
        "runs": counts.runs,
        "runs_that_grew": counts.grew,
        "loads": counts.loads,
        "found": counts.found / counts.loads,
        "found_at_random": counts.drawn_found / counts.loads,
        "bytes_fetched_over_used": counts.bytes_fetched / counts.bytes_used,
    }


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=200)
    parser.add_argument("--random-seed", type=int, default=0)
    results = Path(__file__).parent / "results" / "preloading"
    parser.add_argument("--results", type=Path, default=results)
    told = parser.parse_args()
    figures = measured(told.runs, told.random_seed)
    told.results.mkdir(parents=True, exist_ok=True)
    text = json.dumps(figures, indent=2) + "\n"
    (told.results / "simulated.json").write_text(text, encoding="utf-8")
    sys.stdout.write(text)


if __name__ == "__main__":
    main()
