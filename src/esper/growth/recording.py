"""Recording what reaches a site in ordinary training steps, without a trace in the run.

A forward hook clones a few samples of a site's input and output, a tensor hook the gradient of
the loss at that output. Neither returns anything, and samples are drawn from a generator of the
recorder's own, so that the run stays bit-identical.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, NamedTuple, Self

import torch
from torch import Tensor, nn

from esper.forward.host_output import blendable, with_first
from esper.forward.host_view import declared
from esper.growth.batch import Batch, LossFunction
from esper.seeds.batch_rows import num_rows, rows_of
from esper.seeds.fitting import Pass, Rule, device_of, fits_in_use, uneven
from esper.seeds.micro_batches import compared, looked, measure_loss, parts_of
from esper.seeds.shadow import in_shadow_pass, shadow_pass
from esper.state.host_parts import trainable_parameters
from esper.state.kernel import reference_tensor
from esper.state.layer_call import LayerCall

if TYPE_CHECKING:
    from esper.seeds.fitting import Cuts
    from esper.seeds.sameness import Groups

Hook = Callable[[nn.Module, object, object, object], object]

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
        gradients: The same samples of the gradient of the loss at the output, float32 at least,
            times the number of samples in the update that the step was part of, and without the
            scale of mixed precision: of each sample's own loss, where the update's is a mean.
        call: The first recorded call with all of its samples, where it had more than one
            argument; else None.
        obstacle: Why the latest call that could not be recorded could not; None before one.
        is_called: Whether any call was seen.
        max_rows: Rows (positions of samples) that a ranking is to look at, at most; None: as many
            as it likes.
    """

    site: str
    layer: nn.Module
    inputs: list[Tensor] = field(default_factory=list)
    outputs: list[Tensor] = field(default_factory=list)
    gradients: list[Tensor] = field(default_factory=list)
    call: LayerCall | None = None
    obstacle: str | None = None
    is_called: bool = False
    max_rows: int | None = None

    @property
    def silence(self) -> str:
        """Why nothing was recorded here, for people."""
        if not self.is_called:
            return (
                "no call in a training step was seen: it was not called, or in compiled code only"
            )
        return self.obstacle or "no gradient of the loss reached its output"

    @property
    def example(self) -> LayerCall | Tensor:
        """A call of the layer, to probe kernels with; at least one step has been recorded."""
        if self.call is not None:
            return self.call
        return next((x for x, _, _ in finite_steps(self)), self.inputs[0])

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

    Attributes:
        observations: What was recorded, by site.
        records_shadow_passes: As above.
        rules: What is known of passes that are recorded beside the run.
        beside: Sites of which the shadow pass under way is a recording; none while it is empty.
        leaves: Outputs of frozen layers in that pass, whose gradients are to be asked for.

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
        self.beside: frozenset[str] = frozenset()
        self.leaves: list[Tensor] = []
        self.rules: dict[str, Rule] = {}
        self._parts: _Parts | None = None
        self._capacity = dict.fromkeys(layers, max_samples)
        self._num_backwards = dict.fromkeys(layers, 0)
        self._num_settled = dict.fromkeys(layers, 0)
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

    def end_update(
        self, *, num_batches: int = 1, loss_scale: float = 1.0, share_kept: float = 1.0
    ) -> None:
        """Bring what was recorded since the last update to the units of that update's loss.

        Micro-batches are backwards of their own, each of a part of the update's loss. Their number
        is that of the backwards through the site that had fewest: a layer that is called twice
        in a forward has twice as many.

        Args:
            num_batches: Calls of the owner's step that the update was made of, at least 0.
            loss_scale: By what the losses were multiplied, above 0.
            share_kept: Share of the backwards, the last ones, that went into the update, in (0, 1].
        """
        fewest = min((n for n in self._num_backwards.values() if n), default=0)
        num_passes = max(1, num_batches, round(fewest * share_kept))
        for name, seen in self.observations.items():
            start = self._num_settled[name]
            num_thrown = round((len(seen.gradients) - start) * (1.0 - share_kept))
            for values in (seen.inputs, seen.outputs, seen.gradients):
                del values[start : start + num_thrown]
            for i in range(start, len(seen.gradients)):
                seen.gradients[i] = seen.gradients[i] * (num_passes / loss_scale)
            self._num_settled[name] = len(seen.gradients)
        self._num_backwards = dict.fromkeys(self._num_backwards, 0)

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
        if self._parts is not None:
            self._record_part(self._parts, observation, hooked, (x, h), batch_axis)
            return
        index = self._drawn(observation, x, h, len(h))
        if index is None:
            return
        num_kept = len(index)
        dtype = reference_tensor(observation.layer).dtype  # a forward under autocast has another
        kept_x, kept_h = (_kept(value, index, dtype) for value in (x, h))

        def after_backward(gradient: Tensor) -> None:
            self._num_backwards[observation.site] += 1
            if self._handles and self._room(observation) >= num_kept:
                observation.inputs.append(kept_x)
                observation.outputs.append(kept_h)
                gradient = gradient.detach().movedim(batch_axis, 0)
                observation.gradients.append(_wide(gradient.index_select(0, index)) * len(gradient))

        hooked.register_hook(after_backward)  # type: ignore[no-untyped-call] # torch leaves it untyped

    def _drawn(self, observation: SiteObservation, x: Tensor, h: Tensor, num: int) -> Tensor | None:
        """Draw which of ``num`` samples of a call are kept; None where none is."""
        per_sample = (x.numel() + 2 * h.numel()) // len(h)
        affordable = self._max_elements // max(1, per_sample)
        self._capacity[observation.site] = min(self._capacity[observation.site], affordable)
        num_kept = min(self._samples_per_step, self._room(observation), num)
        if num_kept < 1:
            return None
        drawn = torch.randperm(num, generator=self._generator)[:num_kept]
        return drawn.sort().values.to(h.device)

    @contextmanager
    def in_parts(self) -> Iterator[Callable[[int, int, int], None]]:
        """Record a pass that is made in parts as one; yield what says where the next part stands.

        What is drawn are the samples that a pass of the whole batch would have drawn, and the
        gradients are of the loss that the parts add up to. What fails leaves nothing recorded.
        """
        before = self._generator.get_state(), dict(self._capacity)
        parts = self._parts = _Parts()
        try:
            yield parts.begin
        except BaseException:
            self._generator.set_state(before[0])
            self._capacity = before[1]
            raise
        finally:
            self._parts = None
        for site, values in parts.put_together():
            seen = self.observations[site]
            self._num_backwards[site] += 1
            if self._handles and self._room(seen) >= len(values[0]):
                seen.inputs.append(values[0])
                seen.outputs.append(values[1])
                seen.gradients.append(values[2])

    def mark(self) -> Callable[[], None]:
        """Return what takes back whatever is recorded from now on, of a pass that failed."""
        state, capacity = self._generator.get_state(), dict(self._capacity)
        lengths = {name: len(seen.gradients) for name, seen in self.observations.items()}
        calls = {name: seen.call for name, seen in self.observations.items()}
        backwards = dict(self._num_backwards)

        def back() -> None:
            self._generator.set_state(state)
            self._capacity, self._num_backwards = dict(capacity), dict(backwards)
            for name, num in lengths.items():
                seen = self.observations[name]
                seen.call = calls[name]
                for values in (seen.inputs, seen.outputs, seen.gradients):
                    del values[num:]
            self.leaves.clear()

        return back

    def _record_part(
        self,
        parts: _Parts,
        observation: SiteObservation,
        hooked: Tensor,
        values: tuple[Tensor, Tensor],
        batch_axis: int,
    ) -> None:
        """Keep of a part of a call those samples that were drawn of the whole."""
        x, h = values
        site, rows = observation.site, parts.rows_of(len(h))
        call = parts.call(site)
        if call not in parts.drawn:
            parts.drawn[call] = self._drawn(observation, x, h, rows.num)
        drawn = parts.drawn[call]
        if drawn is None:
            return
        index = drawn[(drawn >= rows.start) & (drawn < rows.stop)] - rows.start
        dtype = reference_tensor(observation.layer).dtype
        kept_x, kept_h = (_kept(value, index, dtype) for value in (x, h))

        def after_backward(gradient: Tensor) -> None:
            gradient = gradient.detach().movedim(batch_axis, 0)
            chosen = _wide(gradient.index_select(0, index)) * rows.num
            parts.add(call, (kept_x, kept_h, chosen))

        hooked.register_hook(after_backward)  # type: ignore[no-untyped-call] # torch leaves it untyped

    def _room(self, observation: SiteObservation) -> int:
        return self._capacity[observation.site] - observation.num_samples


