"""The catalog: which kernels are tried at which layer, and the controls that they are held against.

Every kernel of the catalog adds, and gives exactly the shape of the host's output. It reads the
host's input (parallel); behind a norm, an embedding, a recurrent layer or a whole block its output
(serial). Each ends in one zeroed affine layer, ``"out"``, so that it is the identity at birth and
only its own last layer is zero. Two widths each: about a quarter of the layer, at least 32, and
twice that; half as much for the bottleneck.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import Final

from esper.contracts.blueprint import (
    INPUT,
    OUTPUT,
    BlueprintEdge,
    BlueprintIR,
    BlueprintNode,
    TensorSpec,
)
from esper.contracts.layer_kind import LAYER_KINDS
from esper.contracts.site import SiteSpec

Settings = Mapping[str, bool | int | float | str | tuple[int, ...]]
"""What an operation of a blueprint is told."""

Layer = tuple[str, Settings]
"""An operation and its settings."""

Step = tuple[str, str, Settings]
"""A node of a chain: its id, its operation and its settings."""

Build = Callable[[SiteSpec, int], BlueprintIR | None]
"""Makes a blueprint for a site and a width, or None where the family does not fit."""

_FREE_SIZES: Final = ((), ("L",), ("H", "W"), ("D", "H", "W"))
_LEAST_WIDTH: Final = 32
_LEAST_HEAD: Final = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class CatalogEntry:
    """A family of kernels.

    Attributes:
        name: Begins the id of each of its blueprints.
        kinds: Kinds of sites that it fits, as ``SiteSpec`` names them.
        adds_capacity: Whether its kernels compute what a trainable host layer alone cannot.
        build: Makes a blueprint for a site and a width in features or channels, or None where the
            family does not fit.
        zeroed: Name of the tensor that is zero at birth.
    """

    name: str
    kinds: frozenset[str]
    adds_capacity: bool
    build: Build
    zeroed: str = "out.weight"

    def blueprints_for(self, site: SiteSpec) -> list[BlueprintIR]:
        """Return its blueprints for a site: none, one or two, the smaller first."""
        if site.kind not in self.kinds:
            return []
        built = [self.build(site, width) for width in widths_for(site)]
        return list(dict.fromkeys(blueprint for blueprint in built if blueprint is not None))


@dataclass(frozen=True, slots=True, kw_only=True)
class Catalog:
    """The families of kernels that a controller may choose from.

    Attributes:
        entries: In the order in which they are offered.
    """

    entries: tuple[CatalogEntry, ...]

    def blueprints_for(self, site: SiteSpec, *, capacity_only: bool = True) -> list[BlueprintIR]:
        """Return the candidates for a site.

        Args:
            site: The layer.
            capacity_only: Leave out kernels that add no capacity where the host can learn the
                same by itself, that is where it is trainable.
        """
        blueprints = [b for entry in self.entries for b in entry.blueprints_for(site)]
        if capacity_only and site.host_is_trainable:
            return [blueprint for blueprint in blueprints if blueprint.adds_capacity]
        return blueprints

    def named(self, name: str, *sites: SiteSpec, where: str) -> BlueprintIR:
        """Return the kernel that has a name, those that add no capacity among them.

        Args:
            name: Id of its blueprint.
            sites: Descriptions of the layer, one for each way in which it may be meant.
            where: What the layer is called in messages.

        Raises:
            ValueError: There is none of that name; those that there are, are named.
        """
        offered = [b for site in sites for b in self.blueprints_for(site, capacity_only=False)]
        names = list(dict.fromkeys(blueprint.id for blueprint in offered))
        found = [blueprint for blueprint in offered if blueprint.id == name]
        if found:
            return found[0]
        msg = (
            f"the catalog has no {name!r} for {where}; it has {', '.join(names) or 'none there'}. "
            "A kernel of another catalog is given as its BlueprintIR"
        )
        raise ValueError(msg)


def default_catalog() -> Catalog:
    """Return the catalog that the controller uses unless it is given another."""
    return Catalog(
        entries=(
            _entry("mlp", _mlp),
            _entry("gated-mlp", _gated_mlp),
            _entry("low-rank", _low_rank, adds_capacity=False),
            _entry("bottleneck", _bottleneck),
            _entry("conv-block", _conv_block),
            _entry("separable", _separable),
            _entry("pointwise", _pointwise, adds_capacity=False),
            _entry("mlp-behind", _mlp_behind),
            _entry("block", _block),
        )
    )


def _entry(name: str, build: Build, *, adds_capacity: bool = True) -> CatalogEntry:
    """Return a family for the kinds whose rows in ``LAYER_KINDS`` ask for it."""
    kinds = frozenset(kind.site for kind in LAYER_KINDS if name in kind.kernels)
    return CatalogEntry(name=name, kinds=kinds, adds_capacity=adds_capacity, build=build)


def widths_for(site: SiteSpec) -> tuple[int, int]:
    """Return the two hidden widths that are offered at a site, in features or channels."""
    width = max(_LEAST_WIDTH, max(site.in_features, site.out_features) // 4)
    return width, 2 * width


def _mlp(site: SiteSpec, width: int) -> BlueprintIR:
    hidden = _linear(site.in_features, width)
    return _chain(
        site,
        f"mlp-{_size(site)}-w{width}",
        [("hidden", *hidden), ("act", *_act("gelu")), ("out", *_readout(site, width))],
    )


def _gated_mlp(site: SiteSpec, width: int) -> BlueprintIR:
    nodes = [
        BlueprintNode("value", *_linear(site.in_features, width)),
        BlueprintNode("gate", *_linear(site.in_features, width)),
        BlueprintNode("act", *_act("silu")),
        BlueprintNode("product", "mul"),
        BlueprintNode("out", *_readout(site, width)),
    ]
    edges = [
        BlueprintEdge(INPUT, "value"),
        BlueprintEdge(INPUT, "gate"),
        BlueprintEdge("gate", "act"),
        BlueprintEdge("value", "product", 0),
        BlueprintEdge("act", "product", 1),
        BlueprintEdge("product", "out"),
        BlueprintEdge("out", OUTPUT),
    ]
    return _blueprint(site, f"gated-mlp-{_size(site)}-w{width}", nodes, edges)


def _low_rank(site: SiteSpec, width: int) -> BlueprintIR | None:
    if width >= min(site.in_features, site.out_features):
        return None
    hidden = _linear(site.in_features, width, bias=False)
    steps = [("hidden", *hidden), ("out", *_readout(site, width))]
    return replace(_chain(site, f"low-rank-{_size(site)}-r{width}", steps), adds_capacity=False)


def _bottleneck(site: SiteSpec, width: int) -> BlueprintIR:
    width = width // 2  # its middle grows with the square of the width
    return _chain(
        site,
        f"bottleneck-{_size(site)}-w{width}",
        [
            ("squeeze", *_conv_1x1(site, site.in_features, width)),
            ("act1", *_act("relu")),
            ("spatial", *_conv_like_host(site, width, width)),
            ("act2", *_act("relu")),
            ("out", *_readout(site, width)),
        ],
    )


def _conv_block(site: SiteSpec, width: int) -> BlueprintIR:
    return _chain(
        site,
        f"conv-block-{_size(site)}-w{width}",
        [
            ("spatial", *_conv_like_host(site, site.in_features, width)),
            ("act", *_act("relu")),
            ("out", *_readout(site, width)),
        ],
    )


def _separable(site: SiteSpec, width: int) -> BlueprintIR | None:
    if site.in_features == 1:
        return None  # the convolution block again: there is nothing to separate
    channels = site.in_features * -(-width // site.in_features)
    depthwise = _conv_like_host(site, site.in_features, channels, groups=site.in_features)
    return _chain(
        site,
        f"separable-{_size(site)}-w{channels}",
        [("depthwise", *depthwise), ("act", *_act("relu")), ("out", *_readout(site, channels))],
    )


def _pointwise(site: SiteSpec, _width: int) -> BlueprintIR | None:
    """A 1x1 convolution with the host's stride; only where it meets the host's window centres."""
    centred = all(
        2 * padding == dilation * (kernel - 1)
        for kernel, padding, dilation in zip(
            site.kernel_size, site.padding, site.dilation, strict=True
        )
    )
    if not centred:
        return None
    op_type, attributes = _conv_1x1(site, site.in_features, site.out_features)
    settings = {**attributes, "stride": site.stride, "init": "zeros"}
    chain = _chain(site, f"pointwise-{_size(site)}", [("out", op_type, settings)])
    return replace(chain, adds_capacity=False)


def _mlp_behind(site: SiteSpec, width: int) -> BlueprintIR | None:
    """Two layers position by position, on what the host gives.

    Behind an embedding it can give nothing that the table could not hold.
    """
    if site.out_features == 0:
        return None
    steps = [
        ("hidden", *_pointwise_layer(site, site.out_features, width)),
        ("act", *_act("gelu")),
        ("out", *_readout(site, width)),
    ]
    name = f"mlp-behind-{_size(site)}-w{width}"
    return _serial(site, name, steps, adds_capacity=site.kind != "embedding")


def _block(site: SiteSpec, width: int) -> BlueprintIR | None:
    """One more block behind a sequence: its MLP reads what its own attention has added.

    Behind a block it is offered where that keeps the width, as one of several in a row does.

    Only the MLP's last layer is zero: attention and MLP in one row, as two zeroed branches would
    be two zeroed layers. It looks at earlier positions only, unless the host is known to look at
    later ones: a kernel that sees what it is to predict gains much and learns nothing.
    """
    features = site.out_features
    if not site.is_sequence or (site.kind == "block" and features != site.in_features):
        return None
    heads = [h for h in range(1, 17) if features % h == 0 and features // h >= _LEAST_HEAD]
    norm = {"normalized_shape": features}
    attention = {
        "embed_dim": features,
        "num_heads": max(heads, default=1),
        "causal": site.is_causal,
    }
    nodes = [
        BlueprintNode("norm1", "layer_norm", norm),
        BlueprintNode("attention", "multihead_attention", attention),
        BlueprintNode("skip", "add"),
        BlueprintNode("norm2", "layer_norm", norm),
        BlueprintNode("up", *_linear(features, width)),
        BlueprintNode("act", *_act("gelu")),
        BlueprintNode("out", *_zeroed(_linear(width, features))),
    ]
    spec = TensorSpec(("L", features), site.dtype)
    name = f"block-{_size(site)}-w{width}"
    return BlueprintIR(
        id=f"{name}-causal" if site.is_causal else name,
        nodes=tuple(nodes),
        edges=(*_edges_along(nodes), BlueprintEdge(INPUT, "skip", 1)),
        input_spec=spec,
        output_spec=spec,
        position="serial",
    )


def noop(site: SiteSpec) -> BlueprintIR:
    """Control: the host's output times 0. Serial; nothing to train; contributes exactly nothing."""
    steps = [("off", "scale", {"factor": 0.0})]
    return _serial(site, f"noop-{_size(site)}", steps)


