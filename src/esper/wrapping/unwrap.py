"""From a grown model to plain PyTorch."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Final, TypeVar, cast

from torch import fx, nn

from esper.contracts.lifecycle import SeedLifecycleState
from esper.execution.kernel import reference_tensor
from esper.execution.layer_record import record_of
from esper.wrapping.plain import PlainSeed, fused_paths, graft_graph, plain_kernel
from esper.wrapping.restore import make_bare, refuse_shadows
from esper.wrapping.wrap import layers

if TYPE_CHECKING:
    from esper.execution.kasmina_layer import KasminaLayer

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

    Args:
        model: A model; one that is not wrapped is returned as it is.

    Returns:
        The model; where the model itself is a site that does not fold, its graph module.

    Raises:
        ValueError: A kernel, or the signature of a site, cannot be written as a graph.
        SeedLifecycleError: A layer is in a shadow pass.
    """
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
    seeds = _plain_seeds(layer)
    if not seeds:
        return None
    signature = inspect.signature(layer.default_layer.forward)
    dtype = reference_tensor(layer).dtype
    return graft_graph(layer, seeds, signature=signature, dtype=dtype)


def _plain_seeds(layer: KasminaLayer) -> list[PlainSeed]:
    return [
        PlainSeed(
            name=f"seed_{seed.seed_idx}",
            kernel=plain_kernel(seed.slot.kernel),
            alpha=float(seed.slot.alpha),
            replaces=seed.replaces,
            is_serial=seed.is_serial,
        )
        for seed in record_of(layer).plan
        if not seed.is_shadow
    ]


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
