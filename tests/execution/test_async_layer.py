"""The asynchronous convolutional layer: the numbers of the synchronous one, in an order that holds.

On a machine without an accelerator its schedules are recorded (`recording_streams`) and checked
by torch's own detector of data races; on one with, the device itself is asked.
"""

import copy
import pickle
import weakref

import pytest
import torch
from recording_streams import CPU, Launch, Record, RecordingStreams, races, unkept, without
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from esper.execution.async_kasmina_conv2d_layer import AsyncKasminaConv2dLayer
from esper.execution.host_class import release
from esper.execution.kasmina_conv2d_layer import KasminaConv2dLayer
from esper.streams.stream_manager import StreamManager

SEEDS = {
    "adds": {"seed_idx": 0, "alpha": 0.5},
    "replaces": {"seed_idx": 1, "alpha": 0.25, "mode": "replace"},
    "serial": {"seed_idx": 2, "alpha": 0.125, "position": "serial"},
}
ALL = tuple(SEEDS)


def draw(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(5))


def make_kernel(name):
    """Return a kernel of two convolutions for the host of `make_layer`."""
    if name == "serial":
        return nn.Sequential(nn.Conv2d(4, 3, 1), nn.Tanh(), nn.Conv2d(3, 4, 1))
    return nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.Tanh(), nn.Conv2d(3, 4, 1, stride=2))


def make_layer(family, names=ALL, guard="off", device=None, dtype=None):
    """Return a layer with the named seeds; equal weights for every family."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        layer = family(2, 4, 3, stride=2, padding=1, num_seeds=4).to(device=device, dtype=dtype)
        for name in names:
            kernel = make_kernel(name).to(device=device, dtype=dtype)
            example = draw(2, 2, 7, 7).to(device=device, dtype=dtype)
            layer.graft(kernel=kernel, guard=guard, example=example, **SEEDS[name])
    return layer


def on_recorded(layer, streams):
    layer.stream_manager = StreamManager(layer.num_seeds, streams)
    return layer


def results(layer, x):
    """Return the output, and the gradients of a loss to the input and all parameters."""
    x = x.clone().requires_grad_()
    y = layer(x)
    return [y, *torch.autograd.grad(y.square().sum(), [x, *layer.parameters()])]


def assert_equal(left, right):
    assert len(left) == len(right)
    assert all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


def update_(module):
    """Do what SGD does, on the current stream."""
    with torch.no_grad():
        for p in module.parameters():
            if p.grad is not None:
                p.sub_(p.grad)


# ---- the same numbers


@pytest.mark.parametrize("is_recorded", [False, True])
@pytest.mark.parametrize("guard", ["always", "off"])
@pytest.mark.parametrize("names", [(), *((name,) for name in ALL), ALL])
def test_numbers_are_those_of_the_synchronous_layer(names, guard, is_recorded):
    """Outputs and all gradients are equal bit for bit, inline and on side streams."""
    layer = make_layer(AsyncKasminaConv2dLayer, names, guard)
    if is_recorded:
        on_recorded(layer, RecordingStreams())
    x = draw(2, 2, 7, 7)
    assert_equal(results(layer, x), results(make_layer(KasminaConv2dLayer, names, guard), x))
    assert layer.get_stats()["streams"]["total_usage"] == (len(names) if is_recorded else 0)


def test_a_dormant_layer_runs_the_hosts_function():
    """Without a contributing seed the forward is nn.Conv2d's own, with no stream asked for."""
    layer = make_layer(AsyncKasminaConv2dLayer, ())
    layer.telemetry_enabled = False
    assert type(layer).forward is nn.Conv2d.forward


def test_a_convolution_is_taken_as_it_is():
    """By constructor and by `adopt_as` an existing convolution becomes the layer, and back."""
    for take in (
        lambda host: AsyncKasminaConv2dLayer(2, 4, 3, original_layer=host),
        lambda host: AsyncKasminaConv2dLayer.adopt_as(host, name="site"),
    ):
        host = nn.Conv2d(2, 4, 3, dilation=2)
        layer = take(host)
        assert layer is host
        assert isinstance(layer, AsyncKasminaConv2dLayer)
        assert type(release(layer)) is nn.Conv2d


