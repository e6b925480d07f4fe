"""What a trial needs of memory beside the live run, asked before it begins."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Final

import torch

from esper.continuity.snapshot import snapshot_bytes
from esper.state.device_memory import device_memory

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from torch import Tensor, nn

    from esper.continuity.ensemble import AnyOptimizer

_MEMORY: Final = Path("/proc/meminfo")
_GROUP_LIMIT: Final = Path("/sys/fs/cgroup/memory.max")
_GROUP_USE: Final = Path("/sys/fs/cgroup/memory.current")


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryEstimate:
    """Bytes that a trial needs beside the live run, by what they hold.

    Attributes:
        parameters: Parameters of every twin.
        buffers: Buffers of every twin.
        moments: State of every twin's optimizer.
        gradients: Gradients of every twin, which stay between its updates.
        averages: Averaged weights of every twin, and of the live run.
        activations: What one update keeps for its backward; twins are updated one after another.
        snapshot: The run as it is at the switch, kept while the package is under watch. There is
            one at a time: the next trial begins when the watch is over.
    """

    parameters: int
    buffers: int
    moments: int
    gradients: int
    averages: int
    activations: int
    snapshot: int

    @property
    def total(self) -> int:
        """All of them, in bytes; the snapshot is made when no update keeps anything any more."""
        every: int = sum(getattr(self, part.name) for part in fields(self))
        return every - min(self.activations, self.snapshot)

    def shortage(self, available_bytes: int | None) -> str | None:
        """Say that a trial does not fit; None where it does, or where nobody knows.

        Args:
            available_bytes: As :func:`available_bytes` returns it.
        """
        if available_bytes is None or self.total <= available_bytes:
            return None
        parts = ", ".join(f"{f.name} {_in_mb(getattr(self, f.name))}" for f in fields(self))
        return (
            f"a trial needs {_in_mb(self.total)} of memory ({parts}), and "
            f'{_in_mb(available_bytes)} are available; free some, or use trial="shadow"'
        )


def estimate(
    model: nn.Module,
    optimizer: AnyOptimizer,
    *,
    num_twins: int,
    package_parameters: int = 0,
    activation_bytes: int = 0,
) -> MemoryEstimate:
    """Estimate what twins of a run need beside it, at their second half.

    Kernels have the mean size of an element and the moments that the model's parameters have.

    Args:
        model: The live model.
        optimizer: What trains it, after its first step: its moments are counted as they are.
        num_twins: How many copies of the run are trained, at least 0.
        package_parameters: Parameters that each of them has besides.
        activation_bytes: What one update of the model keeps for its backward.
    """
    parameters = list(model.parameters())
    trainable = [p for p in parameters if p.requires_grad]
    buffers = list(model.buffers())
    own, trained = _bytes(parameters), _bytes(trainable)
    moments = _bytes(t for state in optimizer.state.values() for t in _tensors(state))
    num_trained = sum(p.numel() for p in trainable)
    share = package_parameters / num_trained if num_trained else 0.0
    package = trained * share
    average = _bytes(parameters, wide=True) + _bytes(filter(_is_floating, buffers), wide=True)
    return MemoryEstimate(
        parameters=round(num_twins * (own + package)),
        buffers=num_twins * _bytes(buffers),
        moments=round(num_twins * moments * (1 + share)),
        gradients=round(num_twins * (trained + package)),
        averages=round((num_twins + 1) * average + num_twins * package) if num_twins else 0,
        activations=activation_bytes,
        snapshot=snapshot_bytes(model, optimizer) if num_twins else 0,
    )


def available_bytes(device: torch.device) -> int | None:
    """Return how much memory of a device is left to this process; None where nobody knows.

    On an accelerator what the allocator of torch keeps for later counts as left. On the CPU it is
    what Linux calls available, or what the process's control group leaves where that is less.
    """
    if device.type != "cpu":
        found = device_memory(device)
        return None if found is None else found[0]
    known = [left for left in (_machine_leaves(), _group_leaves()) if left is not None]
    return min(known, default=None)


@dataclass(slots=True, kw_only=True, eq=False)
class Saved:
    """What a forward kept for its backward.

    Attributes:
        size_bytes: Bytes of the storages, each once, those of parameters left out.
    """

    size_bytes: int = 0


@contextmanager
def saved_for_backward(model: nn.Module) -> Iterator[Saved]:
    """Count the bytes that forwards in the block keep for their backward.

    What a checkpoint computes again is not kept, and not counted.

    Args:
        model: Its parameters are there anyway.
    """
    saved = Saved()
    seen = {_storage_of(p)[0] for p in model.parameters()}

    def pack(tensor: Tensor) -> Tensor:
        where, size_bytes = _storage_of(tensor)
        if where not in seen:
            seen.add(where)
            saved.size_bytes += size_bytes
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, _as_it_is):
        yield saved


def _as_it_is(tensor: Tensor) -> Tensor:
    return tensor


def _storage_of(tensor: Tensor) -> tuple[int, int]:
    """Return where a tensor's storage lies, and its size in bytes; a sharded tensor's by itself."""
    try:
        storage = tensor.untyped_storage()
        return storage.data_ptr(), storage.nbytes()
    except (NotImplementedError, RuntimeError):
        return id(tensor), tensor.numel() * tensor.element_size()


def _bytes(tensors: Iterable[Tensor], *, wide: bool = False) -> int:
    """Return the bytes of tensors; ``wide``: those that they have in float32 at least."""
    least = 4 if wide else 1
    return sum(t.numel() * max(t.element_size(), least) for t in tensors)


def _is_floating(tensor: Tensor) -> bool:
    return tensor.is_floating_point()


def _tensors(state: dict[str, object]) -> Iterator[Tensor]:
    return (value for value in state.values() if isinstance(value, torch.Tensor))


def _machine_leaves() -> int | None:
    """Return what Linux calls available, in bytes."""
    for line in _read(_MEMORY).splitlines():
        name, _, size = line.partition(":")
        if name == "MemAvailable":
            return int(size.split()[0]) * 1024
    return None


def _group_leaves() -> int | None:
    """Return what the limit of the process's control group leaves, in bytes; None without one."""
    limit, used = _read(_GROUP_LIMIT).strip(), _read(_GROUP_USE).strip()
    return int(limit) - int(used) if limit.isdigit() and used.isdigit() else None


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""


def _in_mb(size_bytes: int) -> str:
    return f"{size_bytes / 1e6:,.0f} MB"
