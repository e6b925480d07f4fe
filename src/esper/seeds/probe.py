"""The probe: what a kernel must show on a copy before it is let into a layer."""

from __future__ import annotations

import copy
import weakref
from collections import OrderedDict
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final, NoReturn

import torch
from torch import Tensor, nn

from esper.compiler.lowering import LoweredKernel, duplicate
from esper.contracts.errors import KernelRefusedError
from esper.forward.host_output import blendable
from esper.forward.host_view import completed, host_forward, host_view
from esper.forward.input_watch import InputWatch
from esper.resilience.attempt import Failed, attempt
from esper.resilience.clock import MonotonicClock
from esper.seeds.batch_rows import rows_of
from esper.seeds.fitting import Pass, device_of, fits_in_use
from esper.seeds.shadow import shadow_pass
from esper.state.host_parts import trainable_parameters
from esper.state.layer_call import LayerCall, Takes
from esper.state.layer_record import record_of
from esper.state.shortage import is_shortage

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from esper.contracts.ports import Clock
    from esper.state.kernel import PreparedKernel
    from esper.state.layer_call import Example

_Like = tuple[tuple[int, ...], torch.dtype, torch.device]
_Key = tuple[str, "weakref.ref[nn.Module]", tuple[_Like, ...], _Like, bool]
_REMEMBERED: Final = 4096
_UPDATE: Final = 1e-2
_ALWAYS_ALLOWED_S: Final = 1.0
_TIMES_HOST: Final = 100.0
_passed: OrderedDict[_Key, ProbeResult] = OrderedDict()


@dataclass(frozen=True, slots=True, kw_only=True)
class ProbeResult:
    """What the probe of an accepted kernel found.

    Attributes:
        is_identity: Whether the layer's output at alpha 1 equals the host's, bit for bit.
        is_null: Whether the kernel adds nothing, whatever it reads: its last layer is zeros.
        is_trainable: Whether the kernel has a parameter that requires a gradient.
        remembered: Whether an earlier probe of equal weights at this site has answered; for the
            gradients only, where a later identity depends on the host's weights.
    """

    is_identity: bool
    is_null: bool
    is_trainable: bool
    remembered: bool = False


def probe(
    layer: nn.Module,
    kernel: PreparedKernel,
    example: Example,
    *,
    is_pristine: bool = False,
    clock: Clock | None = None,
) -> ProbeResult:
    """Try a kernel on a copy. Neither the layer nor the kernel nor a random state changes.

    Args:
        layer: The layer where the kernel is to go.
        kernel: The kernel.
        example: An input of the layer, on its device: a tensor, positional arguments or a call.
        is_pristine: Whether the kernel's weights are still those of its artifact or blueprint;
            only then may an earlier probe answer.
        clock: Measures how long the kernel takes.

    Returns:
        What was found.

    Raises:
        KernelRefusedError: A check failed; ``check`` is ``"raises"``, ``"type"``, ``"shape"``,
            ``"dtype"``, ``"device"``, ``"view"``, ``"in_place"``, ``"finite"``, ``"random"``,
            ``"grad_mode"``, ``"time"`` (it took more than a second, and more than a hundred times
            what its host did, twice) or ``"gradient"``.
        TypeError: The layer is no site: its output is not one floating tensor.
    """
    call = completed(layer, LayerCall.of(example))
    key = _memory_key(layer, kernel, call.x) if is_pristine else None
    before = None if key is None else _passed.get(key)
    if before is not None and (before.is_null or not before.is_identity):
        return replace(before, remembered=True)

    def look(part: LayerCall) -> ProbeResult:
        made = _Probe(layer, kernel, part, clock or MonotonicClock())
        try:
            return made.run(remembered=before is not None)
        except KernelRefusedError as refusal:
            if refusal.check != "time":
                raise
            return made.run(remembered=before is not None)  # the machine may have halted

    result = _in_memory(layer, call, look)
    if key is not None:
        _passed[key] = result
        _passed.move_to_end(key)
        if len(_passed) > _REMEMBERED:
            _passed.popitem(last=False)
    return result


