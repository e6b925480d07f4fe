"""What a host gives, and the part of it that a graft can be added to."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, fx
from torch.nn.utils.rnn import PackedSequence

if TYPE_CHECKING:
    from esper.state.layer_record import LayerRecord


def graftable(output: object) -> Tensor | None:
    """Return the part of a host's output that a graft can be added to, or None.

    That is a floating tensor, dense or nested, or one that a tuple begins with; no packed sequence,
    which is a tuple too: kernels that read neighbours would read those of other sequences.
    """
    first = _first(output)
    if not isinstance(first, Tensor) or not first.is_floating_point():
        return None
    return first if first.layout == torch.strided or can_be_padded(first) else None


def _first(output: object) -> object:
    if isinstance(output, tuple) and output and not isinstance(output, PackedSequence):
        return output[0]
    return output


def can_be_padded(h: Tensor) -> bool:
    """Return whether a tensor is nested, and made of rows that lie one behind the other."""
    if not h.is_nested or h.layout == torch.strided:
        return h.is_nested
    return h._ragged_idx == 1 and h.lengths() is None  # type: ignore[attr-defined] # noqa: SLF001 - of a nested one


def blendable(output: object) -> Tensor:
    """Return the part of a host's output that a graft can be added to.

    Raises:
        TypeError: There is none.
    """
    found = graftable(output)
    if found is None:
        msg = (
            "a site gives a floating tensor, or a tuple that begins with one; this one gives "
            f"{described(output)}"
        )
        raise TypeError(msg)
    return found


def described(output: object) -> object:
    """Return what a host gave that no graft can be added to: a dtype, a layout or a class."""
    first = _first(output)
    if not isinstance(first, Tensor):
        return type(first).__name__
    return first.layout if first.is_floating_point() else first.dtype


def pass_on(record: LayerRecord, output: object) -> None:
    """Count a call whose output goes on as the host gave it, since no share can be added to it.

    Raises:
        TypeError: The call is traced by torch.fx, and the trace would lose the kernels.
    """
    if isinstance(_first(output), fx.Proxy):
        msg = (
            "a site gives a floating tensor, or a tuple that begins with one; this one gives a "
            "torch.fx.Proxy: trace esper.unwrap(model), or take grown layers for leaves"
        )
        raise TypeError(msg)
    if torch.compiler.is_compiling():
        return
    if record.telemetry_enabled:
        record.native_count += 1
    for seed in record.plan:
        if not seed.is_shadow:
            seed.seen.skip(f"its host gave {described(output)}, which no share can be added to")


def with_first(output: object, y: Tensor) -> tuple[object, ...]:
    """Return a tuple, or a named one, with another first element."""
    assert isinstance(output, tuple)
    rest = (y, *output[1:])
    return type(output)(*rest) if hasattr(output, "_fields") else rest