def test_a_cpu_says_that_it_runs_inline():
    """The statistics say that nothing overlaps, and that no gradient was waited for."""
    layer = make_layer(AsyncKasminaConv2dLayer)
    results(layer, draw(2, 2, 7, 7))
    stats = layer.get_stats()
    assert stats["streams"]["is_inline"]
    assert stats["streams"]["num_streams"] == 4
    assert stats["gradient_sync"]["sync_count"] == 0
    assert stats["seed_stats"]["active_seeds"] == 3


@pytest.mark.slow
def test_compiled_it_is_one_graph_without_streams():
    """torch.compile takes the layer whole, with the numbers that it has eagerly."""
    layer = on_recorded(make_layer(AsyncKasminaConv2dLayer), RecordingStreams())
    x = draw(2, 2, 7, 7)
    expected = results(layer, x)
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    x = x.requires_grad_()
    y = compiled(x)
    assert_equal([y, *torch.autograd.grad(y.square().sum(), [x, *layer.parameters()])], expected)


def test_transforms_of_torch_func_run_inline():
    """Under vmap there is no stream, and the numbers are those of the calls one by one."""
    x = draw(3, 2, 2, 7, 7)
    layer = make_layer(AsyncKasminaConv2dLayer)
    expected = torch.stack([layer(each) for each in x])
    with RecordingStreams() as streams:
        y = torch.func.vmap(on_recorded(layer, streams))(x)
    torch.testing.assert_close(y, expected, rtol=1e-6, atol=1e-6)
    assert streams.waits() == []


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_copy_has_the_seeds_and_streams_of_its_own(copied):
    """A copy made between forward and backward works, and shares no stream with the original."""
    layer, x = make_layer(AsyncKasminaConv2dLayer), draw(2, 2, 7, 7)
    streams = RecordingStreams()
    loss = on_recorded(layer, streams)(x).sum()
    twin = copied(layer)
    assert_equal(results(twin, x), results(make_layer(KasminaConv2dLayer), x))
    assert twin.get_stats()["streams"] == StreamManager(4).get_stats()
    loss.backward()
    assert len(layer.pending_grads) == 3
    assert twin.pending_grads == []


# ---- schedules


class Model(nn.Module):
    """A layer, with or without a convolution before it."""

    def __init__(self, layer, stem=None):
        super().__init__()
        self.stem, self.layer = stem, layer

    def forward(self, x):
        x = x * 2  # made on the current stream, and released there
        return self.layer(x if self.stem is None else self.stem(x)).square().sum()


def first_layer(streams):
    """Parallel kernels in training, where the input takes no gradient."""
    return Model(on_recorded(make_layer(AsyncKasminaConv2dLayer, ("adds", "replaces")), streams))


def inner_layer(streams):
    """Frozen kernels of both positions, with something trainable before them."""
    layer = on_recorded(make_layer(AsyncKasminaConv2dLayer), streams)
    for seed_idx in range(3):
        layer.seed_kernel(seed_idx).requires_grad_(False)
    return Model(layer, nn.Conv2d(2, 2, 1))


def guarded_layer(streams):
    """Trained kernels of both positions under the guard, with something trainable before them."""
    layer = make_layer(AsyncKasminaConv2dLayer, guard="always")
    return Model(on_recorded(layer, streams), nn.Conv2d(2, 2, 1))


def two_updates(make_model):
    """Record two updates; in the second, gradients are added to those of a first micro-batch."""
    streams = RecordingStreams()
    model = make_model(streams)
    with streams:
        for num_batches in (1, 2):
            model.zero_grad()
            for _ in range(num_batches):
                streams.backward(model(draw(2, 2, 7, 7)))
            update_(model)
    return streams


@pytest.mark.parametrize("make_model", [first_layer, inner_layer, guarded_layer])
def test_updates_do_not_race(make_model):
    """No access is out of order, in forward, backward or update, and no memory goes too early."""
    streams = two_updates(make_model)
    assert races(streams.schedule) == []
    assert unkept(streams.schedule) == []


