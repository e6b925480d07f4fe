"""From a grown model to plain PyTorch."""

from __future__ import annotations

import functools
import inspect
import logging
from typing import TYPE_CHECKING, Any, Final, TypeVar, cast

import torch
from torch import fx, nn

from esper.compiler.lowering import LoweredKernel
from esper.contracts.arguments import check_type
from esper.contracts.layer_kind import kind_of
from esper.contracts.lifecycle import SeedLifecycleState
from esper.forward.host_output import blendable
from esper.forward.host_view import declared, host_forward
from esper.forward.input_watch import InputWatch
from esper.resilience.attempt import Done, attempt
from esper.seeds.merging import merge_kernels
from esper.seeds.out_of_use import bypassed, losses, misfits
from esper.seeds.shadow import shadow_pass
from esper.seeds.shallow import depth_state
from esper.seeds.slots import withdraw
from esper.state.host_parts import check_module
from esper.state.kernel import reference_tensor
from esper.state.layer_call import LayerCall
from esper.state.layer_record import record_of
from esper.state.roster import tell_of_unwrapping
from esper.wrapping.plain import (
    PlainHost,
    PlainSeed,
    fused_paths,
    graft_graph,
    plain_kernel,
    standing_in,
)
from esper.wrapping.restore import make_bare, refuse_shadows
from esper.wrapping.wrap import layers

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping

    from esper.execution.kasmina_layer import KasminaLayer
    from esper.seeds.structure import SeedStructure
    from esper.state.seed_slot import Seed

Model = TypeVar("Model", bound=nn.Module)

_logger = logging.getLogger(__name__)

CALL_HOOKS: Final = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_is_full_backward_hook",
)
"""What belongs to a call of a module, and so to whatever stands in its place."""


def unwrap(model: Model, *, fuse: bool = False) -> Model:
    """Return what was learned as plain PyTorch, in place. Succeeds or changes nothing.

    A layer without a contributing seed gets its own class back. So does one whose kernels all
    fold into its weights exactly. Any other is exchanged for a ``torch.fx.GraphModule`` over plain
    ``torch.nn`` parts: ``host``, and one ``seed_<i>`` for each kernel. The graph shares the
    parameters, has the host's mode, and takes over the hooks of its calls (which torch itself drops
    from a ``GraphModule`` that is copied or pickled). The result can be pickled, and loaded where
    Esper is not installed.

    The graph answers as its host: it is an instance of the host's class (but for batch norms, whose
    instances ``convert_sync_batchnorm`` would replace), and attributes that it does not have are
    read off ``host`` and set there. So ``host`` stays, to be asked, where a replacing kernel at
    alpha 1 has made it idle; nothing calls it then.

    The graph is called as its host is. A graph can pass on only what it has a name for: where the
    host takes ``*args`` or ``**kwargs``, it takes what a call was seen to have there, None where
    it is left out, and refuses any other with a TypeError. (``export`` writes such a site as
    code, which passes everything on.) A plain attention needs its key and value. A plain recurrent
    layer passes a packed sequence on as the host gives it, as the layer does.

    A kernel that does not fit its host any more, since somebody has given that another size, is
    left out; what others have put out of use is named, and so are blocks that sleep, which stay as
    they are. All of it is logged.

    Args:
        model: A model; one that is not wrapped is returned as it is.
        fuse: Whether several kernels of a layer become one module where that gives the same within
            1e-6: those of two linear layers with one activation, side by side, at alphas that are
            written into their weights. It is called ``seed_<i>`` by the first of them. Its
            parameters are others than the kernels', which an optimizer does not know.

    Returns:
        The model; where the model itself is a site that does not fold, its graph module.

    Raises:
        TypeError: ``model`` is no module, or ``fuse`` neither True nor False.
        ValueError: A kernel cannot be written as a graph, a site that takes nothing but ``*args``
            was never seen to be called, or a site no longer takes the call that was seen.
        SeedLifecycleError: A layer is in a shadow pass.
    """
    check_module("unwrap", model)
    check_type("fuse", fuse, bool, "True or False")
    sites = layers(model)
    refuse_shadows(sites)
    _tell_losses(model)
    unfit = {name: misfits(layer) for name, layer in sites.items()}
    for name, layer in sites.items():
        layer.take_written_alphas()
        _as_graph(
            layer, unfit[name]
        )  # whatever cannot be written raises here, before anything is changed
    modules = dict(model.named_modules(remove_duplicate=False))
    plain: nn.Module = model
    graphs: dict[str, tuple[list[SeedStructure], dict[int, nn.Module]]] = {}
    for name, layer in sites.items():
        _leave_out(layer, unfit[name])
        _fold(layer)
        if fuse:
            _merge(layer)
        site = _as_graph(layer)
        if site is not None:
            kernels = {i: seed.slot.kernel for i, seed in record_of(layer).seeds.items()}
            graphs[name] = layer.structure(), kernels
        make_bare(layer)
        if site is not None:
            graph = standing_in(site, layer)
            _move_call_hooks(layer, graph)
            _hang_instead(modules, layer, graph)
            plain = graph if layer is model else plain
    for name, attribute, value in fused_paths(plain):
        setattr(plain.get_submodule(name), attribute, value)
    tell_of_unwrapping(plain, graphs)
    return cast("Model", plain)


