"""The optimizer through growth: parameters that appear, parameters that go, and their state.

Parameters of kernels stay in the group of their host layer, with its settings. A group of their
own would break the schedulers that keep one function per group (LambdaLR, SequentialLR).
"""

from __future__ import annotations

import inspect
import logging
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Final, cast

import torch
from torch import nn
from torch.optim import SGD, Adam, AdamW, Optimizer

from esper.continuity.replicas import replicas, share_late_parameters, worst_of_ranks
from esper.execution.kasmina_layer import KasminaLayer
from esper.seeds.step_guard import KeptBuffers, has_step_seeds, read_step_flags
from esper.state.host_parts import check_module, host_parameters, kernel_parameters
from esper.state.layer_record import record_of
from esper.state.roster import Roster

SUPPORTED: Final[tuple[type[Optimizer], ...]] = (SGD, Adam, AdamW)

ParamGroup = dict[str, Any]
"""A parameter group, as torch optimizers keep it: settings of many types by name."""
_logger = logging.getLogger(__name__)


def check_supported(optimizer: Optimizer) -> None:
    """Refuse an optimizer whose state Esper does not know how to carry through growth.

    Raises:
        TypeError: The optimizer is not exactly a torch SGD, Adam or AdamW.
    """
    if type(optimizer) not in SUPPORTED:
        names = ", ".join(f"torch.optim.{cls.__name__}" for cls in SUPPORTED)
        msg = (
            f"cannot grow under {type(optimizer).__module__}.{type(optimizer).__qualname__}: "
            f"supported are {names}, themselves and not a subclass or a wrapper; hand over the "
            "optimizer inside the wrapper, or train with one of these"
        )
        raise TypeError(msg)


def sync_optimizer(model: nn.Module, optimizer: Optimizer) -> None:
    """Bring an optimizer in line with the grafts of a model. Doing it twice changes nothing.

    Trainable parameters of kernels that appeared join the group of their host layer (the group
    that holds a parameter of the layer, else the first); those of kernels that went are dropped
    with their state. Parameters of the host are never touched. From then on the optimizer reads
    the flags of ``guard="step"`` before each step, and skips one that was not finite. Kernels that
    appeared in a model replicated by DistributedDataParallel get rank 0's weights and averaged
    gradients; there every rank has to make the same grafts and the same call.

    Args:
        model: A wrapped model; it may be inside DDP or ``torch.compile``.
        optimizer: The optimizer that trains it.

    Raises:
        TypeError: ``model`` is no module, or the optimizer not a torch SGD, Adam or AdamW.
    """
    check_module("sync_optimizer", model)
    check_supported(optimizer)
    link = _link(optimizer)
    live = {id(p): p for layer in _layers(model) for _, p in kernel_parameters(layer)}
    remove_parameters(optimizer, [p for key, p in link.kernels.items() if key not in live])
    present = {id(p) for group in optimizer.param_groups for p in group["params"]}
    link.kernels.update({key: p for key, p in live.items() if key in present})
    for layer in _layers(model):
        appeared = [(n, p) for n, p in kernel_parameters(layer) if id(p) not in present]
        trainable = [(n, p) for n, p in appeared if p.requires_grad]
        names, new = [n for n, _ in trainable], [p for _, p in trainable]
        append_parameters(optimizer, host_parameters(layer), new, names=names)
    replicated = replicas(model)
    if replicated is not None:
        share_late_parameters(replicated, [p for p in live.values() if p.requires_grad])
    link.watch_steps(model, optimizer)
    if replicated is not None:
        _warn_of_lone_isolation(link.roster.busy())


def _warn_of_lone_isolation(layers: Iterable[nn.Module]) -> None:
    """Say which kernels one rank could isolate alone; the others would wait for its gradients."""
    for layer in layers:
        for seed_idx, seed in record_of(layer).seeds.items():
            if seed.guard != "step":
                _logger.warning(
                    "seed %d of layer %r stands under guard=%r in a replicated model: a fault on "
                    "one rank would isolate it there alone; call layer.set_guard(%d, 'step') on "
                    "every rank, whose flags the ranks share",
                    seed_idx,
                    record_of(layer).name,
                    seed.guard,
                    seed_idx,
                )


def busy_layers(optimizer: Optimizer) -> list[nn.Module]:
    """Return the layers that hold kernels, of the model that was last synced with an optimizer."""
    return _link(optimizer).roster.busy()


def append_parameters(
    optimizer: Optimizer,
    host_params: Iterable[torch.Tensor],
    new_params: Iterable[torch.Tensor],
    state: Mapping[torch.Tensor, object] | None = None,
    *,
    names: Sequence[str] | None = None,
) -> None:
    """Append parameters to the group of their host layer. One that is there already stays.

    Args:
        optimizer: A torch SGD, Adam or AdamW.
        host_params: Parameters of the host layer; the first that is in a group chooses it.
        new_params: Parameters of the kernel.
        state: State of the new parameters, as in ``audition.state``: taken by reference, moments
            and step, so that they are the same tensors afterwards. None starts without.
        names: Names of the new parameters, in their order; needed by an optimizer that was built
            from named parameters, and invented there where None.

    Raises:
        TypeError: The optimizer is not a torch SGD, Adam or AdamW.
    """
    check_supported(optimizer)
    group = host_group(optimizer, host_params)
    present = {id(p) for g in optimizer.param_groups for p in g["params"]}
    link = _link(optimizer)
    for index, p in enumerate(new_params):
        if id(p) in present:
            continue
        group["params"].append(p)
        if "param_names" in group:
            group["param_names"].append(names[index] if names else f"kernel.{id(p)}")
        if state is not None and p in state:
            optimizer.state[p] = state[p]
        link.kernels[id(p)] = p


