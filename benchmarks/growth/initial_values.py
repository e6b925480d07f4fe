"""Initial values that are computed from data, for kernels that have appeared in a model.

Each function changes the values of kernels that are the identity, and are so behind it unless it
says otherwise. What it needs of the model was recorded by :func:`recorded`, with one forward and
one backward on a sample.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from esper.compiler.graph import plan
from esper.compiler.lowering import LoweredKernel
from esper.execution.kasmina_layer import KasminaLayer

RIDGE = 1e-2
"""Of the readout's least squares, relative to the mean square of its features."""
ASCENTS = 10
"""Steps by which hidden units climb to a larger gradient, each of half their own length."""
LIT = 0.1
"""Bias of units behind a ReLU whose weights are zero; at 0 they would have no gradient."""
SHARE = 0.1
"""Of torch's own initial values, in a readout that is small and not zero."""
_HIDDEN = ("hidden", "value", "spatial", "depthwise")
_SIZES = (0.0, *(10.0**k for k in torch.linspace(-3, 3, 13).tolist()))


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Placed:
    """A kernel of the catalog where it stands.

    Attributes:
        layer: Its layer.
        kernel: The kernel, which reads what its layer reads.
    """

    layer: KasminaLayer
    kernel: LoweredKernel

    @property
    def steps(self) -> dict[str, nn.Module]:
        """Its modules, by the ids of their nodes."""
        made = plan(self.kernel.blueprint)
        return {step.id: module for step, module in zip(made.steps, self.kernel.steps, strict=True)}

    @property
    def out(self) -> nn.Module:
        """Its last layer, which is zero at birth."""
        return self.steps["out"]

    @property
    def hidden(self) -> nn.Module:
        """The layer before that; of a gated one that which makes the values."""
        steps = self.steps
        return next(steps[name] for name in _HIDDEN if name in steps)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Recorded:
    """What a sample showed at a kernel's layer.

    Attributes:
        x: What the layer read.
        h: What it gave.
        gradient: Of the mean loss of the sample, at what it gave.
    """

    x: Tensor
    h: Tensor
    gradient: Tensor


def recorded(
    model: nn.Module, placed: Sequence[Placed], sample: tuple[Tensor, Tensor]
) -> dict[Placed, Recorded]:
    """Record a sample of a classifier at the layers of kernels."""
    calls: dict[nn.Module, tuple[Tensor, Tensor]] = {}
    handles = [
        each.layer.register_forward_hook(lambda layer, args, h: calls.update({layer: (args[0], h)}))
        for each in placed
    ]
    loss = F.cross_entropy(model(sample[0]), sample[1])
    for handle in handles:
        handle.remove()
    gradients = torch.autograd.grad(loss, [calls[each.layer][1] for each in placed])
    return {
        each: Recorded(
            x=calls[each.layer][0].detach(), h=calls[each.layer][1].detach(), gradient=gradient
        )
        for each, gradient in zip(placed, gradients, strict=True)
    }


def largest_gradient_behind_(placed: Placed, seen: Recorded) -> None:
    """Give the hidden layer zeros and the readout values that make its gradient large: GradMax.

    The gradient of a hidden unit is that at the output times its column of the readout; one step of
    the power method turns random columns to where that is longest, and each keeps its length. What
    such a unit gives while its weights are zero, the readout's bias takes away.
    """
    hidden, out = placed.hidden, placed.out
    nn.init.zeros_(hidden.weight)
    is_dark = any(isinstance(step, nn.ReLU) for step in placed.steps.values())
    nn.init.constant_(hidden.bias, LIT if is_dark else 0.0)
    nn.init.kaiming_uniform_(out.weight, a=math.sqrt(5), generator=_generator())
    length = _lengths(out.weight, dim=1)
    gradient = _gradient(placed, seen, hidden.weight, create_graph=True)
    (turned,) = torch.autograd.grad(gradient.square().sum(), out.weight)
    with torch.no_grad():
        out.weight.copy_(turned * length / _lengths(turned, dim=1).clamp_min(1e-30))
        features = _features(placed, seen.x[:1]).mean(dim=0)
        out.bias.copy_(-out.weight.flatten(1) @ features if is_dark else torch.zeros_like(out.bias))


