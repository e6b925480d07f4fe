"""Make any module a layer with seeds, in place, and give it its class back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Final

from torch import nn

from esper.contracts.errors import SeedLifecycleError
from esper.contracts.layer_kind import kind_of
from esper.execution.kasmina_attention_layer import KasminaAttentionLayer
from esper.execution.kasmina_batchnorm_layer import KasminaBatchNormLayer
from esper.execution.kasmina_conv2d_layer import KasminaConv2dLayer
from esper.execution.kasmina_embedding_layer import KasminaEmbeddingLayer
from esper.execution.kasmina_layer import KasminaLayer
from esper.execution.kasmina_layernorm_layer import KasminaLayerNormLayer
from esper.execution.kasmina_recurrent_layer import KasminaRecurrentLayer
from esper.forward import class_change
from esper.state.layer_record import record_of

if TYPE_CHECKING:
    from esper.contracts.ports import KernelSource

FAMILIES: Final[Mapping[str, type[KasminaLayer]]] = {
    family.__name__: family
    for family in (
        KasminaLayer,
        KasminaConv2dLayer,
        KasminaAttentionLayer,
        KasminaLayerNormLayer,
        KasminaBatchNormLayer,
        KasminaEmbeddingLayer,
        KasminaRecurrentLayer,
    )
}
"""The layer classes by the names that ``LAYER_KINDS`` has for them."""


def adopt(
    module: nn.Module,
    *,
    name: str,
    num_seeds: int = 4,
    telemetry_enabled: bool = False,
    source: KernelSource | None = None,
) -> KasminaLayer:
    """Change the class of ``module`` itself to one with seeds, all dormant, and return it.

    Args:
        module: The host. Its output must be a floating tensor, or a tuple that begins with one.
        name: Its name in the model.
        num_seeds: Number of seeds, at least 1.
        telemetry_enabled: Whether calls are counted and kernels are timed.
        source: Where the layer's ``load_kernel`` fetches from.

    Raises:
        ValueError: ``num_seeds`` is less than 1, or :func:`refusal` has a reason; nothing has
            changed.
    """
    return _family_of(module).adopt_as(
        module,
        name=name,
        num_seeds=num_seeds,
        telemetry_enabled=telemetry_enabled,
        source=source,
    )


def release(layer: nn.Module) -> nn.Module:
    """Give a layer its own class back and drop its record; it is the same object.

    Raises:
        SeedLifecycleError: A seed holds a kernel, loads one, or is in shadow.
        TypeError: The module is not wrapped.
    """
    record = record_of(layer)
    if record.seeds or record.shadows or record.waiting:
        busy = sorted({*record.seeds, *record.shadows, *record.waiting})
        msg = (
            f"layer {record.name!r} cannot be released: seeds {busy} are in use; unload them "
            "first, or use esper.unwrap (keeps grafts) or esper.restore (drops them)"
        )
        raise SeedLifecycleError(msg)
    class_change.return_class(layer)
    return layer


def refusal(module: nn.Module) -> str | None:
    """Return why a module cannot be a site, or None if it can be one."""
    return class_change.refusal(module, _family_of(module))


def _family_of(module: object) -> type[KasminaLayer]:
    return FAMILIES[kind_of(module).family] if isinstance(module, nn.Module) else KasminaLayer
