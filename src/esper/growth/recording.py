"""Recording what reaches a site in ordinary training steps, without a trace in the run.

A forward hook clones a few samples of a site's input and output, a tensor hook the gradient of
the loss at that output. Neither returns anything, and samples are drawn from a generator of the
recorder's own, so that the run stays bit-identical.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Final, Self

import torch
from torch import Tensor, nn

from esper.forward.host_output import blendable
from esper.forward.host_view import declared
from esper.growth.batch import Batch, LossFunction
from esper.seeds.shadow import in_shadow_pass, shadow_pass
from esper.state.kernel import reference_tensor
from esper.state.layer_call import LayerCall

Hook = Callable[[nn.Module, object, object, object], None]

MAX_SAMPLES: Final = 512
MAX_ELEMENTS: Final = 1 << 24


@dataclass(slots=True, kw_only=True, eq=False)
class SiteObservation:
    """What was recorded at one site. The batch is axis 0 of every tensor.

    Attributes:
        site: Name of the layer.
        layer: The layer itself, as it is now.
        inputs: Per recorded step, samples of the layer's input, on its device.
        outputs: The same samples of its output.
        gradients: The same samples of the gradient of the loss at the output, times the number
            of samples in the step's batch: of each sample's own loss, where the loss is a mean.
        call: The first recorded call with all of its samples, where it had more than one
            argument; else None.
    """

    site: str
    layer: nn.Module
    inputs: list[Tensor] = field(default_factory=list)
    outputs: list[Tensor] = field(default_factory=list)
    gradients: list[Tensor] = field(default_factory=list)
    call: LayerCall | None = None

    @property
    def example(self) -> LayerCall | Tensor:
        """A call of the layer, to probe kernels with; at least one step has been recorded."""
        return self.inputs[0] if self.call is None else self.call

    @property
    def num_samples(self) -> int:
        """Samples recorded so far."""
        return sum(len(gradient) for gradient in self.gradients)


class Recorder:
    """Records samples at several sites at once, until it is closed or has enough.

    Use as a context manager, or call :meth:`close`.

    Args:
        layers: The sites by name.
        samples_per_step: Samples kept of each batch, at least 1.
        max_samples: Samples kept in all, per site; a site that has them is left alone.
        max_elements: Elements kept in all, per site: bounds the memory whatever the shapes.
        random_seed: Starts the generator that draws the samples.
        records_shadow_passes: Whether forwards of shadow passes are recorded too; their
            gradients are not those of the run.

    Raises:
        ValueError: ``samples_per_step`` is less than 1.
    """

    def __init__(
        self,
        layers: Mapping[str, nn.Module],
        *,
        samples_per_step: int = 32,
        max_samples: int = MAX_SAMPLES,
        max_elements: int = MAX_ELEMENTS,
        random_seed: int = 0,
        records_shadow_passes: bool = False,
    ) -> None:
        if samples_per_step < 1:
            msg = f"samples_per_step is at least 1, got {samples_per_step}"
            raise ValueError(msg)
        self.observations = {
            name: SiteObservation(site=name, layer=layer) for name, layer in layers.items()
        }
        self._samples_per_step = samples_per_step
        self._max_elements = max_elements
        self.records_shadow_passes = records_shadow_passes
        self._capacity = dict.fromkeys(layers, max_samples)
        self._generator = torch.Generator().manual_seed(random_seed)
        self._handles = [
            layer.register_forward_hook(
                _AfterForward(self, self.observations[name]), with_kwargs=True
            )
            for name, layer in layers.items()
        ]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def done(self) -> bool:
        """Whether every site has all the samples that it may keep."""
        return all(self._room(o) < 1 for o in self.observations.values())

    def close(self) -> None:
        """Remove every hook; the observations stay."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def record(
        self, observation: SiteObservation, x: Tensor, h: Tensor, *, batch_axis: int = 0
    ) -> None:
        """Keep samples of input and output now, and of the gradient when it comes.

        Args:
            observation: One of the recorder's own.
            x: The layer's input.
            h: Its output, of the same samples, part of a graph.
            batch_axis: The axis of the samples in both; it becomes axis 0.
        """
        hooked, x, h = h, x.movedim(batch_axis, 0), h.movedim(batch_axis, 0)
        per_sample = (x.numel() + 2 * h.numel()) // len(h)
        affordable = self._max_elements // max(1, per_sample)
        self._capacity[observation.site] = min(self._capacity[observation.site], affordable)
        num_kept = min(self._samples_per_step, self._room(observation), len(h))
        if num_kept < 1:
            return
        drawn = torch.randperm(len(h), generator=self._generator)[:num_kept]
        index = drawn.sort().values.to(h.device)
        dtype = reference_tensor(observation.layer).dtype  # a forward under autocast has another
        kept_x, kept_h = (_kept(value, index, dtype) for value in (x, h))

        def after_backward(gradient: Tensor) -> None:
            if self._handles and self._room(observation) >= num_kept:
                observation.inputs.append(kept_x)
                observation.outputs.append(kept_h)
                gradient = gradient.detach().movedim(batch_axis, 0)
                scaled = gradient.index_select(0, index) * len(gradient)
                observation.gradients.append(scaled)

        hooked.register_hook(after_backward)  # type: ignore[no-untyped-call] # torch leaves it untyped

    def _room(self, observation: SiteObservation) -> int:
        return self._capacity[observation.site] - observation.num_samples