def largest_gradient_before_(placed: Placed, seen: Recorded) -> None:
    """Turn hidden units to where the gradient of the zeroed readout is largest; lengths stay."""
    hidden, out = placed.hidden, placed.out
    length = _lengths(hidden.weight, dim=0)
    for _ in range(ASCENTS):
        gradient = _gradient(placed, seen, out.weight, create_graph=True)
        (uphill,) = torch.autograd.grad(gradient.square().sum(), hidden.weight)
        with torch.no_grad():
            far = hidden.weight + 0.5 * length * uphill / _lengths(uphill, dim=0).clamp_min(1e-30)
            hidden.weight.copy_(far * length / _lengths(far, dim=0))


@torch.no_grad()
def matched_(placed: Placed, seen: Recorded) -> None:
    """Scale the hidden layer until its features are as large as what the host gives, by RMS."""
    wanted = seen.h.square().mean().sqrt()
    for _ in range(5):  # an activation need not scale with what it reads
        found = _features(placed, seen.x).square().mean().sqrt()
        placed.hidden.weight.mul_(wanted / found)
        placed.hidden.bias.mul_(wanted / found)


@torch.no_grad()
def small_(placed: Placed, _seen: Recorded) -> None:
    """Give the readout a tenth of torch's own values: the kernel is no identity any more."""
    nn.init.kaiming_uniform_(placed.out.weight, a=math.sqrt(5), generator=_generator())
    placed.out.weight.mul_(SHARE)


@torch.no_grad()
def fitted_(model: nn.Module, seen: dict[Placed, Recorded], sample: tuple[Tensor, Tensor]) -> None:
    """Fit each readout to the falling gradient, as TINY does; no kernel is an identity any more.

    By ridge regression on the kernel's features. One size for the readouts of all kernels is that
    of thirteen, or 0, at which the sample's loss is least.
    """
    fits = {placed: _fit(placed, each) for placed, each in seen.items()}
    losses = {}
    for size in _SIZES:
        _write(fits, size)
        losses[size] = float(F.cross_entropy(model(sample[0]), sample[1]))
    _write(fits, min(losses, key=losses.__getitem__))


def _fit(placed: Placed, seen: Recorded) -> tuple[Tensor, Tensor]:
    """Return weight and bias of a readout, for a mean loss; positions count as samples."""
    features = F.pad(_features(placed, seen.x), (0, 1), value=1.0)
    target = -_last(seen.gradient) * len(seen.gradient)
    square = features.T @ features / len(features)
    square += RIDGE * square.diagonal().mean() * torch.eye(len(square))
    solved = torch.linalg.solve(square, features.T @ target / len(features)).T
    return solved[:, :-1].reshape(placed.out.weight.shape), solved[:, -1]


def _write(fits: dict[Placed, tuple[Tensor, Tensor]], size: float) -> None:
    for placed, (weight, bias) in fits.items():
        placed.out.weight.copy_(size * weight)
        placed.out.bias.copy_(size * bias)


def _gradient(placed: Placed, seen: Recorded, weight: Tensor, *, create_graph: bool) -> Tensor:
    """Return the gradient of a weight while the kernel is the identity."""
    first_order = (placed.kernel(seen.x) * seen.gradient).sum()
    (gradient,) = torch.autograd.grad(first_order, weight, create_graph=create_graph)
    return gradient


def _features(placed: Placed, x: Tensor) -> Tensor:
    """Return what a kernel's readout reads, shape (samples and positions, features)."""
    with _noted(placed.out) as inputs:
        placed.kernel(x)
    return _last(inputs[0])


@contextmanager
def _noted(module: nn.Module) -> Iterator[list[Tensor]]:
    inputs: list[Tensor] = []
    handle = module.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    try:
        yield inputs
    finally:
        handle.remove()


def _last(value: Tensor) -> Tensor:
    """Return a tensor of images, or of vectors, with its channels last and the rest in one axis."""
    return value.movedim(1, -1).reshape(-1, value.shape[1])


def _lengths(weight: Tensor, *, dim: int) -> Tensor:
    """Return the length of what each hidden unit gives by (1, a readout) or reads with (0)."""
    axes = [axis for axis in range(weight.ndim) if axis != dim]
    return torch.linalg.vector_norm(weight.detach(), dim=axes, keepdim=True)


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)