def remove_parameters(optimizer: Optimizer, params: Iterable[torch.Tensor]) -> None:
    """Remove parameters from an optimizer with their state; no trace of them is left in it.

    The groups stay, even where one is empty afterwards: schedulers count them.

    Args:
        optimizer: Any torch optimizer.
        params: Parameters to remove; one that is not there is passed over.
    """
    going = {id(p): p for p in params}
    for group in optimizer.param_groups:
        keep = [id(p) not in going for p in group["params"]]
        for values in (group["params"], group.get("param_names", [])):
            values[:] = [v for v, stays in zip(values, keep, strict=False) if stays]
    link = _link(optimizer)
    for key, p in going.items():
        optimizer.state.pop(p, None)
        link.kernels.pop(key, None)


def audition_optimizer(
    optimizer: Optimizer,
    host_params: Iterable[torch.Tensor],
    kernel_params: Iterable[torch.Tensor],
    *,
    lr: float | None = None,
) -> Optimizer:
    """Build an optimizer of the same class and settings as the host layer's group.

    Args:
        optimizer: The run's optimizer; it is only read.
        host_params: Parameters of the host layer.
        kernel_params: Trainable parameters of the kernel, at least one.
        lr: Learning rate, above 0; the group's present one where None.

    Raises:
        TypeError: The optimizer is not a torch SGD, Adam or AdamW.
    """
    check_supported(optimizer)
    group = host_group(optimizer, host_params)
    accepted = inspect.signature(type(optimizer)).parameters.keys() - {"params", "lr"}
    settings = {name: group[name] for name in sorted(accepted & group.keys())}
    rate = group["lr"] if lr is None else lr
    rate = rate.clone() if isinstance(rate, torch.Tensor) else rate
    build = cast("Callable[..., Optimizer]", type(optimizer))
    return build(list(kernel_params), lr=rate, **settings)


def host_group(optimizer: Optimizer, host_params: Iterable[torch.Tensor]) -> ParamGroup:
    """Return the group that holds a parameter of the host layer, else the first group."""
    wanted = {id(p) for p in host_params}
    for group in optimizer.param_groups:
        if any(id(p) in wanted for p in group["params"]):
            return group
    return optimizer.param_groups[0]


def _layers(model: nn.Module) -> Iterator[KasminaLayer]:
    """Yield the layers with seeds, a layer before those inside it."""
    return (module for module in model.modules() if isinstance(module, KasminaLayer))


class _Link:
    """What Esper remembers of one optimizer: the kernels' parameters in it, and its hook."""

    def __init__(self) -> None:
        self.kernels: dict[int, torch.Tensor] = {}
        self.roster = Roster([])
        self._model: Callable[[], nn.Module | None] = lambda: None
        self._hooked = False
        self._kept: KeptBuffers | None = None

    def watch_steps(self, model: nn.Module, optimizer: Optimizer) -> None:
        """Read the step flags of the model's layers before each step."""
        for layer in _layers(model):
            layer.enable_step_guard(self._keep_now)
        self._model = weakref.ref(model)
        self.roster = Roster(_layers(model))
        self._kept = None
        self._keep(model)
        if not self._hooked:
            optimizer.register_step_pre_hook(self._before_step)
            self._hooked = True

    def _before_step(
        self, optimizer: Optimizer, args: tuple[object, ...], kwargs: dict[str, object]
    ) -> tuple[tuple[object, ...], dict[str, object]] | None:
        """Read the flags now, or, with a closure, once the closure has made the gradients."""
        values = (*args, *kwargs.values())
        if not any(callable(value) and not isinstance(value, Optimizer) for value in values):
            self._read(optimizer)
            return None
        replaced = tuple(self._closed(value, optimizer) for value in args)
        return replaced, {name: self._closed(value, optimizer) for name, value in kwargs.items()}

    def _closed(self, value: object, optimizer: Optimizer) -> object:
        if not callable(value) or isinstance(value, Optimizer):
            return value
        closure: Callable[[], object] = value

        def run_then_read() -> object:
            result = closure()
            self._read(optimizer)
            return result

        return run_then_read

    def _read(self, optimizer: Optimizer) -> None:
        """Keep the buffers of a good step; drop the gradients of a bad one, buffers put back."""
        model = self._model()
        if model is None:
            return
        faults = read_step_flags(self.roster.busy(), worst_of_ranks(model))
        if not faults:
            self._keep(model)
            return
        if self._kept is not None:
            self._kept.put_back()
        for group in optimizer.param_groups:
            for p in group["params"]:
                p.grad = None

    def _keep_now(self) -> None:
        """Copy the buffers where nobody has: a seed has just come under ``guard="step"``."""
        model = self._model()
        if model is not None and self._kept is None:
            self._kept = KeptBuffers(model)

    def _keep(self, model: nn.Module) -> None:
        """Copy the buffers while a seed stands under ``guard="step"``."""
        if self._kept is not None:
            self._kept.keep()
        elif has_step_seeds(self.roster.busy()):
            self._kept = KeptBuffers(model)


_LINKS: weakref.WeakKeyDictionary[Optimizer, _Link] = weakref.WeakKeyDictionary()


def _link(optimizer: Optimizer) -> _Link:
    link = _LINKS.get(optimizer)
    if link is None:
        link = _LINKS[optimizer] = _Link()
    return link
