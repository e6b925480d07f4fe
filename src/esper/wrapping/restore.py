"""Give a model its own classes back and drop what was grafted."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Generic, TypeVar

from torch import nn

from esper.contracts.errors import SeedLifecycleError
from esper.contracts.lifecycle import SeedLifecycleState
from esper.execution.host_class import release
from esper.seeds.grafting import cancel
from esper.state.host_parts import check_module
from esper.state.layer_record import record_of
from esper.wrapping.wrap import layers

if TYPE_CHECKING:
    from collections.abc import Mapping

    from esper.execution.kasmina_layer import KasminaLayer

Model = TypeVar("Model", bound=nn.Module)


@dataclass(frozen=True, slots=True, kw_only=True)
class RestoreResult(Generic[Model]):
    """What ``restore`` did.

    Attributes:
        model: The model, restored in place.
        restored: Names of the layers that have their own class back: all that were wrapped.
        dropped: Names of those of which a kernel was dropped.
        folded: Names of those whose weights hold a folded kernel. They keep it: load the host's
            own weights to be without.
    """

    model: Model
    restored: tuple[str, ...]
    dropped: tuple[str, ...]
    folded: tuple[str, ...]


def restore(model: Model) -> RestoreResult[Model]:
    """Give every wrapped layer its own class back, in place, and drop what was grafted.

    Kernels go, whatever their state; the host's parameters are the objects that they were, with
    the values that they have. What was folded into them cannot be taken out again and stays.

    Args:
        model: A model; one that is not wrapped is left as it is.

    Returns:
        The model, and the names of the layers that it happened to.

    Raises:
        TypeError: ``model`` is no module.
        SeedLifecycleError: A layer is in a shadow pass; nothing has changed.
    """
    check_module("restore", model)
    sites = layers(model)
    refuse_shadows(sites)
    folded = tuple(name for name, layer in sites.items() if _is_folded(layer))
    dropped = tuple(name for name, layer in sites.items() if _holds_kernel(layer))
    for layer in sites.values():
        make_bare(layer)
    return RestoreResult(model=model, restored=tuple(sites), dropped=dropped, folded=folded)


def refuse_shadows(sites: Mapping[str, KasminaLayer]) -> None:
    """Check that no layer is in a shadow pass.

    Raises:
        SeedLifecycleError: One is.
    """
    for name, layer in sites.items():
        if record_of(layer).shadows:
            raise SeedLifecycleError(f"{name!r} is in a shadow pass; leave its `with` block first")


def make_bare(layer: KasminaLayer) -> None:
    """Drop whatever stands or waits in a layer's seeds and give it its own class back."""
    for seed_idx in list(record_of(layer).waiting):
        cancel(layer, seed_idx)
    layer.build([])
    release(layer)


def _holds_kernel(layer: KasminaLayer) -> bool:
    return any("kernel" in seed for seed in layer.structure())


def _is_folded(layer: KasminaLayer) -> bool:
    """Say whether a seed is a fossil without a kernel: it lives on in the host's weights."""
    fossil = int(SeedLifecycleState.FOSSILIZED)
    return any(s["state"] == fossil and "kernel" not in s for s in layer.structure())
