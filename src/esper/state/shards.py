"""Tensors that torch spreads over ranks (``DTensor``), and layers that FSDP2 has sharded.

FSDP2 gathers parameters in hooks around a forward that its owner makes. What runs a layer beside
that finds shards, and has the parameters gathered here.
"""

from __future__ import annotations

from collections import OrderedDict
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final

import torch.distributed as dist
from torch import Tensor, nn

from esper.state.host_parts import host_modules, host_parameters
from esper.state.layer_record import RECORD

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh

_FSDP: Final = "FSDPModule"


def is_spread(tensor: object) -> bool:
    """Say whether a tensor is torch's ``DTensor``: a shard, or a copy that knows of the others."""
    return hasattr(tensor, "full_tensor")


def whole(tensor: Any) -> Any:
    """Return a tensor as it is over all ranks, which have to ask together; others as they are."""
    return tensor.full_tensor() if is_spread(tensor) else tensor


def whole_in(value: Any) -> Any:
    """Return a nesting of dicts, lists and tuples with whole tensors; what was spread on the CPU.

    Every rank has to ask with the same nesting.
    """
    kind = type(value)
    if isinstance(value, dict):
        pairs = ((name, whole_in(item)) for name, item in value.items())
        return kind(pairs) if kind in (dict, OrderedDict) else value
    if kind in (list, tuple):
        return kind(whole_in(item) for item in value)
    return value.full_tensor().cpu() if is_spread(value) else value


def here(tensor: Any) -> Tensor:
    """Return what this rank has of a tensor, which shares its memory."""
    found: Tensor = tensor.to_local() if is_spread(tensor) else tensor
    return found


def spread_like(value: Tensor, like: Any) -> Tensor:
    """Return what every rank has whole as one spread like another tensor; no rank is asked.

    Args:
        value: The same on every rank; shape of ``like``.
        like: A tensor that is spread, or a plain one, for which ``value`` comes back.
    """
    if not is_spread(like) or is_spread(value):
        return value
    from torch.distributed.tensor import DTensor, Replicate

    mesh = like.device_mesh
    held = value.detach().to(like.device)
    replicated = DTensor.from_local(held, mesh, [Replicate()] * mesh.ndim, run_check=False)
    return replicated.redistribute(mesh, like.placements)


def largest(value: Tensor, like: Any) -> Tensor:
    """Return the largest over ranks of what each has, if a tensor is spread; else it itself."""
    if not is_spread(like):
        return value
    from torch.distributed.tensor import DTensor, Partial

    mesh = like.device_mesh
    spread = DTensor.from_local(value, mesh, [Partial("max")] * mesh.ndim, run_check=False)
    found: Tensor = spread.full_tensor()
    return found


def spread_state(state: dict[str, Any], p: Any) -> dict[str, Any]:
    """Return what an optimizer keeps of a parameter, with what has its shape spread as it is."""
    if not is_spread(p):
        return state
    return {
        name: spread_like(value, p) if getattr(value, "shape", None) == p.shape else value
        for name, value in state.items()
    }


def is_sharded(module: nn.Module) -> bool:
    """Say whether a module holds parameters, kernels aside, that are spread over ranks."""
    return any(map(is_spread, host_parameters(module)))


def reshard(module: nn.Module) -> None:
    """Let a module's parameters be its shards, as its optimizer has them.

    FSDP2 leaves the outermost module gathered behind a forward without a backward, an evaluation
    for one. To be called where no forward and no backward is under way.
    """
    for part in module.modules():
        if hasattr(part, "_get_fsdp_state"):
            part.reshard()  # type: ignore[operator] # FSDP2's method


def is_in_shards(model: nn.Module) -> bool:
    """Say whether ranks have a part of a model each, kernels included."""
    return any(map(is_spread, model.parameters()))


