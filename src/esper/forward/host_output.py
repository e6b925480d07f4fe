"""What a host gives, and the part of it that a graft can be added to."""

from __future__ import annotations

from torch import Tensor, fx


def blendable(output: object) -> Tensor:
    """Return the part of a host's output that a graft can be added to.

    Raises:
        TypeError: It is neither a floating tensor nor a tuple that begins with one.
    """
    first = output[0] if isinstance(output, tuple) and output else output
    if isinstance(first, Tensor) and first.is_floating_point():
        return first
    found = first.dtype if isinstance(first, Tensor) else type(first).__name__
    if isinstance(first, fx.Proxy):
        found = "a torch.fx.Proxy: trace esper.unwrap(model), or take grown layers for leaves"
    msg = f"a site gives a floating tensor, or a tuple that begins with one; this one gives {found}"
    raise TypeError(msg)


def with_first(output: object, y: Tensor) -> tuple[object, ...]:
    """Return a tuple, or a named one, with another first element."""
    assert isinstance(output, tuple)
    rest = (y, *output[1:])
    return type(output)(*rest) if hasattr(output, "_fields") else rest
