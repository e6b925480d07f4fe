"""The specification's batch normalisation."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from torch import nn

from esper.execution.kasmina_layer import KasminaLayer

if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Unpack

    from esper.execution.kasmina_layer import LayerOptions

_BY_DIMENSIONS: Final[dict[int, type[nn.Module]]] = {4: nn.BatchNorm2d, 5: nn.BatchNorm3d}


class KasminaBatchNormLayer(KasminaLayer):
    """Batch normalisation with seeds; every wrapped ``BatchNorm`` is one.

    Kernels read what comes out of the normalisation, in training and in evaluation alike, so they
    have no part in the running statistics: a training forward updates these once.

    Args:
        num_features: As of ``torch.nn.BatchNorm1d``, like the others up to
            ``track_running_stats``; all of them are ignored where ``original_layer`` is given.
        eps: See above.
        momentum: See above.
        affine: See above.
        track_running_stats: See above.
        input_shape: Shape of a batch: four dimensions make the host a ``BatchNorm2d``, five a
            ``BatchNorm3d``, anything else a ``BatchNorm1d``.
        original_layer: The host; taken as it is, not copied.
        layer_options: ``num_seeds``, ``cache_size_mb``, ``telemetry_enabled`` and ``source``, as
            of :class:`KasminaLayer`.

    Raises:
        ValueError: ``num_seeds`` is less than 1, or ``original_layer`` cannot be a site.
    """

    @classmethod
    def _construct(  # type: ignore[override] # the specification's constructor
        cls,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        input_shape: Sequence[int] = (),
        original_layer: nn.Module | None = None,
        **layer_options: Unpack[LayerOptions],
    ) -> nn.Module:
        host = original_layer
        if host is None:
            norm = _BY_DIMENSIONS.get(len(input_shape), nn.BatchNorm1d)
            host = norm(num_features, eps, momentum, affine, track_running_stats)
        return super()._construct(0, 0, original_layer=host, **layer_options)
