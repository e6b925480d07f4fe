"""The specification's convolutional layer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from torch import nn

from esper.execution.kasmina_layer import KasminaLayer

if TYPE_CHECKING:
    from typing import Unpack

    from esper.execution.kasmina_layer import LayerOptions

_Pair = int | tuple[int, int]


class KasminaConv2dLayer(KasminaLayer):
    """A two-dimensional convolution with seeds; every wrapped ``Conv2d`` is one.

    Args:
        in_channels: As of ``torch.nn.Conv2d``, like the others up to ``padding_mode``; all of
            them are ignored where ``original_layer`` is given.
        out_channels: See above.
        kernel_size: See above.
        stride: See above.
        padding: See above; a string is taken too.
        dilation: See above.
        groups: See above.
        bias: See above.
        padding_mode: See above.
        original_layer: The host; taken as it is, not copied.
        layer_options: ``num_seeds``, ``cache_size_mb``, ``telemetry_enabled`` and ``source``, as
            of :class:`KasminaLayer`.

    Raises:
        ValueError: ``num_seeds`` is less than 1, or ``original_layer`` cannot be a site.
    """

    @classmethod
    def _construct(  # type: ignore[override] # the specification's constructor
        cls,
        in_channels: int,
        out_channels: int,
        kernel_size: _Pair,
        stride: _Pair = 1,
        padding: _Pair | str = 0,
        dilation: _Pair = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: Literal["zeros", "reflect", "replicate", "circular"] = "zeros",
        original_layer: nn.Module | None = None,
        **layer_options: Unpack[LayerOptions],
    ) -> nn.Module:
        host = original_layer
        if host is None:
            host = nn.Conv2d(
                in_channels,
                out_channels,
                kernel_size,
                stride=stride,
                padding=padding,
                dilation=dilation,
                groups=groups,
                bias=bias,
                padding_mode=padding_mode,
            )
        return super()._construct(in_channels, out_channels, original_layer=host, **layer_options)

    @property
    def conv_params(self) -> dict[str, Any]:
        """The host's settings, by the names of ``torch.nn.Conv2d``'s arguments."""
        host: Any = self
        names = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation")
        settings = {name: getattr(host, name) for name in (*names, "groups", "padding_mode")}
        return {**settings, "bias": host.bias is not None}

    @property
    def input_size(self) -> int:
        """Inputs of one output: channels per group times kernel size (the fan-in)."""
        host: Any = self
        return int(host.weight[0].numel())