def noise(site: SiteSpec, *, std: float = 0.1) -> BlueprintIR:
    """Control: Gaussian noise of the host's output's shape. Serial; nothing to train.

    Args:
        site: The layer.
        std: Standard deviation, above 0.
    """
    steps = [("off", "scale", {"factor": 0.0}), ("noise", "noise", {"std": std})]
    return _serial(site, f"noise-{_size(site)}", steps, draws_random=True)


def noise_readout(site: SiteSpec, *, std: float = 1.0) -> BlueprintIR:
    """Control: a zeroed readout of Gaussian noise. Serial; trains, and has nothing to learn from.

    Args:
        site: The layer.
        std: Standard deviation, above 0.
    """
    steps = [
        ("off", "scale", {"factor": 0.0}),
        ("noise", "noise", {"std": std}),
        ("out", *_zeroed(_pointwise_layer(site, site.out_features, site.out_features))),
    ]
    return _serial(site, f"noise-readout-{_size(site)}", steps, draws_random=True)


def capacity_free(site: SiteSpec) -> BlueprintIR:
    """Control: what the host layer can learn by itself, zeroed; trains, and can add nothing.

    A linear layer or convolution of the host's own settings; behind a norm a factor and a term a
    feature; behind an embedding or an attention, which end in a matrix, a matrix. Behind a
    recurrent layer, which ends in no matrix, and a block, of which nothing is known, a matrix
    too, and there it says ``adds_capacity``.
    """
    return CONTROLS[site.kind].own_shape(site, "capacity-free")


