"""Initial values: which numbers of a kernel's random stream each of its layers begins with.

The stream is that of a generator which the blueprint's ``init_seed`` starts. Layers draw from it in
the order of the plan, unless they say how many numbers come before theirs; so a graph that lacks
some of another's layers can begin with the numbers of those that it shares.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Final

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from esper.compiler.graph import Plan, first_numbers, num_numbers
from esper.compiler.parts import Attention, MeanAttention

if TYPE_CHECKING:
    from collections.abc import Sequence

_AT_ONCE: Final = 1 << 20


def initialise_(made: Plan, modules: Sequence[nn.Module]) -> None:
    """Fill the tensors of a plan's steps; no global random state is read or moved.

    Args:
        made: The plan.
        modules: One a step, on the CPU, in the dtype of the input spec.
    """
    generator = torch.Generator().manual_seed(made.blueprint.init_seed)
    dtype = getattr(torch, made.blueprint.input_spec.dtype)
    rows = zip(first_numbers(made.steps), made.steps, modules, strict=True)
    position = 0
    for first, step, module in sorted(rows, key=lambda row: row[0]):
        if num_numbers(step):
            _pass_over(first - position, dtype, generator)
            position = first + num_numbers(step)
        _initialise_(module, generator, zeros=step.settings.get("init") == "zeros")


def _pass_over(count: int, dtype: torch.dtype, generator: torch.Generator) -> None:
    """Draw numbers that nobody begins with; a generator cannot be moved otherwise."""
    for start in range(0, count, _AT_ONCE):
        torch.empty(min(_AT_ONCE, count - start), dtype=dtype).uniform_(generator=generator)


def _initialise_(module: nn.Module, generator: torch.Generator, *, zeros: bool) -> None:
    """Fill a step's tensors by torch.nn's own distributions, or by zeros."""
    if zeros:
        for parameter in module.parameters():
            parameter.zero_()
    elif isinstance(module, nn.Linear | _ConvNd):
        _initialise_affine_(module.weight, module.bias, generator)
    elif isinstance(module, Attention):
        _initialise_attention_(module.attention, generator)
    elif isinstance(module, MeanAttention):
        _initialise_mean_attention_(module, generator)
    elif list(module.state_dict()):
        module.reset_parameters()  # type: ignore[operator] # norms: ones and zeros


def _initialise_affine_(weight: Tensor, bias: Tensor | None, generator: torch.Generator) -> None:
    """Draw as torch.nn.Linear and the convolutions do: uniform within 1 / sqrt(fan in)."""
    nn.init.kaiming_uniform_(weight, a=math.sqrt(5), generator=generator)
    if bias is not None:
        bound = 1 / math.sqrt(math.prod(weight.shape[1:]))
        nn.init.uniform_(bias, -bound, bound, generator=generator)


def _initialise_attention_(attention: nn.MultiheadAttention, generator: torch.Generator) -> None:
    """Draw as torch.nn.MultiheadAttention does; its biases begin as zeros."""
    nn.init.xavier_uniform_(attention.in_proj_weight, generator=generator)
    out = attention.out_proj
    nn.init.kaiming_uniform_(out.weight, a=math.sqrt(5), generator=generator)
    for bias in (attention.in_proj_bias, out.bias):
        if bias is not None:
            bias.zero_()


def _initialise_mean_attention_(mean: MeanAttention, generator: torch.Generator) -> None:
    """Begin as the attention that it stands for does, whose first third is that of the queries."""
    weight = mean.value.weight
    projections = weight.new_empty(3 * len(weight), len(weight))
    nn.init.xavier_uniform_(projections, generator=generator)
    weight.copy_(projections[2 * len(weight) :])
    nn.init.kaiming_uniform_(mean.out.weight, a=math.sqrt(5), generator=generator)
    for bias in (mean.value.bias, mean.out.bias):
        if bias is not None:
            bias.zero_()
