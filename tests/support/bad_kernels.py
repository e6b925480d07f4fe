"""Kernels that pass every check at load, and go wrong when they are told to."""

import torch
from torch import nn


class _Poison(torch.autograd.Function):
    """The identity, whose gradient is `value` everywhere."""

    @staticmethod
    def forward(ctx, x, value):
        ctx.value = value
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient):
        return torch.full_like(gradient, ctx.value), None


class BadKernel(nn.Module):
    """A linear layer or convolution that contributes exactly 0, until `fault` is set.

    `is_bad` may be switched at any time; while it is False the kernel is healthy.
    """

    def __init__(self, body, fault):
        super().__init__()
        self.body = body
        self.fault = FAULTS[fault]
        self.is_bad = False
        nn.init.zeros_(body.weight)
        nn.init.zeros_(body.bias)
        for name in LEARNS_ALL_THE_SAME.get(fault, ()):
            getattr(body, name).requires_grad_(False)

    def forward(self, x):
        return self.fault(self.body, x) if self.is_bad else self.body(x)


def _raises(body, x):
    raise RuntimeError("this kernel fails on purpose")


def _one_nan(body, x):
    y = body(x)
    mask = torch.zeros_like(y)
    mask.view(-1)[0] = torch.nan
    return y + mask


def _bad_weight_gradient(body, x):
    weight = _Poison.apply(body.weight, torch.nan)
    return torch.func.functional_call(body, {"weight": weight}, (x,))


FORWARD_FAULTS = {
    "raises": _raises,
    "shape": lambda body, x: body(x)[..., :1],
    "dtype": lambda body, x: body(x).double(),
    "type": lambda body, x: [body(x)],
    "nan": lambda body, x: body(x) * torch.nan,
    "infinity": lambda body, x: body(x) + torch.inf,
    "one_nan": _one_nan,
    "overflow": lambda body, x: (body(x) + 3e38) * 10.0,
    "nan_from_gradient_too": lambda body, x: torch.sqrt(body(x) - 1.0),
}
GRADIENT_FAULTS = {
    "gradient_nan": lambda body, x: _Poison.apply(body(x), torch.nan),
    "gradient_infinity": lambda body, x: _Poison.apply(body(x), torch.inf),
    "gradient_of_weight": _bad_weight_gradient,
    "gradient_of_input": lambda body, x: body(_Poison.apply(x, torch.nan)),
}
LEARNS_ALL_THE_SAME = {"gradient_of_weight": ("bias",), "gradient_of_input": ("weight", "bias")}
"""What a fault leaves a good gradient, frozen so that the kernel goes on contributing 0."""

FAULTS = FORWARD_FAULTS | GRADIENT_FAULTS
FENCED = ("raises", "shape", "dtype", "type")
