"""Folding: an affine kernel becomes part of its host's weights, where that is exact."""

from __future__ import annotations

import gc
import sys
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Final, TypeVar

import torch
from torch import Tensor, nn

from esper.contracts.lifecycle import SeedLifecycleState
from esper.forward.class_change import choose_forward
from esper.resilience.attempt import Done, attempt
from esper.seeds.affine import NotFoldable
from esper.seeds.fold_target import FoldTarget, Joining, target_of
from esper.seeds.grafting import active_seed
from esper.seeds.slots import withdraw
from esper.seeds.structure import encoded_structure
from esper.state.layer_record import record_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from esper.seeds.fold_target import Folded
    from esper.state.seed_slot import Seed

T = TypeVar("T")

FLOAT32_TOLERANCE: Final = 1e-6


@dataclass(frozen=True, slots=True, kw_only=True)
class FoldCertificate:
    """What became of a fold.

    Attributes:
        folded: Whether the kernel is now part of the host's weights.
        rel_diff: Largest difference of the layer's outputs before and after, over the largest
            output before, both computed in float64 from the weights as stored; None if nothing
            was computed.
        tolerance: What was allowed: 1e-6 in float32 and float64, else the dtype's epsilon.
        reason: Why it was not folded, or which moments of the host begin anew; empty where neither.
        stale_moments: Names in the layer of host parameters whose gradient is another one from now
            on, so that an optimizer's moments of them are of no use.
            :func:`esper.sync_optimizer` drops them.
    """

    folded: bool
    rel_diff: float | None
    tolerance: float
    reason: str = ""
    stale_moments: tuple[str, ...] = ()


def fossilize(layer: nn.Module, seed_idx: int) -> FoldCertificate:
    """Make a seed permanent; see ``KasminaLayer.fossilize``."""
    seed = active_seed(layer, seed_idx)
    layout = record_of(layer).layout
    certificate = fold(layer, seed)
    record_of(layer).stale_moments |= {*certificate.stale_moments}
    layout.transition_seed_state(seed_idx, SeedLifecycleState.FOSSILIZED)
    if certificate.folded:
        layout.release_kernel(seed_idx)
        withdraw(layer, seed_idx)
    else:
        seed.slot.set_structure(encoded_structure(layer, seed_idx))
        choose_forward(layer)
    return certificate


def fold(layer: nn.Module, seed: Seed) -> FoldCertificate:
    """Add a seed's kernel to its host's weight and bias, or change nothing and say why.

    The parameters stay the same objects; they are written in place, under ``no_grad``.

    With ``G`` the gradient of the loss at the output, that of a weight is ``G x^T``, before the
    fold of what is added beside the host (``W + a K``) as after it: its moments stay. Behind the
    host (``K W``) it was ``K^T G x^T``, and with a share taken from it (``(1 - a) W + a K``) that
    share of it: such moments are of another gradient. An optimizer alone knows which of its state
    is a mean and which a mean of squares, so that nobody can convert them for all.
    """
    tolerance, rel_diff = FLOAT32_TOLERANCE, None
    joining = Joining.of(seed)
    try:
        target = target_beside(layer, [s for s in record_of(layer).seeds.values() if s is not seed])
        tolerance = _tolerance(target.weight)
        exact_weight, exact_bias = composed(target, joining)
        weight = exact_weight.to(target.weight.dtype)
        bias = None
        if exact_bias is not None and target.bias is not None:
            bias = exact_bias.to(target.bias.dtype)
        rel_diff = measured(target, joining, weight, bias)
    except NotFoldable as refused:
        return FoldCertificate(
            folded=False, rel_diff=rel_diff, tolerance=tolerance, reason=str(refused)
        )
    if not rel_diff <= tolerance:
        reason = f"relative difference {rel_diff:.3g} exceeds {tolerance:.3g}"
        return FoldCertificate(folded=False, rel_diff=rel_diff, tolerance=tolerance, reason=reason)
    with torch.no_grad():
        target.weight.copy_(weight)
        if bias is not None and target.bias is not None:
            target.bias.copy_(bias)
    stale = _stale(layer, target) if joining.is_serial or joining.replaces else ()
    reason = f"folded; moments of {' and '.join(stale)} begin anew" if stale else ""
    return FoldCertificate(
        folded=True, rel_diff=rel_diff, tolerance=tolerance, reason=reason, stale_moments=stale
    )


def _stale(layer: nn.Module, target: FoldTarget) -> tuple[str, ...]:
    """Return the names of a host's tensors."""
    held = {id(p) for p in (target.weight, target.bias) if p is not None}
    return tuple(name for name, p in layer.named_parameters() if id(p) in held)