def _kept(value: Tensor, index: Tensor, dtype: torch.dtype) -> Tensor:
    chosen = value.detach().index_select(0, index)
    return chosen.to(dtype) if chosen.is_floating_point() else chosen


class _AfterForward:
    """The hook of one site. A copy of the model, or a file of it, gets one that does nothing."""

    def __init__(self, recorder: Recorder, observation: SiteObservation) -> None:
        self._recorder = recorder
        self._observation = observation

    def __call__(
        self, layer: nn.Module, args: tuple[object, ...], kwargs: dict[str, object], output: object
    ) -> None:
        wanted = self._recorder.records_shadow_passes or not in_shadow_pass()
        if not wanted or not torch.is_grad_enabled():
            return
        call, h = declared(layer, LayerCall(args, kwargs)), _first_tensor(output)
        if h is None or not _can_be_recorded(call.x, h):
            return
        axis = 0 if getattr(layer, "batch_first", True) else call.x.ndim - 2
        self._recorder.record(self._observation, call.x, h, batch_axis=axis)
        if len(args) + len(kwargs) > 1 and self._observation.call is None:
            self._observation.call = call.detached()

    def __reduce__(self) -> tuple[Callable[[], Hook], tuple[()]]:
        return _no_hook, ()


def _no_hook() -> Hook:
    return _nothing


def _nothing(_layer: nn.Module, _args: object, _kwargs: object, _output: object) -> None:
    """Stand for a hook in a copy."""


def _first_tensor(output: object) -> Tensor | None:
    try:
        return blendable(output)
    except TypeError:
        return None


def _can_be_recorded(x: object, h: Tensor) -> bool:
    """Tell a training forward of one tensor per sample from everything else."""
    return (
        isinstance(x, Tensor)
        and h.requires_grad
        and min(x.ndim, h.ndim) > 1
        and len(x) == len(h) > 0
    )


def record_beside(
    recorder: Recorder, model: nn.Module, compute_loss: LossFunction, batch: Batch
) -> None:
    """Record a pass of its own, which the run does not notice.

    Args:
        recorder: One that records shadow passes.
        model: The model, outside DDP and ``torch.compile``.
        compute_loss: ``(model, batch)`` to the scalar training loss.
        batch: The batch of the pass.
    """
    assert recorder.records_shadow_passes
    parameters = [p for p in model.parameters() if p.requires_grad]
    with shadow_pass(model), torch.enable_grad():
        torch.autograd.grad(compute_loss(model, batch), parameters, allow_unused=True)


def finite_steps(observation: SiteObservation) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield input, output and gradient of each recorded step in which all are finite."""
    steps = zip(observation.inputs, observation.outputs, observation.gradients, strict=True)
    return (step for step in steps if all(bool(value.isfinite().all()) for value in step))
