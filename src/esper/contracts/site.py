"""What the catalog needs to know about a place where a kernel may be grafted."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class SiteSpec:
    """One wrappable layer, described without the layer.

    Attributes:
        kind: ``"linear"``, ``"conv1d"``, ``"conv2d"`` or ``"conv3d"``.
        in_features: Input features or channels.
        out_features: Output features or channels.
        kernel_size: Per spatial axis; empty for linear.
        stride: Per spatial axis; empty for linear.
        padding: Per spatial axis, in elements before and after, equal; empty for linear.
        dilation: Per spatial axis; empty for linear.
        groups: Groups of a convolution; 1 for linear.
        padding_mode: ``"zeros"``, ``"reflect"``, ``"replicate"`` or ``"circular"``.
        bias: Whether the host layer has a bias.
        dtype: Parameter dtype by its torch name, for example ``"float32"``.
        host_is_trainable: Whether the host layer has a parameter that requires a gradient.
    """

    kind: str
    in_features: int
    out_features: int
    kernel_size: tuple[int, ...] = ()
    stride: tuple[int, ...] = ()
    padding: tuple[int, ...] = ()
    dilation: tuple[int, ...] = ()
    groups: int = 1
    padding_mode: str = "zeros"
    bias: bool = True
    dtype: str = "float32"
    host_is_trainable: bool = True
