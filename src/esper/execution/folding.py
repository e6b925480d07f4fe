"""Folding: an affine kernel becomes part of its host's weights, where that is exact."""

from __future__ import annotations

import copy
import gc
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor, nn

from esper.contracts.lifecycle import SeedLifecycleState
from esper.execution.affine import (
    CONVOLUTIONS,
    NotFoldable,
    affine_of,
    dense,
    grouped,
    on_taps_of,
)
from esper.execution.generated_class import host_class_of, replan
from esper.execution.grafting import active_seed
from esper.execution.layer_record import record_of
from esper.execution.occupancy import describe, withdraw

if TYPE_CHECKING:
    from esper.execution.seed_slot import Seed

FLOAT32_TOLERANCE: Final = 1e-6
_SAMPLES: Final = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class FoldCertificate:
    """What became of a fold.

    Attributes:
        folded: Whether the kernel is now part of the host's weights.
        rel_diff: Largest difference of the layer's outputs before and after, over the largest
            output before, both computed in float64 from the weights as stored; None if nothing
            was computed.
        tolerance: What was allowed: 1e-6 in float32 and float64, else the dtype's epsilon.
        reason: Why it was not folded; empty if it was.
    """

    folded: bool
    rel_diff: float | None
    tolerance: float
    reason: str = ""


def fossilize(layer: nn.Module, seed_idx: int) -> FoldCertificate:
    """Make a seed permanent; see ``KasminaLayer.fossilize``."""
    seed = active_seed(layer, seed_idx)
    layout = record_of(layer).layout
    certificate = fold(layer, seed)
    layout.transition_seed_state(seed_idx, SeedLifecycleState.FOSSILIZED)
    if certificate.folded:
        layout.release_kernel(seed_idx)
        withdraw(layer, seed_idx)
    else:
        seed.slot.set_structure(describe(layer, seed_idx))
        replan(layer)
    return certificate


def fold(layer: nn.Module, seed: Seed) -> FoldCertificate:
    """Add a seed's kernel to its host's weight and bias, or change nothing and say why.

    The parameters stay the same objects; they are written in place, under ``no_grad``.
    """
    host: Any = layer
    tolerance = FLOAT32_TOLERANCE
    try:
        _check_host(layer, seed)
        tolerance = _tolerance(host.weight)
        exact_weight, exact_bias = _folded(host, seed)
        _check_owner(layer)  # late: it looks at every object that there is
        weight, bias = exact_weight.to(host.weight.dtype), _cast_bias(host, exact_bias)
        rel_diff = _rel_diff(host, seed, weight, bias)
    except NotFoldable as refused:
        return FoldCertificate(
            folded=False, rel_diff=None, tolerance=tolerance, reason=str(refused)
        )
    if not rel_diff <= tolerance:
        reason = f"relative difference {rel_diff:.3g} exceeds {tolerance:.3g}"
        return FoldCertificate(folded=False, rel_diff=rel_diff, tolerance=tolerance, reason=reason)
    with torch.no_grad():
        host.weight.copy_(weight)
        if bias is not None:
            host.bias.copy_(bias)
    return FoldCertificate(folded=True, rel_diff=rel_diff, tolerance=tolerance)


def _tolerance(weight: Tensor) -> float:
    exact = weight.dtype in (torch.float32, torch.float64)
    return FLOAT32_TOLERANCE if exact else float(torch.finfo(weight.dtype).eps)


def _check_host(layer: nn.Module, seed: Seed) -> None:
    if host_class_of(layer) not in (nn.Linear, *CONVOLUTIONS):
        _refuse(f"a {host_class_of(layer).__name__} is not known to be affine in one weight")
    own = layer._parameters  # noqa: SLF001 - past parametrizations
    for name in ("weight", "bias"):
        tensor = own.get(name)
        is_absent = name == "bias" and layer.bias is None
        if not is_absent and (type(tensor) is not nn.Parameter or not tensor.is_floating_point()):
            _refuse(f"the host's {name} is computed, quantised or sharded")
    others = [s for s in record_of(layer).seeds.values() if s is not seed]  # at alpha 0 too
    if any(s.is_serial or s.replaces for s in others):
        _refuse("another contributing seed of the layer is serial or replacing")


