"""What a kernel may be made of: modules of its own, none that the model has already."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from esper.compiler.lowering import LoweredKernel
from esper.state.host_parts import host_modules
from esper.state.kernel import PreparedKernel
from esper.state.layer_record import record_of

if TYPE_CHECKING:
    from collections.abc import Iterator


def refuse_shared_modules(layer: nn.Module, kernel: object) -> None:
    """Check that no module of a kernel is one of its layer's model; tied tensors may be.

    A module that is a layer and part of a kernel would be called twice, listed and unwrapped under
    one of its names only, and one that holds its own layer would never end.

    Raises:
        ValueError: One is; nothing has changed.
    """
    kernel = kernel.module if isinstance(kernel, PreparedKernel) else kernel
    if not isinstance(kernel, nn.Module) or isinstance(kernel, LoweredKernel):
        return  # made of a blueprint, it is nobody else's
    what = next(_shared(layer, kernel), None)
    if what is not None:
        msg = (
            f"a {type(kernel).__name__} cannot be a kernel at layer {record_of(layer).name!r}: "
            f"{what}. The modules of a kernel are its own: graft copy.deepcopy of it (through "
            f"esper.restore where it is wrapped), or a fresh one; to share weights, tie its "
            f"parameters"
        )
        raise ValueError(msg)


def _shared(layer: nn.Module, kernel: nn.Module) -> Iterator[str]:
    """Yield in words what of a kernel is no module of its own."""
    model = record_of(layer).find_model()
    names = {} if model is None else {id(m): name for name, m in model.named_modules()}
    wholes = [layer] if model is None else [layer, model]
    taken = {id(part) for whole in wholes for part in host_modules(whole)}
    for name, part in kernel.named_modules():
        verb = f"its {name!r} is" if name else "it is"
        if part is layer:
            yield f"{verb} that layer itself"
        elif part is model:
            yield f"{verb} the whole model"
        elif id(part) in taken:
            yield f"{verb} {names.get(id(part), 'a part of the layer')!r} of the same model"