def _tell_losses(model: nn.Module) -> None:
    """Log which kernels somebody has put out of use, or bypasses: the result is without the first.

    A graph runs the others, whatever forward its layer had been given.
    """
    sleepers = list(depth_state(model))
    if sleepers:
        _logger.warning(
            "%s: not awake, so that the model is no plain PyTorch there; they stay as they are: "
            "wake them by esper.deepen, or take them out of their stack",
            ", ".join(sleepers),
        )
    for loss in losses(model):
        _logger.warning("seed %d of layer %r: %s", loss.seed_idx, loss.layer, loss.reason)
    for layer in layers(model).values():
        bypassed(layer, again=False)


def _leave_out(layer: KasminaLayer, unfit: Mapping[int, str]) -> None:
    for seed_idx, reason in unfit.items():
        _logger.warning(
            "seed %d of layer %r is left out, as its kernel does not fit its host any more: %s",
            seed_idx,
            layer.name,
            reason,
        )
        withdraw(layer, seed_idx)


def _fold(layer: KasminaLayer) -> None:
    """Fold what folds exactly; the rest stays in the plan as fossils."""
    for seed in record_of(layer).plan:
        if layer.state_layout.state(seed.seed_idx) == SeedLifecycleState.ACTIVE:
            layer.fossilize(seed.seed_idx)


def _merge(layer: KasminaLayer) -> None:
    merged = merge_kernels(layer)
    if merged:
        _logger.info(
            "layer %r: the kernels of seeds %s are part of another's now",
            layer.name,
            ", ".join(map(str, merged)),
        )


def _as_graph(layer: KasminaLayer, unfit: Collection[int] = ()) -> fx.GraphModule | None:
    """Return a layer with its contributing seeds as a graph, or None where there is no such."""
    plan = record_of(layer).plan
    seeds = [seed for seed in plan if not seed.is_shadow and seed.seed_idx not in unfit]
    if not seeds:
        return None
    examples = (seed.example for seed in record_of(layer).seeds.values())
    found = next((example for example in examples if example is not None), None)
    seen = None if found is None else declared(layer, found)
    output = None
    if seen is not None:
        output = _given(layer, "its host", functools.partial(host_forward, layer), seen)
    host = _plain_host(layer, seen, output)
    return graft_graph(host, [_plain_seed(layer, seed, seen, output) for seed in seeds])


def _plain_host(layer: KasminaLayer, seen: LayerCall | None, output: Any) -> PlainHost:
    """Describe how a layer's host is called and what it gives, by a call that a probe has seen."""
    signature = inspect.signature(layer.default_layer.forward)
    kind = kind_of(layer)
    is_declared = str(signature.return_annotation).lower().startswith("tuple")
    is_known = kind.gives_tuple or is_declared
    return PlainHost(
        module=layer,
        signature=signature,
        dtype=reference_tensor(layer).dtype,
        seen=seen,
        gives_tuple=is_known if output is None else isinstance(output, tuple),
        first_field=next(iter(getattr(output, "_fields", ())), None),
        may_pack=kind.may_pack,
        writes=_written(layer, signature, seen),
    )