class _Rows(NamedTuple):
    """Where the rows of a part stand among those of the whole call."""

    start: int
    stop: int
    num: int


_Values = tuple[Tensor, Tensor, Tensor]


class _Parts:
    """What is recorded of a pass that is made in parts.

    Attributes:
        drawn: Which samples of each call are kept, by its site and its number there.
    """

    def __init__(self) -> None:
        self.drawn: dict[tuple[str, int], Tensor | None] = {}
        self._pieces: dict[tuple[str, int], list[_Values]] = {}  # in the order of the backward
        self._calls: dict[str, int] = {}
        self._part = _Rows(0, 0, 0)
        self._num_parts = 0

    def begin(self, start: int, stop: int, num: int) -> None:
        """Say which samples of the batch the next part has."""
        self._part, self._calls = _Rows(start, stop, num), {}
        self._num_parts += 1

    def rows_of(self, num_rows: int) -> _Rows:
        """Return where the rows of a call stand: each sample has equally many, side by side."""
        start, stop, num = self._part
        each = num_rows // (stop - start)
        return _Rows(start * each, start * each + num_rows, num * each)

    def call(self, site: str) -> tuple[str, int]:
        """Return the name of a site's next call in the part."""
        number = self._calls.get(site, 0)
        self._calls[site] = number + 1
        return site, number

    def add(self, call: tuple[str, int], values: _Values) -> None:
        """Keep what a part has of a call."""
        self._pieces.setdefault(call, []).append(values)

    def put_together(self) -> Iterator[tuple[str, _Values]]:
        """Yield input, output and gradient of each call that every part has made."""
        for (site, _), pieces in self._pieces.items():
            if len(pieces) == self._num_parts:
                x, h, gradient = (torch.cat(values) for values in zip(*pieces, strict=True))
                yield site, (x, h, gradient)


