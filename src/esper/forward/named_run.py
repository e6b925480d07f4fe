"""Running kernels under the names of their seeds, for as long as somebody profiles their layer."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from esper.forward.fence import run_kernel
from esper.forward.finiteness import in_transform
from esper.state.ranges import OpenRange

if TYPE_CHECKING:
    from collections.abc import Callable

    from esper.forward.blending import RunKernel
    from esper.state.layer_call import LayerCall
    from esper.state.layer_record import LayerRecord
    from esper.state.seed_slot import Seed

    OpenRun = Callable[[LayerRecord, LayerCall], RunKernel]

_LEAF = "torch::autograd::AccumulateGrad"


def opening_named(open_run: OpenRun | None) -> OpenRun:
    """Return an ``open_run`` whose kernels run in named ranges, backward too.

    Inside a compiled graph there are no ranges: it is as it is without a profile.

    Args:
        open_run: The family's own; None: ``run_kernel``.
    """

    def opened(record: LayerRecord, call: LayerCall) -> RunKernel:
        run = run_kernel if open_run is None else open_run(record, call)
        if torch.compiler.is_compiling() or not record.profiles:
            return run
        return _NamedRun(record, run)

    return opened


class _NamedRun:
    """Runs the kernels of one call in ranges, and names the nodes that their backwards go through.

    Each node has a range of its own: one range over all of them would cross those that torch
    draws around each node.
    """

    def __init__(self, record: LayerRecord, run: RunKernel) -> None:
        self._record, self._run = record, run

    def __call__(self, seed: Seed, call: LayerCall, h: Tensor) -> Tensor | None:
        first = torch._C._autograd._get_sequence_nr()  # noqa: SLF001 - torch has no public name
        opened = OpenRange(self._record, seed.seed_idx, "forward")
        try:
            k = self._run(seed, call, h)
        finally:
            opened.end()
        if k is not None and k.grad_fn is not None and not in_transform():
            _name_nodes(k.grad_fn, first, self._record, seed.seed_idx)
        return k


def _name_nodes(
    last: torch.autograd.graph.Node, first: int, record: LayerRecord, seed_idx: int
) -> None:
    """Hook the nodes from ``last`` down that were made since ``first``: the kernel's own."""
    found, waiting = {last}, [last]
    while waiting:
        node = waiting.pop()
        hook = _NodeRange(record, seed_idx, is_call=node is last)
        node.register_prehook(hook.begin)
        node.register_hook(hook.end)
        for child, _ in node.next_functions:
            if child is None or child in found or child.name() == _LEAF:
                continue
            if child._sequence_nr() >= first:  # noqa: SLF001 - as above
                found.add(child)
                waiting.append(child)


class _NodeRange:
    """The range of one node of a kernel's backward."""

    __slots__ = ("_is_call", "_opened", "_record", "_seed_idx")

    def __init__(self, record: LayerRecord, seed_idx: int, *, is_call: bool) -> None:
        self._record, self._seed_idx, self._is_call = record, seed_idx, is_call
        self._opened: OpenRange | None = None

    def begin(self, _gradients: tuple[Tensor | None, ...]) -> None:
        """Open it, unless the profile is over by now."""
        self._opened = None
        if self._record.profiles:
            self._opened = OpenRange(
                self._record, self._seed_idx, "backward", is_call=self._is_call
            )

    def end(self, *_gradients: object) -> None:
        """Close it."""
        opened, self._opened = self._opened, None
        if opened is not None:
            opened.end()