def own_shape_zeroed(site: SiteSpec) -> BlueprintIR:
    """The same-treatment null of a twin: what :func:`capacity_free` is."""
    return CONTROLS[site.kind].own_shape(site, "own-shape")


def random_features(site: SiteSpec) -> BlueprintIR:
    """Control: random features with a random readout, every tensor frozen; enters at alpha 0."""
    width = widths_for(site)[0]
    trained = CONTROLS[site.kind].features(site, width)
    assert trained is not None, "these families fit every site of their kinds"
    nodes = tuple(_frozen(node) for node in trained.nodes)
    return replace(trained, id=f"random-features-{_size(site)}-w{width}", nodes=nodes)


def _frozen(node: BlueprintNode) -> BlueprintNode:
    if node.op_type == "activation":
        return node
    settings = {**node.attributes, "init": "default", "trainable": False}
    return BlueprintNode(node.id, node.op_type, settings)


def _own_linear(site: SiteSpec, name: str) -> BlueprintIR:
    layer = _linear(site.in_features, site.out_features, bias=site.bias)
    return _own_layer(site, name, layer)


def _own_convolution(site: SiteSpec, name: str) -> BlueprintIR:
    layer = _conv_like_host(
        site, site.in_features, site.out_features, groups=site.groups, bias=site.bias
    )
    return _own_layer(site, name, layer)


