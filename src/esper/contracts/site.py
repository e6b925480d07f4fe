"""What the catalog needs to know about a place where a kernel may be grafted."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class SiteSpec:
    """One wrappable layer, described without the layer.

    Attributes:
        kind: What the rows of ``LAYER_KINDS`` have as their ``site``: ``"linear"``, ``"conv1d"``,
            ``"conv2d"``, ``"conv3d"``, ``"conv_transpose2d"``, ``"attention"``, ``"recurrent"``,
            ``"embedding"``, ``"norm"`` (over the last axis), ``"channel_norm"`` (channels in
            axis 1) or ``"block"`` (any other module).
        in_features: Input features or channels, for an embedding those that it gives; 0 where not
            known.
        out_features: Output features or channels; 0 where what the layer gives is not known.
        kernel_size: Per spatial axis; empty for what is no convolution, like the next four.
        stride: Per spatial axis.
        padding: Per spatial axis, in elements before and after, equal.
        output_padding: Per spatial axis of a transposed convolution; else empty.
        dilation: Per spatial axis.
        groups: Groups of a convolution; 1 for what is none.
        padding_mode: ``"zeros"``, ``"reflect"``, ``"replicate"`` or ``"circular"``.
        bias: Whether the host layer has a bias.
        axes: Axes behind the channels of what a ``"channel_norm"`` or a ``"block"`` gives; None
            where its features are the last axis.
        is_sequence: Whether it gives ``[batch, length, features]``, as far as was seen.
        is_causal: Whether an output may not depend on later inputs; true where nobody knows.
        dtype: Parameter dtype by its torch name, for example ``"float32"``.
        host_is_trainable: Whether the host layer has a parameter that requires a gradient.
    """

    kind: str
    in_features: int
    out_features: int
    kernel_size: tuple[int, ...] = ()
    stride: tuple[int, ...] = ()
    padding: tuple[int, ...] = ()
    output_padding: tuple[int, ...] = ()
    dilation: tuple[int, ...] = ()
    groups: int = 1
    padding_mode: str = "zeros"
    bias: bool = True
    axes: int | None = None
    is_sequence: bool = False
    is_causal: bool = True
    dtype: str = "float32"
    host_is_trainable: bool = True
