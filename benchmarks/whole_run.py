"""``make bench-run``: what Esper costs a run from wrap to unwrap, and which room takes it.

For three sizes of a decoder: an update and the memory of a process beside the same run without
Esper, dormant, in a trial, and with 1, 4 and 16 fossils that are not folded. Writes
``benchmarks/results/whole-run/<environment>.json`` and ``docs/benchmarks.md``.
"""

import argparse
import collections
import json
import os
import platform
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType

import document
import torch
import torch.nn.functional as F
from measure import MS, Timing, one_by_one, take_turns
from torch import Tensor, nn

import esper
from esper.contracts.lifecycle import GraftStage

TOKENS, LENGTH, BATCH = 256, 32, 4
HELD_OUT = (320, 8)
FOSSILS = (1, 4, 16)
FIRST_UPDATES = 3
MEMORY_UPDATES = 6
SAMPLED_EVERY_S = 0.002
WITHOUT, DORMANT, TRIAL = "without Esper", "dormant", "in a trial"


@dataclass(frozen=True, slots=True)
class Size:
    """A decoder, and how often its updates are timed."""

    name: str
    width: int
    blocks: int
    rounds: int


SIZES = (
    Size("small", 48, 4, 120),
    Size("middle", 144, 4, 60),
    Size("large", 448, 4, 16),
)


