"""Tracing over symbolic sizes: is a kernel one graph, whatever the batch and the image?

One that is not would break or recompile a compiled model, where no fence can catch it. So it is
found out beforehand, once per graph, by running it on tensors that have symbols for sizes and no
values: a branch on a value fails, and a branch on a size turns its symbol into a number.
"""

from __future__ import annotations

import functools
from collections import OrderedDict
from typing import TYPE_CHECKING, Final

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._python_dispatch import _disable_current_modes

from esper.compiler.graph import plan
from esper.compiler.lowering import LoweredKernel
from esper.contracts.blueprint import TensorSpec
from esper.contracts.errors import KernelCompilationError

if TYPE_CHECKING:
    from torch._subclasses.fake_tensor import FakeTensorMode

_MAX_REMEMBERED: Final = 1024
_SIZE_HINT: Final = 5003  # above every window that a blueprint may have; nothing is allocated
_traced: Final[OrderedDict[str, None]] = OrderedDict()


def trace_symbolically(kernel: nn.Module, input_spec: TensorSpec) -> None:
    """Trace a kernel with its batch and its free sizes left open.

    A kernel that was lowered from a blueprint is traced once per graph and mode, and remembered;
    any other module is traced every time. Weights, buffers and random state are left alone.

    Args:
        kernel: The kernel, in the mode in which it is to be traced.
        input_spec: What it reads.

    Raises:
        KernelCompilationError: It does not trace, or works for particular sizes only.
    """
    key = _key_of(kernel)
    if key in _traced:
        return
    with _disable_current_modes():  # a counter of FLOPs would count in symbols, and keep them
        _trace(kernel, input_spec)
    if key is not None:
        _traced[key] = None
        if len(_traced) > _MAX_REMEMBERED:
            _traced.popitem(last=False)


@functools.cache
def warm_up() -> None:
    """Trace something small, so that no later trace of this process pays for the first one.

    It takes half a second, most of it for importing sympy, and changes nothing.
    """
    into, out = nn.Linear(2, 3, device="meta"), nn.Linear(3, 2, device="meta")
    trace_symbolically(nn.Sequential(into, nn.GELU(), out), TensorSpec((2,)))


def _key_of(kernel: nn.Module) -> str | None:
    if not isinstance(kernel, LoweredKernel):
        return None
    return f"{plan(kernel.blueprint).graph_digest}:{kernel.training}"


def _trace(kernel: nn.Module, input_spec: TensorSpec) -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode  # sympy comes with it: late
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    fake = FakeTensorMode(shape_env=ShapeEnv())
    own = dict([*kernel.named_parameters(), *kernel.named_buffers()])
    state: dict[str, Tensor] = {
        name: fake.from_tensor(tensor.detach().to("meta")) for name, tensor in own.items()
    }
    x = _symbolic_input(fake, input_spec)
    try:
        with fake, torch.no_grad():
            functional_call(kernel, state, (x,))
    except Exception as error:  # anybody's forward, and whatever torch makes of symbols in it
        msg = f"{_name_of(kernel)} does not trace over symbolic sizes: {error!s:.500}"
        raise KernelCompilationError(msg) from error
    _check_still_symbolic(kernel, input_spec, tuple(x.shape))


def _symbolic_input(fake: FakeTensorMode, spec: TensorSpec) -> Tensor:
    from torch.fx.experimental.symbolic_shapes import DimDynamic, StatelessSymbolicContext

    sizes = {name: _SIZE_HINT + 3 * i for i, name in enumerate(spec.free_sizes)}
    shape = spec.resolve((6, 10), sizes)
    fixed = [size for size in spec.shape if size not in ("*", "N")]
    leading = [DimDynamic.DYNAMIC] * (len(shape) - len(fixed))
    named = [DimDynamic.DYNAMIC if isinstance(s, str) else DimDynamic.STATIC for s in fixed]
    context: StatelessSymbolicContext[..., object] = StatelessSymbolicContext(
        dynamic_sizes=leading + named
    )
    real = torch.empty(shape, dtype=getattr(torch, spec.dtype), device="meta")
    return fake.from_tensor(real, symbolic_context=context)


def _check_still_symbolic(kernel: nn.Module, spec: TensorSpec, shape: tuple[object, ...]) -> None:
    """A size that the kernel compared with a number has become that number."""
    num_fixed = sum(isinstance(size, int) for size in spec.shape)
    num_open = sum(
        isinstance(size, torch.SymInt) and size.node.maybe_as_int() is None for size in shape
    )
    if num_open + num_fixed != len(shape):
        msg = (
            f"{_name_of(kernel)} works for particular sizes only: an input with open sizes was "
            f"narrowed to {tuple(map(str, shape))}; do not branch on sizes"
        )
        raise KernelCompilationError(msg)


def _name_of(kernel: nn.Module) -> str:
    if isinstance(kernel, LoweredKernel):
        return f"the kernel of blueprint {kernel.blueprint.id!r}"
    return f"the kernel {type(kernel).__name__}"
