"""FLOPs of what torch executes: a multiply-add is two, and what is done element by element is none.

torch counts products of matrices, convolutions and attention. Added here are what it lacks and what
this project runs: recurrent layers, the fused layers of ``nn.TransformerEncoder``, and the solves
of a ranking. Any other operation counts nothing: elementwise ones, an optimizer's step, fast
Fourier transforms, kernels written in Triton or C++.
"""

from __future__ import annotations

import math
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final

import torch
from torch.utils.flop_counter import FlopCounterMode
from torch.utils.module_tracker import ModuleTracker

from esper.seeds.shadow import shadow_pass
from esper.state.host_parts import trainable_parameters

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from torch import Tensor, nn

    from esper.growth.batch import Batch, LossFunction

    Shape = Sequence[int]

_aten: Final = torch.ops.aten


@contextmanager
def counting() -> Iterator[FlopCounterMode]:
    """Count what runs in the block, forward and backward; ask ``get_total_flops()`` after it.

    Modes of the owner's around it see what they would have seen. What ``torch.compile`` has made
    runs eagerly meanwhile: dynamo would give up for good a function that it meets under a mode.
    """
    counter = FlopCounterMode(display=False, custom_mapping=_FORMULAS)
    counter.mod_tracker = _NoModules()
    with torch.compiler.set_stance("force_eager"), counter:
        yield counter


class _NoModules(ModuleTracker):
    """Looks at no module: its hooks would be on every module, and on what each is given."""

    def __enter__(self) -> ModuleTracker:
        return self

    def __exit__(self, *_: object) -> None:
        """Leave the hooks alone that were not registered."""


def update_flops(model: nn.Module, compute_loss: LossFunction, batch: Batch) -> int:
    """Count one forward and backward of a model on a batch, which the model does not notice.

    Args:
        model: Outside DDP and ``torch.compile``.
        compute_loss: ``(model, batch)`` to the scalar loss.
        batch: What ``compute_loss`` takes.
    """
    apart = shadow_pass(model, functions=(compute_loss,), values=(batch,))
    with apart, torch.enable_grad(), counting() as counter:
        loss = compute_loss(model, batch)
        torch.autograd.grad(loss, trainable_parameters(model), allow_unused=True)
    return int(counter.get_total_flops())


def _numel(shape: Shape) -> int:
    return math.prod(shape)


def _cholesky(matrix: Shape, *_: object, **__: object) -> int:
    """``n^3 / 3`` of each matrix."""
    return _numel(matrix) * matrix[-1] // 3


def _cholesky_solve(right: Shape, *_: object, **__: object) -> int:
    """Two triangular solves."""
    return 2 * _numel(right) * right[-2]


def _triangular_solve(matrix: Shape, right: Shape, *_: object, **__: object) -> int:
    """``n^2`` of each column."""
    return _numel(right) * matrix[-1]


def _recurrent_layer(x: Shape, w_ih: Shape, w_hh: Shape, *_: object, **__: object) -> int:
    """Two products a step, of one layer in one direction."""
    return 2 * _numel(x[:-1]) * (_numel(w_ih) + _numel(w_hh))


def _recurrent_layers(x: Shape, weights: Sequence[Shape], *_: object, **__: object) -> int:
    """Two products a step, of every layer and direction."""
    return 2 * _numel(x[:-1]) * sum(_numel(w) for w in weights if len(w) == 2)


def _twice(forward: Callable[..., int]) -> Callable[..., int]:
    """A backward takes the products for its inputs and those for its weights."""
    return lambda *shapes, **named: 2 * forward(*shapes, **named)


def _encoder_layer(x: Tensor, width: int, _heads: int, *rest: Any, **_: object) -> int:
    """The matrices of every token, and its attention to all the others."""
    num_tokens = x.numel() // width
    matrices = sum(w.numel() for w in rest if isinstance(w, torch.Tensor) and w.ndim == 2)
    return 2 * num_tokens * (matrices + _attended(x, width))


def _self_attention(
    x: Tensor, _key: Tensor, _value: Tensor, width: int, _heads: int, *rest: Any, **_: object
) -> int:
    return _encoder_layer(x, width, _heads, *(w for w in rest[:4]))


def _attended(x: Tensor, width: int) -> int:
    """Multiplications of one token with the others; none where they are nested, of any number."""
    return 0 if x.is_nested else 2 * x.shape[-2] * width


def _raw(formula: Callable[..., int]) -> Callable[..., int]:
    """Let torch hand over the tensors, and not their shapes."""
    vars(formula)["_get_raw"] = True
    return formula


_FORMULAS: Final = {
    _aten.linalg_cholesky_ex: _cholesky,
    _aten.cholesky_solve: _cholesky_solve,
    _aten.linalg_solve_triangular: _triangular_solve,
    _aten.mkldnn_rnn_layer: _recurrent_layer,
    _aten.mkldnn_rnn_layer_backward: _twice(_recurrent_layer),
    _aten._cudnn_rnn: _recurrent_layers,  # noqa: SLF001 - an operation's name
    _aten._cudnn_rnn_backward: _twice(_recurrent_layers),  # noqa: SLF001 - as above
    _aten._transformer_encoder_layer_fwd: _raw(_encoder_layer),  # noqa: SLF001 - as above
    _aten._native_multi_head_attention: _raw(_self_attention),  # noqa: SLF001 - as above
}