class Decoder(nn.Module):
    """Tokens to logits of the next one."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        width = size.width
        self.embedding = nn.Embedding(TOKENS, width)
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(
                width, 4, 4 * width, 0.0, "gelu", batch_first=True, norm_first=True
            )
            for _ in range(size.blocks)
        )
        self.head = nn.Linear(width, TOKENS)

    def forward(self, x_BL: Tensor) -> Tensor:
        """Return logits, shape (batch, length, TOKENS)."""
        length = x_BL.shape[1]
        mask_LL = nn.Transformer.generate_square_subsequent_mask(length)
        h_BLD = self.embedding(x_BL)
        for block in self.blocks:
            h_BLD = block(h_BLD, src_mask=mask_LL, is_causal=True)
        logits: Tensor = self.head(h_BLD)
        return logits

    def hosts(self) -> list[str]:
        """Return the names of layers that fossils stand in, each four times in all."""
        return [f"blocks.{i}.linear{n}" for i in range(len(self.blocks)) for n in (1, 2)][:4]


class Summed(nn.Module):
    """A layer and kernels beside it, as a person would write them."""

    def __init__(self, host: nn.Module) -> None:
        super().__init__()
        self.host, self.kernels = host, nn.ModuleList()

    def forward(self, x: Tensor) -> Tensor:
        """Add the kernels to the host."""
        y: Tensor = self.host(x)
        for kernel in self.kernels:
            y = y + kernel(x)
        return y


def compute_loss(model: nn.Module, x_BL: Tensor) -> Tensor:
    """Return the mean cross entropy of each next token, in nats."""
    return F.cross_entropy(model(x_BL[:, :-1]).flatten(0, 1), x_BL[:, 1:].flatten())


def evaluate(model: nn.Module) -> Tensor:
    """Return the cross entropy of each held-out sequence."""
    x_BL = torch.randint(TOKENS, HELD_OUT, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        logits_BLV = model(x_BL[:, :-1])
    losses_BL = F.cross_entropy(logits_BLV.transpose(1, 2), x_BL[:, 1:], reduction="none")
    return losses_BL.mean(1)


class Run:
    """A training loop; its state is one of the table's."""

    def __init__(self, size: Size, state: str) -> None:
        torch.manual_seed(0)
        self.model = Decoder(size)
        self.grower: esper.Grower | None = None
        self._batches = [torch.randint(TOKENS, (BATCH, LENGTH)) for _ in range(8)]
        self._updates = 0
        if state.startswith("by hand"):
            self._write_by_hand(size, int(state.rsplit(maxsplit=1)[-1]))
        elif state != WITHOUT:
            esper.wrap(self.model)
        if state.startswith("fossils"):
            self._grow(size, int(state.rsplit(maxsplit=1)[-1]))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4)
        if state != WITHOUT and not state.startswith("by hand"):
            self.grower = esper.Grower(
                self.model,
                self.optimizer,
                compute_loss=compute_loss,
                evaluate=evaluate,
                **self._options(is_trying=state == TRIAL),
            )
        if state == TRIAL:
            self._begin_a_trial()

    def update(self) -> None:
        """Make one update, as a loop of anybody's does."""
        batch = self._batches[self._updates % len(self._batches)]
        self._updates += 1
        loss = compute_loss(self.model, batch)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        if self.grower is not None:
            self.grower.step(loss, batch=batch)

    def close(self) -> None:
        """End what watches it."""
        if self.grower is not None:
            self.grower.close()

    def _options(self, *, is_trying: bool) -> dict[str, object]:
        never = 10**6
        if not is_trying:
            return {"policy": esper.EveryN(never), "evaluate_every": never}
        return {
            "policy": esper.EveryN(1),
            "evaluate_every": 50,
            "record_updates": 4,
            "trial_updates": never,
            "overhead": 1e9,
            "budget": esper.Budget(latency=None),  # or it would depend on the machine's noise
        }

    def _begin_a_trial(self) -> None:
        for _ in range(200):
            self.update()
            assert self.grower is not None
            if any(status.stage is GraftStage.TRIAL for status in self.grower.stages):
                return
        msg = "no trial has begun in 200 updates"
        raise AssertionError(msg)

    def _grow(self, size: Size, num_fossils: int) -> None:
        found = esper.layers(self.model)
        for i in range(num_fossils):
            name = self.model.hosts()[i % 4]
            layer = found[name]
            example = torch.randn(2, LENGTH, self.model.get_submodule(name).in_features)
            kernel = _kernel(size, self.model.get_submodule(name))
            layer.graft(i // 4, kernel, alpha=1.0, guard="off", example=example)
            layer.fossilize(i // 4)

    def _write_by_hand(self, size: Size, num_kernels: int) -> None:
        for i in range(num_kernels):
            path, _, name = self.model.hosts()[i % 4].rpartition(".")
            block = self.model.get_submodule(path)
            host = getattr(block, name)
            summed = host if isinstance(host, Summed) else Summed(host)
            summed.kernels.append(_kernel(size, summed.host))
            setattr(block, name, summed)


def _kernel(size: Size, host: nn.Module) -> nn.Module:
    hidden = size.width // 8
    inner = nn.Linear(host.in_features, hidden), nn.GELU(), nn.Linear(hidden, host.out_features)
    return nn.Sequential(*inner)


def states() -> list[str]:
    """Return the states of a run that are timed, in the order of the table."""
    grown = [f"fossils, {n}" for n in FOSSILS]
    return [WITHOUT, DORMANT, *grown, *(f"by hand, {n}" for n in FOSSILS), TRIAL]


def measured(size: Size, *, quick: bool) -> dict[str, object]:
    """Return the part of the table about one size."""
    runs = {state: Run(size, state) for state in states()}
    for run in runs.values():
        for _ in range(FIRST_UPDATES):
            run.update()
    calls = {state: run.update for state, run in runs.items()}
    took = take_turns(calls, rounds=2 if quick else size.rounds, number=1)
    looked_at, updates = (
        (DORMANT, f"fossils, {FOSSILS[-1]}", TRIAL),
        10 if quick else 3 * size.rounds,
    )
    rooms = {state: shares(runs[state], updates) for state in looked_at}
    for run in runs.values():
        run.close()
    memory = {state: peak_mb(size, state) for state in states() if "hand" not in state}
    rows = [
        {
            "state": state,
            "update_ms": took[state].median_s * MS,
            "over": _over(took[state], took[WITHOUT]),
            "over_by_hand": _over_hand(took, state),
            "memory_mb": memory[state],
            "memory_added_mb": memory[state] - memory[WITHOUT],
        }
        for state in states()
        if "hand" not in state
    ]
    return {
        **asdict(size),
        "parameters": sum(p.numel() for p in Decoder(size).parameters()),
        "wrap_ms": _once(size, esper.wrap, wrapped=False),
        "unwrap_ms": _once(size, esper.unwrap, wrapped=True),
        "rows": rows,
        "rooms": rooms,
    }


def _over(timing: Timing, other: Timing) -> float | None:
    return timing.ratio(other, "").value


def _over_hand(took: dict[str, Timing], state: str) -> float | None:
    other = took.get(f"by hand, {state.rsplit(maxsplit=1)[-1]}")
    return None if other is None else _over(took[state], other)


def _once(size: Size, call: Callable[[nn.Module], object], *, wrapped: bool) -> float:
    def prepare() -> Callable[[], object]:
        model = Decoder(size)
        if wrapped:
            esper.wrap(model)
        return lambda: call(model)

    return one_by_one(prepare, rounds=10).median_s * MS


# ---- memory, each in a process of its own


def peak_mb(size: Size, state: str) -> float:
    """Return the most memory that a process had which trains in a state, in MB."""
    command = [sys.executable, __file__, "--memory-of", size.name, state]
    done = subprocess.run(command, check=True, capture_output=True, text=True)  # noqa: S603 - this file
    return float(done.stdout.split()[-1])


def _print_memory(size: Size, state: str) -> None:
    run = Run(size, state)
    for _ in range(MEMORY_UPDATES):
        run.update()
    status = Path("/proc/self/status").read_text(encoding="ascii")  # its own, not a parent's
    print(int(status.partition("VmHWM:")[2].split()[0]) * 1024 / 1e6)


# ---- rooms


def shares(run: Run, updates: int) -> dict[str, float]:
    """Return the share of a run's time by room, from a look at its stack every two milliseconds.

    What a twin does is the trial's, wherever it is; what a module of torch computes is the model's,
    and what stands behind no room of ours is the loop's.
    """
    with _sampled() as counts:
        for _ in range(updates):
            run.update()
    total = sum(counts.values())
    return {room: n / total for room, n in counts.most_common()}


@contextmanager
def _sampled() -> Iterator[collections.Counter[str]]:
    counts: collections.Counter[str] = collections.Counter()
    watched, over = threading.get_ident(), threading.Event()

    def look() -> None:
        while not over.wait(SAMPLED_EVERY_S):
            counts[_room_of(sys._current_frames()[watched])] += 1  # noqa: SLF001 - the only way

    looking = threading.Thread(target=look, daemon=True)
    looking.start()
    try:
        yield counts
    finally:
        over.set()
        looking.join()


def _room_of(frame: FrameType | None) -> str:
    found = ""
    while frame is not None:
        path = frame.f_code.co_filename
        if path.endswith("esper/growth/twins.py"):
            return "twins of a trial"
        found = found or _named(path)
        frame = frame.f_back
    return found or "loop, backward"


def _named(path: str) -> str:
    parts = Path(path).parts
    if "esper" in parts[:-1] and "src" in parts:
        return parts[parts.index("src") + 2]
    if "/torch/nn/" in path:
        return "model, forward"
    if "/torch/optim/" in path:
        return "optimizer"
    return "backward" if path.endswith("torch/autograd/graph.py") else ""


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="worthless figures; needs --out")
    parser.add_argument("--out", type=Path, help="folder of the results; the document stays")
    parser.add_argument("--memory-of", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.quick and options.out is None:
        parser.error("figures of a quick run are not kept: give it a folder with --out")
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # of runs without a horizon, that never grow
    if options.memory_of:
        name, state = options.memory_of
        _print_memory(next(size for size in SIZES if size.name == name), state)
        return
    start_s = time.perf_counter()
    found = []
    for size in SIZES[:1] if options.quick else SIZES:
        found.append(measured(size, quick=options.quick))
        print(json.dumps(found[-1], indent=1), flush=True)
    named = {
        "esper": esper.__version__,
        "torch": torch.__version__,
        "platform": f"{platform.system()} {platform.machine()}",
        "cores": os.cpu_count(),
        "threads": 1,
    }
    folder = options.out or document.RESULTS / "whole-run"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{named['platform']}-{named['cores']}.json".replace(" ", "-").lower()
    path.write_text(json.dumps({"environment": named, "sizes": found}, indent=1) + "\n")
    print(f"Written to {path}; took {time.perf_counter() - start_s:.0f} s")
    if options.out is None:
        document.write()


if __name__ == "__main__":
    main()
