"""From a grown model to plain PyTorch."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any, Final, TypeVar, cast

import torch
from torch import fx, nn

from esper.compiler.lowering import LoweredKernel
from esper.contracts.layer_kind import kind_of
from esper.contracts.lifecycle import SeedLifecycleState
from esper.forward.host_output import blendable
from esper.forward.host_view import host_view
from esper.seeds.shadow import shadow_pass
from esper.state.host_parts import check_module
from esper.state.kernel import reference_tensor
from esper.state.layer_call import LayerCall
from esper.state.layer_record import record_of
from esper.wrapping.plain import PlainHost, PlainSeed, fused_paths, graft_graph, plain_kernel
from esper.wrapping.restore import make_bare, refuse_shadows
from esper.wrapping.wrap import layers

if TYPE_CHECKING:
    from esper.execution.kasmina_layer import KasminaLayer
    from esper.state.seed_slot import Seed

Model = TypeVar("Model", bound=nn.Module)

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


def unwrap(model: Model) -> Model:
    """Return what was learned as plain PyTorch, in place. Succeeds or changes nothing.

    A layer without a contributing seed gets its own class back. So does one whose kernels all
    fold into its weights exactly. Any other is exchanged for a ``torch.fx.GraphModule`` over plain
    ``torch.nn`` parts: ``host``, and one ``seed_<i>`` for each kernel; ``host`` is left out where a
    replacing kernel at alpha 1 has made it idle. The graph shares the parameters, has the host's
    mode, and takes over the hooks of its calls (which torch itself drops from a ``GraphModule``
    that is copied or pickled). The result can be pickled, and loaded where Esper is not installed.

    The graph is called as its host is. A graph can pass on only what it has a name for: where the
    host takes ``*args`` or ``**kwargs``, it takes what a call was seen to have there, None where
    it is left out, and refuses any other with a TypeError. (``export`` writes such a site as
    code, which passes everything on.) A plain attention needs its key and value. A plain recurrent
    layer passes a packed sequence on as the host gives it, as the layer does.

    Args:
        model: A model; one that is not wrapped is returned as it is.

    Returns:
        The model; where the model itself is a site that does not fold, its graph module.

    Raises:
        TypeError: ``model`` is no module.
        ValueError: A kernel cannot be written as a graph, or a site that takes nothing but
            ``*args`` was never seen to be called.
        SeedLifecycleError: A layer is in a shadow pass.
    """
    check_module("unwrap", model)
    sites = layers(model)
    refuse_shadows(sites)
    for layer in sites.values():
        _as_graph(layer)  # whatever cannot be written raises here, before anything is changed
    modules = dict(model.named_modules(remove_duplicate=False))
    plain: nn.Module = model
    for layer in sites.values():
        _fold(layer)
        graph = _as_graph(layer)
        make_bare(layer)
        if graph is not None:
            _move_call_hooks(layer, graph)
            _hang_instead(modules, layer, graph)
            plain = graph if layer is model else plain
    for name, attribute, value in fused_paths(plain):
        setattr(plain.get_submodule(name), attribute, value)
    return cast("Model", plain)


def _fold(layer: KasminaLayer) -> None:
    """Fold what folds exactly; the rest stays in the plan as fossils."""
    for seed in record_of(layer).plan:
        if layer.state_layout.state(seed.seed_idx) == SeedLifecycleState.ACTIVE:
            layer.fossilize(seed.seed_idx)


def _as_graph(layer: KasminaLayer) -> fx.GraphModule | None:
    """Return a layer with its contributing seeds as a graph, or None where there is no such."""
    seeds = [seed for seed in record_of(layer).plan if not seed.is_shadow]
    if not seeds:
        return None
    examples = (seed.example for seed in record_of(layer).seeds.values())
    seen = next((example for example in examples if example is not None), None)
    output = None if seen is None else _given(layer, host_view(layer), seen)
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
    )


def _plain_seed(layer: KasminaLayer, seed: Seed, seen: LayerCall | None, output: Any) -> PlainSeed:
    kernel = seed.slot.kernel
    gives_tuple = kind_of(kernel).gives_tuple
    if output is not None and not isinstance(kernel, LoweredKernel):
        assert seen is not None, "the output is that of a call"
        reads = LayerCall.of(blendable(output)) if seed.is_serial else LayerCall.of(seen.x)
        reads = reads if seed.takes is None else seed.takes.of(seen)
        gives_tuple = isinstance(_given(layer, kernel, reads), tuple)
    return PlainSeed(
        name=f"seed_{seed.seed_idx}",
        kernel=plain_kernel(kernel),
        alpha=float(seed.slot.alpha),
        replaces=seed.replaces,
        is_serial=seed.is_serial,
        takes=seed.takes,
        gives_tuple=gives_tuple,
    )


def _given(layer: KasminaLayer, module: nn.Module, call: LayerCall) -> Any:
    """Return what a part of a layer gives for a call, or None where the call does not work."""
    call = call.detached().to(reference_tensor(layer).device)
    try:
        with shadow_pass(layer), torch.no_grad():
            return type(module).forward(module, *call.args, **call.kwargs)
    except Exception:  # noqa: BLE001 - anybody's own, on a call of another dtype or device
        return None


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