def _own_layer(site: SiteSpec, name: str, layer: Layer) -> BlueprintIR:
    chain = _chain(site, f"{name}-{_size(site)}", [("out", *_zeroed(layer))])
    return replace(chain, adds_capacity=False)


def _own_diagonal(site: SiteSpec, name: str) -> BlueprintIR:
    return _serial(site, f"{name}-{_size(site)}", [("out", *_zeroed(_diagonal(site)))])


def _own_matrix(site: SiteSpec, name: str, *, adds_capacity: bool = False) -> BlueprintIR:
    layer = _pointwise_layer(site, site.out_features, site.out_features)
    steps = [("out", *_zeroed(layer))]
    return _serial(site, f"{name}-{_size(site)}", steps, adds_capacity=adds_capacity)


@dataclass(frozen=True, slots=True, kw_only=True)
class Controls:
    """What a kernel at one kind of site is held against.

    Attributes:
        own_shape: Makes, for a site and the beginning of a name, what the host could be by itself.
        features: Makes the family whose hidden layer has the random features.
    """

    own_shape: Callable[[SiteSpec, str], BlueprintIR]
    features: Build


_OF_CONVOLUTIONS: Final = Controls(own_shape=_own_convolution, features=_conv_block)
_OF_NORMS: Final = Controls(own_shape=_own_diagonal, features=_mlp_behind)
_BEYOND_A_MATRIX: Final = Controls(
    own_shape=partial(_own_matrix, adds_capacity=True), features=_mlp_behind
)

CONTROLS: Final[Mapping[str, Controls]] = {
    "linear": Controls(own_shape=_own_linear, features=_mlp),
    "conv1d": _OF_CONVOLUTIONS,
    "conv2d": _OF_CONVOLUTIONS,
    "conv3d": _OF_CONVOLUTIONS,
    "conv_transpose2d": _OF_CONVOLUTIONS,
    "attention": Controls(own_shape=_own_matrix, features=_mlp),
    "recurrent": _BEYOND_A_MATRIX,
    "embedding": Controls(own_shape=_own_matrix, features=_mlp_behind),
    "norm": _OF_NORMS,
    "channel_norm": _OF_NORMS,
    "block": _BEYOND_A_MATRIX,
}
"""By the kind of a site, as the rows of ``LAYER_KINDS`` have it."""


def _zeroed(layer: Layer) -> Layer:
    return layer[0], {**layer[1], "init": "zeros"}


def _diagonal(site: SiteSpec) -> Layer:
    dim = -1 if _axes(site) is None else 1
    return "diagonal", {"num_features": site.out_features, "dim": dim, "bias": site.bias}


def _pointwise_layer(site: SiteSpec, features_in: int, features_out: int) -> Layer:
    """An affine layer on the features or channels of what the host gives, at each position."""
    if not _axes(site):
        return _linear(features_in, features_out)
    return _conv_1x1(site, features_in, features_out)


