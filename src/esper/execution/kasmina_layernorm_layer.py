"""The specification's layer normalisation."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from torch import nn

from esper.execution.kasmina_layer import KasminaLayer

if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Unpack

    from esper.execution.kasmina_layer import LayerOptions


class KasminaLayerNormLayer(KasminaLayer):
    """Layer normalisation with seeds; every wrapped ``LayerNorm`` is one.

    Args:
        normalized_shape: As of ``torch.nn.LayerNorm``, like the others up to ``bias``; all of them
            are ignored where ``original_layer`` is given.
        eps: See above.
        elementwise_affine: See above; without it there is no parameter.
        bias: See above.
        original_layer: The host; taken as it is, not copied.
        layer_options: ``num_seeds``, ``cache_size_mb``, ``telemetry_enabled`` and ``source``, as
            of :class:`KasminaLayer`.

    Raises:
        ValueError: ``num_seeds`` is less than 1, or ``original_layer`` cannot be a site.
    """

    @classmethod
    def _construct(  # type: ignore[override] # the specification's constructor
        cls,
        normalized_shape: int | Sequence[int],
        eps: float = 1e-5,
        elementwise_affine: bool = True,
        bias: bool = True,
        original_layer: nn.Module | None = None,
        **layer_options: Unpack[LayerOptions],
    ) -> nn.Module:
        host = original_layer
        if host is None:
            shape = normalized_shape if isinstance(normalized_shape, int) else [*normalized_shape]
            host = nn.LayerNorm(shape, eps, elementwise_affine, bias)
        return super()._construct(0, 0, original_layer=host, **layer_options)

    @property
    def input_size(self) -> int:
        """Elements that are normalised together."""
        host: Any = self
        return math.prod(host.normalized_shape)

    @property
    def output_size(self) -> int:
        """The same."""
        return self.input_size