@pytest.mark.parametrize("guard", ["always", "step"])
def test_kernels_of_one_form_keep_their_streams(guard):
    """Kernels that would run as one elsewhere run side by side here, and nothing races."""

    def alike(streams):
        layer = make_layer(AsyncKasminaConv2dLayer, ())
        layer.enable_step_guard()
        for i in range(4):
            layer.graft(i, make_kernel("adds"), alpha=0.5, guard=guard, example=draw(2, 2, 7, 7))
        return Model(on_recorded(layer, streams), nn.Conv2d(2, 2, 1))

    streams = two_updates(alike)
    assert races(streams.schedule) == []
    assert unkept(streams.schedule) == []
    launched = {entry.stream for entry in streams.schedule if isinstance(entry, Launch)}
    assert len(launched) == 5
    wait = streams.waits(by=("layer",))[0]
    assert races(without(streams.schedule, wait))


def one_update(make_model):
    streams = RecordingStreams()
    model = make_model(streams)
    with streams:
        streams.backward(model(draw(2, 2, 7, 7)))
        update_(model)
    assert races(streams.schedule) == []
    assert unkept(streams.schedule) == []
    return streams


CASES = {first_layer: 8, inner_layer: 12}
"""Models, and how many waits their update has; no more than it needs."""


@pytest.mark.parametrize(
    ("make_model", "n"), [(make, n) for make, num in CASES.items() for n in range(num)]
)
def test_every_wait_of_an_update_is_needed(make_model, n):
    """Control: without any one of the waits, of the layer or of autograd, there is a race."""
    streams = one_update(make_model)
    assert len(streams.waits()) == CASES[make_model]
    assert races(without(streams.schedule, streams.waits()[n]))


@pytest.mark.parametrize("n", range(6))
def test_every_wait_of_a_guarded_layer_is_needed(n):
    """Control: the same for the layer's own waits around trained kernels of both positions."""
    streams = one_update(guarded_layer)
    assert len(streams.waits(by=("layer",))) == 6
    assert races(without(streams.schedule, streams.waits(by=("layer",))[n]))


@pytest.mark.parametrize("n", range(6))
def test_every_tensor_that_crosses_is_kept_for_a_reason(n):
    """Control: without any one of the keeps, memory could be reused while it is read."""
    streams = one_update(guarded_layer)
    assert len(streams.keeps()) == 6
    assert unkept(without(streams.schedule, streams.keeps()[n]))


def test_kernels_do_not_queue_behind_the_host_or_each_other():
    """Parallel kernels wait for what was launched before the host, serial ones for the host."""
    streams = RecordingStreams()
    layer = on_recorded(make_layer(AsyncKasminaConv2dLayer), streams)
    with streams:
        layer(draw(2, 2, 7, 7))
    schedule = streams.schedule
    launched = [i for i, e in enumerate(schedule) if isinstance(e, Launch)]
    host = next(i for i in launched if schedule[i].operator == "aten::convolution")
    recorded = {e.event: i for i, e in enumerate(schedule) if isinstance(e, Record)}
    begins = [recorded[schedule[i].event] for i in streams.waits()[::2]]
    assert begins[0] == begins[1] < host < begins[2] < launched[launched.index(host) + 1]
    assert len({e.stream for e in schedule if isinstance(e, Launch)}) == 4


class Failing(nn.Module):
    """Launches a convolution and then breaks, once it is told to."""

    def __init__(self):
        super().__init__()
        self.conv, self.fails = nn.Conv2d(2, 4, 3, stride=2, padding=1), False

    def forward(self, x):
        y = self.conv(x)
        if self.fails:
            raise RuntimeError("broken")
        return y


@pytest.mark.parametrize("guard", ["always", "off"])
def test_a_kernel_that_raises_costs_its_contribution_and_no_race(guard):
    """The output is the host's; what the kernel had launched ends before its weights change."""
    layer, x, kernel = make_layer(AsyncKasminaConv2dLayer, ()), draw(2, 2, 7, 7), Failing()
    layer.graft(0, kernel, alpha=0.5, guard=guard, example=x)
    kernel.fails = True
    with RecordingStreams() as streams:
        y = on_recorded(layer, streams)(x)
        kernel.conv.weight.detach().zero_()
    assert torch.equal(y, layer.default_layer(x))
    assert races(streams.schedule) == []
    assert races(without(streams.schedule, streams.waits()[-1]))


