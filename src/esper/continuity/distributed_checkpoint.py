"""Folders of ``torch.distributed.checkpoint``, which loads in place what a model asks for by name.

A model without kernels asks for none and gets none. What a folder's model had is therefore built
before its tensors are loaded.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Final

import torch
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.storage import StorageReader

from esper.continuity.ensemble import joined, members_of
from esper.continuity.optimizer import sync_again
from esper.continuity.replicas import bare
from esper.contracts.errors import KernelLoadError
from esper.seeds.rebuilding import carry_out, planned
from esper.seeds.structure import SeedStructure, read_structure
from esper.state.host_parts import SEEDS_PREFIX, check_module
from esper.state.layer_record import RECORD

if TYPE_CHECKING:
    import os
    from collections.abc import Mapping, Sequence

    from torch import Tensor, nn
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata
    from torch.optim import Optimizer

_READ: Final = ("structure", "alpha")
"""What a seed has of which its kernel can be built."""


def build_as_saved(
    checkpoint: str | os.PathLike[str] | StorageReader,
    model: nn.Module,
    optimizer: Optimizer | Sequence[Optimizer] | None = None,
    *,
    prefix: str = "model.",
) -> None:
    """Give a model the kernels that it had when ``torch.distributed.checkpoint`` saved it.

    Their weights, and all else, come from ``dcp.load`` afterwards, which loads in place what it
    finds in a ``state_dict``: of a model without kernels the host alone, and without a word.
    Kernels that the model has beyond the checkpoint are taken out. Moments that a kernel did not
    have yet, since it came after the last step, are not in the folder, nor are names of an
    optimizer that ``sync_optimizer`` had not seen, and torch asks for them all the same:
    ``dcp.load(..., planner=DefaultLoadPlanner(allow_partial_load=True))`` leaves them at their
    beginning, as for any parameter without a gradient so far. Where several processes load, each
    has to call this. Make a Grower, or let it load its state, behind all of it.

    Args:
        checkpoint: The folder, or what reads it.
        model: A model of the same class, wrapped where kernels stood; it may be inside DDP or
            ``torch.compile``, and sharded by FSDP2.
        optimizer: What trains it, or all that do. It gets the kernels' parameters, and loses its
            state and gradients: ``get_state_dict`` of torch makes room for what is to be loaded.
        prefix: What stands before the model's names in the checkpoint: ``dcp.save({"model": ...})``
            makes it ``"model."``.

    Raises:
        ValueError: The checkpoint has kernels under another prefix, at a layer that the model does
            not have or that is not wrapped, at a seed beyond its seeds, or one that was written by
            hand. What differs is named, and no layer was changed.
    """
    check_module("build_as_saved", model)
    reader = checkpoint
    if not isinstance(reader, StorageReader):
        reader = FileSystemReader(Path(reader))
    build_described(_read(reader), model, optimizer, prefix=prefix)


def build_described(
    tensors: Mapping[str, Tensor],
    model: nn.Module,
    optimizer: Optimizer | Sequence[Optimizer] | None = None,
    *,
    prefix: str = "",
) -> None:
    """Give a model the kernels that tensors of a checkpoint describe, as :func:`build_as_saved`.

    Args:
        tensors: By their names there; those that say of no seed what it is are passed over.
        model: As there, as are all that follow.
        optimizer: What trains it, or all that do.
        prefix: What stands before the model's names.

    Raises:
        ValueError: As there.
    """
    every = None if optimizer is None else joined(optimizer)
    found = _by_layer({n: t for n, t in tensors.items() if _says_what_it_is(n)}, prefix)
    layers = {n: m for n, m in bare(model).named_modules() if RECORD in m.__dict__}
    _check_wrapped(found, layers, prefix)
    try:
        plans = {name: planned(layer, found.get(name, [])) for name, layer in layers.items()}
    except KernelLoadError as error:
        msg = f"{error}. Nothing was changed"
        raise ValueError(msg) from error
    for name, plan in plans.items():
        carry_out(layers[name], plan, is_to_be_loaded=True)
    if every is not None:
        sync_again(model, every)
        for member in members_of(every):
            member.state.clear()  # else torch would ask for what there is, and not for kernels'
            member.zero_grad()  # nor does it where there are gradients


def _says_what_it_is(name: str) -> bool:
    return SEEDS_PREFIX in name and name.rpartition(".")[2] in _READ


def _read(reader: StorageReader) -> dict[str, Tensor]:
    """Read what says which kernels there are, by its whole name."""
    entries: Mapping[str, object] = reader.read_metadata().state_dict_metadata
    tensors: dict[str, Tensor] = {
        name: _empty(entry)  # type: ignore[arg-type] # a seed's entries are tensors
        for name, entry in entries.items()
        if _says_what_it_is(name)
    }
    if tensors:
        load({**tensors}, storage_reader=reader)
    return tensors


def _empty(entry: TensorStorageMetadata) -> Tensor:
    return torch.empty(entry.size, dtype=entry.properties.dtype)


def _by_layer(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, list[SeedStructure]]:
    """Return the seeds of each layer, by the layer's name.

    Raises:
        ValueError: Their names do not begin with the prefix.
    """
    found: dict[str, list[SeedStructure]] = {}
    for name in sorted(tensors):
        seed, _, what = name.rpartition(".")
        if what != "structure":
            continue
        if not name.startswith(prefix):
            msg = (
                f"the checkpoint has a kernel under the name {seed!r}, which does not begin with "
                f"prefix={prefix!r}: give what stands before the model's own names there"
            )
            raise ValueError(msg)
        layer = f".{seed.removeprefix(prefix)}".rpartition(f".{SEEDS_PREFIX}")[0].removeprefix(".")
        described = read_structure(tensors[name].numpy().tobytes())
        alpha = tensors.get(f"{seed}.alpha")
        entry: SeedStructure = {**described}
        if alpha is not None:
            entry["alpha"] = float(alpha)
        found.setdefault(layer, []).append(entry)
    return found


def _check_wrapped(
    found: Mapping[str, object], layers: Mapping[str, nn.Module], prefix: str
) -> None:
    absent = sorted(set(found) - set(layers))
    if absent:
        msg = (
            f"the checkpoint has kernels at {', '.join(map(repr, absent))} below {prefix!r}, and "
            "the model has no wrapped layer of that name: build it as it was, and call esper.wrap "
            "with the same select="
        )
        raise ValueError(msg)