def _check_owner(layer: nn.Module) -> None:
    if any(_num_owners(p) > 1 for p in layer.parameters(recurse=False)):
        _refuse("the host's weight is shared with another module")


def _refuse(reason: str) -> None:
    raise NotFoldable(reason)


def _num_owners(parameter: nn.Parameter) -> int:
    """Count the modules that hold a parameter, by asking who refers to it."""
    tables = [t for t in gc.get_referrers(parameter) if isinstance(t, dict)]
    owned = [t for t in tables if any(v is parameter for v in t.values()) and _is_module_table(t)]
    return len(owned)


def _is_module_table(table: dict[Any, Any]) -> bool:
    """Return whether a dict is the ``_parameters`` of a module."""
    for owner in gc.get_referrers(table):
        state = owner.__dict__ if isinstance(owner, nn.Module) else owner
        if isinstance(state, dict) and state.get("_parameters") is table:
            return True
    return False


def _folded(host: Any, seed: Seed) -> tuple[Tensor, Tensor]:
    """Return weight and bias, float64, of the host with the seed in it."""
    kept, alpha = _shares(seed)
    is_linear = isinstance(host, nn.Linear)
    weight = host.weight.detach().double()
    no_bias = weight.new_zeros(weight.shape[0])
    bias = no_bias if host.bias is None else host.bias.detach().double()
    if seed.is_serial:
        return _folded_serially(host, seed, weight, bias)
    num_features = host.in_features if is_linear else host.in_channels
    kernel = affine_of(seed.slot.kernel, num_features, weight)
    if is_linear:
        return kept * weight + alpha * kernel.weight, kept * bias + alpha * kernel.bias
    grafted = grouped(on_taps_of(kernel, host), host.groups)
    return kept * weight + alpha * grafted, kept * bias + alpha * kernel.bias


def _folded_serially(host: Any, seed: Seed, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    kept, alpha = _shares(seed)
    kernel = affine_of(seed.slot.kernel, bias.numel(), weight)
    if kernel.geometry is not None:
        _refuse("a serial kernel folds only where it is 1x1")
    matrix = kept * torch.eye(bias.numel(), dtype=torch.float64, device=bias.device)
    matrix = matrix + alpha * kernel.weight
    groups = 1 if isinstance(host, nn.Linear) else host.groups
    full = torch.einsum("om,m...->o...", matrix, dense(weight, groups))
    return grouped(full, groups), matrix @ bias + alpha * kernel.bias


def _shares(seed: Seed) -> tuple[float, float]:
    """Return the host's weight in the sum and the kernel's."""
    alpha = float(seed.slot.alpha)
    return (1.0 - alpha if seed.replaces else 1.0), alpha


def _cast_bias(host: Any, bias: Tensor) -> Tensor | None:
    if host.bias is not None:
        return bias.to(host.bias.dtype)
    if bool(bias.any()):
        _refuse("the kernel has a bias and the host has none")
    return None


def _rel_diff(host: Any, seed: Seed, weight: Tensor, bias: Tensor | None) -> float:
    """Measure the fold on random inputs, in float64, against the formula."""
    with torch.no_grad():
        x = _random_input(host)
        h = _run(host, host.weight, host.bias, x)
        kernel = copy.deepcopy(seed.slot.kernel).double()
        k = kernel(h if seed.is_serial else x)
        kept, alpha = _shares(seed)
        before = kept * h + alpha * k
        change = (_run(host, weight, bias, x) - before).abs().max()
        return float(change / before.abs().max().clamp_min(sys.float_info.min))


def _random_input(host: Any) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    if isinstance(host, nn.Linear):
        shape: tuple[int, ...] = (64, host.in_features)
    else:
        span = [d * (k - 1) + 1 for d, k in zip(host.dilation, host.kernel_size, strict=True)]
        shape = (2, host.in_channels, *(s + _SAMPLES for s in span))
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    return x.to(host.weight.device)


def _run(host: Any, weight: Tensor, bias: Tensor | None, x: Tensor) -> Tensor:
    """Run the host's class in float64 with another weight and bias."""
    b = None if bias is None else bias.double()
    if isinstance(host, nn.Linear):
        return nn.functional.linear(x, weight.double(), b)
    y: Tensor = host._conv_forward(x, weight.double(), b)  # noqa: SLF001 - does the padding modes
    return y
