"""Places for the catalog's kernels: sites of every kind, what stands for a host, and an input."""

from __future__ import annotations

from dataclasses import fields
from itertools import product

import torch
from torch import nn

from esper.contracts.site import SiteSpec

LINEARS = [
    SiteSpec(kind="linear", in_features=i, out_features=o, bias=bias)
    for i, o, bias in [(16, 10, True), (1, 1, True), (128, 64, False), (3, 200, True)]
]


def _conv(axes, kernel, stride, padding, dilation, **more):
    return SiteSpec(
        kind=f"conv{axes}d",
        in_features=4,
        out_features=6,
        kernel_size=(kernel,) * axes,
        stride=(stride,) * axes,
        padding=(padding,) * axes,
        dilation=(dilation,) * axes,
        **more,
    )


GRID_2D = [
    _conv(2, kernel, stride, padding, dilation)
    for kernel, stride, padding, dilation in product((1, 2, 3, 5), (1, 2, 3), (0, 1, 2), (1, 2))
]
OTHERS = [
    _conv(1, 3, 1, 1, 1),
    _conv(1, 4, 2, 1, 1),
    _conv(3, 3, 2, 1, 1),
    _conv(3, 3, 1, 1, 1, groups=2, bias=False),
    _conv(2, 3, 1, 1, 1, groups=2),
    *[_conv(2, 3, 2, 2, 1, padding_mode=mode) for mode in ("reflect", "replicate", "circular")],
    SiteSpec(
        kind="conv2d",
        in_features=1,
        out_features=4,
        kernel_size=(3, 5),
        stride=(1, 2),
        padding=(1, 0),
        dilation=(2, 1),
    ),
]


LIFTS = [
    SiteSpec(
        kind="conv_transpose2d",
        in_features=4,
        out_features=6,
        kernel_size=(3, 3),
        stride=(stride, stride),
        padding=(1, 1),
        output_padding=(stride - 1, stride - 1),
        dilation=(1, 1),
        groups=groups,
        bias=groups == 1,
    )
    for stride, groups in [(1, 1), (2, 1), (2, 2)]
]
BEHIND = [
    *[SiteSpec(kind=kind, in_features=8, out_features=8) for kind in ("norm", "embedding")],
    SiteSpec(kind="attention", in_features=8, out_features=8),
    *[SiteSpec(kind="channel_norm", in_features=4, out_features=4, axes=n) for n in (0, 1, 2, 3)],
    SiteSpec(kind="block", in_features=8, out_features=8, is_sequence=True),
    SiteSpec(kind="block", in_features=8, out_features=8, is_sequence=True, is_causal=False),
    SiteSpec(kind="block", in_features=3, out_features=8, is_sequence=True),
    SiteSpec(kind="block", in_features=4, out_features=6, axes=2),
    SiteSpec(kind="recurrent", in_features=3, out_features=8, is_sequence=True),
]
"""Kinds whose kernels read behind the host; what stands for the host keeps what it is given."""
ALL = LINEARS + OTHERS + LIFTS + BEHIND


def name_of(site):
    return "-".join(str(getattr(site, f.name)) for f in fields(site)).replace(" ", "")


SMALL = [LINEARS[0], _conv(2, 3, 1, 1, 1), _conv(1, 3, 2, 1, 1), LIFTS[1], BEHIND[5], BEHIND[7]]


def host_of(site):
    if site.kind == "linear":
        return nn.Linear(site.in_features, site.out_features, bias=site.bias)
    if site in LIFTS:
        return nn.ConvTranspose2d(
            site.in_features,
            site.out_features,
            site.kernel_size,
            site.stride,
            site.padding,
            site.output_padding,
            site.groups,
            site.bias,
            site.dilation,
        )
    if site in BEHIND:
        return nn.Identity()
    cls = {"conv1d": nn.Conv1d, "conv2d": nn.Conv2d, "conv3d": nn.Conv3d}[site.kind]
    return cls(
        site.in_features,
        site.out_features,
        site.kernel_size,
        site.stride,
        site.padding,
        site.dilation,
        site.groups,
        site.bias,
        site.padding_mode,
    )


def example_of(site, odd=0):
    axes = len(site.kernel_size) or site.axes or 0
    shape = (2, site.in_features, *(11 + odd + axis for axis in range(axes)))
    if site in BEHIND and site.axes is None:
        shape = (2, 11 + odd, site.out_features)
    elif site in BEHIND:
        shape = (2, site.out_features, *shape[2:])
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))
