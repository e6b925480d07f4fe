"""Describe a wrappable layer for the catalog."""

from __future__ import annotations

from typing import Any, Final

from torch import nn

from esper.contracts.site import SiteSpec

_CONV_KINDS: Final[dict[type[nn.Module], str]] = {
    nn.Conv1d: "conv1d",
    nn.Conv2d: "conv2d",
    nn.Conv3d: "conv3d",
}


def describe_site(module: nn.Module) -> SiteSpec:
    """Return what the catalog needs to know about a linear layer or convolution.

    Args:
        module: The layer, wrapped or not.

    Raises:
        TypeError: The layer is of no kind that the catalog has kernels for.
        ValueError: The convolution pads unequally before and after.
    """
    if isinstance(module, nn.Linear):
        return SiteSpec(
            kind="linear",
            in_features=module.in_features,
            out_features=module.out_features,
            bias=module.bias is not None,
            dtype=_dtype_name(module),
            host_is_trainable=_is_trainable(module),
        )
    for host_class, kind in _CONV_KINDS.items():
        if isinstance(module, host_class):
            return _describe_convolution(module, kind)
    msg = f"{type(module).__name__} is no linear layer or convolution; name a kernel by hand"
    raise TypeError(msg)


def _describe_convolution(conv: Any, kind: str) -> SiteSpec:
    return SiteSpec(
        kind=kind,
        in_features=conv.in_channels,
        out_features=conv.out_channels,
        kernel_size=tuple(conv.kernel_size),
        stride=tuple(conv.stride),
        padding=convolution_padding(conv),
        dilation=tuple(conv.dilation),
        groups=conv.groups,
        padding_mode=conv.padding_mode,
        bias=conv.bias is not None,
        dtype=_dtype_name(conv),
        host_is_trainable=_is_trainable(conv),
    )


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


def _dtype_name(module: nn.Module) -> str:
    weight = module.weight
    return str(weight.dtype).removeprefix("torch.")


def _is_trainable(module: nn.Module) -> bool:
    host = (p for name, p in module.named_parameters() if not name.startswith("_seeds."))
    return any(p.requires_grad for p in host)
