"""The layers of a model with what they are, for the drawing of it on its run's page."""

from __future__ import annotations

from typing import TYPE_CHECKING

from esper.contracts.layer_kind import host_class_name
from esper.contracts.report import SiteRecord
from esper.state.site import widths

if TYPE_CHECKING:
    from collections.abc import Mapping

    from esper.execution.kasmina_layer import KasminaLayer


def outline(layers: Mapping[str, KasminaLayer]) -> tuple[SiteRecord, ...]:
    """Return a record for each layer, in their order."""
    return tuple(
        SiteRecord(site=site, what=_what(layer), seeds=layer.num_seeds)
        for site, layer in layers.items()
    )


def _what(layer: KasminaLayer) -> str:
    """Return class and widths, as far as the layer says them: ``"Linear, 4 to 64"``."""
    name = host_class_name(type(layer)).rpartition(".")[2]
    num_in, num_out = widths(layer)
    if not (num_in and num_out):
        return name
    return f"{name}, {num_in:,}" if num_in == num_out else f"{name}, {num_in:,} to {num_out:,}"
