"""Kernels of two linear layers as one: what is small is joined, what is large is read where it is.

Shapes have R for rows (all axes but the last), S for seeds, and I, H and O for features that come
in, lie between and go out. One function does forward and backward of all seeds, since what autograd
does for each step of each seed is what many seeds cost. The weights are multiplied one by one into
one tensor: to join them in every forward took longer than that from 128 features on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, cast

import torch
from torch import Tensor, nn

from esper.forward.share_marks import check_like, share_marks

if TYPE_CHECKING:
    from esper.forward.kernel_steps import KernelSteps

    Gradients = tuple[Tensor | None, ...]
    Kind = tuple[torch.Size, torch.dtype]

_aten: Final = torch.ops.aten


@dataclass(frozen=True, slots=True, kw_only=True)
class Activation:
    """What a step between two linear layers does.

    Attributes:
        forward: ``(step, x) -> y``; x may be written to where the derivative is made of y.
        derivative: ``(step, gradient, kept) -> gradient``.
        keeps_output: Whether y is kept for the derivative, or else x.
    """

    forward: Callable[[nn.Module, Tensor], Tensor]
    derivative: Callable[[nn.Module, Tensor, Tensor], Tensor]
    keeps_output: bool = True


ACTIVATIONS: Final[dict[type[nn.Module], Activation]] = {
    nn.Identity: Activation(forward=lambda _, x: x, derivative=lambda _, g, __: g),
    nn.ReLU: Activation(
        forward=lambda _, x: x.relu_(),
        derivative=lambda _, g, y: _aten.threshold_backward(g, y, 0),
    ),
    nn.Tanh: Activation(
        forward=lambda _, x: x.tanh_(), derivative=lambda _, g, y: _aten.tanh_backward(g, y)
    ),
    nn.Sigmoid: Activation(
        forward=lambda _, x: x.sigmoid_(),
        derivative=lambda _, g, y: _aten.sigmoid_backward(g, y),
    ),
    nn.GELU: Activation(
        forward=lambda step, x: step(x),
        derivative=lambda step, g, x: _aten.gelu_backward(g, x, approximate=step.approximate),
        keeps_output=False,
    ),
    nn.SiLU: Activation(
        forward=lambda step, x: step(x),
        derivative=lambda _, g, x: _aten.silu_backward(g, x),
        keeps_output=False,
    ),
}
"""Steps that may stand between two linear layers, by class."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Place:
    """Where a tensor of each seed's kernel stands, and what it is like."""

    tables: list[dict[str, Tensor]]
    name: str
    shape: torch.Size
    dtype: torch.dtype

    def read(self) -> list[Tensor]:
        """Return the tensors as they are now.

        Raises:
            ValueError: They are not as they were when the plan was made.
        """
        found = [table[self.name] for table in self.tables]
        for tensor in found:
            if tensor.shape != self.shape or tensor.dtype != self.dtype:
                msg = f"a kernel's {self.name} is {tuple(tensor.shape)}, {tensor.dtype} now"
                raise ValueError(msg)
        return found


class TwoProducts:
    """Runs kernels that are two linear layers, with or without a step of ``ACTIVATIONS`` between.

    Args:
        kernels: Of one form, one for each seed.
    """

    def __init__(self, kernels: Sequence[KernelSteps]) -> None:
        first, *between, last = kernels[0].steps
        self.between = between[0] if between else nn.Identity()
        self.num_seeds = len(kernels)
        self.has_bias = first.bias is not None, last.bias is not None
        self.num_out, self.hidden = map(int, cast("Tensor", last.weight).shape)
        self._places = [
            _Place(
                tables=cast(
                    "list[dict[str, Tensor]]",
                    [kernel.steps[index]._parameters for kernel in kernels],  # noqa: SLF001 - past properties
                ),
                name=name,
                shape=tensor.shape,
                dtype=tensor.dtype,
            )
            for index, step in ((0, first), (-1, last))
            for name, tensor in step._parameters.items()  # noqa: SLF001 - as above
            if tensor is not None
        ]

    def __call__(
        self, given: Tensor, alphas: Tensor, h: Tensor, *, is_watched: bool
    ) -> tuple[Tensor, Sequence[Tensor]]:
        """Return ``sum_i alpha_i k_i``, like ``h``, and the marks of the shares, if asked for.

        Args:
            given: What the kernels read.
            alphas: ``[seeds]``, in the dtype of ``h``.
            h: The host's output, detached.
            is_watched: Whether marks are wanted.

        Raises:
            ValueError: The kernels are not as they were, or what they give is unlike ``h``.
        """
        tensors = [tensor for place in self._places for tensor in place.read()]
        check_like((*given.shape[:-1], self.num_out), given.dtype, h)
        marks: list[Tensor] = []
        watched = h if is_watched else None
        x = given.reshape(-1, given.shape[-1])
        total = _TwoProducts.apply(x, alphas, self, watched, marks, *tensors)  # type: ignore[no-untyped-call] # torch has none
        return cast("Tensor", total).view(h.shape), marks

    def by_kind(self, values: Sequence[Any]) -> tuple[Any, Any, Any, Any]:
        """Return first weights, first biases, last weights and last biases of what is in a row.

        Where layers have no bias there are Nones.
        """
        n, (has_first, has_last) = self.num_seeds, self.has_bias
        none = (None,) * n
        rest = values[2 * n :] if has_first else values[n:]
        return (
            values[:n],
            values[n : 2 * n] if has_first else none,
            rest[:n],
            rest[n:] if has_last else none,
        )


