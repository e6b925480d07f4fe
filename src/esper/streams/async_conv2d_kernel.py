"""A convolution on a side stream."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol, TypedDict

import torch
from torch.nn import functional as F

from esper.contracts.errors import AsyncExecutionError
from esper.streams.device_streams import run_on_side, streams_of
from esper.streams.gradient_sync import GradientFuture

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Unpack

    from torch import Tensor

    from esper.streams.device_streams import Streams

_Pair = int | tuple[int, int]


class ConvOptions(TypedDict):
    """How a convolution goes over its input, as ``torch.nn.functional.conv2d`` has it."""

    stride: _Pair
    padding: _Pair | str
    dilation: _Pair
    groups: int


class ConvFunction(Protocol):
    """A convolution that autograd can follow, with the arguments of ``F.conv2d``."""

    def __call__(
        self,
        input_tensor: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        **settings: Unpack[ConvOptions],
    ) -> Tensor:
        """Return the output; ``settings`` are stride, padding, dilation and groups."""
        ...


class AsyncConv2dKernel:
    """A convolution on a side stream, differentiated by autograd like any other."""

    @staticmethod
    def apply_async(
        input_tensor: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        kernel_fn: ConvFunction | None = None,
        stream: torch.Stream | None = None,
        *,
        stride: _Pair = 1,
        padding: _Pair | str = 0,
        dilation: _Pair = 1,
        groups: int = 1,
        streams: Streams | None = None,
    ) -> tuple[Tensor, GradientFuture]:
        """Launch the convolution on ``stream``; the host does not wait.

        Args:
            input_tensor: ``[B, C_in, H, W]`` or ``[C_in, H, W]``, floating.
            weight: ``[C_out, C_in / groups, kH, kW]``, dtype and device of the input.
            bias: ``[C_out]``, or None.
            kernel_fn: What is run; None for ``torch.nn.functional.conv2d``.
            stream: Where, on the input's device; None for a side stream of torch's pool.
            stride: As of ``torch.nn.functional.conv2d``, like those that follow.
            padding: See above; a string is taken too.
            dilation: See above.
            groups: See above.
            streams: The operations on streams; None for those of the input's device.

        Returns:
            The output, after which the current stream's later work is ordered, so that it may be
            used at once; and a future that is done when a backward has come through it.

        Raises:
            ValueError: ``stream`` is of another device than the input.
            AsyncExecutionError: ``kernel_fn`` gave something else than a tensor.
        """
        device = input_tensor.device
        streams = streams or streams_of(device)
        side = _side_of(streams, device, stream)
        settings = ConvOptions(stride=stride, padding=padding, dilation=dilation, groups=groups)
        convolve: Callable[..., object] = kernel_fn or F.conv2d
        inputs = [tensor for tensor in (input_tensor, weight, bias) if tensor is not None]
        ready = streams.record(streams.current(device))
        output = run_on_side(
            streams, side, ready, inputs, lambda: convolve(input_tensor, weight, bias, **settings)
        )
        if not isinstance(output, torch.Tensor):
            msg = f"kernel_fn: expected a tensor, found {type(output).__name__}; return the output"
            raise AsyncExecutionError(msg)
        future = GradientFuture(streams, device)
        future.follow(output)
        return output, future


def _side_of(streams: Streams, device: torch.device, stream: torch.Stream | None) -> torch.Stream:
    side = stream or streams.side(device)
    if not streams.is_inline and side.device != device:
        msg = f"stream: expected one of {device}, where the input is; found {side.device}"
        raise ValueError(msg)
    return side
