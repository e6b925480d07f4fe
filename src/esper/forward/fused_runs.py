"""How kernels of one form run as one: step by step, each for all seeds at once.

The tensors of their steps are joined in every forward, by what autograd knows: so a parameter stays
what its owner, its hooks and its optimizer know, and gradients come to it as they always do.

What all seeds read has no axis of seeds. Behind the first step that has tensors a value has one,
the second: of ``[rows, seeds, features]``, or of ``[batch, seeds, channels, ...]``.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import partial
from operator import attrgetter
from typing import TYPE_CHECKING, Final, cast

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

NORMS: Final[tuple[type[nn.Module], ...]] = (nn.LayerNorm, nn.RMSNorm)
"""Steps that norm the last axis."""


def _joined(
    steps: Sequence[nn.Module], name: str, join: Callable[[list[Tensor]], Tensor]
) -> Tensor | None:
    """Return the tensors of a name of all seeds' steps, as the modules have them now, as one.

    Raises:
        AttributeError, RuntimeError, ValueError: They are not alike any more.
    """
    tensors = [step._parameters.get(name) for step in steps]  # noqa: SLF001 - getattr costs a microsecond
    if tensors[0] is None:
        return None
    if len({*map(_KIND, tensors)}) > 1:
        msg = f"the kernels' {name}s are not alike any more"
        raise ValueError(msg)
    return join(cast("list[Tensor]", tensors))


_KIND: Final = attrgetter("dtype", "shape")


def _weight(steps: Sequence[nn.Module], join: Callable[[list[Tensor]], Tensor]) -> Tensor:
    weight = _joined(steps, "weight", join)
    assert weight is not None, "a layer has one"
    return weight


def _norm(steps: Sequence[nn.Module], values: Sequence[Tensor]) -> Tensor:
    """Return what is normed, without weight and bias: the layers that read it get them."""
    first = steps[0]
    if type(first) is nn.LayerNorm:
        return nn.functional.layer_norm(values[0], first.normalized_shape, eps=first.eps)
    assert isinstance(first, nn.RMSNorm)
    return nn.functional.rms_norm(values[0], first.normalized_shape, eps=first.eps)


def _behind(
    norms: Sequence[nn.Module], weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Return weights and biases with those of norms in them, whose output they read.

    ``W (g x + b) + c = (W g) x + (W b + c)``
    """
    shift = _joined(norms, "bias", torch.stack)
    if shift is not None:
        added = torch.bmm(weight, shift.unsqueeze(2)).squeeze(2)
        bias = added if bias is None else bias + added
    scale = _joined(norms, "weight", torch.stack)
    return (weight if scale is None else weight * scale.unsqueeze(1)), bias


def _linear(
    steps: Sequence[nn.Module], values: Sequence[Tensor], norms: Sequence[nn.Module] = ()
) -> Tensor:
    """Return ``[rows, seeds, out]``: by one product where all seeds read the same."""
    (x,) = values
    if x.dim() == 2 and not norms:
        y = nn.functional.linear(x, _weight(steps, torch.cat), _joined(steps, "bias", torch.cat))
        return y.view(len(x), len(steps), -1)
    weight, bias = _weight(steps, torch.stack), _joined(steps, "bias", torch.stack)
    if norms:
        weight, bias = _behind(norms, weight, bias)
    if x.dim() == 2:
        joined = None if bias is None else bias.flatten()
        y = nn.functional.linear(x, weight.flatten(0, 1), joined)
        return y.view(len(x), len(steps), -1)
    x, weight = x.transpose(0, 1), weight.transpose(1, 2)
    if bias is None:
        return torch.bmm(x, weight).transpose(0, 1)
    return torch.baddbmm(bias.unsqueeze(1), x, weight).transpose(0, 1)


def _each_number(steps: Sequence[nn.Module], values: Sequence[Tensor]) -> Tensor:
    y: Tensor = steps[0].forward(*values)
    return y