def _in_memory(
    layer: nn.Module, call: LayerCall, look: Callable[[LayerCall], ProbeResult]
) -> ProbeResult:
    """Probe with a call, or with as many of its samples as fit into memory."""
    if not getattr(layer, "batch_first", True):
        return look(call)  # its samples are not the first axis
    return fits_in_use().run(
        lambda: look(call),
        lambda: Pass(
            work="probe",
            batch=call,
            device=call.x.device if isinstance(call.x, Tensor) else device_of(layer),
            parted=lambda cuts, _: look(rows_of(call, *cuts[-1])),
            measure=lambda *_: None,  # a kernel is refused or not by whatever samples it is shown
        ),
    )


def _memory_key(layer: nn.Module, kernel: PreparedKernel, example: Tensor) -> _Key | None:
    blueprint = kernel.blueprint
    digest = kernel.artifact_id or (None if blueprint is None else blueprint.digest)
    if digest is None:
        return None
    like = [(tuple(p.shape), p.dtype, p.device) for p in host_view(layer).parameters()]
    shape = (tuple(example.shape[1:]), example.dtype, example.device)
    return digest, weakref.ref(layer), tuple(like), shape, layer.training


def probe_memory(layers: Mapping[str, nn.Module]) -> dict[str, Any]:
    """Return what probes at layers have found out, as plain values.

    Args:
        layers: The layers by name.
    """
    names = {id(layer): name for name, layer in layers.items()}
    passed = [
        {
            "digest": digest,
            "site": names[id(ref())],
            "like": [_written(*each) for each in like],
            "example": _written(*example),
            "is_training": is_training,
            "found": [found.is_identity, found.is_null, found.is_trainable],
        }
        for (digest, ref, like, example, is_training), found in _passed.items()
        if id(ref()) in names
    ]
    written = {name: record_of(layer).writes_input for name, layer in layers.items()}
    return {
        "passed": passed,
        "writes_input": {name: [own[False], own[True]] for name, own in written.items()},
    }


def load_probe_memory(layers: Mapping[str, nn.Module], memory: Mapping[str, Any]) -> None:
    """Let what probes have found out at other layers be known of layers like them.

    Args:
        layers: The layers by name.
        memory: What :func:`probe_memory` returned of the others.
    """
    for each in memory["passed"]:
        is_identity, is_null, is_trainable = each["found"]
        like = tuple(_read(own) for own in each["like"])
        ref = weakref.ref(layers[each["site"]])
        key = each["digest"], ref, like, _read(each["example"]), each["is_training"]
        _passed[key] = ProbeResult(
            is_identity=is_identity, is_null=is_null, is_trainable=is_trainable
        )
    for name, (in_evaluation, in_training) in memory["writes_input"].items():
        own = record_of(layers[name]).writes_input
        own[False], own[True] = in_evaluation, in_training