def test_a_shadow_pass_uses_no_stream():
    """An audition stays where the model's own work is, and its gradients are nobody's to await."""
    layer, kernel = make_layer(AsyncKasminaConv2dLayer, ()), make_kernel("adds")
    streams = RecordingStreams()
    with streams, on_recorded(layer, streams).shadow(0, kernel):
        loss = layer(draw(2, 2, 7, 7)).sum()
        torch.autograd.grad(loss, list(kernel.parameters()))
    assert streams.waits() == []
    assert layer.pending_grads == []


# ---- nothing stalls


def test_evaluation_leaves_nothing_to_wait_for():
    """Forwards that no backward can follow, and those that none does, leave nothing pending."""
    layer = on_recorded(make_layer(AsyncKasminaConv2dLayer), RecordingStreams())
    for _ in range(3):
        with torch.no_grad():
            layer(draw(2, 2, 7, 7))
        layer(draw(2, 2, 7, 7))
    layer.synchronize_gradients()
    assert layer.pending_grads == []
    assert layer.get_stats()["gradient_sync"]["sync_count"] == 0


def test_only_events_that_were_recorded_are_waited_for():
    """Over evaluations, skipped backwards and updates, every wait has its record before it."""
    streams = RecordingStreams()
    model = guarded_layer(streams)
    with streams:
        for does_update in (False, True, False, True):
            with torch.no_grad():
                model(draw(2, 2, 7, 7))
            loss = model(draw(2, 2, 7, 7))
            if does_update:
                streams.backward(loss)
                model.layer.synchronize_gradients()
                update_(model)
    schedule = streams.schedule
    for i in streams.waits():
        assert any(isinstance(e, Record) and e.event == schedule[i].event for e in schedule[:i])
    assert model.layer.get_stats()["gradient_sync"]["sync_count"] == 2


def test_what_is_pending_does_not_grow():
    """However many updates nobody synchronizes, there is one future a seed."""
    layer = on_recorded(make_layer(AsyncKasminaConv2dLayer), RecordingStreams())
    for _ in range(5):
        results(layer, draw(2, 2, 7, 7))
    assert len(layer.pending_grads) == 3


def test_gradients_are_read_beside_the_stream_of_the_backward():
    """`synchronize_gradients` orders an update after a backward that was called elsewhere."""
    streams = RecordingStreams()
    model = first_layer(streams)
    with streams:
        loss, aside = model(draw(2, 2, 7, 7)), streams.side(CPU)
        with streams.on(aside):
            streams.backward(loss)
        num_waits = len(streams.waits())
        model.layer.synchronize_gradients()
        update_(model)
    assert races(streams.schedule) == []
    added = streams.waits()[num_waits:]
    assert races([e for i, e in enumerate(streams.schedule) if i not in added])


class Shared(nn.Module):
    """Calls a layer twice, optionally under gradient checkpointing."""

    def __init__(self, layer, reentrant=None):
        super().__init__()
        self.layer, self.reentrant = layer, reentrant

    def run(self, x):
        if self.reentrant is None:
            return self.layer(x)
        return checkpoint(self.layer, x, use_reentrant=self.reentrant)

    def forward(self, x):
        return self.run(x) + self.run(2 * x)


@pytest.mark.parametrize("reentrant", [None, False, True])
def test_shared_and_checkpointed_layers_go_through(reentrant):
    """Called twice a step, recomputed or not, the numbers are the synchronous layer's."""
    streams, x = RecordingStreams(), draw(2, 2, 7, 7)
    layers = (make_layer(AsyncKasminaConv2dLayer), make_layer(KasminaConv2dLayer))
    on_recorded(layers[0], streams)
    found = []
    for layer in layers:
        given = x.clone().requires_grad_()
        y = Shared(layer, reentrant)(given)
        y.square().sum().backward()
        found.append([y, given.grad, *(p.grad for p in layer.parameters())])
    assert_equal(*found)
    assert len(layers[0].pending_grads) == 3


