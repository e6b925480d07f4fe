"""What is kept of a finished run: one JSON file per task, arm and random seed.

A run that is cut off has no file, so that the next ``make bench-growth`` does it again, and nothing
else. Files of other settings or another text count as not there.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

FORMAT_VERSION = 1
ROOT = Path(__file__).parent.parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "growth"


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """A finished run.

    Attributes:
        task: What was trained; one of ``tasks.TASKS``.
        arm: How.
        random_seed: What started weights and batches.
        settings: What the run depends on, JSON values.
        figures: What came out, by name; None was not measured.
        flops: Of the whole run, growing included; a multiply-add is two.
        seconds: Wall time of the run on one thread, of a machine that may have had other work.
        curve: Updates, FLOPs so far and the measure, at a few places.
        details: Whatever else is worth keeping, JSON values.
        environment: On what it was measured, as ``environment.environment`` says it; None where
            that was not recorded.
        commit: Short name of the commit that it was measured at; None where it is not known.
    """

    task: str
    arm: str
    random_seed: int
    settings: Mapping[str, Any]
    figures: Mapping[str, float | None]
    flops: float
    seconds: float
    curve: tuple[tuple[int, float, float], ...] = ()
    details: Mapping[str, Any] = field(default_factory=dict)
    environment: Mapping[str, Any] | None = None
    commit: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Store:
    """A folder of results.

    Attributes:
        folder: Where they are.
    """

    folder: Path = RESULTS

    def path(self, task: str, arm: str, random_seed: int) -> Path:
        """Return where a result is, or would be."""
        return self.folder / _plain(task) / f"{_plain(arm)}--{random_seed}.json"

    def write(self, result: Result) -> None:
        """Keep a result: whole, or not at all."""
        path = self.path(result.task, result.arm, result.random_seed)
        path.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps({"format_version": FORMAT_VERSION, **asdict(result)}, allow_nan=False)
        partial = path.with_suffix(".partial")
        partial.write_text(text + "\n", encoding="utf-8")
        partial.replace(path)

    def has(self, task: str, arm: str, random_seed: int, settings: Mapping[str, Any]) -> bool:
        """Say whether a result of these settings is there."""
        path = self.path(task, arm, random_seed)
        return path.exists() and read(path).settings == json.loads(json.dumps(settings))

    def of(self, task: str) -> Iterator[Result]:
        """Yield every result of a task, by arm and random seed."""
        found = [read(path) for path in (self.folder / _plain(task)).glob("*.json")]
        yield from sorted(found, key=lambda result: (result.arm, result.random_seed))


def read(path: Path) -> Result:
    """Read a result.

    Raises:
        ValueError: It is of a newer format.
    """
    found = json.loads(path.read_text(encoding="utf-8"))
    version = found.pop("format_version")
    if version > FORMAT_VERSION:
        msg = f"{path} is of format {version}; {FORMAT_VERSION} is known here"
        raise ValueError(msg)
    found["curve"] = tuple(map(tuple, found["curve"]))
    return Result(**found)


def _plain(name: str) -> str:
    """Return a name as it stands in a path."""
    return name.replace(",", "").replace(" ", "-")
