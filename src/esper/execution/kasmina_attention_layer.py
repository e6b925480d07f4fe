"""The specification's attention layer."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, TypedDict, cast

import torch
from torch import nn

from esper.execution.kasmina_layer import KasminaLayer, LayerOptions

if TYPE_CHECKING:
    from typing import Unpack

    from esper.forward.generated_class import CompleteCall


class _HostOptions(TypedDict, total=False):
    add_bias_kv: bool
    add_zero_attn: bool
    kdim: int | None
    vdim: int | None
    device: torch.device | str | None
    dtype: torch.dtype | None


class _AttentionOptions(LayerOptions, _HostOptions, total=False):
    """Both kinds of options that the constructor passes on."""


def _completed(
    args: tuple[object, ...], kwargs: dict[str, object]
) -> tuple[tuple[object, ...], dict[str, object]]:
    """Return the call with the key and the value that the caller left out."""
    query = args[0] if args else kwargs["query"]
    named = dict(zip(("key", "value"), args[1:3], strict=False)) | kwargs
    key = named.get("key")
    key = query if key is None else key
    value = named.get("value")
    value = key if value is None else value
    kept = {name: kwargs[name] for name in kwargs if name not in ("query", "key", "value")}
    return (query, key, value, *args[3:]), kept


class KasminaAttentionLayer(KasminaLayer):
    """Multi-head attention with seeds; every wrapped ``MultiheadAttention`` is one.

    It is called as its host is and returns what its host returns, ``(output, weights)``; seeds
    act on the output and leave the weights alone. Other than its host it may be called without
    ``key`` and ``value``: the key is then the query, and the value the key.

    Args:
        embed_dim: As of ``torch.nn.MultiheadAttention``, like the others up to ``batch_first``;
            all of them are ignored where ``original_layer`` is given.
        num_heads: See above.
        dropout: See above.
        bias: See above.
        batch_first: See above; true unless said otherwise.
        original_layer: The host; taken as it is, not copied.
        options: ``add_bias_kv``, ``add_zero_attn``, ``kdim``, ``vdim``, ``device`` and ``dtype``
            of ``torch.nn.MultiheadAttention``; ``num_seeds``, ``cache_size_mb``,
            ``telemetry_enabled`` and ``source`` of :class:`KasminaLayer`.

    Raises:
        ValueError: ``num_seeds`` is less than 1, or ``original_layer`` cannot be a site.
    """

    @classmethod
    def _construct(  # type: ignore[override] # the specification's constructor
        cls,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        batch_first: bool = True,
        original_layer: nn.Module | None = None,
        **options: Unpack[_AttentionOptions],
    ) -> nn.Module:
        of_host = _HostOptions.__annotations__.keys()
        settings = cast("_HostOptions", {k: v for k, v in options.items() if k in of_host})
        own = cast("LayerOptions", {k: v for k, v in options.items() if k not in of_host})
        host = original_layer
        if host is None:
            host = nn.MultiheadAttention(
                embed_dim, num_heads, dropout, bias, batch_first=batch_first, **settings
            )
        return super()._construct(embed_dim, embed_dim, original_layer=host, **own)

    complete_call: ClassVar[CompleteCall | None] = staticmethod(_completed)