def mesh_beside(layer: nn.Module) -> DeviceMesh | None:
    """Return the ranks over which FSDP2 has spread a layer, or what is around one without weights.

    Args:
        layer: A wrapped layer.

    Raises:
        ValueError: They are spread in another way, by tensor parallelism for one.
    """
    model = layer.__dict__[RECORD].find_model()
    reshard(layer if model is None else model)
    own = host_parameters(layer)
    if not own and model is not None:
        own = host_parameters(model)
    found: Any = next(filter(is_spread, own), None)
    if found is None:
        return None
    *outer, last = found.placements
    by_fsdp = model is None or any(map(_is_fsdps, model.modules())) or _is_fsdps(layer)
    has_group = _group_of(found.device_mesh) is not None
    if by_fsdp and has_group and last.is_shard() and all(each.is_replicate() for each in outer):
        return found.device_mesh  # type: ignore[no-any-return] # a DTensor's
    msg = (
        f"layer {layer.__dict__[RECORD].name!r} is spread over ranks as {found.placements} on "
        f"{found.device_mesh}: kernels stand in layers that fully_shard has sharded over all "
        "ranks of a mesh, and in plain ones; graft in a layer outside of tensor parallelism, or "
        "before the model is parallelized"
    )
    raise ValueError(msg)


def group_of_shards(model: nn.Module) -> ProcessGroup | None:
    """Return the ranks over which FSDP2 has spread a model; None where it has not."""
    found: Any = next(filter(is_spread, model.parameters()), None)
    return None if found is None else _group_of(found.device_mesh)


def _group_of(mesh: DeviceMesh) -> ProcessGroup | None:
    """Return the group of a mesh's ranks; None of several dimensions that are not all ranks."""
    if mesh.ndim == 1:
        return mesh.get_group()
    return dist.group.WORLD if mesh.size() == dist.get_world_size() else None


def _is_fsdps(module: nn.Module) -> bool:
    return any(base.__name__ == _FSDP for base in type(module).__mro__)


@contextmanager
def unsharded_around(part: nn.Module, model: nn.Module) -> Iterator[None]:
    """Let a part of a model be called by itself: FSDP2 gathers its own modules, none around them.

    Where something is sharded, every rank has to enter at the same moment.

    Args:
        part: What is called.
        model: What has it, in shards or not; it is in shards again afterwards.
    """
    inside = set(part.modules())
    for module in model.modules():
        if hasattr(module, "_get_fsdp_state") and module not in inside:
            module.unshard()  # type: ignore[operator] # FSDP2's method
    try:
        yield
    finally:
        reshard(model)


@contextmanager
def gathered(module: nn.Module) -> Iterator[None]:
    """Let a module have its parameters whole, kernels aside, to be run outside of FSDP2's hooks.

    Where something is sharded, every rank has to enter at the same moment.

    Args:
        module: The module.
    """
    kept = exchange(host_modules(module), _whole_parameter)
    try:
        yield
    finally:
        put_back(kept)


def _whole_parameter(p: Any) -> Tensor:
    found: Tensor = p
    return p.full_tensor().detach().requires_grad_(p.requires_grad) if is_spread(p) else found


Exchanged = list[tuple[nn.Module, str, nn.Parameter]]
"""Modules, names of their parameters, and what stood there."""


def exchange(modules: Iterable[nn.Module], make: Callable[[Any], Tensor]) -> Exchanged:
    """Put others in the place of modules' own parameters; one that is shared stays shared.

    Args:
        modules: The modules.
        make: Gives what stands in for a parameter; the parameter itself where nothing does.

    Returns:
        What :func:`put_back` takes.
    """
    held = [
        (part, name, p)
        for part in modules
        for name, p in part._parameters.items()  # noqa: SLF001 - past properties
        if p is not None
    ]
    made = {id(p): make(p) for _, _, p in held}
    changed = [(part, name, p) for part, name, p in held if made[id(p)] is not p]
    for part, name, p in changed:
        _set(part, name, made[id(p)])
    return changed


def put_back(kept: Exchanged) -> None:
    """Undo :func:`exchange`."""
    for part, name, p in kept:
        _set(part, name, p)


def _set(part: nn.Module, name: str, value: Tensor) -> None:
    part._parameters[name] = value  # type: ignore[assignment] # noqa: SLF001 - FSDP2 does so too
    names = part.__dict__.get("_flat_weights_names")
    if names is not None:  # a recurrent module keeps its weights twice
        part.__dict__["_flat_weights"] = [part._parameters.get(n) for n in names]  # noqa: SLF001 - as above