def _wide(gradient: Tensor) -> Tensor:
    """Return a gradient in float32 at least: a product of half precision overflows."""
    return gradient.to(torch.promote_types(gradient.dtype, torch.float32))


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
    ) -> object:
        """Record a call; return an output only where a shadow pass needs another one."""
        if torch.compiler.is_compiling() or not self._is_wanted():
            return None  # what is compiled is recorded beside
        seen, call = self._observation, declared(layer, LayerCall(args, kwargs))
        h = _first_tensor(output)
        seen.is_called, given = True, None
        if h is not None and in_shadow_pass() and torch.is_grad_enabled() and not h.requires_grad:
            leaf = h.detach().requires_grad_()  # what a frozen layer gives has no gradient
            self._recorder.leaves.append(leaf)
            h = leaf.clone()  # what follows may work in place
            given = h if isinstance(output, Tensor) else with_first(output, h)
        obstacle = _obstacle(call.x, h)
        if h is None or obstacle is not None:
            seen.obstacle = obstacle
            return None
        self._keep(layer, call, h)
        return given

    def _is_wanted(self) -> bool:
        recorder = self._recorder
        if not in_shadow_pass():
            return True
        return recorder.records_shadow_passes and self._observation.site in recorder.beside

    def _keep(self, layer: nn.Module, call: LayerCall, h: Tensor) -> None:
        axis = 0 if getattr(layer, "batch_first", True) else call.x.ndim - 2
        self._recorder.record(self._observation, call.x, h, batch_axis=axis)
        if len(call.args) + len(call.kwargs) > 1 and self._observation.call is None:
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


def _obstacle(x: object, h: Tensor | None) -> str | None:
    """Say what keeps a call from being recorded; None for a training forward, a row a sample."""
    if not torch.is_grad_enabled():
        return "it was called without gradients only (torch.no_grad, or an evaluation)"
    if h is None:
        return "its output is no floating tensor"
    if not h.requires_grad:
        return "it is frozen, and nothing before it is trainable, so no gradient reaches its output"
    if not isinstance(x, Tensor) or min(x.ndim, h.ndim) < 2 or not len(x) == len(h) > 0:
        return "its input and its output are not one tensor each with a row a sample"
    return None


