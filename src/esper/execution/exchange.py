"""What becomes of kernels when somebody puts another module where their layer stood."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import nn
from torch.nn.modules.module import (
    register_module_module_registration_hook,
    register_module_parameter_registration_hook,
)

from esper.contracts.errors import KernelRefusedError
from esper.contracts.layer_kind import kind_of
from esper.execution.host_class import adopt, refusal
from esper.forward.class_change import choose_forward, return_class
from esper.forward.generated_class import host_class_of
from esper.seeds.grafting import cancel
from esper.seeds.isolation import isolate_if_moved
from esper.seeds.out_of_use import remember_loss
from esper.seeds.probe import probe
from esper.state.host_parts import SEEDS
from esper.state.kernel import reference_tensor
from esper.state.layer_record import RECORD, record_of
from esper.state.roster import layers_with_kernels, remember_move
from esper.state.seed_slot import SeedContainer

if TYPE_CHECKING:
    from esper.state.seed_slot import Seed

_CURE: Final = (
    "to keep what was learned, do this before it is grafted or after esper.unwrap; to give it up, "
    "unload the kernel first"
)

_logger = logging.getLogger(__name__)


def watch_exchanges() -> None:
    """See from now on which modules are put where in this process."""
    register_module_module_registration_hook(_look)
    register_module_parameter_registration_hook(_look_at_parameter)


def _look(parent: nn.Module, name: str, module: nn.Module | None) -> None:
    """Look at a module that is about to be registered below another.

    Code that is being compiled only builds containers for the moment, as a slice of a
    ``ModuleList`` does; dynamo would trace the look, and finds no way through its lock.
    """
    if torch.compiler.is_compiling():
        return
    grown = layers_with_kernels()
    if not grown:
        return
    if isinstance(module, SeedContainer) and RECORD not in parent.__dict__:
        for layer in grown:
            if layer._modules.get(SEEDS) is module:  # noqa: SLF001 - what stands in its table
                _move_seeds(layer, parent)
        return
    before = parent._modules.get(name)  # noqa: SLF001 - what stands in its table
    if before is not None and before is not module and not isinstance(parent, SeedContainer):
        _exchange(parent, before, module, grown)


def _look_at_parameter(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
    """Look at a parameter that is about to be registered: in evaluation, a layer's exchanged one.

    ``fuse_conv_bn_eval`` writes a norm into a copy of the convolution before it, whose kernels
    would go on without the norm. In training, and where a ``state_dict`` is loaded, parameters
    are exchanged for others that the kernels are meant for.
    """
    if torch.compiler.is_compiling():
        return
    record = module.__dict__.get(RECORD)
    before = module._parameters.get(name)  # noqa: SLF001 - what stands in its table
    if record is None or module.training or not record.plan or record.is_loading:
        return
    if before is None or before is parameter:
        return
    for seed in record.plan:
        reason = (
            "a parameter of its layer was exchanged for another and the kernel was not; where a "
            "norm was fused into the layer the kernel goes without it: fuse after esper.unwrap"
        )
        remember_loss(module, module, seed.seed_idx, reason)


def _exchange(
    parent: nn.Module, before: nn.Module, module: nn.Module | None, grown: list[nn.Module]
) -> None:
    if module in set(before.modules()):
        _end_adapters(before, module)
    staying = set() if module is None else set(module.modules())
    going = set(before.modules()) - staying
    for layer in (layer for layer in grown if layer in going):
        if layer is before and module is not None and _takes_over(layer, module):
            _move_seeds(layer, module)
            layer._modules.pop(SEEDS, None)  # noqa: SLF001 - a child without an attribute
        elif not (layer is before and _carries_as_many(layer, module)):
            for seed_idx in sorted({*record_of(layer).seeds, *record_of(layer).waiting}):
                what = "nothing" if module is None else f"a {type(module).__name__}"
                remember_loss(parent, layer, seed_idx, f"{what} was put in its place; {_CURE}")
    if before in staying and RECORD in before.__dict__ and not hasattr(module, SEEDS):
        module.__dict__[SEEDS] = before._modules.get(SEEDS)  # noqa: SLF001 - names from before


def _end_adapters(wrapper: nn.Module, layer: nn.Module) -> None:
    """Take PEFT's adapters out of a layer's kernels, as they are taken off the layer itself.

    PEFT looks for them under the name that the layer had in its wrapper, which is gone by then.
    """
    if not hasattr(wrapper, "get_base_layer") or layer._modules.get(SEEDS) is None:  # noqa: SLF001 - as above
        return
    for part in list(layer.get_submodule(SEEDS).modules()):
        children: list[tuple[str, Any]] = list(part.named_children())
        for name, adapter in children:
            if hasattr(adapter, "get_base_layer"):
                if getattr(wrapper, "merged", False):
                    adapter.merge()
                part.add_module(name, adapter.get_base_layer())


def _carries_as_many(layer: nn.Module, module: nn.Module | None) -> bool:
    """Say whether a module is a layer with kernels in the same seeds, as a copy of one is."""
    record = None if module is None else module.__dict__.get(RECORD)
    return record is not None and record_of(layer).seeds.keys() <= record.seeds.keys()


def _takes_over(layer: nn.Module, module: nn.Module) -> bool:
    """Say whether a module is the same kind of layer as one with kernels, and has none itself."""
    record = record_of(layer)
    is_like = kind_of(module).site == kind_of(layer).site and kind_of(module).name != "block"
    return is_like and bool(record.seeds) and not record.shadows and refusal(module) is None


def _move_seeds(layer: nn.Module, module: nn.Module) -> None:
    """Let a layer's kernels stand in the module that takes its place; isolate what does not fit.

    The layer is its host's class again. Its table of children is left to the caller, who may be
    going through it.
    """
    record = record_of(layer)
    for seed_idx in list(record.waiting):
        cancel(layer, seed_idx)
    container = layer._modules.get(SEEDS)  # noqa: SLF001 - a child without an attribute
    return_class(layer)
    adopt(module, name=record.name)
    module.__dict__[RECORD] = record
    if container is not None:  # all seeds may be isolated
        module._modules[SEEDS] = container  # noqa: SLF001 - as above
    choose_forward(module)
    remember_move(layer, module)
    _logger.warning(
        "layer %r: a %s was put in its place, and its kernels stand in that from now on",
        record.name,
        host_class_of(module).__name__,
    )
    for seed_idx, seed in list(record.seeds.items()):
        reason = _why_not(module, seed)
        if reason is not None and record.layout.contributes(seed_idx):
            seed.last_error = reason
            record.layout.isolate(seed_idx)
            isolate_if_moved(module, seed_idx, seed, 1)
            remember_loss(module, module, seed_idx, f"does not fit what took its place: {reason}")


def _why_not(module: nn.Module, seed: Seed) -> str | None:
    """Return why a kernel does not work in a module, or None where it does or cannot be tried."""
    if seed.example is None:
        return None
    try:
        probe(module, seed.kernel, seed.example.to(reference_tensor(module).device))
    except KernelRefusedError as error:
        return str(error)
    except Exception:  # noqa: BLE001 - a host that takes no such call here, as SyncBatchNorm on a CPU
        return None
    return None
