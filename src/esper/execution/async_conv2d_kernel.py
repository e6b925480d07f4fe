"""The specification's name for the convolution on a side stream."""

from __future__ import annotations

from esper.streams.async_conv2d_kernel import AsyncConv2dKernel

__all__ = ["AsyncConv2dKernel"]
