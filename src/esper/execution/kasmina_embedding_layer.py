"""Embeddings as layers with seeds."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from esper.execution.kasmina_layer import KasminaLayer

if TYPE_CHECKING:
    from typing import Unpack

    from esper.execution.kasmina_layer import LayerOptions


class KasminaEmbeddingLayer(KasminaLayer):
    """A table of embeddings with seeds; every wrapped ``Embedding`` is one.

    Its input is integers, so its kernels read its output.

    Args:
        num_embeddings: As of ``torch.nn.Embedding``; ignored where ``original_layer`` is given.
        embedding_dim: See above.
        padding_idx: See above.
        original_layer: The host; taken as it is, not copied.
        layer_options: ``num_seeds``, ``cache_size_mb``, ``telemetry_enabled`` and ``source``, as
            of :class:`KasminaLayer`.

    Raises:
        ValueError: ``num_seeds`` is less than 1, or ``original_layer`` cannot be a site.
    """

    @classmethod
    def _construct(  # type: ignore[override] # a constructor of its host's arguments
        cls,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        original_layer: nn.Module | None = None,
        **layer_options: Unpack[LayerOptions],
    ) -> nn.Module:
        host = original_layer
        if host is None:
            host = nn.Embedding(num_embeddings, embedding_dim, padding_idx)
        return super()._construct(
            num_embeddings, embedding_dim, original_layer=host, **layer_options
        )