class _PeakBytes(TorchDispatchMode):
    """Counts the bytes of storages that were made under it and are alive."""

    def __init__(self):
        super().__init__()
        self.alive, self.peak, self._known = 0, 0, weakref.WeakSet()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        before = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if _has(t)}
        outputs = func(*args, **(kwargs or {}))
        for t in tree_leaves(outputs):
            if _has(t) and t.untyped_storage().data_ptr() not in before:
                self._count(t)
        return outputs

    def _count(self, tensor):
        num_bytes = tensor.untyped_storage().nbytes()
        self.alive += num_bytes
        self.peak = max(self.peak, self.alive)
        weakref.finalize(tensor.untyped_storage(), self._release, num_bytes)

    def _release(self, num_bytes):
        self.alive -= num_bytes


def _has(value):
    return isinstance(value, torch.Tensor)


def peak_bytes(layer, x):
    with _PeakBytes() as mode:
        layer(x)
    return mode.peak


def test_buffers_are_at_most_twice_the_output():
    """Beyond what the synchronous layer holds at once there are at most two outputs' bytes."""
    x = draw(2, 2, 7, 7)
    layer = on_recorded(make_layer(AsyncKasminaConv2dLayer), RecordingStreams())
    output = layer(x)
    extra = peak_bytes(layer, x) - peak_bytes(make_layer(KasminaConv2dLayer), x)
    assert extra <= 2 * output.untyped_storage().nbytes()


# ---- on a device

on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def on_device(family, guard="always"):
    """Return a layer on the device, in float64: no TF32, and sums that agree closely."""
    return make_layer(family, guard=guard, device="cuda", dtype=torch.float64)


def trained(layer, x):
    """Run a forward and a backward; return output and gradients."""
    layer.zero_grad()
    y = layer(x)
    y.square().sum().backward()
    return [y.detach(), *(p.grad for p in layer.parameters())]


def assert_near(left, right):
    for a, b in zip(left, right, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize("guard", ["always", "off"])
def test_on_a_device_numbers_are_those_of_the_synchronous_layer(guard):
    """Over many calls in a row, with no host wait between them, none reads what is not there."""
    x = draw(8, 2, 65, 65).to("cuda", torch.float64)
    layer = on_device(AsyncKasminaConv2dLayer, guard)
    expected = trained(on_device(KasminaConv2dLayer, guard), 1.0 * x)
    found = [trained(layer, 1.0 * x) for _ in range(20)]
    for each in found:
        assert_near(each, expected)
    assert not layer.get_stats()["streams"]["is_inline"]


@pytest.mark.gpu
@on_gpu
def test_on_a_device_the_host_waits_for_nothing():
    """Forward, backward and synchronization pass where every host wait is an error."""
    x = draw(8, 2, 65, 65).to("cuda", torch.float64)
    layer = on_device(AsyncKasminaConv2dLayer)
    trained(layer, x)
    torch.cuda.set_sync_debug_mode("error")
    try:
        trained(layer, x)
        layer.synchronize_gradients()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert layer.get_stats()["gradient_sync"]["sync_count"] == 1


@pytest.mark.gpu
@on_gpu
def test_on_a_device_a_graph_can_be_captured():
    """Forward and backward replay from a CUDA graph, side streams included, on other numbers."""
    x = draw(8, 2, 65, 65).to("cuda", torch.float64)
    layer, warm_up = on_device(AsyncKasminaConv2dLayer), torch.cuda.Stream()
    warm_up.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(warm_up):
        for _ in range(3):
            trained(layer, x)
        layer.zero_grad()
    torch.cuda.current_stream().wait_stream(warm_up)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = trained(layer, x)
    x.copy_(2 * x)
    graph.replay()
    assert_near(captured, trained(on_device(KasminaConv2dLayer), x))


@pytest.mark.gpu
@on_gpu
def test_on_a_device_buffers_are_at_most_twice_the_output():
    """The device's memory peaks at most two outputs above the synchronous layer's."""
    x = draw(8, 2, 65, 65).to("cuda", torch.float64)
    peaks = []
    for family in (KasminaConv2dLayer, AsyncKasminaConv2dLayer):
        layer = on_device(family)
        with torch.no_grad():
            layer(x)
            torch.cuda.synchronize()
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            y = layer(x)
            torch.cuda.synchronize()
        peaks.append(torch.cuda.max_memory_allocated() - before)
    assert peaks[1] - peaks[0] <= 2 * y.untyped_storage().nbytes()
