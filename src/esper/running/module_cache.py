"""Modules ready to run: the least recently used go first when their bytes exceed the budget."""

from __future__ import annotations

import threading
from collections import OrderedDict
from typing import TYPE_CHECKING, final

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch
    from torch import nn

    Key = tuple[str, torch.device]


@final
class ModuleCache:
    """Modules by artifact and device, counted by the bytes of their parameters and buffers.

    One lock is for the table and is never held while a module is built. Threads that miss the
    same module at once each build one, and all of them get the one that was put in first. A
    module larger than the budget is served and not kept, and evicts nobody.

    Args:
        max_size_mb: Budget in MiB, at least 0.

    Raises:
        ValueError: ``max_size_mb`` is negative.
    """

    def __init__(self, max_size_mb: float) -> None:
        if not max_size_mb >= 0:
            msg = f"a cache's budget is at least 0 MiB, found {max_size_mb}"
            raise ValueError(msg)
        self._max_size_bytes = int(max_size_mb * 2**20)
        self._lock = threading.Lock()
        self._modules: OrderedDict[Key, nn.Module] = OrderedDict()
        self._size_bytes = 0
        self._counts = dict.fromkeys(("hits", "misses", "evictions", "oversize"), 0)

    def get(self, key: Key, build: Callable[[], nn.Module]) -> nn.Module:
        """Return the module of a key, built where there is none.

        Args:
            key: The artifact's id, and the device that the module is on.
            build: Makes the module; what it raises is raised, and nothing is kept.
        """
        with self._lock:
            module = self._modules.get(key)
            if module is not None:
                self._modules.move_to_end(key)
                self._counts["hits"] += 1
                return module
            self._counts["misses"] += 1
        made = build()
        with self._lock:
            return self._keep(key, made)

    def get_stats(self) -> dict[str, float]:
        """Return ``modules_cached``, ``memory_mb``, ``max_memory_mb`` (MiB), and counts."""
        with self._lock:
            return {
                "modules_cached": len(self._modules),
                "memory_mb": self._size_bytes / 2**20,
                "max_memory_mb": self._max_size_bytes / 2**20,
                **self._counts,
            }

    def _keep(self, key: Key, made: nn.Module) -> nn.Module:
        first = self._modules.setdefault(key, made)
        if first is not made:
            return first
        self._size_bytes += size_bytes(made)
        if size_bytes(made) > self._max_size_bytes:
            self._drop(key)
            self._counts["oversize"] += 1
        while self._size_bytes > self._max_size_bytes:
            self._drop(next(iter(self._modules)))
            self._counts["evictions"] += 1
        return made

    def _drop(self, key: Key) -> None:
        self._size_bytes -= size_bytes(self._modules.pop(key))


def size_bytes(module: nn.Module) -> int:
    """Return the bytes of a module's parameters and buffers, on whatever device."""
    tensors = [*module.parameters(), *module.buffers()]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
