"""Write a kernel, or a host with its kernels, with the parts of torch alone.

The results share every parameter and buffer with what they were made from.
"""

from __future__ import annotations

import inspect
import itertools
import keyword
import operator
import re
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import torch
from torch import fx, nn
from torch.fx.graph_module import _method_from_src

from esper.compiler.graph import plan
from esper.compiler.lowering import LoweredKernel
from esper.state.layer_call import LayerCall, Takes
from esper.wrapping import stand_in

REFERENCES: Final = ("call_module", "get_attr")
"""Operations of a graph that name a child or a tensor of its module."""

SPREAD: Final = "spread"
"""Key in the ``meta`` of a graph of a site: the names that stand for ``*args`` and ``**kwargs``."""

_SEED: Final = re.compile(r"seed_\d+")

_STAND_IN: Final = inspect.getsource(stand_in)

FUSED_PATHS: Final[dict[type[nn.Module], tuple[str, object]]] = {
    nn.TransformerEncoderLayer: ("activation_relu_or_gelu", 0),
    nn.TransformerEncoder: ("use_nested_tensor", False),
}
"""Modules that read their children's weights in evaluation and bypass their forwards, with the
attribute and its value that turn this off, in copies and reloaded models too."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PlainSeed:
    """One contribution to a site's output.

    Attributes:
        name: Name of the submodule, for example ``"seed_0"``.
        kernel: A module without a class of Esper.
        alpha: Blending coefficient, in (0, 1].
        replaces: True for ``delta = k - h``, False for ``delta = k``.
        is_serial: True where the kernel reads the host's output, False where its input.
        takes: What a parallel kernel takes of the host's call; None for the first argument.
        gives_tuple: Whether the kernel gives a tuple, of which the first element counts.
    """

    name: str
    kernel: nn.Module
    alpha: float
    replaces: bool
    is_serial: bool
    takes: Takes | None = None
    gives_tuple: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class PlainHost:
    """How a host is called and what it gives.

    Attributes:
        module: The host.
        signature: That of its forward, without ``self``.
        dtype: Floating dtype of its output, which the alphas are rounded to, as torch does with
            the layer's float32 tensors.
        seen: A call of it, or None. What the signature leaves to ``*args`` and ``**kwargs`` is
            what was seen: a graph cannot pass on what it has no name for.
        gives_tuple: Whether it gives a tuple, of which the first element is grafted.
        first_field: Name of that element in a named tuple, else None.
        may_pack: Whether that element may be a packed sequence, which no kernel reads.
        writes: Names of the arguments that the host writes to; kernels read copies.
    """

    module: nn.Module
    signature: inspect.Signature
    dtype: torch.dtype
    seen: LayerCall | None = None
    gives_tuple: bool = False
    first_field: str | None = None
    may_pack: bool = False
    writes: frozenset[str] = frozenset()


def is_grafted(module: nn.Module) -> bool:
    """Say whether a module is what ``graft_graph`` makes, copied and reloaded ones included."""
    names = (name for name, _ in module.named_children())
    return isinstance(module, fx.GraphModule) and any(map(_SEED.fullmatch, names))


def fused_paths(model: nn.Module) -> Iterator[tuple[str, str, object]]:
    """Yield (name, attribute, value) for what has to be set so that no graft is bypassed."""
    for name, module in model.named_modules():
        for kind, (attribute, value) in FUSED_PATHS.items():
            is_its_own = isinstance(module, kind) and not is_grafted(module)
            if is_its_own and any(is_grafted(part) for part in module.modules()):
                yield name, attribute, value


def is_ours(module: nn.Module) -> bool:
    """Say whether a module, or anything inside it, is of a class of Esper."""
    return any(type(part).__module__.partition(".")[0] == "esper" for part in module.modules())


def trace(
    kernel: nn.Module, *, is_leaf: Callable[[nn.Module], bool], class_name: str
) -> fx.GraphModule:
    """Return a kernel as a graph over the modules that ``is_leaf`` accepts.

    Args:
        kernel: A module whose forward takes one tensor.
        is_leaf: Says which submodules stay as they are.
        class_name: Name for the class of the result.

    Returns:
        A graph module that shares the kernel's tensors and has its modes.

    Raises:
        TypeError, ValueError: The forward branches on its data and cannot be written as a graph
            (``torch.fx.proxy.TraceError`` is a ValueError).
    """
    traced = _Tracer(is_leaf).trace(kernel)
    names = _readable_names(kernel, traced)
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for node in traced.nodes:
        copies[node] = _copy_node(graph, node, copies, names)
    parts = {name: operator.attrgetter(target)(kernel) for target, name in names.items()}
    return _graph_module(parts, graph, class_name, training=kernel.training)


def plain_kernel(kernel: nn.Module) -> nn.Module:
    """Return a kernel without classes of Esper: itself where it has none, else as a graph."""
    if not is_ours(kernel):
        return kernel
    return trace(kernel, is_leaf=lambda part: not is_ours(part), class_name=class_name_of(kernel))


def graft_graph(host: PlainHost, seeds: Sequence[PlainSeed]) -> fx.GraphModule:
    """Write a site as a graph: ``y = w h + sum alpha_i k_i``, ``w = 1 - sum of replacing alphas``.

    The host is left out where nothing reads what it gives: ``w`` is 0, no kernel is serial, and
    there is nothing beside the output.

    Args:
        host: The host layer; its signature becomes the graph's.
        seeds: What contributes, in the order of the slots; at least one.

    Returns:
        A graph module with the children ``host`` and one for each seed.

    Raises:
        ValueError: The signature takes ``*args`` and nothing else, and no call was seen.
    """
    graph = fx.Graph()
    given = _Given.of(graph, host)
    read = given.before_writes(graph, host.writes)
    weight = _rounded(_host_weight(seeds), host.dtype)
    parts: dict[str, nn.Module] = {}
    called: _Called | None = None
    if weight != 0.0 or host.gives_tuple or any(seed.is_serial for seed in seeds):
        parts["host"] = host.module
        called = _Called.of(graph, host, given)
    h = None if called is None else called.h
    y = _scaled(graph, h, weight) if h is not None and weight != 0.0 else None
    for seed in seeds:
        parts[seed.name] = seed.kernel
        k = _kernel_node(graph, read, seed, h)
        term = _scaled(graph, k, _rounded(seed.alpha, host.dtype))
        y = term if y is None else graph.call_function(operator.add, (y, term))
    graph.output(y if called is None else called.output(graph, host, y))
    made = _graph_module(parts, graph, "Grafted", training=host.module.training)
    made.meta[SPREAD] = given.spread
    return made


def standing_in(site: fx.GraphModule, host: nn.Module) -> fx.GraphModule:
    """Return a site's graph so that it answers as its host, whose attributes its owner may read.

    Args:
        site: What ``graft_graph`` returned.
        host: The host, of its own class. It is there to be asked even where nothing calls it.

    Returns:
        A graph module of a class of its own, made of torch alone; see ``stand_in``.
    """
    given = {"__name__": "grafts", "SOURCE": _STAND_IN}
    made: fx.GraphModule = _method_from_src("GRAFTED", _STAND_IN, given)(site, host)
    return made


@dataclass(frozen=True, slots=True, kw_only=True)
class _Called:
    """The host's part of a graph.

    Attributes:
        out: What the host gives.
        h: What of that the kernels read.
        packed: Whether what it gives is a packed sequence, and that; None where it never is.
    """

    out: fx.Node
    h: fx.Node
    packed: tuple[fx.Node, fx.Node] | None = None

    @classmethod
    def of(cls, graph: fx.Graph, host: PlainHost, given: _Given) -> _Called:
        """Call the host."""
        name = "out" if host.gives_tuple else "h"
        out = graph.create_node("call_module", "host", given.args, dict(given.kwargs), name=name)
        if not host.gives_tuple:
            return cls(out=out, h=out)
        h = graph.create_node("call_function", operator.getitem, (out, 0), name="h")
        if not host.may_pack:
            return cls(out=out, h=h)
        is_packed = graph.create_node(
            "call_function", hasattr, (h, "batch_sizes"), name="is_packed"
        )
        is_packed.meta["is_wrapped"] = True  # so that reading the graph back does not evaluate it
        steps = _unpacked(graph, out, h, is_packed)
        return cls(out=out, h=steps, packed=(is_packed, h))

    def output(self, graph: fx.Graph, host: PlainHost, y: fx.Node | None) -> fx.node.Argument:
        """Return what the graph gives: ``y``, or the host's tuple with ``y`` as its first."""
        if not host.gives_tuple:
            return y
        if self.packed is not None:
            is_packed, h = self.packed
            y = _either(graph, self.out, (y, h), is_packed, name="y")
        return _with_first(graph, host, self.out, y)


