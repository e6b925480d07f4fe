"""What of a wrapped module is its host's, and what belongs to the kernels in its seeds."""

from __future__ import annotations

import reprlib
from typing import Final

from torch import nn

SEEDS: Final = "_seeds"
"""Name of the child of a layer that holds its slots; absent while there is none."""

SEEDS_PREFIX: Final = f"{SEEDS}."
"""What a layer's own names of whatever belongs to its seeds begin with."""


def is_in_a_seed(name: str) -> bool:
    """Say whether a dotted name of a module, parameter or buffer leads through a seed."""
    return SEEDS in name.split(".")


_NO_PLACE: Final = {
    "DataParallel": (
        "torch.nn.DataParallel, which copies the model to each device anew at every forward, so "
        "that kernels and what they count would be lost with the copies. Start a process for each "
        "device with torchrun, and use torch.nn.parallel.DistributedDataParallel"
    ),
    "FullyShardedDataParallel": (
        "FullyShardedDataParallel, which took the weights out of the layers when it was made, and "
        "would train kernels on each rank alone. Use FSDP2: torch.distributed.fsdp.fully_shard"
    ),
}
"""What kernels cannot follow, by the names of torch's classes, which need not be imported."""


def check_module(function: str, model: object) -> None:
    """Refuse what is no module, by the name of the function that it was given to.

    Raises:
        TypeError: It is none.
    """
    if not isinstance(model, nn.Module):
        shown = reprlib.repr(model).splitlines()[0]
        msg = f"{function} takes a torch.nn.Module; got {shown} (a {type(model).__name__})"
        raise TypeError(msg)


def check_replicas(function: str, model: nn.Module) -> None:
    """Refuse what is no module, or in what kernels cannot follow.

    Raises:
        TypeError: It is no module, or is, or has in it, a ``torch.nn.DataParallel``, which makes
            copies at each forward, or a ``FullyShardedDataParallel``, which has the weights.
    """
    check_module(function, model)
    for name, module in model.named_modules():
        why = next((_NO_PLACE[c.__name__] for c in type(module).__mro__ if _is_no_place(c)), None)
        if why is not None:
            where = f"its module {name!r} is in" if name else "it is in"
            msg = f"{function} cannot take this model: {where} {why}"
            raise TypeError(msg)


def _is_no_place(cls: type) -> bool:
    return cls.__name__ in _NO_PLACE and cls.__module__.startswith("torch.")


def host_modules(module: nn.Module) -> list[nn.Module]:
    """Return a module and what is inside it, without the kernels of any seed."""
    return [part for name, part in module.named_modules() if not is_in_a_seed(name)]


def host_parameters(layer: nn.Module) -> list[nn.Parameter]:
    """Return the layer's own parameters, without those of any seed's kernel."""
    return [p for name, p in layer.named_parameters() if not is_in_a_seed(name)]


def trainable_parameters(module: nn.Module) -> list[nn.Parameter]:
    """Return the parameters of a module that require a gradient, whosever they are."""
    return [p for p in module.parameters() if p.requires_grad]
