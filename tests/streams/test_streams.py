"""Side streams: who gets which, convolutions on them, and gradients that are waited for."""

import copy
import pickle

import pytest
import torch
from recording_streams import CPU, Launch, RecordingStreams, races, unkept, without
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from esper.contracts.errors import AsyncExecutionError, GradientSyncError
from esper.streams.async_conv2d_kernel import AsyncConv2dKernel
from esper.streams.gradient_sync import GradientSynchronizer
from esper.streams.stream_manager import StreamManager

SETTINGS = [
    {},
    {"stride": 2, "padding": 1},
    {"padding": "same", "dilation": (2, 1)},
    {"stride": (1, 2), "padding": (0, 1), "groups": 2},
]


def conv_inputs(groups=1):
    """Return an input, a weight and a bias, all of which require a gradient."""
    shapes = ((2, 4, 7, 6), (6, 4 // groups, 3, 3), (6,))
    return [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]


# ---- AsyncConv2dKernel


@pytest.mark.parametrize("settings", SETTINGS)
def test_an_asynchronous_convolution_is_the_synchronous_one(settings):
    """Output and gradients are those of F.conv2d, bit for bit, whatever the settings."""
    given = conv_inputs(settings.get("groups", 1))
    y, _ = AsyncConv2dKernel.apply_async(*given, **settings)
    expected = F.conv2d(*given, **settings)
    assert torch.equal(y, expected)
    pairs = zip(
        torch.autograd.grad(y.square().sum(), given),
        torch.autograd.grad(expected.square().sum(), given),
        strict=True,
    )
    assert all(torch.equal(a, b) for a, b in pairs)


def test_an_asynchronous_convolution_can_be_differentiated_twice():
    """Autograd follows the ordinary operation: first and second derivatives are right."""
    x, weight, bias = conv_inputs()
    given = [x[:1, :, :4, :4].detach().requires_grad_(), weight, bias]

    def convolve(*tensors):
        return AsyncConv2dKernel.apply_async(*tensors, padding=1)[0]

    assert torch.autograd.gradcheck(convolve, given, fast_mode=True)
    assert torch.autograd.gradgradcheck(convolve, given, fast_mode=True)


def test_a_given_function_is_what_runs():
    """`kernel_fn` gets tensors and settings, and its output is the result."""
    x, weight, _ = conv_inputs()

    def twice(x, weight, bias, **settings):
        return 2 * F.conv2d(x, weight, bias, **settings)

    y, _ = AsyncConv2dKernel.apply_async(x, weight, None, twice, stride=2)
    assert torch.equal(y, 2 * F.conv2d(x, weight, stride=2))


def test_a_function_that_returns_nothing_is_refused():
    """A `kernel_fn` written to fill an output, as the specification's, is told what to do."""
    x, weight, bias = conv_inputs()
    with pytest.raises(AsyncExecutionError, match="return the output"):
        AsyncConv2dKernel.apply_async(x, weight, bias, lambda *_, **__: None)


def test_a_stream_of_another_device_is_refused():
    """A stream that cannot run the convolution is named beside the input's device."""
    streams = RecordingStreams()
    elsewhere = streams.side(torch.device("meta"))
    with pytest.raises(ValueError, match="expected one of cpu, where the input is; found meta"):
        AsyncConv2dKernel.apply_async(*conv_inputs(), stream=elsewhere, streams=streams)


# ---- schedules


def conv_schedule():
    """Record two convolutions on side streams, their use, a backward and an update."""
    given = [t.float().detach().requires_grad_() for t in conv_inputs()]
    with RecordingStreams() as streams:
        weight, bias = (1.0 * t for t in given[1:])  # made here, and gone before the backward is
        x = 1.0 * given[0]
        one, _ = AsyncConv2dKernel.apply_async(x, weight, bias, streams=streams)
        two, _ = AsyncConv2dKernel.apply_async(x, weight, bias, streams=streams)
        streams.backward((one * two).sum())
        with torch.no_grad():
            for t in given:
                t.sub_(t.grad)
    return streams


def test_convolutions_on_side_streams_do_not_race():
    """Forward, backward and update access no tensor out of order, and none is released early."""
    schedule = conv_schedule().schedule
    assert len({e.stream for e in schedule if isinstance(e, Launch)}) == 3
    assert races(schedule) == []
    assert unkept(schedule) == []


@pytest.mark.parametrize("n", range(8))
def test_every_wait_of_a_convolution_is_needed(n):
    """Control: without any one of the waits, forward or backward, torch's detector finds a race."""
    streams = conv_schedule()
    assert len(streams.waits()) == 8
    assert races(without(streams.schedule, streams.waits()[n]))


@pytest.mark.parametrize("n", range(8))
def test_every_tensor_of_a_convolution_is_kept_for_a_reason(n):
    """Control: without any one of the keeps, memory could be reused while it is read."""
    streams = conv_schedule()
    assert len(streams.keeps()) == 8
    assert unkept(without(streams.schedule, streams.keeps()[n]))


def test_work_that_raises_is_waited_for():
    """What a failing convolution has launched ends before the caller changes what it reads."""
    weight = torch.ones(6, 4, 3, 3)

    def fail(x, weight, bias, **settings):
        F.conv2d(x, weight)
        raise MemoryError

    with RecordingStreams() as streams:
        x = torch.ones(2, 4, 7, 6) * 2
        with pytest.raises(MemoryError):
            AsyncConv2dKernel.apply_async(x, weight, None, fail, streams=streams)
        weight.zero_()
    assert races(streams.schedule) == []
    assert races(without(streams.schedule, streams.waits()[-1]))


# ---- StreamManager


def test_a_seed_keeps_its_stream():
    """Asking again gives the same stream, whoever asked in between."""
    manager = StreamManager(2, RecordingStreams())
    first = manager.get_stream(0, CPU)
    manager.get_stream(1, CPU)
    assert manager.get_stream(0, CPU) is first


def test_seeds_are_spread_by_load_and_not_by_index():
    """Seeds 0 and 2 of two streams, which a remainder would put together, run side by side."""
    manager = StreamManager(2, RecordingStreams())
    assert manager.get_stream(0, CPU) is not manager.get_stream(2, CPU)


def test_seeds_take_turns():
    """Seeds that ask one after the other get the streams one after the other."""
    manager = StreamManager(3, RecordingStreams())
    first, second = ([manager.get_stream(i, CPU) for i in seeds] for seeds in (range(3), (5, 6, 7)))
    assert len(set(first)) == 3
    assert first == second


def test_each_device_has_streams_of_its_own():
    """A seed that moved gets a stream there, and the load is counted by device."""
    manager, elsewhere = StreamManager(2, RecordingStreams()), torch.device("meta")
    first = manager.get_stream(0, elsewhere)
    assert first.device == elsewhere
    assert manager.get_stream(0, CPU).device == CPU
    assert manager.get_stream(1, CPU) is not manager.get_stream(0, CPU)
    assert manager.get_stats()["stream_usage"] == [3, 1]


def test_stream_statistics_count_requests():
    """The specification's keys: how many streams there are, and who was asked for how often."""
    manager = StreamManager(2, RecordingStreams())
    for seed_idx in (0, 1, 0):
        manager.get_stream(seed_idx, CPU)
    assert manager.get_stats() == {
        "num_streams": 2,
        "stream_usage": [2, 1],
        "total_usage": 3,
        "is_inline": False,
    }


def test_a_cpu_runs_inline_and_says_so():
    """On the CPU there is one stream, a context that changes nothing, and the statistics say so."""
    manager = StreamManager()
    with manager.get_stream(0, CPU), manager.get_stream(1, CPU):
        assert torch.equal(torch.ones(2) + 1, torch.full((2,), 2.0))
    manager.synchronize_all()
    assert manager.get_stats()["is_inline"]


@pytest.mark.parametrize("argument", [{"num_streams": 0}, {"seed_idx": -1}])
def test_numbers_out_of_range_are_refused(argument):
    """No stream at all, and a seed before the first, are mistakes that are named."""
    with pytest.raises(ValueError, match=next(iter(argument))):
        StreamManager(argument.get("num_streams", 1)).get_stream(argument.get("seed_idx", 0))


def test_synchronize_all_waits_for_every_side_stream():
    """After it the current stream may touch what any side stream did, and not before."""
    with RecordingStreams() as streams:
        manager, tensors = StreamManager(2, streams), []
        for i in range(2):
            with streams.on(manager.get_stream(i, CPU)):
                tensors.append(torch.zeros(2))
        manager.synchronize_all()
        for tensor in tensors:
            tensor.add_(1)
    assert races(streams.schedule) == []
    assert len(streams.waits()) == 2
    for wait in streams.waits():
        assert races(without(streams.schedule, wait))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_copied_manager_starts_afresh(copied):
    """Streams cannot be copied: the copy has as many, made anew, and counts from zero."""
    manager = StreamManager(3)
    manager.get_stream(1, CPU)
    twin = copied(manager)
    assert twin.get_stats() == StreamManager(3).get_stats()
    twin.get_stream(0, CPU)
    assert manager.stream_usage == [1, 0, 0]


# ---- gradients


def test_a_future_is_done_when_a_backward_came():
    """Not before it, nor in a backward elsewhere; once waited for, it is open again."""
    y, future = AsyncConv2dKernel.apply_async(*conv_inputs())
    torch.ones(1, requires_grad=True).backward()
    assert not future.done()
    y.sum().backward()
    assert future.done()
    future.result()
    assert not future.done()


def test_a_backward_that_fails_produces_nothing():
    """A future whose backward broke off is not done: some of its gradients never came."""
    given = conv_inputs()
    y, future = AsyncConv2dKernel.apply_async(*given)

    def fail(gradient):
        raise MemoryError

    given[0].register_hook(fail)
    with pytest.raises(MemoryError):
        y.sum().backward()
    assert not future.done()


def test_asking_for_what_may_never_come_is_an_error():
    """Without a backward `result` raises at once, with the cure, and does not wait."""
    with torch.no_grad():
        _, future = AsyncConv2dKernel.apply_async(*conv_inputs())
    with pytest.raises(GradientSyncError, match=r"after backward\(\)"):
        future.result()


def test_a_device_that_refuses_is_an_error_of_the_gradients():
    """What the device says against a wait arrives as GradientSyncError, with its cause."""

    class Refusing(RecordingStreams):
        def wait(self, stream, event, by="layer"):
            if self.refuses:
                raise RuntimeError("device lost")

        refuses = False

    streams = Refusing()
    y, future = AsyncConv2dKernel.apply_async(*conv_inputs(), streams=streams)
    y.sum().backward()
    streams.refuses = True
    with pytest.raises(GradientSyncError, match="device lost") as caught:
        future.result()
    assert isinstance(caught.value.__cause__, RuntimeError)


def test_only_gradients_that_were_produced_are_waited_for():
    """Evaluations and forwards without a backward cost no wait; they are counted."""
    with RecordingStreams() as streams:
        with torch.no_grad():
            evaluated = AsyncConv2dKernel.apply_async(*conv_inputs(), streams=streams)[1]
        waiting = AsyncConv2dKernel.apply_async(*conv_inputs(), streams=streams)[1]
        y, produced = AsyncConv2dKernel.apply_async(*conv_inputs(), streams=streams)
        y.sum().backward()
        num_before, synchronizer = len(streams.waits()), GradientSynchronizer()
        synchronizer.synchronize_pending([evaluated, waiting, produced])
        synchronizer.synchronize_pending([evaluated])
    assert len(streams.waits()) == num_before + 1
    assert synchronizer.get_stats()["sync_count"] == 1
    assert synchronizer.get_stats()["num_not_produced"] == 3


def test_synchronization_times_are_in_milliseconds():
    """Total and average are of the calls that waited for something."""
    ticks = iter([1.0, 1.5, 7.0, 7.25])
    synchronizer = GradientSynchronizer(clock=lambda: next(ticks))
    for _ in range(2):
        y, future = AsyncConv2dKernel.apply_async(*conv_inputs())
        y.sum().backward()
        synchronizer.synchronize_pending([future])
        synchronizer.synchronize_pending([])
    assert synchronizer.get_stats() == {
        "sync_count": 2,
        "total_sync_time_ms": 750.0,
        "avg_sync_time_ms": 375.0,
        "num_not_produced": 0,
    }


def test_gradients_can_be_read_beside_the_stream_of_the_backward():
    """A backward called on another stream is waited for, and without that wait there is a race."""
    given = [t.float().detach().requires_grad_() for t in conv_inputs()]
    with RecordingStreams() as streams:
        y, future = AsyncConv2dKernel.apply_async(*given, streams=streams)
        loss, aside = y.square().sum(), streams.side(CPU)
        with streams.on(aside):
            streams.backward(loss)
        GradientSynchronizer().synchronize_pending([future])
        with torch.no_grad():
            for t in given:
                t.sub_(t.grad)
    assert races(streams.schedule) == []
    assert races(without(streams.schedule, streams.waits(by=("layer",))[-1]))


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_recomputed_convolution_reports_its_backward_once_it_came(reentrant):
    """Under gradient checkpointing a future of the recomputation, or of the first pass, is done."""
    futures = []

    def convolve(*given):
        y, future = AsyncConv2dKernel.apply_async(*given)
        futures.append(future)
        return y

    checkpoint(convolve, *conv_inputs(), use_reentrant=reentrant).sum().backward()
    assert [future.done() for future in futures].count(True) == 1