def _unpacked(graph: fx.Graph, out: fx.Node, h: fx.Node, is_packed: fx.Node) -> fx.Node:
    """Return what the kernels read: of a packed sequence one step, as a batch of one sequence.

    A graph has no branches. What they make of that step is not used; a packed sequence is passed
    on as the host gave it.
    """
    whole, first_step = slice(None), (slice(None, 1), None)
    which = _either(graph, out, (whole, 0), is_packed, name="which")  # the data come first
    data = graph.create_node("call_function", operator.getitem, (h, which), name="data")
    where = _either(graph, out, (whole, first_step), is_packed, name="where")
    return graph.create_node("call_function", operator.getitem, (data, where), name="steps")


def _either(
    graph: fx.Graph,
    out: fx.Node,
    choice: tuple[fx.node.Argument, fx.node.Argument],
    is_second: fx.Node,
    *,
    name: str,
) -> fx.Node:
    """Return the first or the second of two, by a node that is false or true.

    The pair is made of nothing and of a tuple that a graph knows: a bare one would be indexed, in
    vain, when the graph is read back.
    """
    nothing = graph.call_function(operator.getitem, (out, slice(None, 0)))
    pair = graph.call_function(operator.add, (nothing, choice))
    return graph.create_node("call_function", operator.getitem, (pair, is_second), name=name)


