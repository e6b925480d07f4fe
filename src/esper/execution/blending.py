"""The graft: ``y = w h + sum alpha_i k_i``, with ``w = 1 - sum of the replacing alphas``.

``k_i`` is the output of seed i's kernel, which reads the layer's input x (parallel) or the host's
output h (serial). The plan is made when a seed changes; the forward follows it.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Final

import torch

from esper.execution.guard import OutputGate, is_finite, observe, run_kernel

if TYPE_CHECKING:
    from torch import Tensor

    from esper.execution.layer_record import LayerRecord
    from esper.execution.seed_slot import Seed


TIMED_EVERY: Final = 64
"""With telemetry on, the kernels of one call in so many are timed."""


def blend(record: LayerRecord, x: Tensor, h: Tensor) -> Tensor:
    """Return the layer's output.

    Where a guarded seed's share is not finite it is left out, and a replacing one gives its
    weight back to the host. The neutral element of addition is -0.0 (``-0.0 + 0.0 == 0.0``), so
    what remains is the formula over the others, bit for bit.

    Args:
        record: The layer's record; its plan has the seeds with alpha > 0, in slot order.
        x: The layer's input.
        h: The host's output, of floating dtype.
    """
    terms: list[Tensor] = []
    replaced: Tensor | None = None
    is_timed = record.telemetry_enabled and not torch.compiler.is_compiling() and _count(record)
    for seed in record.plan:
        k = _run_timed(record, seed, x, h) if is_timed else run_kernel(seed, x, h)
        if k is None:
            continue
        alpha = seed.slot._buffers["alpha"]  # noqa: SLF001 - getattr costs a microsecond
        assert alpha is not None
        term, share = _admit(seed, h, k, alpha)
        terms.append(term)
        if seed.replaces:
            replaced = share if replaced is None else replaced + share
    y = h if replaced is None else (1.0 - replaced) * h
    for term in terms:
        y = y + term
    return y


def _count(record: LayerRecord) -> bool:
    """Count a call; return whether its kernels are to be timed."""
    record.forward_count += 1
    record.kernel_execution_count += len(record.plan)
    return record.forward_count % TIMED_EVERY == 1


def _run_timed(record: LayerRecord, seed: Seed, x: Tensor, h: Tensor) -> Tensor | None:
    """Run a kernel and record how long it took on this thread, and how healthy it has been."""
    start_s = time.perf_counter()
    k = run_kernel(seed, x, h)
    latency_us = int((time.perf_counter() - start_s) * 1e6)
    if not seed.is_shadow:
        health = 1.0 - record.layout.fault_rate(seed.seed_idx)
        record.layout.update_telemetry(seed.seed_idx, latency_us, health)
    return k


def _admit(seed: Seed, h: Tensor, k: Tensor, alpha: Tensor) -> tuple[Tensor, Tensor]:
    """Return ``alpha * k`` and alpha, or neutral elements where the guard says no."""
    term = alpha * k
    if seed.guard == "off":
        return term, alpha
    sums = observe(seed, h, k, term, alpha)
    if seed.guard == "step":
        return term, alpha
    if k.requires_grad and not torch.compiler.is_compiling():
        k.register_hook(OutputGate(seed, sums))  # type: ignore[no-untyped-call] # torch has none
    ok = is_finite(sums[1])
    share = torch.where(ok, alpha, 0.0) if seed.replaces else alpha
    return torch.where(ok, term, -0.0), share