def _linear(in_features: int, out_features: int, *, bias: bool = True) -> Layer:
    sizes = {"in_features": in_features, "out_features": out_features}
    return "linear", {**sizes, "bias": bias}


def _act(name: str) -> Layer:
    return "activation", {"type": name}


def _conv_1x1(site: SiteSpec, channels_in: int, channels_out: int) -> Layer:
    sizes = {"in_channels": channels_in, "out_channels": channels_out, "kernel_size": 1}
    return f"conv{_axes(site)}d", sizes


def _axes(site: SiteSpec) -> int | None:
    """Return how many axes stand behind the channels; None where features are the last axis."""
    return len(site.kernel_size) or site.axes


def _conv_like_host(
    site: SiteSpec, channels_in: int, channels_out: int, *, groups: int = 1, bias: bool = True
) -> Layer:
    """A convolution with the host's window, so that its output has the host's spatial size."""
    settings: Settings = {
        "in_channels": channels_in,
        "out_channels": channels_out,
        "kernel_size": site.kernel_size,
        "stride": site.stride,
        "padding": site.padding,
        "dilation": site.dilation,
        "groups": groups,
        "bias": bias,
    }
    if _is_transposed(site):
        return site.kind, {**settings, "output_padding": site.output_padding}
    return site.kind, {**settings, "padding_mode": site.padding_mode}


def _readout(site: SiteSpec, width: int) -> Layer:
    """The zeroed last layer: from ``width`` to the host's outputs."""
    return _zeroed(_pointwise_layer(site, width, site.out_features))


def _size(site: SiteSpec) -> str:
    """Say a layer's size in a name: ``16x10``, ``4x4-k3``, ``4x8-k3-s2``."""
    parts = [f"{site.in_features}x{site.out_features}"]
    for letter, values in (("k", site.kernel_size), ("s", site.stride)):
        if set(values) - {1}:
            parts.append(letter + "x".join(map(str, dict.fromkeys(values))))
    return "-".join(parts)


def _chain(site: SiteSpec, name: str, steps: Iterable[Step]) -> BlueprintIR:
    nodes = [BlueprintNode(*step) for step in steps]
    return _blueprint(site, name, nodes, _edges_along(nodes))


def _edges_along(nodes: list[BlueprintNode]) -> list[BlueprintEdge]:
    ids = [INPUT, *(node.id for node in nodes), OUTPUT]
    return [BlueprintEdge(a, b) for a, b in pairwise(ids)]


def _blueprint(
    site: SiteSpec, name: str, nodes: list[BlueprintNode], edges: list[BlueprintEdge]
) -> BlueprintIR:
    return BlueprintIR(
        id=name,
        nodes=tuple(nodes),
        edges=tuple(edges),
        input_spec=_spec(site, site.in_features),
        output_spec=_spec(site, site.out_features, prefix="" if _keeps_size(site) else "O"),
    )


def _serial(
    site: SiteSpec,
    name: str,
    steps: Iterable[Step],
    *,
    draws_random: bool = False,
    adds_capacity: bool = False,
) -> BlueprintIR:
    nodes = [BlueprintNode(*step) for step in steps]
    return BlueprintIR(
        id=name,
        nodes=tuple(nodes),
        edges=tuple(_edges_along(nodes)),
        input_spec=_spec(site, site.out_features),
        output_spec=_spec(site, site.out_features),
        position="serial",
        draws_random=draws_random,
        adds_capacity=adds_capacity,
    )


def _spec(site: SiteSpec, features: int, *, prefix: str = "") -> TensorSpec:
    axes = _axes(site)
    if axes is None:
        return TensorSpec(("*", features), site.dtype)
    free = tuple(prefix + name for name in _FREE_SIZES[axes])
    return TensorSpec((features, *free), site.dtype)


def _is_transposed(site: SiteSpec) -> bool:
    return site.kind.startswith("conv_transpose")


def _keeps_size(site: SiteSpec) -> bool:
    """Whether the host's output has the spatial size of its input."""
    if _is_transposed(site):
        return False
    axes = zip(site.kernel_size, site.stride, site.padding, site.dilation, strict=True)
    return all(s == 1 and 2 * p == d * (k - 1) for k, s, p, d in axes)