def _written(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> list[Any]:
    return [list(shape), str(dtype).removeprefix("torch."), str(device)]


def _read(written: Sequence[Any]) -> tuple[tuple[int, ...], torch.dtype, torch.device]:
    shape, dtype, device = written
    return tuple(shape), getattr(torch, dtype), torch.device(device)


class _Probe:
    """One probe: a copy of the kernel, a fixed input, and the host's output for it."""

    def __init__(
        self, layer: nn.Module, kernel: PreparedKernel, call: LayerCall, clock: Clock
    ) -> None:
        self._layer, self._kernel, self._clock = layer, kernel, clock
        self._call = call.detached()
        self._takes = None if kernel.position == "serial" else Takes.by(kernel.module)
        self._direction: Tensor | None = None
        self._where = f"kernel {kernel.kernel_id} at layer {record_of(layer).name!r}"

    def run(self, *, remembered: bool) -> ProbeResult:
        """Do all checks, the cheapest first; those of gradients unless they are remembered."""
        module = self._kernel.module  # one that is remembered is only run, which leaves no trace
        if not remembered:
            with torch.inference_mode(mode=False):  # a copy of its parameters can be differentiated
                module = _copied(module)
        module.train(self._layer.training)
        aside = shadow_pass(self._layer, module)
        with torch.inference_mode(mode=False), aside, torch.enable_grad():
            h, given = self._host_output()
            k = self._output(module, given)
            self._check_output(k, h)
            is_identity = self._is_identity(h, k)
            is_null = is_identity and self._kernel.mode == "add" and _ends_in_zeros(module)
            if not remembered:
                self._check_gradients(module, given, k)
        return ProbeResult(
            is_identity=is_identity,
            is_null=is_null,
            is_trainable=bool(trainable_parameters(module)),
            remembered=remembered,
        )

    def _host_output(self) -> tuple[Tensor, LayerCall]:
        """Return the host's output, and what the kernel is given: leaves where they can be."""
        with torch.no_grad():
            call = self._call.detached()
            watch = InputWatch(call)
            start_s = self._clock.now()
            h = blendable(host_forward(self._layer, *call.args, **call.kwargs))
            self._host_s = self._clock.now() - start_s
        record_of(self._layer).writes_input[self._layer.training] = watch.has_changed
        self._look_in_other_mode()
        if self._kernel.position == "serial":
            given = LayerCall.of(h.clone())
        elif self._takes is None:
            given = LayerCall.of(self._call.x.clone())
        else:
            given = self._takes.of(self._call).detached()
        return h, given.with_tensors(lambda t: t.requires_grad_(t.is_floating_point()))

    def _look_in_other_mode(self) -> None:
        """See whether the host writes to its input in its other mode, where it takes the call."""
        layer, other = self._layer, not self._layer.training
        writes = record_of(layer).writes_input
        if writes[other] is not None:
            return
        call = self._call.detached()
        watch = InputWatch(call)
        modes = [(module, module.training) for module in layer.modules()]
        layer.train(other)
        with torch.no_grad():
            ran = attempt(lambda: host_forward(layer, *call.args, **call.kwargs))
        for module, training in modes:
            module.training = training
        if not isinstance(ran, Failed):
            writes[other] = watch.has_changed

    def _output(self, module: nn.Module, given: LayerCall) -> Tensor:
        """Run the kernel and check what it does to what it is given."""
        entered = given.with_tensors(Tensor.clone)  # no leaves, so that writing to them is possible
        self._entered = entered.tensors()
        versions = [t._version for t in self._entered]  # noqa: SLF001 - torch's counter
        state = _random_states(self._call.x)
        start_s = self._clock.now()
        try:
            k: object = module(*entered.args, **entered.kwargs)
        except Exception as error:
            if is_shortage(error):
                raise
            msg = f"{self._where} raised {type(error).__name__}: {error}"
            raise KernelRefusedError(msg, check="raises") from error
        took_s = self._clock.now() - start_s
        if not torch.is_grad_enabled():
            torch.set_grad_enabled(True)
            self._refuse("grad_mode", "gradients on, as it found them", "gradients off")
        if isinstance(k, tuple) and k:
            k = k[0]
        if [t._version for t in self._entered] != versions:  # noqa: SLF001 - torch has no public one
            self._refuse("in_place", "an input that is only read", "an input that was modified")
        if not self._kernel.draws_random and not torch.equal(state, _random_states(self._call.x)):
            self._refuse("random", "no random numbers drawn", "a random state that moved")
        if not isinstance(k, Tensor):
            self._refuse("type", "a tensor", type(k).__name__)
        allowed_s = max(_ALWAYS_ALLOWED_S, _TIMES_HOST * self._host_s)
        if took_s > allowed_s:
            self._refuse("time", f"a forward of {allowed_s:.1f} s at most", f"{took_s:.1f} s")
        return k

    def _check_output(self, k: Tensor, h: Tensor) -> None:
        if k.shape != h.shape:
            self._refuse("shape", tuple(h.shape), tuple(k.shape))
        if k.device != h.device:
            self._refuse("device", h.device, k.device)
        if k.dtype != h.dtype and not torch.is_autocast_enabled(h.device.type):
            self._refuse("dtype", h.dtype, k.dtype)
        if any(_share_memory(k, t) for t in self._entered):
            self._refuse("view", "an output of its own", "its input, or a view of it")
        if not _all_finite(k) and not _finite_beside(k, h):
            self._refuse("finite", "a finite output where its host's is", "NaN or infinity")

    def _is_identity(self, h: Tensor, k: Tensor) -> bool:
        return torch.equal(k if self._kernel.mode == "replace" else h + k, h)

    def _check_gradients(self, module: nn.Module, given: LayerCall, k: Tensor) -> None:
        """Check that gradients are finite and reach every layer, the inner after one update."""
        parameters = trainable_parameters(module)
        if not k.requires_grad:
            if parameters:
                self._refuse("gradient", "a gradient for its parameters", "none at all")
            return
        inputs = [*parameters, *(t for t in given.tensors() if t.requires_grad)]
        first = self._gradients(k, inputs)
        if not parameters:
            return
        if not any(_reaches(g) for g in first[: len(parameters)]):
            self._refuse("gradient", "a gradient for its last layer", "zeros everywhere")
        with torch.no_grad():
            for parameter, g in zip(parameters, first, strict=False):
                if g is not None:
                    parameter.sub_(_UPDATE * g / (1.0 + g.norm()))
        second = self._gradients(self._output(module, given.detached()), parameters)
        reached = {
            id(p)
            for p, g, g0 in zip(parameters, second, first, strict=False)
            if _reaches(g) or _reaches(g0)
        }
        self._check_each_layer(module, reached)

    def _check_each_layer(self, module: nn.Module, reached: set[int]) -> None:
        for name, part in module.named_modules():
            own = [p for p in part.parameters(recurse=False) if p.requires_grad]
            if own and not any(id(p) in reached for p in own):
                self._refuse(
                    "gradient",
                    "a gradient for every layer after one update",
                    f"none for {name or type(module).__name__!r}",
                )

    def _gradients(self, k: Tensor, inputs: Sequence[Tensor]) -> list[Tensor | None]:
        gradients: list[Tensor | None]
        if self._direction is None or self._direction.shape != k.shape:
            generator = torch.Generator().manual_seed(0)
            self._direction = torch.randn(k.shape, generator=generator).to(k.device, k.dtype)
        try:
            gradients = list(torch.autograd.grad(k, inputs, self._direction, allow_unused=True))
        except Exception as error:
            if is_shortage(error):
                raise
            msg = f"{self._where} raised {type(error).__name__} in its backward: {error}"
            raise KernelRefusedError(msg, check="raises") from error
        if not all(g is None or _all_finite(g) for g in gradients):
            self._refuse("finite", "finite gradients", "NaN or infinity")
        return gradients

    def _refuse(self, check: str, expected: object, found: object) -> NoReturn:
        msg = f"{self._where} failed the {check} check: expected {expected}, found {found}"
        raise KernelRefusedError(msg, check=check)


def _random_states(tensor: Tensor) -> Tensor:
    """Return the states of the generators that a computation on this tensor may draw from."""
    states = [torch.get_rng_state()]
    if tensor.device.type not in ("cpu", "meta"):
        states.append(torch.get_device_module(tensor.device).get_rng_state(tensor.device))
    return torch.cat(states)


def _copied(module: nn.Module) -> nn.Module:
    return duplicate(module) if isinstance(module, LoweredKernel) else copy.deepcopy(module)


def _ends_in_zeros(module: nn.Module) -> bool:
    if not isinstance(module, LoweredKernel):
        return False
    last = list(module.steps[-1].parameters())
    return bool(last) and not any(bool(p.any()) for p in last)


def _share_memory(left: Tensor, right: Tensor) -> bool:
    return left.untyped_storage().data_ptr() == right.untyped_storage().data_ptr() != 0


def _reaches(gradient: Tensor | None) -> bool:
    return gradient is not None and bool((gradient != 0).any())


def _finite_beside(k: Tensor, h: Tensor) -> bool:
    """Return whether ``k`` is finite, or what ``h`` is; where ``h`` has a NaN it says nothing."""
    return bool((k.isfinite() | (k == h)).all()) or bool(h.isnan().any())


def _all_finite(tensor: Tensor) -> bool:
    if bool(torch.isfinite(tensor.sum(dtype=torch.float64))):  # an eighth of the time
        return True
    return bool(torch.isfinite(tensor).all())