def _multiply(
    xs: Sequence[Tensor],
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    outs: Sequence[Tensor],
) -> None:
    """Run the linear layers of all seeds, each into its part of one tensor."""
    for x, weight, bias, out in zip(xs, weights, biases, outs, strict=True):
        if bias is None:
            torch.mm(x, weight.t(), out=out)
        else:
            torch.addmm(bias, x, weight.t(), out=out)


class _TwoProducts(torch.autograd.Function):
    """``x_RI -> sum_i alpha_i (V_i act(W_i x + b_i) + c_i)``, whose terms are not kept."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        alphas: Tensor,
        run: TwoProducts,
        watched: Tensor | None,
        marks: list[Tensor],
        *tensors: Tensor,
    ) -> Tensor:
        ws, bs, vs, cs = run.by_kind(tensors)
        activation = ACTIVATIONS[type(run.between)]
        a = x.new_empty(len(x), run.num_seeds, run.hidden)
        _multiply([x] * run.num_seeds, ws, bs, a.unbind(1))
        y = activation.forward(run.between, a)
        factors = alphas.view(-1, 1)
        scaled = y * factors
        terms = (torch.stack(cs) * factors).unbind(0) if run.has_bias[1] else cs
        shares = x.new_empty(run.num_seeds, len(x), run.num_out)
        _multiply(scaled.unbind(1), vs, terms, shares.unbind(0))
        kept = y if activation.keeps_output else a
        ctx.run, ctx.biases = run, (bs, cs)  # no derivative is made of a bias's value
        ctx.save_for_backward(x, alphas, kept, scaled, *ws, *vs)
        total = shares.sum(0)
        if watched is not None:
            marks += share_marks(watched.view(total.shape), shares)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Gradients:
        run, (g,) = ctx.run, gradients
        x, alphas, kept, scaled, *weights = ctx.saved_tensors
        needs_x, _, _, _, _, *needs = ctx.needs_input_grad
        ws, vs = weights[: run.num_seeds], weights[run.num_seeds :]
        if torch.is_grad_enabled():
            bs, cs = ctx.biases
            tensors = cast("tuple[Tensor, ...]", _in_a_row(run, ws, bs, vs, cs))
            dx, *ds = _differentiable(run, (x, *tensors), alphas, g, (needs_x, *needs))
            return dx, None, None, None, None, *ds
        needs_w, needs_b, needs_v, needs_c = map(any, run.by_kind(needs))
        factors = alphas.view(-1, 1)
        dv = dc = dw = db = (None,) * run.num_seeds
        dx = None
        if needs_c:
            dc = (g.sum(0) * factors).unbind(0)
        if needs_v:
            g_t = g.t()
            dv = tuple(torch.mm(g_t, each) for each in scaled.unbind(1))
        if needs_x or needs_w or needs_b:
            da = torch.empty_like(scaled)
            for v, out in zip(vs, da.unbind(1), strict=True):
                torch.mm(g, v, out=out)
            da = ACTIVATIONS[type(run.between)].derivative(run.between, da.mul_(factors), kept)
            if needs_b:
                db = da.sum(0).unbind(0)
            if needs_w:
                dw = torch.mm(da.flatten(1).t(), x).view(*da.shape[1:], -1).unbind(0)
            if needs_x:
                dx = _summed_products(da.unbind(1), ws)
        return dx, None, None, None, None, *_in_a_row(run, dw, db, dv, dc)


def _in_a_row(run: TwoProducts, ws: Any, bs: Any, vs: Any, cs: Any) -> Gradients:
    """Return tensors, or gradients, in the order in which they are given: undoes ``by_kind``."""
    has_first, has_last = run.has_bias
    return (*ws, *(bs if has_first else ()), *vs, *(cs if has_last else ()))


def _summed_products(parts: Sequence[Tensor], weights: Sequence[Tensor]) -> Tensor:
    total = torch.mm(parts[0], weights[0])
    for part, weight in zip(parts[1:], weights[1:], strict=True):
        total.addmm_(part, weight)
    return total


def _differentiable(
    run: TwoProducts,
    inputs: tuple[Tensor, ...],
    alphas: Tensor,
    g: Tensor,
    needs: Sequence[bool],
) -> list[Tensor | None]:
    """Return gradients that can be differentiated again, of the same sum written out."""
    x, *tensors = inputs
    terms = []
    for alpha, w, b, v, c in zip(alphas, *run.by_kind(tensors), strict=True):
        hidden = run.between(nn.functional.linear(x, w, b))
        terms.append(alpha * nn.functional.linear(hidden, v, c))
    total = torch.stack(terms).sum(0)
    wanted = [tensor for tensor, is_needed in zip(inputs, needs, strict=True) if is_needed]
    found = iter(torch.autograd.grad(total, wanted, g, create_graph=True))
    return [next(found) if is_needed else None for is_needed in needs]