def target_beside(layer: nn.Module, others: Iterable[Seed]) -> FoldTarget:
    """Return the target that a layer's host is, beside the layer's other seeds.

    Raises:
        NotFoldable: The host, one of its tensors or another seed does not allow a fold.
    """
    if any(s.is_serial or s.replaces for s in others):  # at alpha 0 too
        _refuse("another contributing seed of the layer is serial or replacing")
    target = target_of(layer)
    _check_tensors(target.owner)
    return target


def composed(target: FoldTarget, joining: Joining) -> Folded:
    """Return a host's weight and bias with a kernel in them, in float64; nothing is changed.

    Raises:
        NotFoldable: That is not exact, or another module has the host's tensors too.
    """
    made = _or_not_foldable(partial(target.folded, joining))
    _check_owner(target.owner)  # late: it looks at every object that there is
    return made


def measured(target: FoldTarget, joining: Joining, weight: Tensor, bias: Tensor | None) -> float:
    """Return the relative difference of host and kernel to a host with another weight and bias.

    Raises:
        NotFoldable: There is nothing to measure it with.
    """
    return _or_not_foldable(partial(_rel_diff, target, joining, weight, bias))


def _or_not_foldable(step: Callable[[], T]) -> T:
    """Return what a step of a fold gives; what it raises is a reason, whatever the kernel is.

    Raises:
        NotFoldable: It raised.
    """
    outcome = attempt(step)
    if isinstance(outcome, Done):
        return outcome.value
    if isinstance(outcome.error, NotFoldable):
        raise outcome.error
    error = outcome.error
    msg = f"the kernel cannot be composed with the host: {type(error).__name__}: {error}"
    raise NotFoldable(msg) from error


def _tolerance(weight: Tensor) -> float:
    exact = weight.dtype in (torch.float32, torch.float64)
    return FLOAT32_TOLERANCE if exact else float(torch.finfo(weight.dtype).eps)


def _check_tensors(owner: nn.Module) -> None:
    own = owner._parameters  # noqa: SLF001 - past parametrizations
    for name in ("weight", "bias"):
        tensor = own.get(name)
        is_absent = name == "bias" and getattr(owner, "bias", None) is None
        if not is_absent and (type(tensor) is not nn.Parameter or not tensor.is_floating_point()):
            _refuse(f"the host's {name} is computed, quantised, sharded or absent")


def _check_owner(layer: nn.Module) -> None:
    """Refuse a layer whose parameters another module holds too, by asking who refers to them.

    Every object that there is, is looked at, so that all parameters are asked for at once.
    """
    held = list(layer.parameters(recurse=False))
    ids = set(map(id, held))
    tables = [t for t in gc.get_referrers(*held) if isinstance(t, dict)]
    tables = [t for t in tables if any(id(value) in ids for value in t.values())]
    owned = [id(value) for table in _of_modules(tables) for value in table.values()]
    if any(owned.count(key) > 1 for key in ids):
        _refuse("the host's weight is shared with another module")


def _refuse(reason: str) -> None:
    raise NotFoldable(reason)


def _of_modules(tables: list[dict[object, object]]) -> list[dict[object, object]]:
    """Return those of some dicts that are the ``_parameters`` of a module."""
    found = set()
    for owner in gc.get_referrers(*tables):
        state = owner.__dict__ if isinstance(owner, nn.Module) else owner
        if isinstance(state, dict):
            found.add(id(state.get("_parameters")))
    return [table for table in tables if id(table) in found]


def _rel_diff(target: FoldTarget, joining: Joining, weight: Tensor, bias: Tensor | None) -> float:
    """Measure the fold on random inputs, in float64, against the formula."""
    with torch.no_grad():
        x = target.random_input(joining)
        h = target.run(*_in_float64(target.weight, target.bias), x)
        k = _output(joining, h if joining.is_serial else x)
        if k.shape != h.shape:
            _refuse(f"the kernel gives {tuple(k.shape)} beside the host's {tuple(h.shape)}")
        kept, alpha = joining.shares
        before = kept * h + alpha * k
        change = (target.run(*_in_float64(weight, bias), x) - before).abs().max()
        return float(change / before.abs().max().clamp_min(sys.float_info.min))


def _output(joining: Joining, given: Tensor) -> Tensor:
    try:
        k: Tensor = joining.in_float64()(given)
    except Exception as error:  # a kernel of anybody's, on an input of our choice
        msg = f"the kernel does not take the input that the fold is measured with: {error}"
        raise NotFoldable(msg) from error
    return k


def _in_float64(weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    return weight.double(), None if bias is None else bias.double()