def _kernel_node(graph: fx.Graph, given: _Given, seed: PlainSeed, h: fx.Node | None) -> fx.Node:
    """Call a kernel on what it reads; return the node of its output, the first of several."""
    args, kwargs = ((h,), {}) if seed.is_serial else given.for_kernel(seed.takes)
    name = seed.name.replace("seed", "k")
    out = f"{name}_out" if seed.gives_tuple else name
    k = graph.create_node("call_module", seed.name, args, kwargs, name=out)
    if seed.gives_tuple:
        k = graph.create_node("call_function", operator.getitem, (k, 0), name=name)
    return k


def _with_first(graph: fx.Graph, host: PlainHost, out: fx.Node, y: fx.Node | None) -> fx.Node:
    """Return a tuple with another first element."""
    if host.first_field is not None:
        return graph.call_method("_replace", (out,), {host.first_field: y})
    rest = graph.call_function(operator.getitem, (out, slice(1, None)))
    return graph.call_function(operator.add, ((y,), rest))


def class_name_of(module: nn.Module) -> str:
    """Return a name for a kernel's class: its blueprint's id in camel case, if it has one."""
    if isinstance(module, fx.GraphModule):
        return str(module.meta.get("class_name", "Kernel"))
    if not isinstance(module, LoweredKernel):
        return type(module).__name__
    words = re.findall(r"[A-Za-z0-9]+", module.blueprint.id)
    name = "".join(word[:1].upper() + word[1:] for word in words)
    return name if name.isidentifier() else f"Kernel{name}"


