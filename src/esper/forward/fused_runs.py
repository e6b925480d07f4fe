"""How kernels of one form run as one: step by step, each for all seeds at once.

The tensors of their steps are joined in every forward, by what autograd knows: so a parameter stays
what its owner, its hooks and its optimizer know, and gradients come to it as they always do.

What all seeds read has no axis of seeds. Behind the first step that has tensors a value has one:
the first of ``[seeds, rows, features]``, the second of ``[batch, seeds, channels, ...]``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Final

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from esper.compiler.parts import Add, Mul, Scale, Sub
from esper.forward.share_marks import check_like, share_marks

if TYPE_CHECKING:
    from esper.forward.kernel_steps import KernelSteps

Rule = Callable[[Sequence[nn.Module], Sequence[Tensor]], Tensor]
"""Runs one step of all seeds on the values that it reads."""

Rules = dict[type[nn.Module], Rule]

ACTIVATIONS: Final[tuple[type[nn.Module], ...]] = (
    *(nn.ReLU, nn.GELU, nn.SiLU, nn.Tanh, nn.Sigmoid, nn.LeakyReLU, nn.ELU, nn.Softplus),
    *(nn.Mish, nn.Hardswish, nn.Identity, Scale),
)
"""Steps that work on each number by itself and have no tensors."""

COMBINATIONS: Final[tuple[type[nn.Module], ...]] = (Add, Sub, Mul)
"""Steps that put several values together, number by number."""


def _joined(
    steps: Sequence[nn.Module], name: str, join: Callable[[list[Tensor]], Tensor]
) -> Tensor | None:
    """Return the tensors of a name of all seeds' steps, as the modules have them now, as one.

    Raises:
        AttributeError, RuntimeError, ValueError: They are not alike any more.
    """
    found = [step._parameters[name] for step in steps]  # noqa: SLF001 - getattr costs a microsecond
    if found[0] is None:
        return None
    tensors: list[Tensor] = [tensor for tensor in found if tensor is not None]
    kinds = {(type(tensor), tensor.dtype, tensor.shape) for tensor in tensors}
    if len(kinds) > 1 or len(tensors) < len(steps):
        msg = f"the kernels' {name}s are not alike any more"
        raise ValueError(msg)
    return join(tensors)


def _weight(steps: Sequence[nn.Module], join: Callable[[list[Tensor]], Tensor]) -> Tensor:
    weight = _joined(steps, "weight", join)
    assert weight is not None, "a layer has one"
    return weight


def _linear(steps: Sequence[nn.Module], values: Sequence[Tensor]) -> Tensor:
    """Return ``[seeds, rows, out]``: by one product where all seeds read the same."""
    (x,) = values
    if x.dim() == 2:
        bias = _joined(steps, "bias", torch.cat)
        y = nn.functional.linear(x, _weight(steps, torch.cat), bias)
        return y.view(len(x), len(steps), -1).transpose(0, 1)
    weight, bias = _weight(steps, torch.stack), _joined(steps, "bias", torch.stack)
    if bias is None:
        return torch.bmm(x, weight.transpose(1, 2))
    return torch.baddbmm(bias.unsqueeze(1), x, weight.transpose(1, 2))


def _each_number(steps: Sequence[nn.Module], values: Sequence[Tensor]) -> Tensor:
    y: Tensor = steps[0].forward(*values)
    return y


FEATURES: Final[Rules] = {
    nn.Linear: _linear,
    **dict.fromkeys(ACTIVATIONS + COMBINATIONS, _each_number),
}
"""Steps that work on the last axis."""


def _convolution(steps: Sequence[nn.Module], values: Sequence[Tensor]) -> Tensor:
    """Run one convolution with the channels of all seeds."""
    (x,), first, num_seeds = values, steps[0], len(steps)
    assert isinstance(first, _ConvNd)
    axes, groups = len(first.kernel_size), first.groups
    if x.dim() == axes + 3:
        x, groups = x.flatten(1, 2), groups * num_seeds
    elif groups > 1:
        x, groups = x.repeat(1, num_seeds, *(1,) * axes), groups * num_seeds
    y: Tensor = _CONVOLVE[axes](
        x,
        _weight(steps, torch.cat),
        _joined(steps, "bias", torch.cat),
        first.stride,
        first.padding,
        first.dilation,
        groups,
    )
    return y.view(len(y), num_seeds, -1, *y.shape[2:])


_CONVOLVE: Final[dict[int, Callable[..., Tensor]]] = {
    1: nn.functional.conv1d,
    2: nn.functional.conv2d,
    3: nn.functional.conv3d,
}


def _combination(steps: Sequence[nn.Module], values: Sequence[Tensor]) -> Tensor:
    """Put values together; what all seeds share gets an axis of seeds."""
    most = max(value.dim() for value in values)
    return _each_number(steps, [v if v.dim() == most else v.unsqueeze(1) for v in values])


CHANNELS: Final[Rules] = {
    **dict.fromkeys((nn.Conv1d, nn.Conv2d, nn.Conv3d), _convolution),
    **dict.fromkeys(ACTIVATIONS, _each_number),
    **dict.fromkeys(COMBINATIONS, _combination),
}
"""Steps that work on channels."""


class StepByStep:
    """Runs kernels of one form.

    Args:
        kernels: One for each seed.
        rules: ``FEATURES`` or ``CHANNELS``; has the class of each step.
    """

    def __init__(self, kernels: Sequence[KernelSteps], rules: Rules) -> None:
        first = kernels[0]
        self._lines = [
            (rules[type(step)], steps, inputs)
            for step, inputs, *steps in zip(
                first.steps, first.wiring, *(kernel.steps for kernel in kernels), strict=True
            )
        ]
        self._has_rows = rules is FEATURES

    def __call__(
        self, given: Tensor, alphas: Tensor, h: Tensor, *, is_watched: bool
    ) -> tuple[Tensor, Sequence[Tensor]]:
        """Return ``sum_i alpha_i k_i``, like ``h``, and the marks of the shares, if asked for.

        As :class:`~esper.forward.fused_products.TwoProducts` does.
        """
        values = [given.reshape(-1, given.shape[-1]) if self._has_rows else given]
        for rule, steps, inputs in self._lines:
            values.append(rule(steps, [values[i] for i in inputs]))
        outputs = values[-1]
        if self._has_rows:
            outputs = outputs.reshape(len(alphas), *given.shape[:-1], -1)
        else:
            outputs = outputs.transpose(0, 1)
        check_like(outputs.shape[1:], outputs.dtype, h)
        shares = outputs * alphas.view(-1, *(1,) * h.dim())
        total = shares.sum(0)
        return total, share_marks(h, shares.detach()) if is_watched else ()
