"""The graft: ``y = w h + sum alpha_i k_i``, with ``w = 1 - sum of the replacing alphas``.

``k_i`` is the output of seed i's kernel, which reads the layer's input x (parallel) or the host's
output h (serial). The plan is made when a seed changes; the forward follows it.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Final

import torch

from esper.forward.fence import left_out, run_kernel
from esper.forward.value_gates import kept, share_adder

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from esper.forward.value_gates import ShareAdder
    from esper.state.layer_call import LayerCall
    from esper.state.layer_record import LayerRecord
    from esper.state.seed_slot import Seed

    RunKernel = Callable[[Seed, LayerCall, Tensor], Tensor | None]


TIMED_EVERY: Final = 64
"""With telemetry on, the kernels of one call in so many are timed."""


def blend(record: LayerRecord, call: LayerCall, h: Tensor, run: RunKernel = run_kernel) -> Tensor:
    """Return the layer's output.

    Where a guarded seed's share is not finite it is left out, and a replacing one gives its
    weight back to the host: what remains is the formula over the others, bit for bit.

    Args:
        record: The layer's record; its plan has the seeds with alpha > 0, in slot order.
        call: What the layer was given.
        h: The host's output, of floating dtype.
        run: Runs the kernel of one seed, as ``run_kernel`` does.
    """
    adders: list[ShareAdder] = []
    replaced: Tensor | None = None
    share = 0.0
    is_counted = record.telemetry_enabled and not record.in_shadow
    if is_counted and not torch.compiler.is_compiling() and _count(record):
        run = _Timed(record, run)
    for seed in record.plan:
        k = run(seed, call, h)
        if k is None:
            h = left_out(h, seed)
            continue
        alpha = seed.slot._buffers["alpha"]  # noqa: SLF001 - getattr costs a microsecond
        assert alpha is not None
        add, weight = share_adder(seed, h, k, alpha)
        adders.append(add)
        if seed.replaces:
            replaced = weight if replaced is None else replaced + weight
            share += seed.slot._alpha  # noqa: SLF001 - as above
    y = h if replaced is None else kept(h, 1.0 - replaced, share)
    for add in adders:
        y = add(y)
    return y


def _count(record: LayerRecord) -> bool:
    """Count a call; return whether its kernels are to be timed."""
    record.active_count += 1
    record.kernel_execution_count += len(record.plan)
    return record.active_count % TIMED_EVERY == 1


class _Timed:
    """Runs kernels and records how long each took on this thread, and how healthy it has been."""

    def __init__(self, record: LayerRecord, run: RunKernel) -> None:
        self._record, self._run = record, run

    def __call__(self, seed: Seed, call: LayerCall, h: Tensor) -> Tensor | None:
        start_s = time.perf_counter()
        k = self._run(seed, call, h)
        latency_us = int((time.perf_counter() - start_s) * 1e6)
        health = 1.0 - self._record.layout.fault_rate(seed.seed_idx)
        self._record.layout.update_telemetry(seed.seed_idx, latency_us, health)
        self._record.last_timed_us = latency_us
        seed.timed_us.append(latency_us)
        seed.num_timed += 1
        return k
