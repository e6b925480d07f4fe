"""Describe a wrappable layer for the catalog."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from esper.contracts.site import SiteSpec
from esper.state.host_parts import host_modules
from esper.state.kernel import reference_tensor

if TYPE_CHECKING:
    from torch import Tensor

CHANNEL_NORMS: Final = (_BatchNorm, nn.GroupNorm)
LAST_AXIS_NORMS: Final = (nn.LayerNorm, nn.RMSNorm)

_CONVOLUTION_KINDS: Final[dict[type[nn.Module], str]] = {
    nn.Conv1d: "conv1d",
    nn.Conv2d: "conv2d",
    nn.Conv3d: "conv3d",
    nn.ConvTranspose2d: "conv_transpose2d",
}
_KINDS: Final[tuple[tuple[tuple[type[nn.Module], ...], str], ...]] = (
    ((nn.Linear,), "linear"),
    ((nn.MultiheadAttention,), "attention"),
    ((nn.Embedding,), "embedding"),
    (LAST_AXIS_NORMS, "norm"),
    (CHANNEL_NORMS, "channel_norm"),
)
_NORM_AXES: Final[dict[type[nn.Module], int]] = {nn.BatchNorm2d: 2, nn.BatchNorm3d: 3}
_CHANNELS_SECOND: Final = (*_CONVOLUTION_KINDS, *CHANNEL_NORMS)


def describe_site(
    module: nn.Module,
    x: Tensor | None = None,
    h: Tensor | None = None,
    *,
    is_causal: bool = True,
) -> SiteSpec:
    """Return what the catalog needs to know about a layer.

    Args:
        module: The layer, wrapped or not.
        x: Its first input as it was seen, with any number of samples, or None. What a GroupNorm,
            a BatchNorm1d or a block gives is known from an example only.
        h: The output for it, the first one where there are several; given if ``x`` is.
        is_causal: Whether an output may not depend on later inputs.

    Raises:
        ValueError: The convolution pads unequally before and after.
    """
    kind = _kind(module)
    common: dict[str, Any] = {
        "kind": kind,
        "dtype": str(reference_tensor(module).dtype).removeprefix("torch."),
        "bias": getattr(module, "bias", None) is not None,
        "host_is_trainable": _is_trainable(module),
        "is_causal": is_causal,
    }
    if kind.startswith("conv"):
        return SiteSpec(**common, **_convolution_fields(module))
    if kind == "block":
        return SiteSpec(**common, **_block_fields(module, x, h))
    num_in, num_out = widths(module)
    axes = _norm_axes(module, h) if kind == "channel_norm" else None
    if kind == "embedding":
        num_in = num_out
    if kind == "channel_norm" and axes is None:
        num_out = 0
    return SiteSpec(**common, in_features=num_in, out_features=num_out, axes=axes)


def widths(module: nn.Module) -> tuple[int, int]:
    """Return input and output features of a layer, or channels; 0 where it does not say.

    The input of an embedding is counted in rows of its table.
    """
    host: Any = module
    if is_transposed_linear(module):
        return int(host.weight.shape[0]), int(host.weight.shape[1])
    for names in _WIDTH_NAMES:
        if all(isinstance(getattr(host, name, None), int) for name in names):
            return int(getattr(host, names[0])), int(getattr(host, names[-1]))
    if isinstance(module, LAST_AXIS_NORMS):
        return int(module.normalized_shape[-1]), int(module.normalized_shape[-1])
    return 0, 0


_WIDTH_NAMES: Final = (
    ("in_features", "out_features"),
    ("in_channels", "out_channels"),
    ("num_embeddings", "embedding_dim"),
    ("embed_dim",),
    ("num_features",),
    ("num_channels",),
)


def is_transposed_linear(module: nn.Module) -> bool:
    """Say whether a module is ``transformers``' ``Conv1D``: linear, its weight ``[in, out]``.

    That package is not imported to find out.
    """
    return any(
        cls.__name__ == "Conv1D" and cls.__module__ == "transformers.pytorch_utils"
        for cls in type(module).__mro__
    )


def feature_axis(module: nn.Module, h: Tensor) -> int:
    """Return which axis of a layer's output is that of its features or channels.

    Args:
        module: The layer.
        h: What it gives, at least two axes.
    """
    kind = _kind(module)
    if kind == "block":
        return 1 if _gives_channels(module, h) else h.ndim - 1
    return 1 if isinstance(module, _CHANNELS_SECOND) else h.ndim - 1


def convolution_padding(conv: Any) -> tuple[int, ...]:
    """Return a convolution's padding in elements per side; ``"same"`` and ``"valid"`` resolved.

    Raises:
        ValueError: ``padding="same"`` that cannot be the same before and after.
    """
    if not isinstance(conv.padding, str):
        return tuple(conv.padding)
    if conv.padding == "valid":
        return (0,) * len(conv.kernel_size)
    spans = [d * (k - 1) for d, k in zip(conv.dilation, conv.kernel_size, strict=True)]
    if any(span % 2 for span in spans):
        msg = f"padding='same' with kernel_size={tuple(conv.kernel_size)} pads unequally"
        raise ValueError(msg)
    return tuple(span // 2 for span in spans)


def _kind(module: nn.Module) -> str:
    if is_transposed_linear(module):
        return "linear"
    for host_class, kind in _CONVOLUTION_KINDS.items():
        if isinstance(module, host_class):
            return kind
    return next((kind for classes, kind in _KINDS if isinstance(module, classes)), "block")


def _convolution_fields(conv: Any) -> dict[str, Any]:
    return {
        "in_features": conv.in_channels,
        "out_features": conv.out_channels,
        "kernel_size": tuple(conv.kernel_size),
        "stride": tuple(conv.stride),
        "padding": convolution_padding(conv),
        "output_padding": tuple(conv.output_padding) if conv.transposed else (),
        "dilation": tuple(conv.dilation),
        "groups": conv.groups,
        "padding_mode": conv.padding_mode,
    }


def _norm_axes(norm: nn.Module, h: Tensor | None) -> int | None:
    """Return how many axes stand behind the channels, or None where only an example could say."""
    if h is not None:
        return h.ndim - 2
    return next((axes for kind, axes in _NORM_AXES.items() if isinstance(norm, kind)), None)


def _block_fields(block: nn.Module, x: Tensor | None, h: Tensor | None) -> dict[str, Any]:
    """Describe a module by what it was seen to read and give."""
    if x is None or h is None or min(x.ndim, h.ndim) < 2:
        return {"in_features": 0, "out_features": 0}
    if _gives_channels(block, h):
        return {"in_features": x.shape[1], "out_features": h.shape[1], "axes": h.ndim - 2}
    return {
        "in_features": x.shape[-1],
        "out_features": h.shape[-1],
        "is_sequence": h.ndim == 3 and _is_batch_first(block),
    }


def _gives_channels(block: nn.Module, h: Tensor) -> bool:
    """Guess by the last layer with a place for channels whether they are in axis 1."""
    layers = [m for m in host_modules(block) if _kind(m) not in ("block", "embedding")]
    return h.ndim > 2 and bool(layers) and isinstance(layers[-1], _CHANNELS_SECOND)


def _is_batch_first(block: nn.Module) -> bool:
    return all(getattr(part, "batch_first", True) for part in host_modules(block))


def _is_trainable(module: nn.Module) -> bool:
    parameters = (p for part in host_modules(module) for p in part.parameters(recurse=False))
    return any(p.requires_grad for p in parameters)
