"""Every kind of layer that a seed may stand in, one row each.

To add a kind, add a row to ``LAYER_KINDS``: ``tests/test_layer_kinds.py`` then names each function
and each test host that the rooms lack for it.

A row has values only; torch is not imported. A module is of the kind whose host class comes first
among its class and that class's bases, so that a subclass is of its base's kind, and whatever has
no row of its own is a block. Classes are compared by the dotted name of the place where they are
defined (``torch.nn.modules.linear.Linear``, which ``torch.nn`` merely passes on), so that packages
which may be absent need not be imported.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Literal

from esper.contracts.choices import POSITIONS

if TYPE_CHECKING:
    from esper.contracts.choices import Position

_SERIAL: Final[tuple[Position, ...]] = ("serial",)


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerKind:
    """What the rooms know about one kind of layer.

    Attributes:
        name: Name of the row, by which the rooms register their functions for it.
        site: What the catalog calls it: ``SiteSpec.kind``. Kinds for which the catalog offers the
            same kernels in the same way share one.
        host_classes: Dotted names of the host classes. An instance of a subclass is of this kind
            too, but what depends on a host's own arithmetic (folding) asks for one of these.
        family: Name of the layer class of its layers, a class of ``esper.execution``.
        is_default: Whether ``wrap`` takes it where nobody says otherwise.
        positions: What kernels may read at it; the first is the default of a module.
        kernels: Names of the families of the default catalog that are offered at it.
        feature_axis: The axis of the features or channels in what it gives; None where only an
            example says which.
        num_axes: How many axes a norm gives behind its channels, where its class says so.
        takes_integers: Whether its input is integers, which no kernel reads.
        gives_tuple: Whether it gives a tuple that begins with the tensor that is grafted.
        may_pack: Whether it also takes packed sequences, which it gives as it takes them; no
            kernel reads one.
        uncalled_children: Names of children whose tensors it reads without calling their forward,
            where a seed would never be asked.
    """

    name: str
    site: str
    host_classes: tuple[str, ...]
    family: str = "KasminaLayer"
    is_default: bool = True
    positions: tuple[Position, ...] = POSITIONS
    kernels: tuple[str, ...]
    feature_axis: Literal[1, -1] | None = -1
    num_axes: int | None = None
    takes_integers: bool = False
    gives_tuple: bool = False
    may_pack: bool = False
    uncalled_children: tuple[str, ...] = ()

    def is_host(self, cls: type) -> bool:
        """Say whether a class is itself one of the host classes, not derived from one."""
        return dotted_name(cls) in self.host_classes


_ON_FEATURES: Final = ("mlp", "gated-mlp", "low-rank")
_ON_CHANNELS: Final = ("bottleneck", "conv-block", "separable", "pointwise")
_BEHIND: Final = ("mlp-behind",)

LAYER_KINDS: Final[tuple[LayerKind, ...]] = (
    LayerKind(
        name="linear",
        site="linear",
        host_classes=("torch.nn.modules.linear.Linear",),
        kernels=_ON_FEATURES,
    ),
    LayerKind(
        name="transposed_linear",
        site="linear",
        host_classes=("transformers.pytorch_utils.Conv1D",),
        kernels=_ON_FEATURES,
    ),
    LayerKind(
        name="conv1d",
        site="conv1d",
        host_classes=("torch.nn.modules.conv.Conv1d",),
        kernels=_ON_CHANNELS,
        feature_axis=1,
    ),
    LayerKind(
        name="conv2d",
        site="conv2d",
        host_classes=("torch.nn.modules.conv.Conv2d",),
        family="KasminaConv2dLayer",
        kernels=_ON_CHANNELS,
        feature_axis=1,
    ),
    LayerKind(
        name="conv3d",
        site="conv3d",
        host_classes=("torch.nn.modules.conv.Conv3d",),
        kernels=_ON_CHANNELS,
        feature_axis=1,
    ),
    LayerKind(
        name="conv_transpose2d",
        site="conv_transpose2d",
        host_classes=("torch.nn.modules.conv.ConvTranspose2d",),
        kernels=("bottleneck", "conv-block", "separable"),
        feature_axis=1,
    ),
    LayerKind(
        name="attention",
        site="attention",
        host_classes=("torch.nn.modules.activation.MultiheadAttention",),
        family="KasminaAttentionLayer",
        kernels=("mlp", "gated-mlp", *_BEHIND),
        gives_tuple=True,
        uncalled_children=("out_proj",),
    ),
    LayerKind(
        name="recurrent",
        site="recurrent",
        host_classes=(
            "torch.nn.modules.rnn.LSTM",
            "torch.nn.modules.rnn.GRU",
            "torch.nn.modules.rnn.RNN",
        ),
        family="KasminaRecurrentLayer",
        positions=_SERIAL,
        kernels=(*_BEHIND, "block"),
        gives_tuple=True,
        may_pack=True,
    ),
    LayerKind(
        name="embedding",
        site="embedding",
        host_classes=("torch.nn.modules.sparse.Embedding",),
        family="KasminaEmbeddingLayer",
        is_default=False,
        positions=_SERIAL,
        kernels=_BEHIND,
        takes_integers=True,
    ),
    LayerKind(
        name="embedding_bag",
        site="block",
        host_classes=("torch.nn.modules.sparse.EmbeddingBag",),
        family="KasminaEmbeddingLayer",
        is_default=False,
        positions=_SERIAL,
        kernels=(*_BEHIND, "block"),
        takes_integers=True,
    ),
    LayerKind(
        name="layer_norm",
        site="norm",
        host_classes=("torch.nn.modules.normalization.LayerNorm",),
        family="KasminaLayerNormLayer",
        kernels=_BEHIND,
    ),
    LayerKind(
        name="rms_norm",
        site="norm",
        host_classes=("torch.nn.modules.normalization.RMSNorm",),
        kernels=_BEHIND,
    ),
    LayerKind(
        name="group_norm",
        site="channel_norm",
        host_classes=("torch.nn.modules.normalization.GroupNorm",),
        kernels=_BEHIND,
        feature_axis=1,
    ),
    LayerKind(
        name="batch_norm",
        site="channel_norm",
        host_classes=(
            "torch.nn.modules.batchnorm.BatchNorm1d",
            "torch.nn.modules.batchnorm._BatchNorm",
        ),
        family="KasminaBatchNormLayer",
        positions=_SERIAL,
        kernels=_BEHIND,
        feature_axis=1,
    ),
    LayerKind(
        name="batch_norm2d",
        site="channel_norm",
        host_classes=("torch.nn.modules.batchnorm.BatchNorm2d",),
        family="KasminaBatchNormLayer",
        positions=_SERIAL,
        kernels=_BEHIND,
        feature_axis=1,
        num_axes=2,
    ),
    LayerKind(
        name="batch_norm3d",
        site="channel_norm",
        host_classes=("torch.nn.modules.batchnorm.BatchNorm3d",),
        family="KasminaBatchNormLayer",
        positions=_SERIAL,
        kernels=_BEHIND,
        feature_axis=1,
        num_axes=3,
    ),
    LayerKind(
        name="block",
        site="block",
        host_classes=(
            "torch.nn.modules.module.Module",
            "torch.fx.graph_module.GraphModule",  # what unwrap leaves comes before its host's class
        ),
        is_default=False,
        kernels=(*_BEHIND, "block"),
        feature_axis=None,
    ),
)
"""The rows. The last one takes every module that no other does."""


def kind_of(module: object) -> LayerKind:
    """Return the kind of a layer, wrapped or not.

    Raises:
        TypeError: It is no ``torch.nn.Module``.
    """
    return kind_of_class(type(module))


def kind_of_class(cls: type) -> LayerKind:
    """Return the kind of a class's instances.

    Raises:
        TypeError: They are no ``torch.nn.Module``.
    """
    return _BY_CLASS[host_class_name(cls)]


def positions_at(site: str) -> tuple[Position, ...]:
    """Return what kernels may read at whatever the catalog calls ``site``."""
    kinds = [kind for kind in LAYER_KINDS if kind.site == site]
    return tuple(p for p in POSITIONS if all(p in kind.positions for kind in kinds))


def host_class_name(cls: type) -> str:
    """Return the dotted name of the host class that makes a class's instances what they are.

    Raises:
        TypeError: The class is no ``torch.nn.Module``.
    """
    for base in cls.__mro__:
        name = dotted_name(base)
        if name in _BY_CLASS:
            return name
    msg = f"a site is a torch.nn.Module, found a {cls.__qualname__}"
    raise TypeError(msg)


def dotted_name(cls: type) -> str:
    """Return module and qualified name of a class, as it was defined."""
    return f"{cls.__module__}.{cls.__qualname__}"


_BY_CLASS: Final = {name: kind for kind in LAYER_KINDS for name in kind.host_classes}
