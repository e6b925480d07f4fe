"""Recurrent layers with seeds."""

from __future__ import annotations

from typing import TYPE_CHECKING

from esper.execution.kasmina_layer import KasminaLayer

if TYPE_CHECKING:
    from typing import ClassVar, Unpack

    from torch import nn

    from esper.execution.kasmina_layer import LayerOptions


class KasminaRecurrentLayer(KasminaLayer):
    """A recurrent layer with seeds; every wrapped ``LSTM``, ``GRU`` or ``RNN`` is one.

    It is called as its host is and returns what its host returns, ``(output, hidden)``. Kernels
    read the output of the last layer at every step, both directions side by side, and leave the
    hidden state alone, so that they take no part in the recurrence. ``input_size`` is the host's
    own attribute.

    What the host makes of a packed sequence is passed on as it is, without the kernels, and
    counted as a call of the host alone; ``esper.maintain`` tells it. The steps of all sequences lie
    mixed in one axis there: a kernel that reads each step by itself could work on them, one that
    reads its neighbours would read those of other sequences, and nothing tells the two apart.

    Args:
        original_layer: The host; taken as it is, not copied.
        layer_options: ``num_seeds``, ``cache_size_mb``, ``telemetry_enabled`` and ``source``, as
            of :class:`KasminaLayer`.

    Raises:
        ValueError: ``num_seeds`` is less than 1, or ``original_layer`` cannot be a site.
    """

    LEFT_TO_HOST: ClassVar[frozenset[str]] = frozenset({"input_size"})

    input_size: int = 0  # no property any more, so that the host's own attribute is found

    @classmethod
    def _construct(  # type: ignore[override] # a constructor that takes a host only
        cls, original_layer: nn.Module, **layer_options: Unpack[LayerOptions]
    ) -> nn.Module:
        return super()._construct(0, 0, original_layer=original_layer, **layer_options)
