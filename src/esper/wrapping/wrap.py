"""Put seeds into the layers of a model, and list what was taken and what was left."""

from __future__ import annotations

import itertools
import weakref
from typing import TYPE_CHECKING, Final, TypeVar

from torch import nn

from esper.contracts.arguments import whole_number
from esper.execution.host_class import adopt, release
from esper.execution.kasmina_layer import KasminaLayer
from esper.state.host_parts import check_module, check_replicas
from esper.state.layer_record import RECORD, record_of
from esper.wrapping.select import Select, SkippedModule, choose, named_host_modules

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

    from esper.contracts.ports import KernelSource

Model = TypeVar("Model", bound=nn.Module)

_REFUSALS: Final = (TypeError, ValueError, AttributeError, RuntimeError)
"""What a class raises that does not let itself be inherited from or assigned to."""


def wrap(
    model: Model,
    *,
    select: Select | None = None,
    num_seeds: int = 4,
    telemetry_enabled: bool = False,
    source: KernelSource | None = None,
) -> Model:
    """Put dormant seeds into the layers of a model, in place. Succeeds or changes nothing.

    The layers stay the objects that they are, under the same names, with the same parameters and
    hooks; only ``type(layer)`` becomes a subclass of what it was. While no seed contributes, the
    model computes what it computed before, bit for bit.

    Args:
        model: The model; it may itself be a layer.
        select: Names, globs, types or a predicate ``(name, module) -> bool``; see
            ``esper.wrapping.select.choose``. By default every linear layer, convolution,
            attention, recurrent layer and norm that is not tied, quantised or owned by another
            wrapper. A site may be inside another: each has seeds of its own, and the kernels of
            the outer one read what comes in and out of it, the inner one's grafts included.
        num_seeds: Seeds in each layer, at least 1.
        telemetry_enabled: Whether the layers time their seeds.
        source: Where ``layer.load_kernel`` fetches from.

    Returns:
        The model itself.

    Raises:
        TypeError: ``model`` is no module or in ``torch.nn.DataParallel``, ``num_seeds`` no whole
            number, or ``select`` of a wrong type.
        ValueError: There is nothing to wrap; ``select`` matches nothing; a layer that was asked
            for is wrapped already or cannot be; ``num_seeds`` is out of range. What a layer whose
            class does not let itself be changed raises is the cause of such an error, which names
            it.
    """
    check_replicas("wrap", model)
    whole_number("num_seeds", num_seeds, least=1)
    selection = choose(model, select)
    _refuse_wrapped(selection.taken)
    if not selection.taken:
        raise ValueError(_nothing_to_wrap(model, selection.skipped))
    name = ""
    try:
        for name, module in selection.taken.items():
            adopt(
                module,
                name=name,
                num_seeds=num_seeds,
                telemetry_enabled=telemetry_enabled,
                source=source,
            )
        _tell_surroundings(model, selection.taken)
    except _REFUSALS as error:
        _put_back(selection.taken)
        raise ValueError(_why_not(name, selection.taken[name], error)) from error
    except BaseException:
        _put_back(selection.taken)
        raise
    layers(model)
    return model


def layers(model: nn.Module) -> dict[str, KasminaLayer]:
    """Return the wrapped layers of a model by qualified name, in the model's order.

    A layer that is there under two names has the first. Empty if nothing is wrapped.

    Raises:
        TypeError: ``model`` is no module.
    """
    check_module("layers", model)
    found = {n: m for n, m in named_host_modules(model).items() if isinstance(m, KasminaLayer)}
    for record in map(record_of, found.values()):
        if record.find_model() is None:  # fresh, or unpickled
            record.model = weakref.ref(model)
    return found


def skipped(model: nn.Module) -> tuple[SkippedModule, ...]:
    """Return the modules with tensors of their own that are not wrapped, and why.

    It is worked out from the model as it is, so it holds for copies and reloaded models. For a
    model that is not wrapped it says what ``wrap`` would leave.

    Raises:
        TypeError: ``model`` is no module.
    """
    check_module("skipped", model)
    if not layers(model):
        return choose(model).skipped
    return choose(model, lambda _, module: isinstance(module, KasminaLayer)).skipped


def _tell_surroundings(model: nn.Module, taken: dict[str, nn.Module]) -> None:
    """Tell the layers without tensors of their own what those around them are like."""
    for name, module in taken.items():
        if next(_floating(module), None) is None:
            record_of(module).surroundings = _like_around(model, name)


def _like_around(model: nn.Module, name: str) -> Tensor | None:
    """Return an empty tensor like the first of the nearest parent that has one, or None."""
    while name:
        name = name.rpartition(".")[0]
        tensor = next(_floating(model.get_submodule(name)), None)
        if tensor is not None:
            return tensor.new_empty(0)
    return None


def _floating(module: nn.Module) -> Iterator[Tensor]:
    tensors = itertools.chain(module.parameters(), module.buffers())
    return (tensor for tensor in tensors if tensor.is_floating_point())


def _put_back(taken: dict[str, nn.Module]) -> None:
    """Undo the adoption of modules, also of the one in which it failed half way."""
    for module in taken.values():
        if isinstance(module, KasminaLayer):
            release(module)
        module.__dict__.pop(RECORD, None)


def _why_not(name: str, module: nn.Module, error: Exception) -> str:
    return (
        f"{name!r} ({type(module).__name__}) cannot be wrapped, and nothing has changed: {error}; "
        f"to wrap the rest, leave it out with select="
    )


def _refuse_wrapped(taken: dict[str, nn.Module]) -> None:
    wrapped = [name for name, module in taken.items() if isinstance(module, KasminaLayer)]
    if wrapped:
        raise ValueError(
            f"{', '.join(map(repr, wrapped[:5]))}{' and more' if wrapped[5:] else ''} "
            f"{'are' if wrapped[1:] else 'is'} wrapped already: esper.layers(model) lists the "
            f"layers, esper.restore(model) unwraps them, and select= can name others"
        )


def _nothing_to_wrap(model: nn.Module, left: tuple[SkippedModule, ...]) -> str:
    reasons = [f"{entry.name!r} ({entry.type}): {entry.reason}" for entry in left[:5]]
    return (
        f"{type(model).__name__} has no layer to wrap: "
        f"{'; '.join(reasons) or 'it holds no parameters'}; select= takes any module by name"
    )