def _graph_module(
    parts: dict[str, nn.Module], graph: fx.Graph, class_name: str, *, training: bool
) -> fx.GraphModule:
    made = fx.GraphModule(parts, graph, class_name=class_name)
    made.meta["class_name"] = class_name  # a deepcopy forgets the name of the class
    made.training = training
    return made


class _Tracer(fx.Tracer):
    def __init__(self, is_leaf: Callable[[nn.Module], bool]) -> None:
        super().__init__()
        self._is_leaf = is_leaf

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        del module_qualified_name
        return self._is_leaf(m)


def _host_weight(seeds: Sequence[PlainSeed]) -> float:
    """Return ``w``, rounded to float32 at each step, as the layer's forward does."""
    replaced = torch.zeros(())
    for seed in seeds:
        if seed.replaces:
            replaced = replaced + torch.tensor(seed.alpha)
    return float(1.0 - replaced)


def _rounded(factor: float, dtype: torch.dtype) -> float:
    return float(torch.tensor(factor).to(dtype))


def _scaled(graph: fx.Graph, node: fx.Node, factor: float) -> fx.Node:
    return node if factor == 1.0 else graph.call_function(operator.mul, (factor, node))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Given:
    """What a graph is called with.

    Attributes:
        args: What is passed on by position.
        kwargs: What is passed on by name.
        names: Names of ``args`` in the host's signature.
        num_positional: So many of ``args`` a caller gives by position.
        input_name: Which of them kernels of one input read; None for the first.
        spread: For ``"*args"`` and ``"**kwargs"``, as the host spells them, the names that the
            graph has in their place.
    """

    args: tuple[fx.Node, ...]
    kwargs: dict[str, fx.Node]
    names: tuple[str, ...]
    num_positional: int
    input_name: str | None
    spread: dict[str, list[str]]

    @classmethod
    def of(cls, graph: fx.Graph, host: PlainHost) -> _Given:
        """Give a graph the parameters of the host's forward."""
        args: dict[str, fx.Node] = {}
        kwargs: dict[str, fx.Node] = {}
        spread: dict[str, list[str]] = {}
        has_default = False
        for parameter in host.signature.parameters.values():
            names = _names_for(parameter, host)
            has_default = has_default or parameter.default is not parameter.empty
            for name in names:
                default = None if parameter.default is parameter.empty else parameter.default
                options = {"default_value": default} if has_default or _is_named(parameter) else {}
                required = parameter.kind is parameter.KEYWORD_ONLY and not has_default
                node = graph.placeholder(name, **({} if required else options))
                (kwargs if _is_named(parameter) else args)[name] = node
            if parameter.kind in _VARIADIC:
                spread[str(parameter.replace(annotation=parameter.empty))] = names
        if not args and not kwargs:
            msg = (
                f"a {type(host.module).__name__} takes {host.signature}, which a torch.fx graph "
                f"cannot pass on, and no call of it was seen: name its arguments"
            )
            raise ValueError(msg)
        return cls(
            args=tuple(args.values()),
            kwargs=kwargs,
            names=tuple(args),
            num_positional=_num_positional(host),
            input_name=_input_name(host),
            spread=spread,
        )

    def before_writes(self, graph: fx.Graph, names: Collection[str]) -> _Given:
        """Return this with copies of some arguments, made where the graph is now."""

        def copied(name: str, node: fx.Node) -> fx.Node:
            if name not in names:
                return node
            return graph.create_node("call_method", "clone", (node,), name=f"{name}_given")

        return replace(
            self,
            args=tuple(map(copied, self.names, self.args)),
            kwargs={name: copied(name, node) for name, node in self.kwargs.items()},
        )

    def for_kernel(self, takes: Takes | None) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return the arguments of a parallel kernel."""
        if takes is None:
            nodes = dict(zip(self.names, self.args, strict=True)) | self.kwargs
            return (nodes.get(self.input_name or "", next(iter(nodes.values()))),), {}
        behind = slice(self.num_positional, None)
        by_name = dict(zip(self.names[behind], self.args[behind], strict=True)) | self.kwargs
        taken = takes.of(LayerCall(self.args[: self.num_positional], by_name))
        return taken.args, dict(taken.kwargs)


_VARIADIC: Final = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


def _is_named(parameter: inspect.Parameter) -> bool:
    return parameter.kind in (parameter.KEYWORD_ONLY, parameter.VAR_KEYWORD)


def _names_for(parameter: inspect.Parameter, host: PlainHost) -> list[str]:
    """Return the names that a graph has for a parameter: one, or those that were seen."""
    if parameter.kind not in _VARIADIC:
        return [parameter.name]
    seen = LayerCall((), {}) if host.seen is None else host.seen
    own = list(host.signature.parameters.values())
    if parameter.kind is parameter.VAR_POSITIONAL:
        num_named = sum(p.kind in _BY_POSITION for p in own)
        return [f"{parameter.name}_{i}" for i in range(len(seen.args) - num_named)]
    return [name for name in seen.kwargs if name not in host.signature.parameters]


_BY_POSITION: Final = (
    inspect.Parameter.POSITIONAL_ONLY,
    inspect.Parameter.POSITIONAL_OR_KEYWORD,
)


def _input_name(host: PlainHost) -> str | None:
    """Return which argument was seen to be the first that is not None; None where that is open."""
    if host.seen is None:
        return None
    bound = host.signature.bind_partial(*host.seen.args, **host.seen.kwargs).arguments
    return next((name for name, value in bound.items() if value is not None), None)


def _num_positional(host: PlainHost) -> int:
    """Return how many arguments come by position: as was seen, else those without a default."""
    if host.seen is not None:
        return len(host.seen.args)
    parameters = host.signature.parameters.values()
    return sum(p.kind in _BY_POSITION and p.default is p.empty for p in parameters)


def _copy_node(
    graph: fx.Graph, node: fx.Node, copies: dict[fx.Node, fx.Node], names: dict[str, str]
) -> fx.Node:
    if node.op not in REFERENCES:
        copy = graph.node_copy(node, copies.__getitem__)
        copy.type = None  # an annotation kept as text cannot be pickled
        return copy
    args = fx.map_arg(node.args, copies.__getitem__)
    kwargs = fx.map_arg(node.kwargs, copies.__getitem__)
    name = names[str(node.target)]
    return graph.create_node(node.op, name, args, kwargs, name=name)


def _readable_names(kernel: nn.Module, traced: fx.Graph) -> dict[str, str]:
    """Return a flat name for each module or tensor that a graph refers to.

    The steps of a kernel from a blueprint are named for its nodes.
    """
    ids: list[str] = []
    if isinstance(kernel, LoweredKernel):
        ids = [step.id for step in plan(kernel.blueprint).steps]
    names: dict[str, str] = {}
    for target in dict.fromkeys(str(n.target) for n in traced.nodes if n.op in REFERENCES):
        parts = target.split(".")
        if ids and parts[0] == "steps":
            parts = [ids[int(parts[1])], *parts[2:]]
        names[target] = _free_name("_".join(parts), names.values())
    return names


def _free_name(wish: str, taken: Collection[str]) -> str:
    """Return an attribute name like ``wish`` that no module and nobody in ``taken`` has."""
    stem = re.sub(r"\W", "_", wish)
    stem = stem if stem.isidentifier() and not keyword.iskeyword(stem) else f"part_{stem}"
    candidates = itertools.chain([stem], (f"{stem}_{n}" for n in itertools.count(2)))
    bare = nn.Module()
    return next(name for name in candidates if name not in taken and not hasattr(bare, name))