def record_beside(
    recorder: Recorder,
    model: nn.Module,
    compute_loss: LossFunction,
    batch: Batch,
    sites: Iterable[str] | None = None,
) -> None:
    """Record a pass of its own, which the run does not notice.

    What a frozen layer gives gets a gradient there, which an ordinary step has no use for.

    Args:
        recorder: One that records shadow passes.
        model: The model, outside DDP and ``torch.compile``.
        compute_loss: ``(model, batch)`` to the scalar training loss.
        batch: The batch of the pass.
        sites: Of which sites; None: of all.
    """
    assert recorder.records_shadow_passes
    undo = recorder.mark()
    fits_in_use().run(
        lambda: _record(recorder, model, compute_loss, batch, sites),
        lambda: Pass(
            work="ranking",
            batch=batch,
            device=device_of(model),
            parted=lambda cuts, rule: _record_parts(
                recorder, model, compute_loss, batch, sites, cuts, rule
            ),
            measure=lambda num, rule: _measure(recorder, model, compute_loss, batch, num, rule),
            rules=recorder.rules,
            undo=undo,
        ),
    )
    recorder.end_update()


def _record(
    recorder: Recorder,
    model: nn.Module,
    compute_loss: LossFunction,
    batch: Batch,
    sites: Iterable[str] | None,
) -> None:
    """Record a pass on the whole batch."""
    parameters = trainable_parameters(model)
    recorder.beside = frozenset(recorder.observations if sites is None else sites)
    apart = shadow_pass(model, functions=(compute_loss,), values=(batch,))
    try:
        with apart, torch.enable_grad():
            loss = compute_loss(model, batch)
            _gradients(loss, [*parameters, *recorder.leaves])
    finally:
        recorder.beside = frozenset()
        recorder.leaves.clear()


def _record_parts(
    recorder: Recorder,
    model: nn.Module,
    compute_loss: LossFunction,
    batch: Batch,
    sites: Iterable[str] | None,
    cuts: Cuts,
    rule: Rule,
) -> None:
    """Record a pass in parts as if it were one."""
    parameters, num = trainable_parameters(model), cuts[-1][1]
    recorder.beside = frozenset(recorder.observations if sites is None else sites)
    apart = shadow_pass(model, functions=(compute_loss,), values=(batch,))
    try:
        with recorder.in_parts() as begin, apart, torch.enable_grad():
            for part in parts_of(model, compute_loss, cuts, rule):
                begin(*part.rows, num)
                with part.within:
                    loss = compute_loss(model, rows_of(batch, *part.rows)) * part.share
                    _gradients(loss, [*parameters, *recorder.leaves])
                recorder.leaves.clear()
    finally:
        recorder.beside = frozenset()
        recorder.leaves.clear()


def _gradients(loss: Tensor, inputs: list[Tensor]) -> None:
    if loss.requires_grad and inputs:
        torch.autograd.grad(loss, inputs, allow_unused=True)


def _measure(
    recorder: Recorder,
    model: nn.Module,
    compute_loss: LossFunction,
    batch: Batch,
    num: int,
    rule: Rule,
) -> None:
    """Learn whether a loss adds up, and whether what is recorded of parts is what of the whole."""
    measure_loss(model, compute_loss, batch, num, rule)
    if rule.against:
        return
    layers = {name: seen.layer for name, seen in recorder.observations.items()}

    def look(sample: Batch) -> str:
        cuts = uneven(num_rows(sample), rule)

        def recorded(record: Callable[[Recorder], None]) -> Groups:
            with Recorder(layers, records_shadow_passes=True) as other:
                record(other)
            return _figures(other)

        return compared(
            model,
            lambda: recorded(lambda r: _record(r, model, compute_loss, sample, None)),
            lambda: recorded(
                lambda r: _record_parts(r, model, compute_loss, sample, None, cuts, rule)
            ),
        )

    rule.against = looked(look, batch, num, rule)


def _figures(recorder: Recorder) -> Groups:
    return [
        figures
        for seen in recorder.observations.values()
        for figures in (seen.inputs, seen.outputs, seen.gradients)
    ]


def finite_steps(observation: SiteObservation) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield input, output and gradient of each recorded step in which all are finite."""
    steps = zip(observation.inputs, observation.outputs, observation.gradients, strict=True)
    return (step for step in steps if all(map(_is_finite, step)))


def _is_finite(value: Tensor) -> bool:
    """Return whether all elements are; by the extremes, a tenth of the time that a mask takes."""
    plain = torch.view_as_real(value) if value.is_complex() else value
    return plain.numel() == 0 or bool(torch.stack(plain.aminmax()).isfinite().all())