def _written(
    layer: KasminaLayer, signature: inspect.Signature, seen: LayerCall | None
) -> frozenset[str]:
    """Return the names of the arguments that a host writes to, of a call that a probe has seen."""
    if seen is None or True not in record_of(layer).writes_input:
        return frozenset()
    call = seen.detached().to(reference_tensor(layer).device)
    watch = InputWatch(call)
    with shadow_pass(layer), torch.no_grad():
        attempt(
            lambda: host_forward(layer, *call.args, **call.kwargs)
        )  # in a mode that it may hate
    changed = {id(tensor) for tensor in watch.changed()}
    bound = signature.bind_partial(*call.args, **call.kwargs).arguments
    return frozenset(name for name, value in bound.items() if id(value) in changed)


def _plain_seed(layer: KasminaLayer, seed: Seed, seen: LayerCall | None, output: Any) -> PlainSeed:
    kernel = seed.slot.kernel
    gives_tuple = kind_of(kernel).gives_tuple
    if output is not None and not isinstance(kernel, LoweredKernel):
        assert seen is not None, "the output is that of a call"
        reads = LayerCall.of(blendable(output)) if seed.is_serial else LayerCall.of(seen.x)
        reads = reads if seed.takes is None else seed.takes.of(seen)
        forward = functools.partial(type(kernel).forward, kernel)
        gives_tuple = isinstance(_given(layer, type(kernel).__name__, forward, reads), tuple)
    return PlainSeed(
        name=f"seed_{seed.seed_idx}",
        kernel=plain_kernel(kernel),
        alpha=float(seed.slot.alpha),
        replaces=seed.replaces,
        is_serial=seed.is_serial,
        takes=seed.takes,
        gives_tuple=gives_tuple,
    )


def _given(
    layer: KasminaLayer, part: str, forward: Callable[..., object], call: LayerCall
) -> object:
    """Return what a part of a layer gives for a call that was seen, in the host's present dtype.

    Raises:
        ValueError: The part does not take the call, in the dtype that was seen neither.
    """
    reference = reference_tensor(layer)
    seen = call.detached().to(reference.device)
    found = attempt(functools.partial(_run, layer, forward, seen.with_dtype(reference.dtype)))
    if isinstance(found, Done):
        return found.value
    again = attempt(functools.partial(_run, layer, forward, seen))
    if isinstance(again, Done):  # a host of several dtypes takes no call of a single one
        return again.value
    msg = (
        f"layer {layer.name!r} is no graph, and nothing has changed: {part} does not take the call "
        f"that was seen when its kernel was grafted ({found}); unwrap while the model takes such "
        "calls (before it is moved or its forward is changed), or graft with an example= that it "
        "takes"
    )
    raise ValueError(msg) from found.error


def _run(layer: KasminaLayer, forward: Callable[..., object], call: LayerCall) -> object:
    with shadow_pass(layer), torch.no_grad():
        return forward(*call.args, **call.kwargs)


def _hang_instead(modules: dict[str, nn.Module], old: nn.Module, made: nn.Module) -> None:
    """Put a module in another's place under each of its names.

    Args:
        modules: The model's modules by all of their names, from before anything was exchanged.
        old: The module that goes; one that is inside an exchanged one has its parent still.
        made: The module that comes.
    """
    for name in [name for name, module in modules.items() if name and module is old]:
        parent, _, child = name.rpartition(".")
        setattr(modules[parent], child, made)


def _move_call_hooks(host: nn.Module, graph: nn.Module) -> None:
    """Give a host's call hooks to its graph; handles that were given out go on working.

    Pre-hooks of ``torch.nn.utils`` (pruning, the old weight_norm) make the host's own parameters
    and stay.
    """
    for name in CALL_HOOKS:
        mine, theirs = host.__dict__[name], graph.__dict__[name]
        host.__dict__[name], graph.__dict__[name] = theirs, mine
    hooks = graph.__dict__["_forward_pre_hooks"]
    for key in [k for k, h in hooks.items() if type(h).__module__.startswith("torch.nn.utils.")]:
        host.__dict__["_forward_pre_hooks"][key] = hooks.pop(key)