def _combination(steps: Sequence[nn.Module], values: Sequence[Tensor]) -> Tensor:
    """Put values together; what all seeds share gets an axis of seeds."""
    most = max(value.dim() for value in values)
    return _each_number(steps, [v if v.dim() == most else v.unsqueeze(1) for v in values])


FEATURES: Final[Rules] = {
    nn.Linear: _linear,
    **dict.fromkeys(NORMS, _norm),
    **dict.fromkeys(ACTIVATIONS, _each_number),
    **dict.fromkeys(COMBINATIONS, _combination),
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


def _summed(
    steps: Sequence[nn.Module], alphas: Tensor, *, is_shared: bool
) -> tuple[Tensor, Tensor | None]:
    """Return weight and bias of what gives ``sum_i alpha_i k_i``.

    Args:
        steps: The last steps.
        alphas: ``[seeds]``.
        is_shared: Whether all read the same, or else each its own, times its alpha, which lie side
            by side.
    """
    bias = _joined(steps, "bias", torch.stack)
    total = None if bias is None else alphas @ bias
    if is_shared:
        weight = _weight(steps, torch.stack)
        return (alphas @ weight.flatten(1)).view(weight.shape[1:]), total
    return _weight(steps, partial(torch.cat, dim=1)), total


def _linear_sum(steps: Sequence[nn.Module], x: Tensor, alphas: Tensor) -> Tensor:
    is_shared = x.dim() == 2
    given = x if is_shared else (x * alphas.unsqueeze(1)).flatten(1)
    return nn.functional.linear(given, *_summed(steps, alphas, is_shared=is_shared))


def _convolution_sum(steps: Sequence[nn.Module], x: Tensor, alphas: Tensor) -> Tensor:
    first = steps[0]
    assert isinstance(first, _ConvNd)
    axes = len(first.kernel_size)
    is_shared = x.dim() == axes + 2
    scaled = x if is_shared else (x * alphas.view(-1, *(1,) * (axes + 1))).flatten(1, 2)
    y: Tensor = _CONVOLVE[axes](
        scaled,
        *_summed(steps, alphas, is_shared=is_shared),
        first.stride,
        first.padding,
        first.dilation,
        first.groups,
    )
    return y


SUMS: Final[dict[type[nn.Module], Callable[..., Tensor]]] = {
    nn.Linear: _linear_sum,
    **dict.fromkeys((nn.Conv1d, nn.Conv2d, nn.Conv3d), _convolution_sum),
}
"""Last steps that give the sum of all shares, of which none is made."""


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
        of_all = list(zip(*(kernel.steps for kernel in kernels), strict=True))
        norms = [type(first.steps[i[0] - 1]) in NORMS and of_all[i[0] - 1] for i in first.wiring]
        self._lines = [
            (partial(_linear, norms=norm) if norm else rules[type(steps[0])], steps, inputs)
            for steps, inputs, norm in zip(of_all, first.wiring, norms, strict=True)
        ]
        self._has_rows = rules is FEATURES
        self._axis = -1 if self._has_rows else 1
        self._sum = SUMS.get(type(first.steps[-1])) if _can_sum(first) else None
        self._fewest_rows = _fewest_rows(first) if self._has_rows else 0
        self._most_rows = _most_rows(first, len(kernels), has_sum=self._sum is not None)

    def pays(self, given: Tensor) -> bool:
        """Say whether it was measured to take less time on this input than one by one."""
        num_rows = given.numel() // (given.shape[self._axis] or 1)
        return self._fewest_rows <= num_rows <= self._most_rows

    def __call__(
        self, given: Tensor, alphas: Tensor, h: Tensor, *, is_watched: bool
    ) -> tuple[Tensor, Sequence[Tensor]]:
        """Return ``sum_i alpha_i k_i``, like ``h``, and the marks of the shares, if asked for.

        Where no marks are wanted, and the last step is a layer, no share is made by itself.

        Args:
            given: What the kernels read.
            alphas: ``[seeds]``, in the dtype of ``h``.
            h: The host's output, detached.
            is_watched: Whether marks are wanted.

        Raises:
            AttributeError, RuntimeError, ValueError: The kernels are not alike any more, or what
                they give is unlike ``h``.
        """
        values = [given.reshape(-1, given.shape[-1]) if self._has_rows else given]
        for rule, steps, inputs in self._lines[:-1]:
            values.append(rule(steps, [values[i] for i in inputs]))
        rule, steps, inputs = self._lines[-1]
        last = [values[i] for i in inputs]
        if self._sum is not None and not is_watched:
            total = self._sum(steps, last[0], alphas)
            shape = (*given.shape[:-1], total.shape[-1]) if self._has_rows else total.shape
            check_like(shape, total.dtype, h)
            return total.view(h.shape), ()
        outputs = rule(steps, last).transpose(0, 1)
        if self._has_rows:
            outputs = outputs.reshape(len(alphas), *given.shape[:-1], -1)
        check_like(outputs.shape[1:], outputs.dtype, h)
        shares = outputs * alphas.view(-1, *(1,) * h.dim())
        total = shares.sum(0)
        return total, share_marks(h, shares.detach()) if is_watched else ()


def are_norms_known(kernel: KernelSteps) -> bool:
    """Say whether norms are over the last axis, and only linear layers read what they give."""
    for place, step in enumerate(kernel.steps, 1):
        if not isinstance(step, NORMS):
            continue
        readers = [type(s) for s, i in zip(kernel.steps, kernel.wiring, strict=True) if place in i]
        if len(cast("tuple[int, ...]", step.normalized_shape)) != 1 or {*readers} != {nn.Linear}:
            return False
    return True


def _readers(kernel: KernelSteps) -> list[tuple[nn.Module, bool]]:
    """Return the layers of a kernel, and of each whether it reads what all seeds read."""
    is_shared, found = [True], []
    for step, inputs in zip(kernel.steps, kernel.wiring, strict=True):
        reads_shared = all(is_shared[i] for i in inputs)
        if type(step) in SUMS:
            found.append((step, reads_shared))
        is_shared.append(reads_shared and type(step) not in SUMS)
    return found


def _can_sum(kernel: KernelSteps) -> bool:
    """Say whether a kernel's last step can give the sum of all seeds."""
    (last, reads_shared), before = _readers(kernel)[-1], kernel.wiring[-1][0] - 1
    if last is not kernel.steps[-1] or (before >= 0 and type(kernel.steps[before]) in NORMS):
        return False
    return reads_shared or getattr(last, "groups", 1) == 1


def _fewest_rows(kernel: KernelSteps) -> int:
    """Return with how many rows kernels on features begin to be faster as one."""
    num_elements = sum(parameter.numel() for parameter in kernel.kernel.parameters())
    return num_elements // _ELEMENTS_A_ROW if num_elements > _FEW_ELEMENTS else 0


def _most_rows(kernel: KernelSteps, num_seeds: int, *, has_sum: bool) -> int:
    """Return up to how many rows kernels are faster as one."""
    *others, (last, _) = _readers(kernel)
    between = max((_width(layer, 1) for layer, is_shared in others if not is_shared), default=0)
    most = _NUMBERS_BETWEEN // (between * num_seeds) if between else sys.maxsize
    return most if has_sum else min(most, _NUMBERS_OF_SHARES // (_width(last, 0) * num_seeds))


def _width(layer: nn.Module, axis: int) -> int:
    """Return how many features or channels a layer gives (0) or reads (1)."""
    weight = cast("Tensor", layer.weight)
    groups: int = getattr(layer, "groups", 1) if axis else 1
    return weight.shape[axis] * groups


_FEW_ELEMENTS: Final = 1 << 16
"""Parameters of a kernel of which so many are joined in no time, ..."""

_ELEMENTS_A_ROW: Final = 1 << 10
"""... and, where there are more, so many for each row: beyond, joining them costs what it saves."""

_NUMBERS_BETWEEN: Final = 1 << 18
"""Numbers that layers between first and last read, of all seeds: more leave the caches."""

_NUMBERS_OF_SHARES: Final = 1 << 17
"""Numbers of all shares, where the last step does not sum them up, likewise."""
