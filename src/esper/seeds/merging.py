"""Several kernels of one layer as one module, where that gives what they give."""

from __future__ import annotations

import copy
from collections import defaultdict
from typing import TYPE_CHECKING, Final

import torch
from torch import Tensor, nn

from esper.forward.fused_runs import ACTIVATIONS
from esper.forward.kernel_steps import settings_of, steps_of
from esper.seeds.slots import insert, make_seed, withdraw
from esper.state.kernel import PreparedKernel
from esper.state.layer_record import record_of

if TYPE_CHECKING:
    from collections.abc import Hashable, Sequence

    from esper.state.seed_slot import Seed

_NUM_ROWS: Final = 64
"""Rows of random input that a merged kernel is measured with."""


def merge_kernels(layer: nn.Module) -> list[int]:
    """Put one wide kernel in the place of those that add, beside each other, of two linear layers.

    With the same activation, or none, between them they are one MLP: their hidden features side by
    side, each last weight times its alpha. Measured in float64, from the weights as stored, on
    random input it differs by at most 1e-6 of the largest output (by the dtype's epsilon where that
    is more), or nothing is changed.

    Args:
        layer: A wrapped layer that is about to be unwrapped.

    Returns:
        The seeds whose kernels are now part of another's.
    """
    record = record_of(layer)
    alike: defaultdict[Hashable, list[Seed]] = defaultdict(list)
    for seed in record.plan:
        form = _form(seed)
        if form is not None:
            alike[form].append(seed)
    gone: list[int] = []
    for seeds in alike.values():
        merged = _merged(seeds) if len(seeds) > 1 else None
        if merged is None:
            continue
        first, *others = seeds
        kernel = PreparedKernel(module=merged, position=first.kernel.position)
        for seed in others:
            record.layout.release_kernel(seed.seed_idx)
            withdraw(layer, seed.seed_idx)
        made = make_seed(layer, first.seed_idx, kernel, guard=first.guard, example=first.example)
        insert(layer, made, 1.0)
        gone += [seed.seed_idx for seed in others]
    return gone


def _form(seed: Seed) -> Hashable:
    """Return what kernels that can be merged have alike; None for one that cannot."""
    found = None if seed.replaces or seed.takes is not None else steps_of(seed.slot.kernel)
    if found is None or any(found.hooks()) or not 2 <= len(found.steps) <= 3:
        return None
    first, *between, last = found.steps
    if type(first) is not nn.Linear or type(last) is not nn.Linear or first is last:
        return None
    is_chain = found.wiring == tuple((i,) for i in range(len(found.steps)))
    if not is_chain or any(type(step) not in ACTIVATIONS for step in between):
        return None
    tensors = {(t.dtype, t.device, t.requires_grad) for t in seed.slot.kernel.parameters()}
    activation = tuple((type(step), settings_of(step)) for step in between)
    return None if len(tensors) > 1 else (*tensors, activation, *_ends(found.steps), seed.is_serial)


def _ends(steps: Sequence[nn.Module]) -> tuple[object, ...]:
    first, last = steps[0], steps[-1]
    assert isinstance(first, nn.Linear), "its class was asked for"
    assert isinstance(last, nn.Linear), "as was this one's"
    return first.in_features, last.out_features, first.bias is None, last.bias is None


def _merged(seeds: Sequence[Seed]) -> nn.Sequential | None:
    """Return one kernel for several at their alphas, or None where it would differ from them."""
    kernels = [found.steps for seed in seeds if (found := steps_of(seed.slot.kernel)) is not None]
    alphas = [seed.slot.read_alpha() for seed in seeds]
    with torch.no_grad():
        made = _side_by_side(kernels, alphas)
        weight = next(made.parameters())
        numbers = torch.Generator().manual_seed(0)
        x = torch.randn(_NUM_ROWS, weight.shape[1], generator=numbers, dtype=torch.float64)
        x = x.to(weight.device)
        before = torch.stack(
            [a * _output(steps, x) for a, steps in zip(alphas, kernels, strict=True)]
        ).sum(0)
        difference = (_output(tuple(made), x) - before).abs().max()
    tolerance = max(1e-6, torch.finfo(weight.dtype).eps)
    if not difference <= tolerance * before.abs().max():
        return None
    kernel = seeds[0].slot.kernel
    return made.train(kernel.training).requires_grad_(next(kernel.parameters()).requires_grad)


def _side_by_side(kernels: Sequence[Sequence[nn.Module]], alphas: Sequence[float]) -> nn.Sequential:
    """Return the kernels as one, with the alphas in its last layer; rounded once."""
    firsts, lasts = ([_tensors(steps[i]) for steps in kernels] for i in (0, -1))
    scaled = [[a * t for t in tensors] for a, tensors in zip(alphas, lasts, strict=True)]
    first = [torch.cat(tensors) for tensors in zip(*firsts, strict=True)]
    weights, *biases = zip(*scaled, strict=True)
    last = [torch.cat(weights, 1), *(torch.stack(terms).sum(0) for terms in biases)]
    between = map(copy.deepcopy, kernels[0][1:-1])
    return nn.Sequential(_linear(first, kernels[0][0]), *between, _linear(last, kernels[0][-1]))


def _tensors(step: nn.Module) -> list[Tensor]:
    """Return weight and bias, where there is one, in float64."""
    return [parameter.detach().double() for parameter in step.parameters()]


def _linear(tensors: Sequence[Tensor], like: nn.Module) -> nn.Linear:
    """Return a layer with a weight and perhaps a bias, in dtype and on the device of another."""
    out, given = tensors[0].shape
    weight = next(like.parameters())
    has_bias = len(tensors) > 1
    options = {"bias": has_bias, "device": weight.device, "dtype": weight.dtype}
    made = nn.utils.skip_init(nn.Linear, given, out, **options)  # type: ignore[no-untyped-call] # torch has none; it draws no numbers
    assert isinstance(made, nn.Linear), "as asked for"
    for parameter, tensor in zip(made.parameters(), tensors, strict=True):
        parameter.copy_(tensor)
    return made


def _output(steps: Sequence[nn.Module], x: Tensor) -> Tensor:
    """Return what steps give in float64, from their weights as stored."""
    for step in steps:
        x = copy.deepcopy(step).double()(x)
    return x
